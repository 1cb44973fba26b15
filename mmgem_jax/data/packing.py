"""Packed rows: the texts of a group of images share rows of tokens, and little of them is padding.

A segment is a region's text, `<s> text [EMB]`, or its caption, G visual tokens and `<s> text`: the
`</s>` is only predicted. n images and their r rows of L tokens are a group, and a batch of B images
is A = B / n groups. A packed batch is a dict of numpy arrays:
  image, boxes, region_mask, group_ids, truncated, region_counts, source
                                 as at the top of mmgem_jax/objective.py. A slot that no image
                                 fills holds zeros, and its region_mask is False; not so `source`
  tokens         int32 [A r, L]  0 where there is none
  segment_ids    int32 [A r, L]  1, 2, ... within a row; 0: padding
  positions      int32 [A r, L]  place in the own segment; 0 in padding
  visual_index   int32 [A (r - r'), L]  which of the group's visual tokens is here:
                                 (slot R + region) G + g; -1: none. The first r' rows of a group,
                                 of texts alone, have none and are left out
  embed_place    int32 [B, R]    place of the region's [EMB] among its group's positions, which is
                                 row L + column; 0 for padding regions
  target_place   int32 [A, K]    place of the state that predicts the target; 0 where unused
  targets        int32 [A, K]    token to predict; 0 where unused
  target_mask    bool [A, K]     which are used
  data_position  int32 [A, 1 + waiting]  the group's stream after this batch: how many examples were
                                 taken from it, and the numbers of those that wait, the oldest
                                 first; -1: none
"""

import bisect
import dataclasses
import itertools
from typing import NamedTuple

import numpy as np

from mmgem_jax.errors import UserError

TEXT, CAPTION = 0, 1
OF_AN_IMAGE = ("image", "boxes", "region_mask", "group_ids", "truncated", "region_counts")
# What a slot of no image has of the entries for the host (`TrainingExample`).
FOR_THE_HOST = {"record": -1, "skipped": 0, "skipped_record": -1}


@dataclasses.dataclass(frozen=True)
class Packing:
    """The sizes of a group: `config.data.packing`, and G."""

    images: int
    rows: int
    row_length: int
    targets: int
    text_rows: int
    waiting: int
    visual_tokens: int


def check_packing(packing, regions, text_length, caption_length, where="data"):
    """Raises UserError where an image of so many regions, and texts this long, may fit no group.

    So the oldest of those that wait, for which a group is still empty, is always placed.
    """

    def expect(field, holds, expected):
        if not holds:
            found = getattr(packing, field)
            raise UserError(f"{where}.packing.{field}: {found}; expected {expected}")

    for field, least in {"rows": 1, "text_rows": 0, "waiting": 1}.items():
        expect(field, getattr(packing, field) >= least, f"at least {least}")
    text, caption = text_length, packing.visual_tokens + caption_length - 1
    longest = max(text, caption)
    expect("row_length", packing.row_length >= longest, f"at least {longest}, the longest segment")
    targets = regions * (caption_length - 1)
    expect("targets", packing.targets >= targets, f"at least {targets}, of an image")
    length, split = packing.row_length, packing.text_rows
    enough = "at least {}, for what an image may need"
    if split:
        least = rows_needed([text], regions, length)
        expect("text_rows", split >= least, enough.format(least))
        least = split + rows_needed([caption], regions, length)
    else:
        least = rows_needed([text, caption], regions, length)
    expect("rows", packing.rows >= least, enough.format(least))


def rows_needed(longest, count, length):
    """How many empty rows surely take `count` segments of every kind, the longest first.

    A segment of x tokens has no room where every row is filled above length - x by segments that
    are no shorter. Either their total or their number is too small for that.

    Args:
      longest: tokens of a kind's longest segment, for each kind.
      count: segments of each kind.
      length: tokens of a row.
    """
    longest = sorted(longest, reverse=True)

    def enough(rows):
        total = number = 0
        for size in longest:
            total, number = total + count * size, number + count
            by_total = rows * (length - size + 1) > total - size
            by_number = rows * (length // longest[0]) >= number
            if not (by_total or by_number):
                return False
        return True

    return next(rows for rows in itertools.count(1) if enough(rows))


# ---- the plan ------------------------------------------------------------------------------------


class Segment(NamedTuple):
    """What is placed as a whole; segments compare by their length first."""

    length: int
    kind: int
    region: int


class Candidate(NamedTuple):
    """An example, its number in its stream, its segments, the longest first, and their tokens."""

    number: int
    example: dict
    segments: list
    tokens: int


def candidate_of(number, example, visual_tokens):
    """A Candidate of an example (mmgem_jax/data/training_example.py)."""
    segments = []
    for region in np.flatnonzero(example["region_mask"]).tolist():
        words, caption = example["embed_index"][region], example["caption_length"][region]
        segments.append(Segment(int(words) + 1, TEXT, region))
        segments.append(Segment(visual_tokens + int(caption) - 1, CAPTION, region))
    tokens = sum(segment.length for segment in segments)
    return Candidate(number, example, sorted(segments, reverse=True), tokens)


class Rows:
    """The room that is left in the rows of a group, and for its targets."""

    def __init__(self, packing):
        self.packing, self.targets = packing, packing.targets
        empty = [(packing.row_length, row) for row in range(packing.rows)]
        split = packing.text_rows
        self.free = [empty[:split], empty[split:]] if split else [empty]  # sorted, by kind

    def place(self, segments):
        """Where the segments of an example go: row L + column each; None where not all have room.

        Each goes to the row with the least room that is enough.
        """
        length, visual_tokens = self.packing.row_length, self.packing.visual_tokens
        targets = self.targets - sum(
            s.length - visual_tokens for s in segments if s.kind == CAPTION
        )
        if targets < 0:
            return None
        free, places = [rows.copy() for rows in self.free], []
        for size, kind, _ in segments:
            rows = free[kind % len(free)]  # both kinds in the only ones, where there is no split
            found = bisect.bisect_left(rows, (size, 0))
            if found == len(rows):
                return None
            room, row = rows.pop(found)
            places.append((row + 1) * length - room)
            bisect.insort(rows, (room - size, row))
        self.free, self.targets = free, targets
        return places


def plan_group(packing, waiting, draw):
    """Fills the slots of a group one by one from the candidates at hand: those that may wait.

    The oldest comes first. An empty group has room for it: so none waits longer than `waiting`
    groups. Then comes the one whose tokens are nearest to an equal share of the room left for each
    slot left: so rows and slots are full at the same time. Where none has room, slots stay empty.

    Args:
      packing: a Packing.
      waiting: Candidates that wait, the oldest first.
      draw: returns the stream's next Candidate.

    Returns:
      Those that were placed, each with the places of its segments; and those that wait now.
    """
    rows, placed, at_hand = Rows(packing), [], list(waiting)
    room, order = packing.rows * packing.row_length, [0]
    for slot in range(packing.images):
        at_hand += [draw() for _ in range(packing.waiting - len(at_hand))]
        if placed:
            share = room / (packing.images - slot)
            distances = [abs(candidate.tokens - share) for candidate in at_hand]
            order = sorted(range(len(at_hand)), key=distances.__getitem__)
        for chosen in order:
            places = rows.place(at_hand[chosen].segments)
            if places is not None:
                break
        else:
            break
        candidate = at_hand.pop(chosen)
        placed.append((candidate, places))
        room -= candidate.tokens
    return placed, at_hand


# ---- the arrays ----------------------------------------------------------------------------------


def assemble(packing, placed):
    """The arrays of a group, all but `data_position`, from what `plan_group` has placed."""
    first = placed[0][0].example
    group = {
        name: np.zeros((packing.images, *first[name].shape), first[name].dtype)
        for name in OF_AN_IMAGE
    }
    for name, none in FOR_THE_HOST.items():
        shape = packing.images, *first[name].shape
        group[name] = np.full(shape, none, first[name].dtype)
    group["source"] = np.full(packing.images, first["source"], np.int32)
    group["embed_place"] = np.zeros(group["region_mask"].shape, np.int32)
    shape = packing.rows, packing.row_length
    group |= {name: np.zeros(shape, np.int32) for name in ("tokens", "segment_ids", "positions")}
    group["visual_index"] = np.full(shape, -1, np.int32)
    # Views of the rows one after the other, in which a place is an index.
    flat = {name: group[name].reshape(-1) for name in ("tokens", "segment_ids", "positions")}
    flat["visual_index"] = group["visual_index"].reshape(-1)
    filled, counting = [0] * packing.rows, np.arange(packing.row_length, dtype=np.int32)
    R, G = len(first["region_mask"]), packing.visual_tokens
    states, targets = [], []
    for slot, (candidate, places) in enumerate(placed):
        example = candidate.example
        for name in (*OF_AN_IMAGE, *FOR_THE_HOST):
            group[name][slot] = example[name]
        for (length, kind, region), start in zip(candidate.segments, places, strict=True):
            row, end = start // packing.row_length, start + length
            filled[row] += 1
            flat["segment_ids"][start:end] = filled[row]
            flat["positions"][start:end] = counting[:length]
            if kind == TEXT:
                flat["tokens"][start:end] = example["text_tokens"][region, :length]
                group["embed_place"][slot, region] = end - 1
                continue
            words, number = start + G, slot * R + region
            flat["visual_index"][start:words] = counting[:G] + number * G
            size = end - words
            flat["tokens"][words:end] = example["caption_tokens"][region, :size]
            states.append(np.arange(words, end))
            targets.append(example["caption_tokens"][region, 1 : size + 1])
    group["visual_index"] = group["visual_index"][packing.text_rows :]
    return group | target_arrays(packing, states, targets)


def target_arrays(packing, states, targets):
    """`target_place`, `targets` and `target_mask` of a group, from those of its captions."""
    arrays = {
        "target_place": np.zeros((1, packing.targets), np.int32),
        "targets": np.zeros((1, packing.targets), np.int32),
        "target_mask": np.zeros((1, packing.targets), np.bool_),
    }
    if targets:  # none where no image of the group has a region
        count = sum(map(len, targets))
        arrays["target_place"][0, :count] = np.concatenate(states)
        arrays["targets"][0, :count] = np.concatenate(targets)
        arrays["target_mask"][0, :count] = True
    return arrays
