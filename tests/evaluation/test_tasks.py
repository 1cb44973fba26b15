"""What each task asks of the engine and how the answers score; here the answers are ours."""

import collections
import dataclasses
import re

import numpy as np
import pytest
import tiny_dataset
from tiny_dataset import evaluate

from mmgem_jax.errors import UserError
from mmgem_jax.evaluation import caption_scores, tasks
from mmgem_jax.evaluation.tasks import Asked, check, predict

ALL = ("zero_shot", "retrieval", "caption")
DATASET = tiny_dataset.dataset(captions=1, images=range(7))
NAMES = DATASET.texts  # of image i: "a COLOUR CLASS"


class Engine:
    """Says of every text and image what it is told to, and counts what it is asked."""

    def __init__(self, images=range(7), captions=NAMES):
        self.images, self.said = list(images), list(captions)
        self.embedded, self.read = collections.Counter(), collections.Counter()

    def vector(self, text):
        """The class decides the first three axes, the name the others."""
        kind = next(i for i, name in enumerate(tiny_dataset.CLASSES) if name in text)
        vector = np.zeros(10, np.float32)
        vector[kind] = 0.6
        vector[3 + NAMES.index(text) if text in NAMES else kind] += 0.8
        return vector / np.linalg.norm(vector)

    def embed_texts(self, params, texts):
        self.embedded.update(texts)
        cut = np.asarray([text.startswith("a b") for text in texts])
        return np.stack([self.vector(text) for text in texts]), cut

    def read_images(self, params, dataset):
        for places in np.split(np.arange(len(dataset.images)), [4]):
            self.read.update(places.tolist())
            yield places, places

    def look_at_whole(self, params, places):
        rows = np.stack([self.vector(NAMES[self.images[place]]) for place in places])
        return np.concatenate([rows, rows]), places  # as if padded

    def captions(self, params, places, visual):
        assert visual is places
        return [self.said[place] for place in places]

    def candidates(self, texts):
        return np.asarray(texts), np.asarray(["brown" in text for text in texts])

    def score_all(self, params, visual, candidates):
        """The class after the right one is the likeliest."""
        right = [(i + 1) % 3 for i in visual]
        scores = [[float(place == answer) for place in range(len(candidates))] for answer in right]
        return np.asarray(scores + scores)

    def score_pairs(self, params, dataset, candidates, pairs):
        return -np.abs(pairs[:, 0] - pairs[:, 1]).astype(float)


def test_every_text_is_embedded_and_every_image_read_once_for_all_tasks():
    engine = Engine()
    dataset = dataclasses.replace(DATASET, texts=[*NAMES, NAMES[0]], text_ids=[*range(7), 0])
    asked = Asked(ALL, ("a red {c}", "{c}"), likelihood="{c}")
    predictions = predict(engine, None, dataset, asked)
    prompts = {t.replace("{c}", c) for t in asked.templates for c in tiny_dataset.CLASSES}
    assert engine.embedded == dict.fromkeys({*NAMES, *prompts}, 1)
    assert "a red hat" in NAMES and "a red hat" in prompts
    assert engine.read == dict.fromkeys(range(7), 1)
    assert predictions.image_embeddings.shape == (7, 10)
    assert predictions.class_log_probs.shape == (7, 3)
    assert len(predictions.captions) == 7


@pytest.mark.parametrize("task", ALL)
def test_a_task_alone_asks_for_no_more_than_it_needs(task):
    engine = Engine()
    predictions = predict(engine, None, DATASET, Asked((task,)))
    expected = {"zero_shot": tiny_dataset.CLASSES, "retrieval": NAMES, "caption": ()}[task]
    assert engine.embedded == dict.fromkeys(expected, 1)
    assert len(predictions.captions) == (7 if task == "caption" else 0)
    assert predictions.class_log_probs.size == 0


def test_each_score_by_hand():
    engine = Engine(images=[0, 1, 2, 3, 4, 2, 0], captions=[*NAMES[:6], "a"])
    metrics, _, _ = evaluate(engine, None, DATASET, Asked(ALL, likelihood="{c}", rerank=7))
    # Image 5 is drawn as 2 and 6 as 0: of one class each, by chance the right one.
    assert metrics["zero_shot/acc1"] == 1
    assert metrics["zero_shot_likelihood/acc1"] == 0
    assert metrics["retrieval/image_to_text_r1"] == pytest.approx(5 / 7)
    assert metrics["retrieval_reranked/image_to_text_r1"] == 1
    assert metrics["retrieval_reranked/text_to_image_r1"] == 1
    assert metrics["caption/exact_match"] == pytest.approx(6 / 7)
    assert metrics["caption/token_f1"] == pytest.approx((6 + 2 / 4) / 7)


def test_without_rerank_and_likelihood_there_are_none():
    metrics, _, _ = evaluate(Engine(), None, DATASET, Asked(ALL))
    assert not [name for name in metrics if "rerank" in name or "likelihood" in name]


def test_the_share_of_cut_texts_is_of_each_kind():
    predictions = evaluate(
        Engine(), None, DATASET, Asked(ALL, ("a blue {c}", "{c}"), likelihood="{c}", rerank=1)
    )[2]
    assert predictions.truncated == {
        "texts": pytest.approx(3 / 7),  # blue, black, brown
        "prompts": pytest.approx(1 / 2),
        "class_texts": 0,
        "reranked_texts": pytest.approx(1 / 7),
    }


def test_with_several_captions_there_is_no_exact_match(monkeypatch):
    calls = []
    monkeypatch.setattr(caption_scores, "installed", lambda: True)
    score = lambda *args, spice: calls.append(args) or ({"cider": 2.0}, {"meteor": "run"})  # noqa: E731
    monkeypatch.setattr(caption_scores, "score_captions", score)
    dataset = tiny_dataset.dataset(images=range(7))
    metrics, how, _ = evaluate(Engine(), None, dataset, Asked(("caption",)))
    assert (metrics, how) == ({"caption/cider": 2.0}, {"caption": {"meteor": "run"}})
    ((said, of_images, keys),) = calls
    assert said == NAMES and keys == dataset.image_keys
    assert of_images[2] == ["a blue shoe", "the blue shoe stands here"]


def test_without_pycocoevalcap_what_needs_it_is_refused_or_said_not_to_have_run(monkeypatch):
    monkeypatch.setattr(caption_scores, "installed", lambda: False)
    metrics, how, _ = evaluate(Engine(), None, DATASET, Asked(("caption",)))
    assert set(metrics) == {"caption/exact_match", "caption/token_f1"}
    assert how["caption"]["scorer"].startswith("not run: pycocoevalcap is not installed")
    several = tiny_dataset.dataset(images=range(7))
    with pytest.raises(UserError, match="several captions an image, whose scores need pycocoev"):
        check(several, Asked(("caption",)))
    check(several, Asked(("retrieval",)))


def test_images_that_share_an_id_share_its_references():
    dataset = dataclasses.replace(
        DATASET, image_ids=["x", "y"] * 3 + ["x"], texts=["p", "q", "r"], text_ids=["x", "y", "x"]
    )
    found = tasks.references(dataset)
    assert found[:2] == [["p", "r"], ["q"]] and found[6] == ["p", "r"]


# ---- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ("retrieval", "vqa")}, "task: found 'vqa', expected one or more of zero_shot,"),
        ({"tasks": ()}, "task: found none, expected one or more of zero_shot, retrieval, caption"),
        ({"tasks": ALL, "rerank": -1}, "rerank: found -1, expected how many items, or 0"),
        ({"tasks": ALL, "templates": ("a",)}, "templates: found the template 'a', expected {c}"),
        ({"tasks": ALL, "likelihood": "a"}, "templates: found the template 'a', expected {c} in"),
    ],
)
def test_what_cannot_be_asked(options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        Asked(**options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": []}, "data set made: found no images"),
        ({"texts": [], "text_ids": []}, "task retrieval: data set made has no texts"),
        ({"labels": []}, "task zero_shot: data set made has no labels"),
        ({"class_names": []}, "task zero_shot: data set made has no class_names of its own; give"),
        ({"class_names": ["hat", "cup"]}, "class_names: found 2, expected 3 or more, for data set"),
        ({"text_ids": [0, 1, 2, 3, 4, 5, 5]}, "data set made: image 6.png has no text"),
    ],
)
def test_what_a_data_set_lacks_is_named_before_the_work(changes, message):
    check(DATASET, Asked(ALL))
    with pytest.raises(UserError, match=re.escape(message)):
        check(dataclasses.replace(DATASET, **changes), Asked(ALL))
