"""The commands of docs/tpu.md: every flag of ours in them is one."""

import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

# Runs programs as far as their flags: those of absl with their types and the config's fields. Each
# in a fork of one process, which has imported what takes long.
PARSE = """
import json, os, runpy, sys
import mmgem_jax.train
from mmgem_jax import command_line
from mmgem_jax.evaluation import evaluate_run

command_line.run = lambda main, choices=(): command_line.parse_flags(sys.argv)

def parse(program, *arguments):
    sys.argv = [program, *arguments]
    if program == "mmgem_jax.train":
        runpy.run_path("mmgem_jax/train.py", run_name="__main__")
    elif program == "tools/evaluate.py":
        runpy.run_path(program)["parse_arguments"]()
    else:
        runpy.run_path(program, run_name="__main__")

for command in json.load(sys.stdin):
    if os.fork() == 0:
        parse(*command)
        sys.exit(0)
    print(os.waitstatus_to_exitcode(os.wait()[1]))
"""


def commands(text):
    """Our commands in a document, each a program and its arguments."""
    blocks = re.findall(r"```(?:bash|yaml)\n(.*?)```", text, re.DOTALL)
    found = []
    for block in blocks:
        # YAML folds the lines of an argument as a backslash does those of a shell's.
        joined = re.sub(r"\n +(?=--)", " ", block.replace("\\\n", " "))
        ours = r"python (?:-m (mmgem_jax\.\w+)|(tools/\w+\.py))([^\n'>&]*)"
        for module, tool, arguments in re.findall(ours, joined):
            found.append((module or tool, *shlex.split(arguments)))
    return found


COMMANDS = commands((ROOT / "docs" / "tpu.md").read_text())


def statuses(commands):
    """The exit status of each command after its flags are read, and what all printed of them."""
    call = [sys.executable, "-c", PARSE]
    text = json.dumps(commands)
    done = subprocess.run(call, cwd=ROOT, input=text, capture_output=True, text=True)
    return [int(line) for line in done.stdout.splitlines()], done.stderr


def test_the_commands_are_found():
    programs = [program for program, *_ in COMMANDS]
    assert programs.count("mmgem_jax.train") == 5
    assert {"tools/evaluate.py", "tools/preflight.py"} <= set(programs)
    assert any("--coordinator" in command for command in COMMANDS)
    assert sum("--config.mesh.slice=2" in command for command in COMMANDS) == 2


WRONG = ("--config.mesh.slices=2", "--coordinater=HOST:1", "--config.batch_size=many")


def test_the_meshes_divide_the_batches_on_the_chips_of_the_document():
    """256 chips a slice."""
    for program, *arguments in COMMANDS:
        path = next((a for a in arguments if a.endswith(".py")), "")
        if program != "mmgem_jax.train" or not path.startswith("configs/vitl"):
            continue
        config = importlib.import_module(Path(path).stem).get_config()
        given = [a.removeprefix("--config.").split("=") for a in arguments if "--config." in a]
        numbers = {name: int(value) for name, value in given if value.isdecimal()}
        config.update_from_flattened_dict(numbers)
        mesh = config.mesh
        shards = 256 * mesh.slice // mesh.tensor
        assert shards % (mesh.slice * mesh.fsdp) == 0
        assert config.batch_size % shards == config.eval.batch_size % shards == 0, arguments


def test_every_flag_of_ours_is_one_and_others_are_seen():
    train = next(command for command in COMMANDS if command[0] == "mmgem_jax.train")
    wrong = tuple((*train, flag) for flag in WRONG)
    found, errors = statuses((*COMMANDS, *wrong))
    assert found == [0] * len(COMMANDS) + [2] * len(wrong), errors
