"""Batches read back into examples: what the model is given of each image, for people to look at."""

from typing import NamedTuple

import numpy as np


class Pair(NamedTuple):
    """A region and its texts, as the losses compare them.

    Fields:
      box: fp32 [4], x0, y0, x1, y1 as shares of the image.
      text: ids of `<s> text [EMB]`.
      caption: ids of `<s> text </s>`.
      text_cut: whether the text was cut to fit.
      caption_cut: whether the caption was.
      number: of the pair in the batch, slot R + region.
    """

    box: np.ndarray
    text: list[int]
    caption: list[int]
    text_cut: bool
    caption_cut: bool
    number: int


class Seen(NamedTuple):
    """An image and its pairs.

    Fields:
      image: uint8 [h, w, 3].
      pairs: those that are no padding.
      padding: how many are.
      counts: regions of its record: drawn, over the limit, out of the view, unusable.
      slot: its place in the batch.
    """

    image: np.ndarray
    pairs: list[Pair]
    padding: int
    counts: list[int]
    slot: int


def seen_in(batch, slots, visual_tokens):
    """What the model is given of the images in some slots of a batch.

    Args:
      batch: dict of numpy arrays, padded (top of mmgem_jax/objective.py) or packed (top of
        mmgem_jax/data/packing.py).
      slots: their places in the batch.
      visual_tokens: G, of a caption.

    Returns:
      A list of Seen.
    """
    texts_of = packed_texts if "segment_ids" in batch else padded_texts
    R, found = batch["region_mask"].shape[1], []
    for slot in slots:
        pairs = []
        for region in np.flatnonzero(batch["region_mask"][slot]).tolist():
            cut = batch["truncated"][slot, region].tolist()
            texts = texts_of(batch, slot, region, visual_tokens)
            pairs.append(Pair(batch["boxes"][slot, region], *texts, *cut, slot * R + region))
        counts = batch["region_counts"][slot].tolist()
        image = np.array(batch["image"][slot])  # a batch of a worker's goes when the next one comes
        found.append(Seen(image, pairs, R - len(pairs), counts, slot))
    return found


def padded_texts(batch, slot, region, _):
    """Text and caption of a region of a padded batch, as lists of ids."""
    text_end = batch["embed_index"][slot, region] + 1
    caption_end = batch["caption_length"][slot, region]
    text = batch["text_tokens"][slot, region, :text_end]
    return text.tolist(), batch["caption_tokens"][slot, region, :caption_end].tolist()


def packed_texts(batch, slot, region, visual_tokens):
    """The same of a packed batch: segments of its group's rows, and the targets of one of them."""
    (groups, _), (slots, R) = batch["targets"].shape, batch["region_mask"].shape
    group, own_slot = divmod(slot, slots // groups)
    # The rows of the group one after the other, in which a place is an index.
    tokens, segments, positions, visual = (
        batch[name].reshape(groups, -1)[group]
        for name in ("tokens", "segment_ids", "positions", "visual_index")
    )
    end = batch["embed_place"][slot, region]
    text = tokens[end - positions[end] : end + 1]

    # Rows of texts alone come first, and visual_index does not go over them.
    alone = len(tokens) - len(visual)
    first = (own_slot * R + region) * visual_tokens
    start = alone + np.flatnonzero(visual == first)[0]
    length = batch["tokens"].shape[1]
    row_end = (start // length + 1) * length
    size = np.argmin(np.append(segments[start:row_end] == segments[start], False))
    words = tokens[start + visual_tokens : start + size]
    used = batch["target_mask"][group]
    last = batch["target_place"][group] == start + size - 1  # the state that predicts </s>
    (target,) = batch["targets"][group][used & last]
    return text.tolist(), [*words.tolist(), int(target)]


# ---- how long texts are --------------------------------------------------------------------------


def text_lengths(batch):
    """Tokens of every text of a batch that is no padding, with `<s>` and `[EMB]`: int [N]."""
    mask = batch["region_mask"]
    if "segment_ids" not in batch:
        return batch["embed_index"][mask] + 1
    positions = batch["positions"].reshape(len(batch["targets"]), -1)
    places = batch["embed_place"].reshape(len(positions), -1)
    return np.take_along_axis(positions, places, axis=1).reshape(mask.shape)[mask] + 1


def caption_lengths(batch, visual_tokens):
    """Tokens of every caption of a batch that is no padding, with `<s>` and `</s>`: int [N]."""
    if "segment_ids" not in batch:
        return batch["caption_length"][batch["region_mask"]]
    visual = batch["visual_index"]
    with_captions = len(batch["segment_ids"]) - len(visual)
    groups = len(batch["targets"])
    rows = batch["segment_ids"].reshape(groups, -1, visual.shape[1])
    rows = rows[:, with_captions // groups :].reshape(visual.shape)
    found = []
    for ids, places in zip(rows, visual, strict=True):
        starts = np.flatnonzero((places >= 0) & (places % visual_tokens == 0))
        found += np.bincount(ids)[ids[starts]].tolist()
    # The `</s>` is in no row: it is only predicted.
    return np.asarray(found, int) - visual_tokens + 1


def used_share(batch):
    """The share of the places for tokens that hold one: of rows, or of padded texts and captions.

    Padding regions are padding; of a padded caption the last place, whose token is only predicted,
    counts too.
    """
    if "segment_ids" in batch:
        return float(np.mean(batch["segment_ids"] > 0))
    used = text_lengths(batch).sum() + caption_lengths(batch, 0).sum()
    return float(used / (batch["text_tokens"].size + batch["caption_tokens"].size))
