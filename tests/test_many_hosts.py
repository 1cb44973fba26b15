"""Several processes train and evaluate as one does; and where one fails, all end."""

import json
import shutil
import socket

import many_hosts
import numpy as np
import pytest
from stopped_runs import lines_of

from mmgem_jax import processes, run, run_folder, train
from mmgem_jax.errors import UserError

ROOT = many_hosts.ROOT
STEPS = 20
# Adam divides a gradient that is 0 but for rounding by its size: epsilon above the rounding.
CHANGES = {
    "steps": STEPS,
    "mesh.fsdp": 2,
    "model.vision.depth": 1,
    "model.vision.unroll": 1,
    "model.decoder.depth": 1,
    "model.decoder.unroll": 1,
    "log.every": 1,
    "log.conflict_every": 0,
    "checkpoint.every": STEPS // 2,
    "eval.every": 0,
    "eval.final_splits": ["test"],  # 34 images in batches of 16
    "eval.pixel_floor": False,
    "optimizer.adam_epsilon": 1e-3,
}
for group in ("decoder", "vision", "rest"):
    CHANGES[f"optimizer.groups.{group}.algorithm"] = "adamw"
    CHANGES[f"optimizer.groups.{group}.learning_rate"] = 3e-3
NO_RESULTS = {"eval.final_splits": [], "eval.sample_split": ""}
FROM_ONE = NO_RESULTS | {"steps": 2, "optimizer.warmup_steps": 1, "log.conflict_every": 1}
ASKED = "--task zero_shot,retrieval,caption --rerank 3 --dataset emoji/fixture --split test"


def in_one(emoji_config, workdir, changes):
    """Trains in this process, on its 8 devices."""
    changes = {k: tuple(v) if isinstance(v, list) else v for k, v in changes.items()}
    train.train(emoji_config(changes), workdir)
    return workdir


def at_half(workdir, copy):
    """A copy of a run's folder as it was when half of its steps were taken."""
    shutil.copytree(workdir, copy)
    shutil.rmtree(copy / "checkpoints" / str(STEPS))
    return copy


@pytest.fixture(scope="module")
def one(emoji_config, tmp_path_factory):
    """The folder of a run by one process with 8 devices."""
    return in_one(emoji_config, tmp_path_factory.mktemp("one") / "run", CHANGES)


@pytest.fixture(scope="module")
def four(emoji_config, tmp_path_factory, quick_compilation):
    """The same by 4 processes with 2 devices each, by the command line; and what they said."""
    folder = tmp_path_factory.mktemp("four")
    changes = CHANGES | {"data.dir": emoji_config().data.dir, "compile_cache": ""}
    command = ["-m", "mmgem_jax.train", "--config", ROOT / "configs" / "emoji_fixture.py"]
    command += ["--workdir", "run"]
    for name, value in changes.items():
        command += [f"--config.{name}={v}" for v in (value if isinstance(value, list) else [value])]
    done, _ = many_hosts.run_processes([command] * 4, 2, folder, quick_compilation)
    assert [process.returncode for process in done] == [0] * 4, done
    return folder / "run", done


@pytest.fixture(scope="module")
def two(emoji_config, one, trained, tmp_path_factory, quick_compilation):
    """What 2 processes with 4 devices each do, one run after the other; see below."""
    folder = tmp_path_factory.mktemp("two")
    own = {"data.dir": emoji_config().data.dir, "compile_cache": ""}
    at_half(one, folder / "half")
    jobs = {
        "train": {
            "whole": CHANGES | own,
            "half": CHANGES | own | NO_RESULTS,
            "from": CHANGES | own | FROM_ONE | {"init_from": str(one)},
        },
        "evaluate": f"--checkpoint {trained[0]} --data {own['data.dir']} --out result.json {ASKED}",
    }
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [ROOT / "tests" / "one_of_two.py", "jobs.json", "."]
    done, _ = many_hosts.run_processes([command] * 2, 4, folder, quick_compilation)
    assert [process.returncode for process in done] == [0] * 2, done
    return folder, done


def training_of(workdir):
    return [line for line in lines_of(workdir) if "train/loss" in line]


def assert_same_curve(found, expected):
    """Of the same steps, the losses and the gradients' norm."""
    found, expected = training_of(found), training_of(expected)
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    assert len({line["train/loss"] for line in expected}) == len(expected)
    for name in ("loss", "loss_emb", "loss_gen", "grad_norm", "param_norm"):
        values = ([line[f"train/{name}"] for line in lines] for lines in (found, expected))
        np.testing.assert_allclose(*values, rtol=1e-5, err_msg=name)


def assert_same_results(found, expected):
    found, expected = (json.loads((w / "results.json").read_text()) for w in (found, expected))
    for results in (found, expected):
        del results["checkpoint"]["parameters"], results["config"]["data"]["dir"]
    assert found["splits"]["test"]["metrics"] == expected["splits"]["test"]["metrics"]
    assert found == expected


# ---- as one process ------------------------------------------------------------------------------


def test_four_processes_train_and_score_as_one_does(one, four):
    assert [line["step"] for line in training_of(one)] == list(range(1, STEPS + 1))
    assert_same_curve(four[0], one)
    assert_same_results(four[0], one)


def test_two_processes_train_and_score_as_one_does(one, two):
    assert_same_curve(two[0] / "whole", one)
    assert_same_results(two[0] / "whole", one)


def test_one_process_goes_on_where_four_stopped(emoji_config, one, four, tmp_path):
    in_one(emoji_config, at_half(four[0], tmp_path / "half"), CHANGES)
    assert_same_curve(tmp_path / "half", one)
    assert_same_results(tmp_path / "half", one)


def test_two_processes_go_on_where_one_stopped(one, two):
    assert_same_curve(two[0] / "half", one)


def test_two_processes_start_from_another_run_and_probe_its_objectives(
    emoji_config, one, two, tmp_path
):
    in_one(emoji_config, tmp_path / "from", CHANGES | FROM_ONE | {"init_from": str(one)})
    assert_same_curve(two[0] / "from", tmp_path / "from")
    for found, expected in zip(
        *map(training_of, (two[0] / "from", tmp_path / "from")), strict=True
    ):
        for name in ("emb", "gen"):
            key = f"train/decoder_grad_norm_{name}"
            assert found[key] == pytest.approx(expected[key], rel=1e-5)


def test_two_processes_evaluate_a_run_as_one_does(emoji_config, trained, two, call_tool, tmp_path):
    data = emoji_config().data.dir
    out = tmp_path / "result.json"
    asked = ["--checkpoint", trained[0], "--data", data, "--out", out, *ASKED.split()]
    status, printed, _ = call_tool("evaluate.py", *asked)
    assert status == 0
    for name in ("result.json", "result.captions.json"):
        found, expected = (json.loads((f / name).read_text()) for f in (two[0], tmp_path))
        assert found == expected
    assert len({row["caption"] for row in expected}) > 10
    assert printed.splitlines()[-1] in two[1][0].stdout


def test_each_process_opens_the_images_of_its_rows_once(two):
    """But the first 3 in order of similarity are read again, for their log P."""
    opened = [json.loads((two[0] / f"opened.{process}").read_text()) for process in range(2)]
    rows = [[i for i in range(34) if i % 16 // 8 == process] for process in range(2)]
    assert opened == [sorted(2 * own) for own in rows]


# ---- who writes ----------------------------------------------------------------------------------


def test_the_first_process_writes_and_prints_alone(one, four, two):
    for workdir in (four[0], two[0] / "whole"):
        assert {path.name for path in workdir.iterdir()} == {path.name for path in one.iterdir()}
        assert [line["step"] for line in training_of(workdir)] == list(range(1, STEPS + 1))
        assert len(list((workdir / "tensorboard").iterdir())) == 1
    first, *others = four[1]
    assert "4 process(es)" in first.stdout and f"step {STEPS}/{STEPS}: loss" in first.stdout
    assert first.stdout.count("i>t R@1") == 1
    said = [(process.stdout, process.stderr) for process in others]
    assert said == [("", "")] * 3


# ---- where one fails, all end --------------------------------------------------------------------

PROGRAM = """
import argparse
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils
from mmgem_jax import processes
from mmgem_jax.errors import UserError

parser = argparse.ArgumentParser()
processes.add_arguments(parser)
args = parser.parse_args()
with processes.joined(args.coordinator, args.process_id, args.process_count):
    who, of_first = processes.on_first(lambda: [args.process_id, 0.1])
    assert (who, of_first) == (0, 0.1)
    for turn in range(3):
        found = processes.gathered([args.process_id, turn])
        assert found == [[process, turn] for process in range(args.process_count)], found
    if args.process_id == 0:  # of what was gathered before, nothing is left
        kept = distributed.global_state.client.key_value_dir_get("mmgem_jax/gathered")
        assert len(kept) == args.process_count, kept
    print("joined")
    {act}
    multihost_utils.process_allgather(np.ones(2))
"""


def run_program(folder, act, count=3):
    """Runs PROGRAM, whose processes do `act` before they wait for each other."""
    (folder / "program.py").write_text(PROGRAM.format(act=act))
    return many_hosts.run_processes([["program.py"]] * count, 1, folder)


def test_a_mistake_that_one_process_alone_finds_ends_all(tmp_path):
    act = "if args.process_id == 1: raise UserError('data: a\\n broken file')"
    done, seconds = run_program(tmp_path, act)
    assert [process.returncode for process in done] == [1, 2, 1]
    told = "error: process 1 of 3 failed: data: a broken file\n"
    assert [process.stderr for process in done] == [told, "error: data: a broken file\n", told]
    assert [process.stdout for process in done] == ["joined\n", "", ""]
    assert seconds < 60  # JAX alone waits for 300


def test_a_mistake_that_the_first_process_finds_for_all_is_everyone_s(tmp_path):
    act = """
    def check():
        raise UserError(f'--out: process {args.process_id} cannot write')
    processes.on_first(check)
"""
    done, seconds = run_program(tmp_path, act, count=2)
    assert [process.returncode for process in done] == [2, 2]
    assert {process.stderr for process in done} == {"error: --out: process 0 cannot write\n"}
    assert seconds < 60


def test_processes_with_other_configs_are_refused(emoji_config, tmp_path, monkeypatch):
    """In the second of two, which hears of the first's config."""
    tokenizer = run.load_run_tokenizer(emoji_config())
    config = run.complete(emoji_config({"seed": 1}), tokenizer)
    first = emoji_config().to_dict()
    monkeypatch.setattr(processes, "on_first", lambda function: first)
    with pytest.raises(UserError, match=r"^config: not the same in process 0 as in the fi"):
        run_folder.claim_workdir(tmp_path, config, tokenizer)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_shared_is_refused(tmp_path):
    """What the first has written is not there, or is another run's."""
    message = "workdir .*: process 0 finds no config.json of this run there; expected a folder that"
    with pytest.raises(UserError, match=message):
        run_folder.check_shared(tmp_path, {"seed": 0}, seconds=0)
    (tmp_path / "config.json").write_text('{"seed": 1}')
    with pytest.raises(UserError, match=message):
        run_folder.check_shared(tmp_path, {"seed": 0}, seconds=0)
    run_folder.check_shared(tmp_path, {"seed": 1}, seconds=0)


# ---- how they join -------------------------------------------------------------------------------


@pytest.fixture
def initialized(monkeypatch):
    """The arguments of the calls of `jax.distributed.initialize`, which does nothing."""
    calls = []
    monkeypatch.setattr("jax.distributed.initialize", lambda *given: calls.append(given))
    monkeypatch.delenv("TPU_ML_PLATFORM", raising=False)
    return calls


def test_a_process_by_itself_joins_nobody(initialized):
    with processes.joined():
        assert processes.is_first() and processes.on_first(lambda: (1, 2)) == (1, 2)
        processes.check_same("config", {"seed": 0})
    assert initialized == []


def test_a_process_of_a_tpu_vm_joins_the_others_unasked(initialized, monkeypatch):
    monkeypatch.setenv("TPU_ML_PLATFORM", "JAX")
    processes.join(None, None, None)
    assert initialized == []  # the tests' platform is the CPU
    for platforms in ("tpu,cpu", None):
        monkeypatch.setattr(processes, "platforms", lambda value=platforms: value)
        processes.join(None, None, None)
    assert initialized == [(), ()]


def test_flags_say_where_the_others_are(initialized):
    processes.join(f"localhost:{many_hosts.free_port()}", 0, 2)
    processes.join("localhost:1234", 1, 2)
    assert [call[1:] for call in initialized] == [(2, 0), (2, 1)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("localhost:1234", None, 2), r"--process_id: found none; expected --coordinator, --proc"),
        ((None, 0, 2), r"--coordinator: found none; expected "),
        (("localhost:1234", 0, None), r"--process_count: found none; expected "),
        (("localhost", 0, 2), r"--coordinator: found 'localhost'; expected HOST:PORT"),
        (("localhost:http", 0, 2), r"--coordinator: found 'localhost:http'; expected HOST:PORT"),
        (("localhost:65536", 0, 2), r"--coordinator: found 'localhost:65536'; expected HOST:PORT"),
        (("no host:1234", 1, 2), r"--coordinator no host:1234: .*; expected the host of process 0"),
        (("localhost:1234", 2, 2), r"--process_id: found 2; expected 0 to 1"),
        (("localhost:1234", -1, 2), r"--process_id: found -1; expected 0 to 1"),
        (("localhost:1234", 0, 0), r"--process_count: found 0; expected 1 or more"),
    ],
)
def test_flags_that_do_not_fit_are_one_line(initialized, given, message):
    with pytest.raises(UserError, match=f"^{message}") as error:
        processes.join(*given)
    assert "\n" not in str(error.value) and initialized == []


def test_a_port_that_is_taken_is_a_mistake(initialized):
    with socket.create_server(("", 0)) as taken:
        address = f"localhost:{taken.getsockname()[1]}"
        with pytest.raises(UserError, match=f"^--coordinator {address}: .* in use.*; expected the"):
            processes.join(address, 0, 2)
