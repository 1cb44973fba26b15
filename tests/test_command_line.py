"""Mistakes on a command line: one line, the field in it, exit status 2."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from mmgem_jax import command_line

ROOT = Path(__file__).parents[1]

PROGRAM = """
from mmgem_jax import command_line
from mmgem_jax.errors import UserError

CONFIG = command_line.define_config()

def main():
    if CONFIG.value.steps == 13:
        raise UserError("steps: 13 is\\n  unlucky; expected another")
    if CONFIG.value.steps == 14:
        raise ValueError("a mistake in the program")
    print(CONFIG.value.steps, CONFIG.value.splits, CONFIG.value.group.width)

command_line.run(main)
"""
BESIDE = "from ml_collections import ConfigDict\n"
CONFIG = """
from beside import ConfigDict

def get_config():
    config = ConfigDict(dict(steps=10, splits=("a",), group=dict(width=1.5)))
    return config
"""


def execute(command, cwd, **environment):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **environment}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
    )


def assert_one_line(done, *parts):
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1 and done.stderr.endswith("\n")
    for part in parts:
        assert part in done.stderr


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "beside.py").write_text(BESIDE)
    (tmp_path / "configs" / "good.py").write_text(CONFIG)
    return tmp_path


# ---- flags, through a small program --------------------------------------------------------------


def program(folder, *arguments, config="configs/good.py"):
    given = ["--config", config] if config else []
    return execute(["program.py", *given, *arguments], folder)


def test_a_config_file_imports_those_beside_it_and_fields_are_overridden(folder):
    arguments = "--config.steps=7 --config.splits=b --config.splits=c --config.group.width=2"
    done = program(folder, *arguments.split())
    assert (done.returncode, done.stdout) == (0, "7 ('b', 'c') 2.0\n"), done.stderr


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--config.steps=many"], ["--config.steps=many", "int", "'many'"]),
        (["--config.stps=3"], ["--config.stps: no field 'stps'; expected one of: ", "steps"]),
        (["--confg.steps=3"], ["confg.steps"]),
        (["train"], ["train", "flags only"]),
        (["--config.steps=13"], ["error: steps: 13 is unlucky; expected another\n"]),
    ],
)
def test_a_mistake_in_the_flags_is_one_line(folder, arguments, parts):
    assert_one_line(program(folder, *arguments), *parts)


def test_no_config_and_no_such_config(folder):
    assert_one_line(program(folder, config=None), "--config")
    assert_one_line(program(folder, config="configs/bad.py"), "--config: no file 'configs/bad.py'")


def test_a_mistake_in_the_program_is_not_the_users(folder):
    done = program(folder, "--config.steps=14")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ValueError: a mistake in the program" in done.stderr


# ---- the same, without a process -----------------------------------------------------------------


def fails(capsys, function, *arguments):
    with pytest.raises(SystemExit) as ended:
        function(*arguments)
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err.removeprefix("error: ").strip()


FIELDS = ConfigDict({"steps": 3, "model": {"vision": {"width": 8, "depth": 2}, "grid": 1}})


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.stps=3", "--config.stps: no field 'stps'; expected one of: model, steps"),
        (
            "--config.model.vison.width=3",
            "--config.model.vison.width: no field 'vison'; expected one of: grid, vision",
        ),
        (
            "-config.model.vision.widht",
            "--config.model.vision.widht: no field 'widht'; expected one of: depth, width",
        ),
        ("--config.steps.x=3", "--config.steps.x: no field 'x'; expected one of: none"),
        ("--noconfig.model.x", "--config.model.x: no field 'x'; expected one of: grid, vision"),
    ],
)
def test_an_unknown_field_is_named_with_those_there_are(capsys, argument, message):
    known = ["--config.steps=4", "--config.model.vision.depth=2", "--workdir=config.x"]
    command_line.check_overrides(FIELDS, known)
    assert fails(capsys, command_line.check_overrides, FIELDS, [*known, argument]) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(:\n", "line 1: SyntaxError"),
        ("import no_such_module\n", "line 1: ModuleNotFoundError: No module named"),
        ("\ndef get_config():\n    raise ValueError('a\\nb')\n", "line 3: ValueError: a b"),
        ("\ndef get_config():\n    return open('nowhere')\n", "line 3: FileNotFoundError"),
        ("config = 3\n", "KeyError: 'get_config'"),
        ("def get_config():\n    return {}\n", "get_config() gives a dict; expected ConfigDict"),
    ],
)
def test_whatever_is_wrong_in_a_config_file_is_one_line_with_its_place(
    tmp_path, capsys, text, message
):
    path = tmp_path / "config.py"
    path.write_text(text)
    line = fails(capsys, command_line.load_config_file, str(path))
    assert line.startswith(f"--config: {path}")
    assert message in line


def test_a_field_that_the_defaults_lack_is_a_mistake_in_a_config_file(tmp_path, capsys):
    path = tmp_path / "config.py"
    path.write_text(
        "import base\n\ndef get_config():\n    config = base.get_config()\n"
        "    config.model.vision.widht = 3\n    return config\n"
    )
    line = fails(capsys, command_line.load_config_file, str(path))
    assert "line 5" in line and "widht" in line


# ---- the real thing ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def main_job(tmp_path_factory, quick_compilation):
    """A folder where the README's main job has run, with the fixture instead of npm's drawings."""
    folder = tmp_path_factory.mktemp("main-job")
    packages = ROOT / "tests" / "fixture" / "emoji"
    build = [ROOT / "tools" / "build_emoji.py", "--data_dir", "data", "--config", "fixture"]
    built = execute([*build, "--packages", packages], folder)
    assert (built.returncode, built.stderr) == (0, "")
    done = train(folder, XLA_FLAGS=quick_compilation)
    assert done.returncode == 0, done.stderr
    return folder, done


def train(folder, *arguments, workdir="run", **environment):
    config = ROOT / "configs" / "emoji_fixture.py"
    command = ["-m", "mmgem_jax.train", "--config", config, "--workdir", workdir, *arguments]
    return execute(command, folder, **environment)


def test_the_main_job_runs_and_says_what_it_did(main_job):
    folder, done = main_job
    assert done.stderr == ""
    assert "87,585: decoder" in done.stdout
    assert "step 10/10: loss " in done.stdout
    results = json.loads((folder / "run" / "results.json").read_text())
    table = done.stdout[done.stdout.index("i>t R@1") :].split()
    for split, found in results["splits"].items():
        assert split in table
        assert f"{found['metrics']['retrieval/image_to_text_r1']:.3f}" in table
    assert (folder / "run" / "samples.png").stat().st_size > 1000
    assert (folder / ".jax_cache").is_dir()


def test_a_run_is_evaluated_from_its_folder(main_job, quick_compilation):
    folder, _ = main_job
    command = [ROOT / "tools" / "evaluate.py", "--checkpoint", "run", "--out", "result.json"]
    command += ["--task", "retrieval,caption", "--dataset", "emoji/fixture", "--data", "data"]
    done = execute([*command, "--split", "unseen"], folder, XLA_FLAGS=quick_compilation)
    assert (done.returncode, done.stderr) == (0, "")
    trained = json.loads((folder / "run" / "results.json").read_text())["splits"]["unseen"]
    found = json.loads((folder / "result.json").read_text())
    assert found["annotations"] == trained["annotations"]
    for name in ("retrieval/text_to_image_r1", "caption/token_f1"):
        assert found["metrics"][name] == pytest.approx(trained["metrics"][name])
        assert name in done.stdout
    assert len(json.loads((folder / "result.captions.json").read_text())) == found["images"] == 6


def test_the_folder_of_another_run_is_refused(main_job):
    folder, _ = main_job
    done = train(folder, "--config.batch_size=8")
    assert_one_line(done, "workdir run holds another config's run", "batch_size is 16 there and 8")


def test_missing_data_are_named(main_job, tmp_path):
    folder, _ = main_job
    done = train(folder, "--config.data.name=emoji/things", workdir=tmp_path / "run")
    assert_one_line(done, "data.name: no data set 'emoji/things' in data.dir 'data'")
    assert not (tmp_path / "run").exists()
