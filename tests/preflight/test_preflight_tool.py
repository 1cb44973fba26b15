"""tools/preflight.py as a user calls it, on the tiny config."""

import json

import pytest

SMALL = {"batch_size": 16, "mesh.fsdp": 2, "model.vision.depth": 3, "model.decoder.depth": 3}
MEMORY = ("params", "optimizer", "batch", "temporaries")


@pytest.fixture(scope="module")
def trained(preflight, tmp_path_factory):
    """A report on the train step, as text and as JSON, and a saved program."""
    folder = tmp_path_factory.mktemp("preflight")
    files = "--json", folder / "report.json", "--save", folder / "step"
    done = preflight(SMALL, "--topology", "v5e:2x2", *files)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((folder / "report.json").read_text()), folder / "step"


def test_the_report_says_what_was_compiled_and_that_it_fits(trained):
    _, report, _ = trained
    assert (report["chips"], report["device_kind"]) == (4, "TPU v5 lite")
    assert report["mesh"] == {"slice": 1, "data": 2, "fsdp": 2, "tensor": 1}
    (step,) = report["programs"]
    assert report["fits"] and step["fits"] and step["problems"] == []
    assert (step["batch"], step["batch_per_chip"]) == (16, 4)


def test_memory_adds_up(trained):
    memory = trained[1]["programs"][0]["memory"]
    assert sum(memory[name] for name in MEMORY) == memory["peak"] < memory["capacity"]
    assert memory["exceeds_by"] == 0
    # Adam's two moments are as large as the parameters, with a counter or two.
    assert memory["optimizer"] == pytest.approx(2 * memory["params"], rel=0.01)
    assert memory["batch"] >= 4 * 16 * 16 * 3


def test_time_adds_up(trained):
    step = trained[1]["programs"][0]
    found = step["prediction"]
    assert sum(row["seconds"] for row in step["time"]) == pytest.approx(found["compute_seconds"])
    exposed = sum(row["exposed_seconds"] for row in step["collectives"])
    assert exposed == pytest.approx(found["exposed_collective_seconds"])
    assert found["seconds"] == pytest.approx(found["compute_seconds"] + exposed)
    assert found["images_per_second"] == pytest.approx(16 / found["seconds"])
    assert found["mfu"] == pytest.approx(step["flops"]["total"] / 4 / 197e12 / found["seconds"])
    assert found["loops_of_unknown_trips"] == 0
    parts = {(row["part"], row["phase"]) for row in step["time"]}
    assert {
        (part, way) for part in ("vision", "decoder") for way in ("forward", "backward")
    } <= parts
    assert len(step["costliest"]) == 10
    assert {row["axes"] for row in step["collectives"]} <= {"fsdp", "data", "data+fsdp"}


def test_the_text_says_what_the_json_does(trained):
    text, report, _ = trained
    step = report["programs"][0]
    for words in (
        *("v5e:2x2: 4 x TPU v5 lite", "data=2 fsdp=2", "16 images, 4 a chip", ": fits ("),
        *(f"MFU {step['prediction']['mfu']:.3f}", "vision, backward", "calibration"),
        *("Predicted, not measured", step["costliest"][0]["instruction"]),
    ):
        assert words in text
    assert "PROBLEM" not in text


def test_the_saved_program_is_there_with_its_fingerprint(trained):
    from mmgem_jax.errors import UserError
    from mmgem_jax.saved_program import load_program

    with pytest.raises(UserError, match=r"step: batch\.boxes is float32\[16, 1, 4\] there"):
        load_program(trained[2], {}, None)


@pytest.mark.parametrize(
    ("what", "names"),
    [
        ("eval", ["feature map", "embeddings and visual tokens", "text embeddings"]),
        ("decode", ["captions"]),
    ],
)
def test_evaluation_and_decoding_are_compiled_too(preflight, tmp_path, what, names):
    report = tmp_path / "report.json"
    changes = SMALL | {"eval.batch_size": 8}
    done = preflight(changes, "--topology", "v5e:2x2", "--what", what, "--json", report)
    assert done.returncode == 0, done.stderr
    programs = json.loads(report.read_text())["programs"]
    assert [program["name"] for program in programs] == names
    assert all(program["prediction"]["seconds"] > 0 for program in programs)


def test_what_does_not_fit_is_a_result_and_fix_finds_what_does(preflight, tmp_path):
    """400 layers of 3.3 million parameters, and Adam's moments of them, are 15 GiB a chip."""
    report = tmp_path / "rows.json"
    changes = {"model.vision.remat": "full", "model.decoder.remat": "full", "batch_size": 16}
    changes |= {"model.decoder.width": 512, "model.decoder.mlp": 2_048, "model.decoder.depth": 400}
    done = preflight(changes, "--topology", "v5e:2x2", "--fix", "--json", report)
    assert done.returncode == 0, done.stderr
    first, last = json.loads(report.read_text())
    assert not first["fits"] and first["exceeds_by"] > 0 and first["changes"] == {}
    memory = first["report"]["programs"][0]["memory"]
    assert memory["peak"] == memory["capacity"] + memory["exceeds_by"]
    assert memory["params"] + memory["optimizer"] > 0.9 * memory["capacity"]
    assert last["fits"] and last["changes"] == {"mesh.data": 2, "mesh.fsdp": 2}
    assert "fits with --config.mesh.data=2 --config.mesh.fsdp=2" in done.stdout


def test_a_sweep_is_a_table_and_a_picture_best_first(preflight, tmp_path):
    report, picture = tmp_path / "rows.json", tmp_path / "sweep.png"
    sweep = "mesh.data+mesh.fsdp=2 batch_size=8,16"
    files = "--json", report, "--plot", picture
    done = preflight(SMALL, "--topology", "v5e:2x2", "--sweep", sweep, *files)
    assert done.returncode == 0, done.stderr
    rows = json.loads(report.read_text())
    assert [set(row["changes"]) for row in rows] == [{"mesh.data", "mesh.fsdp", "batch_size"}] * 2
    speeds = [row["images_per_second"] for row in rows]
    assert speeds == sorted(speeds, reverse=True)
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--topology", "v5e:3x3"), "--topology: 'v5e:3x3'; expected KIND:SHAPE"),
        (("--topology", "v5p:16x16"), "--topology: 'v5p:16x16'; expected KIND:SHAPE"),
        (("--topology", "list"), "--topology: 'list'; expected KIND:SHAPE"),
        (("--topology", "v5p:2x3x4"), "--topology: 'v5p:2x3x4' ("),
        (("--topology", "v5e:4x8"), "batch_size: 16 is not a multiple of the 32"),
        (("--topology", "v5e:2x2", "--sweep", "batch=1"), "--sweep: no field 'batch'"),
    ],
)
def test_a_mistake_is_one_line(preflight, flags, message):
    done = preflight({"batch_size": 16}, *flags)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: {message}")
    assert "Traceback" not in done.stderr
