"""tools/compare_stages.py on two steps of a small run, and data sets that are made here."""

import functools
import json

import pytest
import tiny_dataset

from mmgem_jax import trained_run
from mmgem_jax.evaluation import caption_scores, datasets


@pytest.fixture
def compare(call_tool, trained, emoji_config, monkeypatch):
    """`compare(*arguments)` calls the tool on the steps 2 and 3 of a run."""
    open_dataset = datasets.open_dataset
    scenes = tiny_dataset.dataset(captions=1, regions=tiny_dataset.regions())
    pairs = {"image_keys": ["1a", "1b", "2a", "2b"], "long_text": True}
    pairs["texts"] = [f"{'a long walk ' * 9}{letter}" for letter in "abcd"]
    long = tiny_dataset.dataset(count=4, captions=1, **pairs)

    def opened(name, data, split):
        made = {"test": scenes, "long": long}
        return made[split] if name == "made" else open_dataset(name, data, split=split)

    monkeypatch.setattr(datasets, "open_dataset", opened)
    monkeypatch.setattr(caption_scores, "installed", lambda: False)
    names = "--scenes", "made", "--drawings", "emoji/fixture", "--data", emoji_config().data.dir
    checkpoints = "--before", trained[0] / "checkpoints" / "2", "--after", trained[0]
    return functools.partial(call_tool, "compare_stages.py", *checkpoints, *names)


def test_one_table_of_all_that_regions_gave_and_cost(compare, trained, tmp_path):
    status, out, err = compare("--json", tmp_path / "a.json", "--text_length", "96")
    assert (status, err) == (0, "")
    result = json.loads((tmp_path / "a.json").read_text())
    assert out.endswith(f"\n\n{result['table']}\n")
    head, rule, *rows = result["table"].splitlines()
    columns = [cell.strip() for cell in head.split("|")[1:-1]]
    assert columns == ["", "chance", "before, 32 px", "after, 32 px"]
    assert all(line.count("|") == 5 for line in (head, rule, *rows))  # nothing was cut
    titles = [row.split("|")[1].strip() for row in rows]
    assert len(set(titles)) == len(titles) == 18  # without CIDEr and METEOR

    # The numbers are those of the end of the training, where it saw the same.
    after = result["results"]["after, 32 px"]
    at_end = trained[1]["splits"]["test"]["metrics"]["caption/exact_match"]
    assert after["drawings"]["metrics"]["caption/exact_match"] == at_end
    cells = {title: row.split("|")[2:-1] for title, row in zip(titles, rows, strict=True)}
    pointing = after["scenes"]["metrics"]["pointing/accuracy"]
    assert cells["regions: pointing"][2].strip() == f"{pointing:.3f}"
    assert cells["long: own scene, not its sibling"][0].strip() == "0.500"
    assert cells["regions: class"][0].strip() == f"{1 / 3:.3f}"
    steps = [of_run["long"]["checkpoint"]["step"] for of_run in result["results"].values()]
    assert steps == [2, 3]
    assert {r["text_length"] for of_run in result["results"].values() for r in of_run.values()} == {
        96
    }


def test_what_was_cut_is_said_below(compare):
    status, out, _ = compare()
    assert status == 0
    assert "after, 32 px: 100.0% of the texts of `long` were cut to " in out


def test_another_size_is_a_column_of_its_own(compare, monkeypatch):
    load, sizes = trained_run.load, []

    def at_its_own(folder, changes):
        sizes.append(changes["model.vision.image_size"])
        return load(folder, {k: v for k, v in changes.items() if "image_size" not in k})

    monkeypatch.setattr(trained_run, "load", at_its_own)
    status, out, err = compare("--image_size", "64")
    assert (status, err) == (0, "") and sizes == [32, 64, 64]
    assert "| | chance | before, 32 px | before, 64 px | after, 64 px |\n" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--before", "/nowhere"], "checkpoint /nowhere: no config.json"),
        (["--scenes", "emoji/fixture"], "task region_caption: data set emoji/fixture has no reg"),
        (["--drawings", "emojis"], "dataset: found 'emojis', expected one of coco,"),
        (["--json", "/nowhere/a.json"], "/nowhere/a.json: No such file or directory"),
        (["--mesh", "rows=2"], "--mesh: found 'rows=2'"),
        (["--image_size", "0"], "--image_size: found 0, expected 1 or more"),
    ],
)
def test_a_mistake_is_one_line(compare, arguments, message):
    status, out, err = compare(*arguments)
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert message in err and "|" not in out
