"""Caption scores against the papers' formulas, with and without Java, and what they say of it."""

import json
import math
import shutil
import sys
import types
from collections import Counter

import numpy as np
import pytest

from mmgem_jax.errors import UserError
from mmgem_jax.evaluation.caption_scores import (
    score_captions,
    tokenize_with_jar,
    write_coco_results,
)
from mmgem_jax.evaluation.ptb import tokenize

KEYS = [391895, 522418, 184613, 318219]
PREDICTIONS = [
    "A man's riding a wave (on a surfboard).",
    "two dogs aren't playing with a frisbee!",
    "A kitchen with a stove, a sink & a fridge",
    "a clock tower at 3:45 p.m.",
]
REFERENCES = [
    ["A man on a surfboard.", "The man's surfing (riding) a small wave", "A surfer rides a wave"],
    ["Two dogs playing with a frisbee in the park.", "Two dogs are playing; one isn't."],
    ["A kitchen with a white refrigerator, a sink and a stove.", "A kitchen -- a stove & a fridge"],
    ["A clock tower that reads 3:45 p.m.", "The clock tower's face at a quarter to four"],
]
NO_METEOR = {"bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider"}
needs_java = pytest.mark.skipif(not shutil.which("java"), reason="needs Java")


@pytest.fixture
def scorer():
    """For tests that score: skips them without the package."""
    return pytest.importorskip("pycocoevalcap.cider.cider", reason="needs the extra `caption`")


@pytest.fixture
def java(tmp_path, monkeypatch):
    """`java(script)`: the PATH holds one program, `java`, that is this shell script, or none."""

    def make(script=None):
        if script is not None:
            (tmp_path / "java").write_text(f"#!/bin/sh\n{script}\n")
            (tmp_path / "java").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))

    return make


def ngrams(words, n):
    """How often each n-gram stands in a list of words."""
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def bleu(said, truth, order):
    """Papineni et al.: clipped precisions over the corpus, closest reference length."""
    precisions = []
    for n in range(1, order + 1):
        found = total = 0
        for words, texts in zip(said, truth, strict=True):
            most = Counter()
            for text in texts:
                most |= ngrams(text, n)
            found += (ngrams(words, n) & most).total()
            total += ngrams(words, n).total()
        precisions.append(found / total)
    length = sum(map(len, said))
    closest = sum(
        min((abs(len(text) - len(words)), len(text)) for text in texts)[1]
        for words, texts in zip(said, truth, strict=True)
    )
    return min(1, math.exp(1 - closest / length)) * math.prod(precisions) ** (1 / order)


def rouge_l(said, truth):
    """Lin: F of the longest common subsequence, beta 1.2, best precision and best recall."""
    scores = []
    for words, texts in zip(said, truth, strict=True):
        shared = []
        for text in texts:
            row = [0] * (len(text) + 1)
            for word in words:
                diagonal = row
                row = [0]
                for i, other in enumerate(text):
                    same = diagonal[i] + 1
                    row.append(same if word == other else max(row[i], diagonal[i + 1]))
            shared.append(row[-1])
        precision = max(shared) / len(words)
        recall = max(s / len(text) for s, text in zip(shared, texts, strict=True))
        scores.append((1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision))
    return np.mean(scores)


def cider_d(said, truth):
    """Vedantam et al., CIDEr-D: clipped, with a penalty on the difference in length."""

    def weigh(words, n):
        return {gram: count * idf(gram, n) for gram, count in ngrams(words, n).items()}

    def idf(gram, n):
        images = sum(any(gram in ngrams(text, n) for text in texts) for texts in truth)
        return math.log(len(truth)) - math.log(max(1, images))

    def norm(weights):
        return math.sqrt(sum(weight**2 for weight in weights.values()))

    scores = []
    for words, texts in zip(said, truth, strict=True):
        for n in range(1, 5):
            ours = weigh(words, n)
            for text in texts:
                theirs = weigh(text, n)
                dot = sum(
                    min(w, theirs.get(gram, 0)) * theirs.get(gram, 0) for gram, w in ours.items()
                )
                penalty = math.exp(-((len(words) - len(text)) ** 2) / (2 * 6**2))
                scale = norm(ours) * norm(theirs) or 1
                scores.append(10 * penalty * dot / scale / len(texts) / 4)
    return sum(scores) / len(truth)


def test_scores_without_java_are_those_of_the_formulas(scorer, java):
    java()
    metrics, how = score_captions(PREDICTIONS, REFERENCES, KEYS)
    assert how["tokenizer"] == "ours"
    assert how["meteor"] == "not run: no java"
    assert how["spice"] == "not run: not asked for"
    assert how["scorer"].startswith("pycocoevalcap 1.")
    assert how["cider"] == "document frequencies of 4 keys' 9 references"
    said = tokenize(PREDICTIONS)
    truth = [tokenize(texts) for texts in REFERENCES]
    expected = {f"bleu_{n}": bleu(said, truth, n) for n in (1, 2, 3, 4)}
    expected |= {"rouge_l": rouge_l(said, truth), "cider": cider_d(said, truth)}
    assert metrics == pytest.approx(expected, rel=1e-6)
    assert metrics["cider"] == pytest.approx(2.785664650857921, rel=1e-6)


def test_scorers_are_given_words_image_by_image(java, monkeypatch):
    """On stand-ins for the package, so that it need not be installed."""
    seen = []

    class Scorer:
        def __init__(self, *_):
            pass

        def compute_score(self, truth, said, **_):
            seen.append((truth, said))
            return [0.1, 0.2, 0.3, 0.4] if len(seen) == 1 else len(seen), []

    for name in ("Bleu", "Rouge", "Cider", "Meteor"):
        module = types.ModuleType(f"pycocoevalcap.{name.lower()}.{name.lower()}")
        setattr(module, name, Scorer)
        for parent in ("pycocoevalcap", module.__name__.rpartition(".")[0]):
            monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr("mmgem_jax.evaluation.caption_scores.version", lambda _: "9.9")
    java()
    metrics, how = score_captions(["A cat!", ""], [["a cat's"], ["Two dogs.", "dogs"]], ["x", "y"])
    assert seen == 3 * [({0: ["a cat 's"], 1: ["two dogs", "dogs"]}, {0: ["a cat"], 1: [""]})]
    bleu = {f"bleu_{n}": n / 10 for n in (1, 2, 3, 4)}
    assert metrics == pytest.approx(bleu | {"rouge_l": 2, "cider": 3})
    assert (how["scorer"], how["tokenizer"]) == ("pycocoevalcap 9.9", "ours")


@needs_java
def test_with_java_the_tokenizer_and_meteor_are_the_packages_own(scorer):
    metrics, how = score_captions(PREDICTIONS, REFERENCES, KEYS)
    assert (how["tokenizer"], how["meteor"]) == ("jar", "run")
    assert metrics["meteor"] == pytest.approx(0.43200013036841106, rel=1e-9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", "")
        without_java, _ = score_captions(PREDICTIONS, REFERENCES, KEYS)
    assert set(without_java) == NO_METEOR
    assert without_java == {name: metrics[name] for name in NO_METEOR}


def test_a_java_that_does_not_run_is_none(scorer, java):
    java("exit 1")
    assert score_captions(PREDICTIONS, REFERENCES, KEYS)[1]["tokenizer"] == "ours"


def test_one_image_has_no_cider(scorer, java):
    java()
    metrics, how = score_captions(["a cat"], [["a cat"]], ["one"])
    assert metrics["cider"] == 0 and metrics["rouge_l"] == 1
    assert how["cider"].endswith("0 by definition")


def test_empty_predictions_score_nothing(scorer, java):
    java()
    metrics, _ = score_captions(["", " "], [["a cat"], ["two dogs run", "dogs"]], [1, 2])
    assert metrics == dict.fromkeys(NO_METEOR, 0)


def test_references_without_words_are_counted(scorer, java):
    java()
    _, how = score_captions(["a cat", ""], [["a cat", "..."], ["!"]], [1, 2])
    assert how["references"] == "2 of 3 hold punctuation alone"
    with pytest.raises(UserError, match="references: none of 1 has a word"):
        score_captions(["a cat"], [["..."]], [1])


@pytest.mark.parametrize(
    ("predictions", "references", "keys", "message"),
    [
        (["a"], [["b"]], [1, 2], "keys: found 2 for 1 predictions"),
        (["a", "b"], [["b"], ["c"]], [7, 7], "keys: found 7 twice"),
        (["a"], [["b"], ["c"]], [1], "references: found those of 2 images for 1 predictions"),
        ([], [], [], "references: found those of 0 images"),
        (["a"], [[]], ["x.jpg"], "references: found none for image 'x.jpg'"),
        (["a"], ["b c"], [1], "references: found one text for image 1, expected a list"),
        (["a"], [["b", " \n"]], [1], "references: one of image 1 is blank"),
    ],
)
def test_wrong_input_is_named(predictions, references, keys, message):
    with pytest.raises(UserError, match=message):
        score_captions(predictions, references, keys)


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocoevalcap.bleu.bleu", None)
    with pytest.raises(UserError, match=r"pycocoevalcap: not installed.*\.\[caption\]"):
        score_captions(PREDICTIONS, REFERENCES, KEYS)


def test_spice_runs_only_where_asked_for_and_with_java(scorer, java, monkeypatch):
    class Spice:
        def compute_score(self, truth, said):
            assert said[1] == ["two dogs are n't playing with a frisbee"]
            return 0.25, []

    class Offline:
        def __init__(self):
            raise OSError("no network")

    module = types.ModuleType("pycocoevalcap.spice.spice")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr("mmgem_jax.evaluation.caption_scores._meteor", lambda *_: 0.5)
    monkeypatch.setattr("mmgem_jax.evaluation.caption_scores.tokenize_with_jar", tokenize)
    java("exit 0")
    module.Spice = Spice
    metrics, how = score_captions(PREDICTIONS, REFERENCES, KEYS, spice=True)
    assert (metrics["spice"], how["spice"]) == (0.25, "run")
    module.Spice = Offline
    metrics, how = score_captions(PREDICTIONS, REFERENCES, KEYS, spice=True)
    assert "spice" not in metrics and how["spice"].startswith("not run: SPICE: did not run: no net")
    java("exit 1")
    assert score_captions(PREDICTIONS, REFERENCES, KEYS, spice=True)[1]["spice"] == (
        "not run: no java"
    )


def test_a_tokenizer_that_says_nothing_is_an_error(scorer, java):
    java("exit 0")
    with pytest.raises(UserError, match="java: the tokenizer gave 1 captions, expected 5"):
        score_captions(PREDICTIONS, REFERENCES, KEYS)


@needs_java
def test_a_meteor_that_fails_costs_no_other_score(scorer, java):
    program = shutil.which("java")
    java(f'case "$*" in *-stdio*) echo no memory >&2; exit 1;; esac; exec {program} "$@"')
    metrics, how = score_captions(PREDICTIONS, REFERENCES, KEYS)
    assert set(metrics) == NO_METEOR
    assert how["meteor"] == "not run: java: METEOR failed: no memory"


@needs_java
def test_the_jar_gives_every_caption_its_own_tokens(scorer):
    captions = ["", "a\rb", "c\u2028d\x85e", "f\ng", "", ""]
    assert tokenize_with_jar(captions) == [[], ["a", "b"], ["c", "d", "e"], ["f", "g"], [], []]
    assert tokenize_with_jar([]) == []


def test_coco_results_are_read_back(tmp_path):
    path = tmp_path / "results.json"
    write_coco_results(path, [7, "x.jpg"], ['a "café"\n', ""])
    assert json.loads(path.read_text()) == [
        {"image_id": 7, "caption": 'a "café"\n'},
        {"image_id": "x.jpg", "caption": ""},
    ]
    with pytest.raises(UserError, match="keys: found 7 twice"):
        write_coco_results(path, [7, 7], ["a", "b"])


def test_coco_reads_the_results(tmp_path):
    coco_module = pytest.importorskip("pycocotools.coco", reason="needs the extra `caption`")
    coco = coco_module.COCO()
    coco.dataset = {"images": [{"id": key} for key in KEYS], "annotations": []}
    coco.createIndex()
    write_coco_results(tmp_path / "results.json", KEYS, PREDICTIONS)
    results = coco.loadRes(str(tmp_path / "results.json"))
    assert [results.imgToAnns[key][0]["caption"] for key in KEYS] == PREDICTIONS
