"""What each task asks about regions and how the answers score; here the answers are ours."""

import collections
import dataclasses
import re

import numpy as np
import pytest
import tiny_dataset
from tiny_dataset import evaluate

from mmgem_jax.errors import UserError
from mmgem_jax.evaluation import caption_scores, tasks
from mmgem_jax.evaluation.pointing import cell_centres
from mmgem_jax.evaluation.results import data_stamp, framing_of
from mmgem_jax.evaluation.tasks import Asked, check
from mmgem_jax.generate import Decoding

TASKS = ("region_caption", "region_retrieval", "region_classification", "pointing")
REGIONS = tiny_dataset.regions()
DATASET = dataclasses.replace(tiny_dataset.dataset(captions=1), regions=REGIONS)
TEXTS = sorted(set(REGIONS.texts))
SIDE = 8  # cells of the map


class Engine:
    """Knows the truth about regions: a box's embedding and caption are those of its text.

    `wrong` are regions that it takes for what the region before them is.
    """

    batch_size, window, text_length, seed = 3, 1, 24, 0
    decoding = Decoding(length=4)

    def __init__(self, wrong=()):
        self.said = list(REGIONS.texts)
        for region in wrong:
            self.said[region] = REGIONS.texts[region - 1]
        self.looks, self.embedded = [], collections.Counter()

    def vector(self, text):
        """The class decides the first three axes, the text the others."""
        vector = np.zeros(3 + len(TEXTS), np.float32)
        vector[[text.endswith(name) for name in tiny_dataset.CLASSES].index(True)] = 0.6
        if text in TEXTS:
            vector[3 + TEXTS.index(text)] = 0.8
        return vector / np.linalg.norm(vector)

    def embed_texts(self, params, texts):
        self.embedded.update(texts)
        cut = np.asarray([text.startswith("a b") for text in texts])
        return np.stack([self.vector(text) for text in texts]), cut

    def read_images(self, params, dataset):
        for places in np.split(np.arange(len(dataset.images)), [4]):
            yield places, np.broadcast_to(places[:, None, None], (len(places), SIDE, SIDE))

    def look_at_whole(self, params, feature_map):
        return np.eye(10, dtype=np.float32)[: len(feature_map)], None

    def look(self, params, feature_map, rows, boxes):
        self.looks.append(len(rows))
        images = feature_map[rows, 0, 0]
        own = [
            np.flatnonzero((REGIONS.images == image) & (REGIONS.boxes == box).all(axis=1))[0]
            for image, box in zip(images, boxes, strict=True)
        ]
        found = np.stack([self.vector(self.said[region]) for region in own])
        return np.resize(found, (3, found.shape[1])), own  # as if padded

    def captions(self, params, places, visual):
        assert visual == places.tolist()
        return [self.said[place] for place in places]

    def embed_cells(self, params, feature_map, window):
        """Every cell is like the last of the regions that it lies in."""
        self.asked_window = window
        cells = np.zeros((len(feature_map), SIDE * SIDE, 3 + len(TEXTS)), np.float32)
        x, y = cell_centres(SIDE, SIDE).T
        for row, image in enumerate(feature_map[:, 0, 0]):
            for region in np.flatnonzero(REGIONS.images == image):
                x0, y0, x1, y1 = REGIONS.boxes[region]
                inside = (x >= x0) & (x <= x1) & (y >= y0) & (y <= y1)
                cells[row, inside] = self.vector(self.said[region])
        return cells.reshape(len(feature_map), SIDE, SIDE, -1)


def test_who_answers_perfectly_scores_perfectly():
    engine = Engine()
    metrics, _, predictions = evaluate(engine, None, DATASET, Asked(TASKS))
    perfect = ["region_retrieval/text_to_region_r1", "region_retrieval/region_to_text_r1"]
    perfect += ["region_retrieval/within_image_r1", "region_classification/acc1"]
    perfect += ["region_classification/mean_per_class_recall"]
    perfect += ["region_caption/exact_match", "region_caption/token_f1"]
    assert {name: metrics[name] for name in perfect} == dict.fromkeys(perfect, 1)
    # Boxes overlap, and cells show the last of the regions alone.
    assert 0.8 < metrics["pointing/accuracy"] <= 1
    assert 0 < metrics["pointing/chance"] < 0.5 and metrics["pointing/reachable"] == 1
    assert metrics["region_retrieval/within_image_chance"] < 0.8
    assert predictions.regions.captions == REGIONS.texts
    assert engine.looks == [
        3,
        3,
        3,
        3,
        3,
        2,
    ]  # 6 and 11 on the batches' images


def test_mistakes_count_where_they_are_made():
    wrong = [1, 8]
    assert all(REGIONS.texts[region] != REGIONS.texts[region - 1] for region in wrong)
    metrics, _, predictions = evaluate(Engine(wrong), None, DATASET, Asked(TASKS))
    count = len(REGIONS)
    assert metrics["region_caption/exact_match"] == pytest.approx(1 - 2 / count)
    assert metrics["region_retrieval/region_to_text_r1"] == pytest.approx(1 - 2 / count)
    same_class = [REGIONS.labels[region] == REGIONS.labels[region - 1] for region in wrong]
    expected = 1 - same_class.count(False) / count
    assert metrics["region_classification/acc1"] == pytest.approx(expected)
    assert predictions.regions.places.tolist() == list(range(count))


def test_regions_alone_ask_nothing_of_whole_images():
    engine = Engine()
    engine.look_at_whole = None
    predictions = tasks.predict(engine, {}, DATASET, Asked(("region_caption",)))
    assert predictions.regions.captions == list(REGIONS.texts)


def test_every_text_is_embedded_once():
    engine = Engine()
    asked = Asked(("retrieval", *TASKS), ("{c}", "a red {c}"))
    dataset = dataclasses.replace(DATASET, texts=REGIONS.texts[:7])
    predictions = evaluate(engine, None, dataset, dataclasses.replace(asked, tasks=TASKS))[2]
    prompts = {t.replace("{c}", c) for t in asked.templates for c in tiny_dataset.CLASSES}
    assert engine.embedded == dict.fromkeys({*REGIONS.texts, *prompts}, 1)
    cut = np.mean([text.startswith("a b") for text in REGIONS.texts])
    assert predictions.truncated == {"region_texts": pytest.approx(cut), "region_prompts": 0}


@pytest.mark.parametrize("task", TASKS)
def test_a_task_alone_has_its_own_metrics_alone(task):
    engine = Engine()
    metrics, how, predictions = evaluate(engine, None, DATASET, Asked((task,)))
    assert {name.split("/")[0] for name in metrics} == {task}
    assert bool(predictions.regions.captions) == (task == "region_caption") == bool(how)
    assert len(predictions.regions.pointed) == (len(REGIONS) if task == "pointing" else 0)
    assert bool(engine.embedded) == (task != "region_caption")


def test_each_region_is_a_key_with_one_reference(monkeypatch):
    calls = []
    monkeypatch.setattr(caption_scores, "installed", lambda: True)
    score = lambda *args, spice: calls.append(args) or ({"cider": 2.0}, {"meteor": "run"})  # noqa: E731
    monkeypatch.setattr(caption_scores, "score_captions", score)
    metrics, how, _ = evaluate(Engine(), None, DATASET, Asked(("region_caption",)))
    assert calls == [(REGIONS.texts, [[text] for text in REGIONS.texts], REGIONS.keys)]
    assert metrics["region_caption/cider"] == 2 and metrics["region_caption/exact_match"] == 1
    assert how == {"region_caption": {"meteor": "run"}}


def test_without_pycocoevalcap_exact_match_and_f1_are_left(monkeypatch):
    monkeypatch.setattr(caption_scores, "installed", lambda: False)
    metrics, how, _ = evaluate(Engine(), None, DATASET, Asked(("region_caption",)))
    assert set(metrics) == {"region_caption/exact_match", "region_caption/token_f1"}
    assert how["region_caption"]["scorer"].startswith("not run: pycocoevalcap is not installed")


def test_the_stamp_says_what_was_asked_of_regions():
    engine, asked = Engine(), Asked(TASKS)
    stamp = data_stamp(DATASET, asked, engine, {})
    assert (stamp["regions"], stamp["window"]) == (len(REGIONS), 1)
    assert stamp["decoding"]["method"] == "greedy" and stamp["prompts"] == ["{c}"]
    other = dataclasses.replace(REGIONS, class_names=["hat", "cup", "boot"])
    renamed = data_stamp(dataclasses.replace(DATASET, regions=other), asked, engine, {})
    assert {k for k in stamp if stamp[k] != renamed[k]} == {"region_class_names"}
    window = data_stamp(DATASET, Asked(("pointing",), window=3), engine, {})
    assert window["window"] == 3 and "decoding" not in window and "prompts" not in window
    assert framing_of(DATASET).startswith("whole image")
    assert framing_of(tiny_dataset.dataset()).endswith("centre crop")


def test_the_window_is_the_one_asked_for():
    engine = Engine()
    evaluate(engine, None, DATASET, Asked(("pointing",), window=3))
    assert engine.asked_window == 3


# ---- siblings ------------------------------------------------------------------------------------


def test_siblings_are_a_task():
    class Scenes(Engine):
        def embed_texts(self, params, texts):
            return np.eye(10, dtype=np.float32)[[0, 1, 2, 3]], np.zeros(4, bool)

    dataset = tiny_dataset.dataset(count=4, captions=1, image_keys=["1a", "1b", "2a", "2b"])
    check(dataset, Asked(("siblings",)))
    metrics, _, _ = evaluate(Scenes(), None, dataset, Asked(("siblings",)))
    assert metrics == {"siblings/accuracy": 1}
    with pytest.raises(UserError, match=r"task siblings: image .* has no sibling"):
        check(tiny_dataset.dataset(), Asked(("siblings",)))


# ---- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_a_data_set_without_regions_is_refused_in_one_line(task):
    with pytest.raises(UserError, match=f"^task {task}: data set made has no regions$"):
        check(tiny_dataset.dataset(), Asked((task,)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": []}, "task region_classification: data set made: regions have no labels"),
        ({"class_names": []}, "made: regions have no class_names of their own; give a file"),
        ({"class_names": ["hat"]}, "class_names: found 1, expected 3 or more, for data set made"),
    ],
)
def test_what_regions_lack_is_named(changes, message):
    check(DATASET, Asked(TASKS))
    dataset = dataclasses.replace(DATASET, regions=dataclasses.replace(REGIONS, **changes))
    check(dataset, Asked(("region_caption", "region_retrieval", "pointing")))
    with pytest.raises(UserError, match=re.escape(message)):
        check(dataset, Asked(TASKS))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ("pointing",), "window": -1}, "window: found -1, expected how many cells, or 0"),
        ({"tasks": ("caption",), "window": 2}, "window: is of the task pointing, which is not"),
    ],
)
def test_a_window_that_cannot_be_asked(options, message):
    with pytest.raises(UserError, match=message):
        Asked(**options)
