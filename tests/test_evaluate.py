"""tools/evaluate.py on a small run: what it writes, and every mistake in one line."""

import dataclasses
import functools
import json
from pathlib import Path

import pytest
import tiny_dataset

from mmgem_jax import __version__
from mmgem_jax.data import emoji
from mmgem_jax.data.tokenizer import fingerprint, load_tokenizer
from mmgem_jax.evaluation import caption_scores, datasets
from mmgem_jax.evaluation.results import digest_of, parameters_fingerprint
from mmgem_jax.trained_run import load

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def run(trained, emoji_config):
    """The folder of a run on the fixture's drawings, its results and the folder of its data."""
    return *trained[:2], emoji_config().data.dir


@pytest.fixture
def evaluate(call_tool):
    """`evaluate(*arguments)` calls the tool."""
    return functools.partial(call_tool, "evaluate.py")


@pytest.fixture
def made(tmp_path):
    """A folder of COCO's layout: 3 of the 4 listed images are there, with two captions each."""
    (tmp_path / "coco" / "val2014").mkdir(parents=True)
    entries = []
    for number in range(4):
        captions = [f"a {colour} hat" for colour in tiny_dataset.COLOURS[number : number + 2]]
        sentences = [{"raw": caption} for caption in captions]
        entry = {"split": "test", "filepath": "val2014", "filename": f"{number}.jpg"}
        entries.append(entry | {"cocoid": 100 + number, "sentences": sentences})
        if number != 2:
            path = tmp_path / "coco" / "val2014" / f"{number}.jpg"
            path.write_bytes(tiny_dataset.png(number))
    (tmp_path / "coco" / "dataset_coco.json").write_text(json.dumps({"images": entries}))
    return tmp_path / "coco"


def on_emoji(run, task="zero_shot,retrieval,caption"):
    workdir, _, data = run
    return "--checkpoint", workdir, "--task", task, "--dataset", "emoji/fixture", "--data", data


# ---- results -------------------------------------------------------------------------------------


def test_the_numbers_are_those_of_the_end_of_training(run, evaluate, tmp_path):
    workdir, results, _ = run
    status, out, err = evaluate(*on_emoji(run), "--out", tmp_path / "a.json")
    assert (status, err) == (0, "")
    result = json.loads((tmp_path / "a.json").read_text())
    trained = results["splits"]["test"]
    same = {name: result["metrics"][name] for name in trained["metrics"]}
    assert same == pytest.approx(trained["metrics"], abs=1e-12)
    for name in ("retrieval/image_to_text_r1", "caption/exact_match"):
        assert f"{name:40s}{same[name]:10.4f}" in out
    # The stamp is that of training's results too.
    for name in ("mmgem_jax", "checkpoint", "tokenizer", "preprocessing", "text_length"):
        assert result[name] == results[name]
    for name in ("images", "texts", "classes", "annotations", "prompts", "decoding", "truncated"):
        assert result[name] == trained[name]
    params = load(workdir).params
    assert result["checkpoint"] == {
        "step": 3,
        "averaged": True,
        "parameters": parameters_fingerprint(params),
    }
    assert result["tokenizer"] == fingerprint(load_tokenizer(str(workdir / "tokenizer")))
    assert result["mmgem_jax"] == __version__
    assert result["protocol"].startswith("emoji-fixture-")
    assert (result["images"], result["texts"]) == (34, 34)
    assert result["decoding"]["method"] == "greedy" and result["decoding"]["length"] == 9
    assert list(result)[-1] == "metrics"


def test_captions_are_beside_the_result_in_cocos_format(run, made, evaluate, tmp_path, monkeypatch):
    found = {"cider": 0.5}, {"tokenizer": "ours", "meteor": "not run: no java"}
    monkeypatch.setattr(caption_scores, "installed", lambda: True)
    monkeypatch.setattr(caption_scores, "score_captions", lambda *_, spice: found)
    arguments = ("--checkpoint", run[0], "--task", "caption", "--dataset", "coco", "--data", made)
    options = ("--decoding", "sample", "--temperature", "2", "--length", "5", "--seed", "7")
    out = ("--allow_missing", "--out", tmp_path / "b.json", "--mesh", "data=2,fsdp=4")
    status, printed, err = evaluate(*arguments, *options, *out)
    assert (status, err) == (0, "")
    result = json.loads((tmp_path / "b.json").read_text())
    assert result["missing_images"] == [102]
    assert (result["images"], result["texts"]) == (3, 6)
    assert result["protocol"].startswith("coco-karpathy-test-5k-partial")
    decoding = result["decoding"]
    assert (decoding["method"], decoding["temperature"], decoding["length"]) == ("sample", 2, 5)
    assert (decoding["seed"], decoding["batch_size"]) == (7, 16)
    assert "left out: 1 images" in printed and "images: 1/1 batches" in printed
    assert result["caption_scores"] == found[1] and "meteor not run: no java\n" in printed
    rows = json.loads((tmp_path / "b.captions.json").read_text())
    assert [row["image_id"] for row in rows] == [100, 101, 103]
    assert all(isinstance(row["caption"], str) and len(row) == 2 for row in rows)
    assert result["metrics"] == {"caption/cider": 0.5}


def test_a_step_of_a_run_reranked_and_by_likelihood(run, evaluate, tmp_path):
    workdir, *rest = run
    step = on_emoji((workdir / "checkpoints" / "2", *rest), "zero_shot,retrieval")
    options = ("--rerank", "3", "--likelihood", "--template", "a {c}", "--template", "{c}")
    status, _, err = evaluate(*step, *options, "--split", "unseen", "--out", tmp_path / "c.json")
    assert (status, err) == (0, "")
    result = json.loads((tmp_path / "c.json").read_text())
    assert (result["checkpoint"]["step"], result["rerank"]) == (2, 3)
    assert result["prompts"] == ["a {c}", "{c}"] and result["likelihood_text"] == "{c}"
    kinds = {name.split("/")[0] for name in result["metrics"]}
    assert kinds == {"zero_shot", "zero_shot_likelihood", "retrieval", "retrieval_reranked"}
    assert "decoding" not in result and not (tmp_path / "c.captions.json").exists()


def test_a_long_text_is_not_cut_without_a_word(run, evaluate, tmp_path):
    for folder in ("image", "caption"):
        (tmp_path / "urban" / folder).mkdir(parents=True)
    for number, text in enumerate(["a red hat", "a long walk " * 9]):
        (tmp_path / "urban" / "image" / f"{number}.jpg").write_bytes(tiny_dataset.png(number))
        (tmp_path / "urban" / "caption" / f"{number}.txt").write_text(text)
    arguments = ("--checkpoint", run[0], "--task", "retrieval", "--dataset", "urban1k")
    arguments += ("--data", tmp_path / "urban", "--out", tmp_path / "d.json")
    status, _, err = evaluate(*arguments)
    assert status == 0 and err.count("\n") == 1
    assert err.startswith("warning: --text_length cut 50.00% of the texts of urban1k-line1")
    cut = json.loads((tmp_path / "d.json").read_text())
    assert cut["truncated"] == {"texts": 0.5}
    assert cut["protocol"].endswith(f"-cut-{cut['text_length']}")
    status, _, err = evaluate(*arguments, "--text_length", "96")
    assert (status, err) == (0, "")
    result = json.loads((tmp_path / "d.json").read_text())
    assert (result["truncated"], result["text_length"]) == ({"texts": 0}, 96)
    assert result["protocol"] == cut["protocol"].partition("-cut-")[0]
    arguments = on_emoji(run, "retrieval")  # a set of short texts
    assert "warning: --text_length cut " in evaluate(*arguments, "--text_length", "3")[2]


@pytest.fixture
def with_regions(run, evaluate, monkeypatch):
    """`with_regions(*arguments)` calls the tool on a data set of images and their regions."""
    made = tiny_dataset.dataset(captions=1, regions=tiny_dataset.regions())
    made = dataclasses.replace(made, labels=[], class_names=[])
    monkeypatch.setattr(datasets, "open_dataset", lambda *_, **__: made)
    monkeypatch.setattr(caption_scores, "installed", lambda: False)
    arguments = ("--checkpoint", run[0], "--dataset", "made", "--data", "x", "--text_length", "64")
    return lambda *more: evaluate(*arguments, *more)


REGION_TASKS = "region_caption,region_retrieval,region_classification,pointing"


def test_captions_of_images_and_of_regions_go_into_two_files(with_regions, tmp_path):
    tasks, out = ("--task", f"caption,{REGION_TASKS}"), ("--out", tmp_path / "a.json")
    status, printed, err = with_regions(*tasks, *out, "--window", "3", "--image_size", "32")
    assert (status, err) == (0, "")
    result = json.loads((tmp_path / "a.json").read_text())
    kinds = {name.split("/")[0] for name in result["metrics"]}
    assert kinds == {"caption", *REGION_TASKS.split(",")}
    assert (result["regions"], result["window"]) == (17, 3)
    assert result["framing"].startswith("whole image") and "crop" not in result["preprocessing"]
    for task, keys in (
        ("", [f"{i}.png" for i in range(7)]),
        ("region_", tiny_dataset.regions().keys),
    ):
        rows = json.loads((tmp_path / f"a.{task}captions.json").read_text())
        assert [row["image_id"] for row in rows] == keys
        assert f"{task}caption: scorer not run: pycocoevalcap is not" in printed
        assert result[f"{task}caption_scores"]["scorer"].startswith("not run")


def test_class_names_may_be_those_of_regions(with_regions, tmp_path):
    (tmp_path / "names.json").write_text(json.dumps({"mine": ["hat", "mug", "shoe"], "few": []}))
    task = ("--task", "region_classification", "--class_names", tmp_path / "names.json")
    out = ("--out", tmp_path / "b.json")
    status, _, err = with_regions(*task, "--class_set", "mine", *out)
    assert (status, err) == (0, "")
    result = json.loads((tmp_path / "b.json").read_text())
    assert result["region_class_names"] == digest_of(["hat", "mug", "shoe"])
    (tmp_path / "names.json").write_text(json.dumps({"mine": ["hat", "mug"]}))
    done = with_regions(*task, "--class_set", "mine", *out)
    assert_refused(done, "--class_names: found 2, expected 3, the classes of made")


def test_regions_that_are_not_there(run, evaluate):
    done = evaluate(*on_emoji(run, "region_caption"))
    assert_refused(done, "task region_caption: data set emoji/fixture has no regions")


def test_two_results_are_compared_and_protocols_not_mixed(evaluate, tmp_path):
    for name, protocol in (("a", "p"), ("b", "p"), ("c", "q")):
        content = {"protocol": protocol, "metrics": {"retrieval/r1": 0.5}}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    files = [tmp_path / f"{name}.json" for name in "abc"]
    status, out, err = evaluate("--compare", *files[:2])
    assert (status, err) == (0, "") and "retrieval/r1" in out and "+0.0000" in out
    status, out, err = evaluate("--compare", *files[1:])
    assert (status, out) == (2, "") and "protocol p and " in err and " of q;" in err


# ---- mistakes ------------------------------------------------------------------------------------


def assert_refused(done, *parts):
    status, out, err = done
    assert (status, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    for part in parts:
        assert part in err


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--task", "vqa"], ["task: found 'vqa'", "zero_shot, retrieval, caption"]),
        (["--dataset", "cocoa"], ["dataset: found 'cocoa'", "coco-val2017, flickr30k"]),
        (["--dataset", "coco"], ["dataset_coco.json: No such file", "annotation file"]),
        (["--checkpoint", "/nowhere"], ["checkpoint /nowhere: no config.json and checkpoints/"]),
        (["--out", "/nowhere/a.json"], ["--out /nowhere/a.json: No such file or directory"]),
        (["--decoding", "dream"], ["decoding", "'dream'"]),
        (
            ["--mesh", "fsdp=two"],
            ["--mesh: found 'fsdp=two', expected AXIS=SIZE of slice, data, fsdp"],
        ),
        (["--mesh", "rows=2"], ["--mesh: found 'rows=2'"]),
        (["--batch_size", "12"], ["batch_size: 12 is not a multiple of the 8 parts"]),
        (["--task", ""], ["--task: found none"]),
        (["--no_such"], ["unrecognized arguments: --no_such"]),
        (["--beams", "many"], ["--beams", "'many'"]),
        (["--length", "0"], ["decoding.length: found 0, expected at least 1"]),
        (["--template", "a photo"], ["found the template 'a photo', expected {c} in it"]),
        (["--out", "."], ["--out .: Is a directory"]),
        (["--batch_size", "0"], ["--batch_size: found 0, expected 1 or more"]),
        (["--image_size", "0"], ["--image_size: found 0, expected 1 or more"]),
        (["--window", "2"], ["window: is of the task pointing, which is not asked for"]),
        (["--mesh", "data=--4"], ["--mesh: found 'data=--4'"]),
        (["--task", "caption", "--rerank", "3"], ["rerank: is of the task retrieval, which is"]),
        (["--task", "caption", "--likelihood"], ["likelihood: is of the task zero_shot"]),
        (["--text_length", "2"], ["text length: found 2, expected at least 3"]),
    ],
)
def test_a_mistake_is_one_line(run, evaluate, arguments, parts):
    assert_refused(evaluate(*on_emoji(run), *arguments), *parts)


def test_class_names_of_another_number_are_refused(run, evaluate, tmp_path):
    (tmp_path / "names.json").write_text(json.dumps({"mine": [f"class {i}" for i in range(1000)]}))
    arguments = ("--class_names", tmp_path / "names.json", "--class_set", "mine")
    assert_refused(evaluate(*on_emoji(run), *arguments), "--class_names: found 1000, expected ")


def test_classes_named_by_wordnet_ids_are_no_prompts(run, evaluate, tmp_path):
    for name in ("n01440764", "n01443537"):
        (tmp_path / "val" / name).mkdir(parents=True)
        (tmp_path / "val" / name / "0.png").write_bytes(tiny_dataset.png(0))
    arguments = ("--checkpoint", run[0], "--task", "zero_shot", "--dataset", "imagenet")
    assert_refused(evaluate(*arguments, "--data", tmp_path), "names its classes by WordNet ids")


def test_absent_images_and_captions_of_no_length(run, made, evaluate):
    arguments = ("--checkpoint", run[0], "--task", "caption", "--dataset", "coco", "--data", made)
    assert_refused(evaluate(*arguments), "1 of the 4 images listed are not there", "2.jpg")
    listed = made / "dataset_coco.json"
    listed.write_text(listed.read_text().replace("a green hat", " "))
    assert_refused(evaluate(*arguments), "caption ' '; expected a text")


def test_a_result_that_cannot_be_written_is_told_before_the_work(run, evaluate, tmp_path):
    (tmp_path / "a.captions.json").mkdir()
    arguments = ("--data", "/nowhere", "--out", tmp_path / "a.json")  # what is wrong later
    assert_refused(evaluate(*on_emoji(run), *arguments), "--out ", "a.captions.json: Is a dir")


def test_the_same_data_with_another_tokenizer(run, evaluate, tmp_path):
    packages = str(ROOT / "tests" / "fixture" / "emoji")
    emoji.build(str(tmp_path), "fixture", packages=packages, vocab_size=600)
    done = evaluate(*on_emoji(run, "retrieval"), "--data", tmp_path)
    assert_refused(done, "its tokenizer is ", "expected the data that the run was trained on")
