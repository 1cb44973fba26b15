"""Image-to-text and text-to-image retrieval: recall at k and the median rank.

Recall@k is the share of queries that have any relevant item among their k most similar ones
(Karpathy and Fei-Fei, 2015, arXiv 1412.2306): one of an image's five captions is enough. A text
and an image are relevant to each other when they carry the same id, so a caption for every image,
five of them, and one name shared by many drawings are all the same case. Ties go to the item with
the lower index.

Axes: I images, T texts, Q queries, M gallery items, E joint embedding.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from mmgem_jax.errors import UserError

RECALL_AT = (1, 5, 10)
GALLERY_BLOCK = 2**16  # items of a gallery that are scored at once
# A bfloat16 model normalises to within 2^-8; anything further off was never normalised.
UNIT_TOLERANCE = 1e-2


def retrieval_metrics(
    image_embeddings: np.ndarray,
    text_embeddings: np.ndarray,
    text_image: Sequence,
    ks: Sequence[int] = RECALL_AT,
    *,
    image_ids: Sequence | None = None,
    block_size: int = 256,
    distractors: bool = False,
) -> dict[str, float]:
    """Recall@k and the median rank in both directions, over images [I, E] and texts [T, E].

    `text_image` [T] names the image of each text: its index, or where `image_ids` [I] is given,
    its id there (integers or strings, and images may share one). A k above the gallery's size is
    left out. Every query needs something relevant in the gallery; with `distractors` those without
    are not asked, and only make the other direction harder. Similarities are held for `block_size`
    queries and a part of the gallery at a time. Raises UserError where embeddings, ids or sizes do
    not fit.
    """
    images = unit_embeddings("image_embeddings", image_embeddings)
    texts = unit_embeddings("text_embeddings", text_embeddings)
    image_ids = np.arange(len(images)) if image_ids is None else image_ids
    require_length("image_ids", image_ids, "image_embeddings", len(images))
    require_length("text_image", text_image, "text_embeddings", len(texts))

    metrics = {}
    for direction, query_ids, gallery_ids, asked in directions(image_ids, text_image, distractors):
        queries, gallery = (images, texts) if direction == "image_to_text" else (texts, images)
        ranks = best_ranks(queries[asked], gallery, query_ids[asked], gallery_ids, block_size)
        metrics |= rank_metrics(direction, ranks, len(gallery), ks)
    return metrics


def chance_metrics(
    text_image: Sequence,
    image_ids: Sequence,
    ks: Sequence[int] = RECALL_AT,
    *,
    distractors: bool = False,
) -> dict[str, float]:
    """What `retrieval_metrics` expects of a random ranking: the same keys for the same truth.

    `image_ids` is `range(I)` where `text_image` holds image indices. With n relevant items among
    M, P(best rank <= k) = 1 - C(M - n, k) / C(M, k); the median rank is that of all queries' ranks
    taken together.
    """
    metrics = {}
    for direction, query_ids, gallery_ids, asked in directions(image_ids, text_image, distractors):
        relevant = np.bincount(gallery_ids, minlength=query_ids.max() + 1)[query_ids[asked]]
        metrics |= chance_of(direction, relevant, len(gallery_ids), ks)
    return metrics


def chance_of(
    direction: str, relevant: np.ndarray, size: int, ks: Sequence[int]
) -> dict[str, float]:
    """`chance_metrics` of one direction: of `size` items so many are relevant to each query [Q]."""
    counts, queries = np.unique(relevant, return_counts=True)
    place = np.arange(size)
    missed = np.cumprod(np.maximum(size - counts[:, None] - place, 0) / (size - place), axis=1)
    found = 1 - queries @ missed / queries.sum()  # [M], found[k - 1] = P(best rank <= k)
    metrics = {f"{direction}_r{k}": float(found[k - 1]) for k in ks if k <= size}
    # Halves that are exact in theory (two items, four items, ...) must not hang on rounding.
    low, high = np.searchsorted(found, [0.5 - 1e-9, 0.5 + 1e-9]) + 1
    return metrics | {f"{direction}_median_rank": float(low + high) / 2}


def best_ranks(
    queries: np.ndarray,
    gallery: np.ndarray,
    query_ids: np.ndarray,
    gallery_ids: np.ndarray,
    block_size: int = 256,
) -> np.ndarray:
    """`ranks_of` where what carries a query's id is relevant to it."""
    relevant = lambda rows, columns: query_ids[rows, None] == gallery_ids[columns]  # noqa: E731
    return ranks_of(queries, gallery, relevant, block_size)


def ranks_of(
    queries: np.ndarray,
    gallery: np.ndarray,
    relevant: Callable[[slice, slice], np.ndarray],
    block_size: int = 256,
) -> np.ndarray:
    """The rank [Q], from 1, of the best relevant item of a gallery [M, E] for queries [Q, E].

    `relevant` tells it, bool, for a slice of the queries and one of the gallery. Ties go to the
    lower index; every query has something relevant. The scores are computed twice, first to find
    the best relevant item and then to count what is ahead of it, so that a block of them is all
    that is held, however large the gallery.
    """
    best = np.full(len(queries), -np.inf, np.float32)
    first = np.zeros(len(queries), int)
    for rows, columns, scores in score_blocks(queries, gallery, block_size):
        of_relevant = np.where(relevant(rows, columns), scores, -np.inf)
        place = np.argmax(of_relevant, axis=1)
        found = np.take_along_axis(of_relevant, place[:, None], axis=1)[:, 0]
        better = found > best[rows]
        best[rows] = np.where(better, found, best[rows])
        first[rows] = np.where(better, place + columns.start, first[rows])

    ranks = np.ones(len(queries), int)
    for rows, columns, scores in score_blocks(queries, gallery, block_size):
        index = np.arange(columns.start, columns.start + scores.shape[1])
        ahead = scores == best[rows, None]
        ahead &= index < first[rows, None]
        ahead |= scores > best[rows, None]
        ranks[rows] += ahead.sum(axis=1)
    return ranks


def score_blocks(
    queries: np.ndarray, gallery: np.ndarray, block_size: int
) -> Iterator[tuple[slice, slice, np.ndarray]]:
    """Similarities of queries [Q, E] and a gallery [M, E], float32, a block of both at a time.

    Yields the slice of the queries, that of the gallery and their scores. Raises UserError where
    the two are not of one width.
    """
    if queries.shape[1] != gallery.shape[1]:
        raise UserError(
            f"embeddings: {queries.shape[1]} wide in the queries and {gallery.shape[1]} in the"
            " gallery, expected the same width"
        )
    for start in range(0, len(queries), block_size):
        rows = slice(start, min(start + block_size, len(queries)))
        block = queries[rows].astype(np.float64)
        for left in range(0, len(gallery), GALLERY_BLOCK):
            columns = slice(left, min(left + GALLERY_BLOCK, len(gallery)))
            # A float32 product differs in its last bit with the place of a row in the block.
            # Rounding a float64 product to float32 makes equal embeddings tie, whatever the block.
            scores = block @ gallery[columns].astype(np.float64).T
            yield rows, columns, scores.astype(np.float32)


def first_relevant_rank(scores: np.ndarray, relevant: np.ndarray) -> np.ndarray:
    """The rank [Q], from 1, of each row's best relevant item: scores and mask are [Q, M].

    Ties go to the lower index. A row whose relevant items all score minus infinity, or that has
    none, gets M + 1: found at no k.
    """
    gallery_size = scores.shape[1]
    of_relevant = np.where(relevant, scores, -np.inf)
    first = np.argmax(of_relevant, axis=1)[:, None]
    best = np.take_along_axis(of_relevant, first, axis=1)
    ahead = (scores > best) | ((scores == best) & (np.arange(gallery_size) < first))
    return np.where(best[:, 0] == -np.inf, gallery_size + 1, 1 + ahead.sum(axis=1))


def rank_metrics(
    direction: str, ranks: np.ndarray, gallery_size: int, ks: Sequence[int]
) -> dict[str, float]:
    """Recall at each k that the gallery can hold, and the median, of ranks [Q] counted from 1."""
    metrics = {f"{direction}_r{k}": float(np.mean(ranks <= k)) for k in ks if k <= gallery_size}
    return metrics | {f"{direction}_median_rank": float(np.median(ranks))}


def unit_embeddings(field: str, embeddings: np.ndarray) -> np.ndarray:
    """The embeddings [N, E] as they came; UserError unless all are finite and of length 1."""
    embeddings = np.asarray(embeddings)
    if embeddings.ndim != 2 or not embeddings.size:
        raise UserError(f"{field}: found the shape {embeddings.shape}, expected [rows, width]")
    lengths = np.linalg.norm(embeddings.astype(np.float64), axis=1)
    # Written so that NaN, which compares false with everything, is caught too.
    wrong = np.flatnonzero(~(np.abs(lengths - 1) <= UNIT_TOLERANCE))
    if len(wrong):
        raise UserError(
            f"{field}: row {wrong[0]} has the length {lengths[wrong[0]]:.4g}, expected 1"
        )
    return embeddings


def require_length(field: str, values: Sequence, other: str, length: int) -> None:
    """UserError unless there are `length` values, one for each row of the field `other`."""
    if len(values) != length:
        raise UserError(f"{field}: found {len(values)} values, expected {length}, as in {other}")


def require_finite(field: str, values: np.ndarray) -> None:
    """UserError where a value is not a number or has no bound."""
    wrong = np.argwhere(~np.isfinite(values))
    if len(wrong):
        place = ", ".join(map(str, wrong[0]))
        raise UserError(f"{field}: found {values[tuple(wrong[0])]} at {place}, expected a number")


def directions(
    image_ids: Sequence, text_image: Sequence, distractors: bool
) -> Iterator[tuple[str, np.ndarray, np.ndarray, np.ndarray]]:
    """For each direction: its name, the ids of queries and gallery, and the queries to ask."""
    names = np.concatenate([np.asarray(image_ids), np.asarray(text_image)])
    codes = np.unique(names, return_inverse=True)[1]
    images, texts = np.split(codes, [len(image_ids)])
    for direction, queries, gallery in (
        ("image_to_text", images, texts),
        ("text_to_image", texts, images),
    ):
        answered = np.isin(queries, gallery)
        if not (answered.any() if distractors else answered.all()):
            source, target = direction.split("_to_")
            row = np.flatnonzero(~answered)[0]
            raise UserError(f"text_image: {source} {row} has no {target}, expected one or more")
        yield direction, queries, gallery, np.flatnonzero(answered)
