"""Exact match and token F1 on cases worked out by hand."""

import pytest

from mmgem_jax.errors import UserError
from mmgem_jax.evaluation.captioning import caption_metrics, normalise_caption


@pytest.mark.parametrize(
    ("prediction", "reference", "exact", "f1"),
    [
        ("red apple", "red apple", 1, 1),
        ("  Red\t APPLE\n", "red apple", 1, 1),
        ("apple red", "red apple", 0, 1),  # a multiset has no order
        ("green apple", "red apple", 0, 1 / 2),
        ("apple", "red apple", 0, 2 / 3),  # precision 1, recall 1/2
        ("red red apple", "red apple", 0, 4 / 5),  # the second red is not shared: 2/3 and 1
        ("red red apple", "red red", 0, 4 / 5),  # both reds are shared: 2/3 and 1
        ("dog", "red apple", 0, 0),
        ("", "red apple", 0, 0),
        ("red apple", " ", 0, 0),
        ("", " \n", 1, 1),
        ("the red apple.", "red apple", 0, 2 / 5),  # articles and punctuation stay
        ("PIÑATA", "piñata", 1, 1),
    ],
)
def test_one_caption(prediction, reference, exact, f1):
    metrics = caption_metrics([prediction], [reference])
    assert metrics == pytest.approx({"exact_match": exact, "token_f1": f1})


def test_metrics_are_means_over_captions():
    metrics = caption_metrics(["a b", "c", "x y", ""], ["A b", "d", "x z", "w"])
    assert metrics == pytest.approx({"exact_match": 1 / 4, "token_f1": 1.5 / 4})


def test_normalise_caption_keeps_everything_but_case_and_white_space():
    assert normalise_caption("\u00a0 A man,\r\n running!  ") == "a man, running!"


def test_unequal_or_empty_lists_are_errors():
    with pytest.raises(UserError, match="predictions: found 1 for 2 references"):
        caption_metrics(["a"], ["a", "b"])
    with pytest.raises(UserError, match="found 0 for 0"):
        caption_metrics([], [])
