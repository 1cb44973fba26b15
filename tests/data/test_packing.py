import collections
import itertools

import numpy as np
import pytest
from packed import for_the_host
from unpacked import unpack

from mmgem_jax.data.packing import (
    CAPTION,
    TEXT,
    Candidate,
    Packing,
    Rows,
    Segment,
    assemble,
    candidate_of,
    check_packing,
    plan_group,
    rows_needed,
)
from mmgem_jax.errors import UserError

BOS, EMB, EOS, PAD = 1, 2, 3, 4


def example_of(number, texts, captions, regions, text_length, caption_length):
    """An example whose regions have texts and captions of these sizes, and ids like no other."""
    ids = iter(range(10 + 10_000 * number, 10_000 * (number + 1)))
    example = {
        "image": np.full((2, 2, 3), number % 251 + 1, np.uint8),
        "boxes": np.zeros((regions, 4), np.float32),
        "region_mask": np.arange(regions) < len(texts),
        "group_ids": np.zeros((regions, 2), np.int32),
        "truncated": np.zeros((regions, 2), np.bool_),
        "region_counts": np.int32([len(texts), 0, 0, 0]),
        "source": np.int32(7),
        "text_tokens": np.zeros((regions, text_length), np.int32),
        "embed_index": np.zeros(regions, np.int32),
        "caption_tokens": np.zeros((regions, caption_length), np.int32),
        "caption_length": np.zeros(regions, np.int32),
        **for_the_host(number),
    }
    for k, (text, caption) in enumerate(zip(texts, captions, strict=True)):
        words = [BOS, *itertools.islice(ids, text - 2), EMB]
        example["text_tokens"][k] = words + [PAD] * (text_length - text)
        example["embed_index"][k] = text - 1
        words = [BOS, *itertools.islice(ids, caption - 2), EOS]
        example["caption_tokens"][k] = words + [PAD] * (caption_length - caption)
        example["caption_length"][k] = caption
        example["boxes"][k] = number, k, 0, 0
    return example


def expected_of(example):
    """What `unpack` is to find of an example's regions."""
    return [
        (
            example["text_tokens"][k, : example["embed_index"][k] + 1].tolist(),
            example["caption_tokens"][k, : example["caption_length"][k]].tolist(),
        )
        for k in np.flatnonzero(example["region_mask"])
    ]


def random_lengths(random, low, high, kind):
    """A length from low to high, by a law with short, long or both extremes."""
    if kind == "extremes":
        return int(random.choice([low, high]))
    if kind == "longest":
        return high
    if kind == "short":
        return int(np.clip(np.exp(random.normal(np.log(low + 2), 0.7)), low, high))
    return int(random.integers(low, high + 1))


def random_examples(random, regions, text_length, caption_length, kind, empty=0.1):
    """Endless random examples; some have no region."""
    for number in itertools.count():
        count = 0 if random.random() < empty else int(random.integers(1, regions + 1))
        count = regions if kind == "longest" else count
        texts = [random_lengths(random, 3, text_length, kind) for _ in range(count)]
        captions = [random_lengths(random, 3, caption_length, kind) for _ in range(count)]
        yield example_of(number, texts, captions, regions, text_length, caption_length)


def least_packing(random, regions, text_length, caption_length, split):
    """A Packing that `check_packing` takes, but not with fewer rows or targets."""
    visual_tokens = int(random.integers(1, 20))
    longest = max(text_length, visual_tokens + caption_length - 1)
    row_length = longest + int(random.integers(0, 2 * longest))
    kinds = [text_length, visual_tokens + caption_length - 1]
    text_rows, rows = 0, rows_needed(kinds, regions, row_length)
    if split:
        text_rows, caption_rows = (rows_needed([kind], regions, row_length) for kind in kinds)
        rows = text_rows + caption_rows
    return Packing(
        images=int(random.integers(1, 9)),
        rows=rows,
        row_length=row_length,
        targets=regions * (caption_length - 1),
        text_rows=text_rows,
        waiting=int(random.integers(1, 6)),
        visual_tokens=visual_tokens,
    )


# ---- nothing is lost, and all fits ---------------------------------------------------------------


@pytest.mark.parametrize("kind", ["even", "short", "extremes", "longest"])
@pytest.mark.parametrize("split", [False, True])
def test_every_region_comes_once_with_its_own_tokens_however_little_room_there_is(split, kind):
    for seed in range(25):
        random = np.random.default_rng(seed)
        regions = int(random.integers(1, 5))
        lengths = int(random.integers(3, 30)), int(random.integers(3, 30))
        packing = least_packing(random, regions, *lengths, split)
        check_packing(packing, regions, *lengths)
        stream, drawn = random_examples(random, regions, *lengths, kind), []

        def draw(stream=stream, drawn=drawn, packing=packing):
            drawn.append(next(stream))
            return candidate_of(len(drawn) - 1, drawn[-1], packing.visual_tokens)

        waiting, placed_in = [], {}
        for turn in range(30):
            placed, waiting = plan_group(packing, waiting, draw)
            assert len(waiting) <= packing.waiting
            group = assemble(packing, placed)
            regions_found = unpack(group, packing.visual_tokens)
            for slot in range(packing.images):
                mine = [regions_found[key] for key in sorted(regions_found) if key[0] == slot]
                if slot >= len(placed):
                    assert not mine and not group["image"][slot].any()
                    assert not group["region_mask"][slot].any()
                    assert group["record"][slot] == group["skipped_record"][slot] == -1
                    continue
                candidate = placed[slot][0]
                assert placed_in.setdefault(candidate.number, turn) == turn
                assert mine == expected_of(drawn[candidate.number])
                for name in ("image", "boxes", "region_mask", "region_counts", "record"):
                    np.testing.assert_array_equal(group[name][slot], candidate.example[name])
            assert (group["source"] == 7).all()
            numbers = [candidate.number for candidate in waiting]
            assert sorted([*placed_in, *numbers]) == list(range(len(drawn)))
            assert numbers == sorted(numbers)  # the oldest first
            if split:
                has_visual = (group["visual_index"] >= 0).any(axis=1)
                filled = (group["segment_ids"][packing.text_rows :] > 0).any(axis=1)
                np.testing.assert_array_equal(has_visual, filled)


@pytest.mark.parametrize("kind", ["even", "extremes"])
def test_none_waits_for_more_groups_than_may_wait(kind):
    for seed in range(20):
        random = np.random.default_rng(seed)
        packing = least_packing(random, 3, 12, 20, split=seed % 2)
        stream, count = random_examples(random, 3, 12, 20, kind), itertools.count()

        def draw(stream=stream, count=count, packing=packing):
            return candidate_of(next(count), next(stream), packing.visual_tokens)

        waiting, age = [], collections.Counter()
        for _ in range(100):
            placed, left = plan_group(packing, waiting, draw)
            assert not waiting or placed[0][0].number == waiting[0].number
            waiting = left
            age.update(candidate.number for candidate in waiting)
        assert max(age.values(), default=0) <= packing.waiting


def test_a_group_of_images_without_regions_is_empty_rows():
    packing = Packing(2, 3, 40, 19, 0, 1, visual_tokens=4)
    examples = (example_of(n, [], [], 2, 10, 10) for n in itertools.count())
    placed, _ = plan_group(packing, [], lambda: candidate_of(0, next(examples), 4))
    group = assemble(packing, placed)
    assert len(placed) == 2 and unpack(group, 4) == {}
    assert not group["segment_ids"].any() and not group["target_mask"].any()
    assert (group["image"] > 0).all()


# ---- where segments go ---------------------------------------------------------------------------


def test_a_segment_goes_to_the_row_with_the_least_room_that_is_enough():
    rows = Rows(Packing(4, 3, 20, 100, 0, 1, visual_tokens=4))
    place = lambda *sizes: rows.place([Segment(size, TEXT, 0) for size in sizes])  # noqa: E731
    assert place(12, 16) == [0, 20]  # rows with room for 8, 4 and 20
    assert place(4) == [36]
    assert place(5, 5) == [12, 40]
    assert place(16, 4) is None  # the first has room for neither 16 nor, after it, the rest
    assert place(15, 3) == [45, 17]


def test_targets_are_limited_and_what_does_not_fit_takes_nothing():
    rows = Rows(Packing(4, 1, 20, 3, 0, 1, visual_tokens=4))
    assert rows.place([Segment(8, CAPTION, 0)]) is None
    assert rows.place([Segment(6, CAPTION, 0), Segment(15, TEXT, 0)]) is None
    assert rows.place([Segment(7, CAPTION, 0), Segment(3, TEXT, 0)]) == [0, 7]


def test_texts_and_captions_keep_to_their_rows():
    rows = Rows(Packing(4, 2, 20, 100, 1, 1, visual_tokens=4))
    assert rows.place([Segment(12, CAPTION, 0), Segment(8, TEXT, 0)]) == [20, 0]
    assert rows.place([Segment(13, TEXT, 0)]) is None
    assert rows.place([Segment(12, TEXT, 0), Segment(8, CAPTION, 0)]) == [8, 32]


# ---- how little is padding -----------------------------------------------------------------------


def short_captions(random, count):
    """Words of captions: log-normal, median 16, at most 75."""
    words = np.exp(random.normal(np.log(16), 0.6, count))
    return np.clip(np.rint(words), 1, 75).astype(int)


def mixed_captions(random, count):
    """Half of the captions are long: log-normal, median 220, at most 1,022."""
    words = np.exp(random.normal(np.log(220), 0.7, count))
    long = np.clip(np.rint(words), 1, 1022).astype(int)
    return np.where(random.random(count) < 0.5, short_captions(random, count), long)


def shares(packing, captions, groups):
    """Shares of positions, of slots and of targets in use, where texts are as long as captions."""
    random, used, slots, targets = np.random.default_rng(0), 0, 0, 0
    words = iter(lambda: int(captions(random, 1)[0]), None)

    def draw():
        size = next(words)
        caption = Segment(packing.visual_tokens + size + 1, CAPTION, 0)
        segments = [caption, Segment(size + 2, TEXT, 0)]
        return Candidate(0, {}, sorted(segments, reverse=True), sum(s.length for s in segments))

    waiting = []
    for _ in range(groups):
        placed, waiting = plan_group(packing, waiting, draw)
        used += sum(candidate.tokens for candidate, _ in placed)
        targets += sum(s.length - 64 for c, _ in placed for s in c.segments if s.kind == CAPTION)
        slots += len(placed)
    available = np.array([packing.rows * packing.row_length, packing.images, packing.targets])
    return np.array([used, slots, targets]) / (groups * available)


# With G = 64. 32 such images have 3,366 tokens on average: 13 rows of 256 are too few for them, and
# of 14 at most 94 % can be used.
@pytest.mark.parametrize(
    ("packing", "captions"),
    [
        (Packing(32, 9, 384, 688, 0, 8, 64), short_captions),
        (Packing(32, 12, 288, 688, 0, 8, 64), short_captions),
        (Packing(64, 27, 256, 1376, 0, 8, 64), short_captions),
        (Packing(16, 5, 352, 352, 0, 8, 64), short_captions),
        (Packing(32, 7, 1728, 5056, 0, 32, 64), mixed_captions),
    ],
)
def test_nearly_all_positions_and_slots_are_used(packing, captions):
    lengths = (77, 77) if captions is short_captions else (1024, 1024)
    check_packing(packing, 1, *lengths)
    used, slots, targets = shares(packing, captions, groups=600)
    assert used >= 0.95 and slots >= 0.99 and targets >= 0.9


# ---- mistakes ------------------------------------------------------------------------------------

GOOD = dict(images=4, rows=4, row_length=60, targets=57, text_rows=0, waiting=3, visual_tokens=16)

MISTAKES = [
    ({"rows": 0}, r"packing\.rows: 0; expected at least 1$"),
    ({"waiting": 0}, r"packing\.waiting: 0; expected at least 1$"),
    ({"text_rows": -1}, r"packing\.text_rows: -1; expected at least 0$"),
    ({"row_length": 34}, r"packing\.row_length: 34; expected at least 35, the longest segment$"),
    ({"targets": 56}, r"packing\.targets: 56; expected at least 57, of an image$"),
    ({"rows": 2}, r"packing\.rows: 2; expected at least 3, for what an image may need$"),
    ({"text_rows": 1, "rows": 3}, r"packing\.rows: 3; expected at least 4, for"),
    ({"text_rows": 1, "row_length": 35}, r"packing\.text_rows: 1; expected at least 2, for"),
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES)
def test_an_image_that_may_not_fit_names_the_field(changes, message):
    check_packing(Packing(**GOOD), 3, 12, 20)
    with pytest.raises(UserError, match=rf"^data\.mixture\.a\.{message}") as error:
        check_packing(Packing(**GOOD | changes), 3, 12, 20, "data.mixture.a")
    assert "\n" not in str(error.value)
