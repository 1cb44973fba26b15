"""How near generated captions come to their references: a benchmark's scores, and our own two."""

from collections import Counter
from collections.abc import Sequence

from mmgem_jax import processes
from mmgem_jax.errors import UserError
from mmgem_jax.evaluation import caption_scores


def benchmark_scores(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    keys: Sequence,
    spice: bool = False,
) -> tuple[dict[str, float], dict[str, str]]:
    """Those of `caption_scores.score_captions`, with one reference each also `caption_metrics`.

    The latter are all there is where pycocoevalcap is not installed, and `how` says so. Of several
    processes the first scores for all.
    """
    return tuple(
        processes.on_first(lambda: _benchmark_scores(predictions, references, keys, spice))
    )


def _benchmark_scores(predictions, references, keys, spice):
    scores, how = {}, {"scorer": "not run: pycocoevalcap is not installed (extra `caption`)"}
    if caption_scores.installed():
        scores, how = caption_scores.score_captions(predictions, references, keys, spice=spice)
    if all(len(texts) == 1 for texts in references):
        scores |= caption_metrics(predictions, [texts[0] for texts in references])
    return scores, how


def caption_metrics(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """The mean `exact_match` and `token_f1` of normalised captions, each with one reference.

    Token F1 is SQuAD's (Rajpurkar et al., 2016, arXiv 1606.05250) on words as `normalise_caption`
    leaves them: unlike SQuAD's script, articles and punctuation stay. Raises UserError where the
    two differ in number or are empty.
    """
    if not references or len(predictions) != len(references):
        raise UserError(
            f"predictions: found {len(predictions)} for {len(references)} references,"
            " expected as many of both, one or more"
        )
    pairs = [
        (normalise_caption(prediction), normalise_caption(reference))
        for prediction, reference in zip(predictions, references, strict=True)
    ]
    return {
        "exact_match": sum(prediction == reference for prediction, reference in pairs) / len(pairs),
        "token_f1": sum(_token_f1(*pair) for pair in pairs) / len(pairs),
    }


def normalise_caption(caption: str) -> str:
    """The caption in lower case, stripped, with every run of white space as one space."""
    return " ".join(caption.lower().split())


def _token_f1(prediction: str, reference: str) -> float:
    predicted, expected = prediction.split(), reference.split()
    if not predicted or not expected:
        return float(predicted == expected)
    shared = (Counter(predicted) & Counter(expected)).total()
    # 2PR / (P + R) with P = shared / predicted and R = shared / expected, never 0 / 0.
    return 2 * shared / (len(predicted) + len(expected))
