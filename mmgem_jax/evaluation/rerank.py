"""Retrieval in two stages: the k most similar items, put in the order of log P(text | image).

Similarity of embeddings is cheap and finds the k; the decoder's likelihood is dear and orders them.
Items past the k keep their places. In both directions the score is that of the text given the
image, so a long text is at a disadvantage where texts are ranked for an image.

Axes: Q queries, M gallery items, P pairs of an image and a text, E joint embedding.
"""

from collections.abc import Callable, Sequence

import numpy as np

from mmgem_jax.evaluation.retrieval import (
    RECALL_AT,
    best_ranks,
    directions,
    rank_metrics,
    require_finite,
    score_blocks,
)


def reranked_metrics(
    image_embeddings: np.ndarray,
    text_embeddings: np.ndarray,
    text_image: Sequence,
    log_probs: Callable[[np.ndarray], np.ndarray],
    k: int,
    ks: Sequence[int] = RECALL_AT,
    *,
    image_ids: Sequence,
    block_size: int = 256,
) -> dict[str, float]:
    """The keys of `retrieval_metrics`, after the first k are put in the order of `log_probs`.

    `log_probs` is called once, with the distinct pairs [P, 2] of an image's and a text's index, and
    returns their log P(text | image), [P]. Of equally likely items the more similar is first.
    Raises UserError where one is not finite.
    """
    found, pairs = [], []
    for direction, query_ids, gallery_ids, asked in directions(image_ids, text_image, False):
        sides = image_embeddings, text_embeddings
        queries, gallery = sides if direction == "image_to_text" else sides[::-1]
        top = top_items(queries, gallery, k, block_size)  # [Q, k]
        ranks = best_ranks(queries, gallery, query_ids, gallery_ids, block_size)
        found.append((direction, gallery_ids[top] == query_ids[:, None], ranks, len(gallery)))
        of_query = np.broadcast_to(asked[:, None], top.shape)
        both = (of_query, top) if direction == "image_to_text" else (top, of_query)
        pairs.append(np.stack(both, axis=-1).astype(np.int64))

    flat = np.concatenate([p.reshape(-1, 2) for p in pairs])
    codes, places = np.unique(flat @ [len(text_embeddings), 1], return_inverse=True)
    scores = log_probs(np.stack(np.divmod(codes, len(text_embeddings)), axis=-1))
    require_finite("log_probs", scores)
    scores = np.split(scores[places], [pairs[0].shape[0] * pairs[0].shape[1]])

    metrics = {}
    for (direction, relevant, ranks, size), of_top in zip(found, scores, strict=True):
        order = np.argsort(-of_top.reshape(relevant.shape), axis=1, kind="stable")
        relevant = np.take_along_axis(relevant, order, axis=1)
        # Where nothing relevant is among the k, re-ranking moves nothing.
        ranks = np.where(relevant.any(axis=1), relevant.argmax(axis=1) + 1, ranks)
        metrics |= rank_metrics(direction, ranks, size, ks)
    return metrics


def top_items(
    queries: np.ndarray, gallery: np.ndarray, k: int, block_size: int = 256
) -> np.ndarray:
    """The k most similar items of a gallery [M, E] for queries [Q, E], best first: int [Q, k].

    All M where there are fewer. Of equally similar items the one with the lower index is first.
    """
    k = min(k, len(gallery))
    best = [None] * -(-len(queries) // block_size)
    for rows, columns, scores in score_blocks(queries, gallery, block_size):
        # One integer a score, in the order of (score, lower index): no two are equal.
        bits = scores.view(np.int32).astype(np.int64)
        ordered = np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
        index = np.arange(columns.start, columns.start + scores.shape[1])
        keys = (ordered << 32) | (0xFFFFFFFF - index)
        block = rows.start // block_size
        if best[block] is not None:
            keys = np.concatenate([best[block], keys], axis=1)
        if keys.shape[1] > k:
            keys = -np.partition(-keys, k - 1, axis=1)[:, :k]
        best[block] = keys
    keys = -np.sort(-np.concatenate(best), axis=1)
    return 0xFFFFFFFF - (keys & 0xFFFFFFFF)
