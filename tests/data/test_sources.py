"""Every kind of source through the pipeline: the same pairs, each once an epoch, whoever reads."""

import functools
from collections import Counter

import made_pairs
import numpy as np
import pytest
import tiny
from PIL import Image

from mmgem_jax.data import counted_batches
from mmgem_jax.data.broken import CAUSES
from mmgem_jax.data.counted_batches import skipped_metrics, summed
from mmgem_jax.data.pipeline import training_batches
from mmgem_jax.data.tokenizer import load_tokenizer
from mmgem_jax.errors import UserError
from mmgem_jax.run_record import merged

KINDS = ("tfds", "tar", "jsonl", "array_record")
COUNT, SIZE = 40, 8  # 5 batches an epoch
PACKING = dict(images=4, rows=3, row_length=30, targets=92, text_rows=0, waiting=2)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    fields, examples = made_pairs.write_all(folder, COUNT)
    tokenizer = load_tokenizer(str(folder / "tfds" / "pairs" / "1.0.0" / "tokenizer"))
    return folder, fields, examples, tokenizer


@pytest.fixture
def config_of(made):
    """`config_of(fields)`: the tiny config on a source."""

    def make(fields, **changes):
        config = tiny.config({"model.vision.image_size": made_pairs.SIDE, "batch_size": SIZE})
        config.data.update(workers=0, text_length=24, caption_length=24)
        config.data.update(window=16, index_dir=str(made[0] / "index"))
        config.data.update(fields | changes)
        return config

    return make


def take(batches, count):
    taken = [next(batches) for _ in range(count)]
    batches.close()
    return taken


def pairs_of(batches, tokenizer):
    """Every row's pixels and caption."""
    return [
        (image.tobytes(), tokenizer.decode(row[0], skip_special_tokens=True))
        for batch in batches
        for image, row in zip(batch["image"], batch["caption_tokens"], strict=True)
    ]


def stored(made):
    """The pixels and captions that were written."""
    from mmgem_jax.data.images import decode

    return [(np.asarray(decode(image)).tobytes(), caption.decode()) for image, caption in made[2]]


@pytest.mark.parametrize("kind", KINDS)
def test_every_pair_comes_once_an_epoch_in_another_order_each_time(made, config_of, kind):
    config = config_of(made[1][kind])
    found = pairs_of(take(training_batches(config, made[3]), 10), made[3])
    first, second = found[:COUNT], found[COUNT:]
    assert Counter(first) == Counter(second) == Counter(stored(made))
    assert first != second and first != stored(made)
    config.seed = 1
    assert pairs_of(take(training_batches(config, made[3]), 5), made[3]) != first


@pytest.mark.parametrize("kind", KINDS)
def test_hosts_share_the_batches_and_any_number_of_them_goes_on(made, config_of, kind):
    config = config_of(made[1][kind])
    whole = take(training_batches(config, made[3]), 8)  # past the end of an epoch
    parts = [training_batches(config, made[3], share, 4) for share in range(4)]
    taken = [take(part, 3) for part in parts]
    state = functools.reduce(merged, [part.get_state() for part in parts])
    others = [training_batches(config, made[3], share, 2) for share in range(2)]
    for other in others:
        other.set_state(state)
    assert_joined(taken, whole[:3])
    assert_joined([take(other, 5) for other in others], whole[3:])
    state = functools.reduce(merged, [other.get_state() for other in others])
    assert summed(state["seen"])[""]["used"] == 8 * SIZE


def assert_joined(parts, whole):
    for batch, *rows in zip(whole, *parts, strict=True):
        for name, value in batch.items():
            np.testing.assert_array_equal(np.concatenate([r[name] for r in rows]), value)


def test_workers_and_packing_change_nothing_of_tars(made, config_of):
    tar = made[1]["tar"]
    plain = take(training_batches(config_of(tar), made[3]), 6)
    assert_joined([take(training_batches(config_of(tar, workers=2), made[3]), 6)], plain)
    config = config_of(tar, packing=PACKING)
    packed = take(training_batches(config, made[3]), 5)
    images = {image.tobytes() for batch in packed for image in batch["image"] if image.any()}
    assert images <= {image for image, _ in stored(made)} and len(images) >= COUNT - 8


def test_kinds_can_be_mixed(made, config_of):
    config = config_of(made[1]["tfds"])
    mixed = {"a": made[1]["tar"] | {"weight": 2.0}, "b": made[1]["jsonl"], "c": made[1]["tfds"]}
    with config.data.unlocked():
        config.data.mixture = mixed
    batches = training_batches(config, made[3])
    found = Counter(int(batch["source"][0]) for batch in take(batches, 40))
    assert found == {0: 20, 1: 10, 2: 10}
    assert {n: s["used"] for n, s in summed(batches.counts()).items()} == {
        "a": 20 * SIZE,
        "b": 10 * SIZE,
        "c": 10 * SIZE,
    }


# ---- what is broken ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def some_broken(made, tmp_path_factory):
    """Tars of the pairs, with one of each of these between them; and how many of each cause."""
    whole = made[2][0][0]
    broken = [
        ((whole[: len(whole) // 2], b"cut"), "image"),
        ((b"not an image", b"text"), "image"),
        ((b"", b"nothing"), "no_image"),
        ((None, b"no image"), "no_image"),
        ((whole, None), "no_caption"),
        ((whole, b"  \n "), "no_caption"),
        ((whole, b"\xff\xfe\xfa"), "encoding"),
        ((whole, b"no object", b"[1]"), "annotation"),
        ((made_pairs.file_of(Image.new("RGB", (600, 1))), b"a line"), "aspect"),
        ((made_pairs.file_of(Image.new("L", (60, 60))), b"large"), "pixels"),
        ((made_pairs.file_of(Image.new("F", (8, 8)), "TIFF"), b"floats"), "channels"),
    ]
    examples = list(made[2])
    for place, (example, _) in enumerate(broken):
        examples.insert(4 * place + 2, example)
    folder = tmp_path_factory.mktemp("broken")
    fields = made[1]["tar"] | {"files": (made_pairs.write_tars(folder, examples, 3),)}
    return fields, Counter(cause for _, cause in broken)


def test_broken_examples_are_replaced_counted_by_cause_and_the_rest_is_whole(
    made, config_of, some_broken
):
    fields, causes = some_broken
    config = config_of(fields, max_pixels=2000)
    batches = training_batches(config, made[3])
    found = pairs_of(take(batches, 7), made[3])  # 51 records: an epoch
    known = stored(made)
    assert set(found) == set(known)
    metrics = skipped_metrics(batches.counts())
    assert metrics.pop("data/examples") == 56
    # Those met in the epoch's order, and more where the one in its place was broken as well.
    assert metrics.pop("data/skipped_share") >= 11 / 67
    counts = {name.removeprefix("data/skipped_"): n for name, n in metrics.items()}
    assert counts.keys() == causes.keys()
    assert all(counts[cause] >= causes[cause] for cause in causes)


def test_counts_do_not_depend_on_hosts_workers_or_restarts(made, config_of, some_broken):
    config = config_of(some_broken[0], max_pixels=2000)
    whole = training_batches(config, made[3])
    expected = take(whole, 6)
    parts = [training_batches(config, made[3], share, 2) for share in range(2)]
    for part in parts:
        take(part, 3)
    state = functools.reduce(merged, [part.get_state() for part in parts])
    config.data.workers = 1
    resumed = training_batches(config, made[3])
    resumed.set_state(state)
    assert_joined([take(resumed, 3)], expected[3:])
    assert summed(resumed.counts()) == summed(whole.counts())


def test_too_many_broken_ones_end_the_run_with_names(made, config_of, some_broken):
    config = config_of(some_broken[0], max_broken_share=0.0004, max_pixels=2000)
    batches = training_batches(config, made[3])
    with pytest.raises(UserError, match=r"^data: \d of the last \d+ .* \{.*tar/0") as error:
        take(batches, 6)
    assert "0.0004 (max_broken_share)" in str(error.value) and "\n" not in str(error.value)


def test_what_breaks_late_is_judged_by_itself(made, config_of, monkeypatch):
    """Whole examples that were seen long before do not weigh against it."""
    monkeypatch.setattr(counted_batches, "WINDOW", 16)
    batches = training_batches(config_of(made[1]["tar"], max_broken_share=0.4), made[3])
    for _ in range(20):
        next(batches)
    broken = nothing_but(batches.batches.batches, "image")
    monkeypatch.setattr(batches.batches, "batches", broken)
    with pytest.raises(UserError, match=r"8 of the last 16 examples are broken \{'image': 8\}"):
        take(batches, 1)


def nothing_but(batches, cause):
    """The same batches, but that every example was met after a broken one."""
    for batch in batches:
        column = np.zeros_like(batch["skipped"])
        column[:, CAUSES.index(cause)] = 1
        yield batch | {"skipped": column, "skipped_record": batch["record"]}


def test_nothing_but_broken_ones_is_an_error_at_once(made, config_of, tmp_path):
    fields = made[1]["tar"] | {"files": (made_pairs.write_tars(tmp_path, [(b"x", b"y")] * 4, 1),)}
    config = config_of(fields, max_broken_share=1.0)
    with pytest.raises(UserError, match=r"00000\.tar.*image: .*100 records in a row"):
        next(training_batches(config, made[3]))


def test_hosts_with_other_files_are_told_apart_though_they_have_as_many(made, config_of, tmp_path):
    """What the hosts compare, and what a position has, says more than a number of records."""
    other = made[1]["tar"] | {"files": (made_pairs.write_tars(tmp_path, made[2], 4),)}
    batches = [training_batches(config_of(f), made[3]) for f in (made[1]["tar"], other)]
    with pytest.raises(UserError, match=r"^data: files with 40 .*; expected 40 .* as when"):
        batches[1].set_state(batches[0].get_state())
    moved = made[1]["tar"] | {"files": (made_pairs.write_tars(tmp_path / "b", made[2], 3),)}
    training_batches(config_of(moved), made[3]).set_state(batches[0].get_state())


def test_other_data_than_those_of_the_position_are_refused(made, config_of, some_broken):
    batches = training_batches(config_of(made[1]["tar"]), made[3])
    state = batches.get_state()
    batches = training_batches(config_of(some_broken[0]), made[3])
    with pytest.raises(UserError, match=r"^data: files with 51 .*; expected 40 .* as when"):
        batches.set_state(state)


MISTAKES = [
    ({"files": ("nowhere/*.tar",)}, r"^data\.files: .*nowhere"),
    ({"files": ("{tars}/*.tar", "{lines}")}, r"^data\.files: found .* one kind"),
    ({"files": ("{images}",)}, r"^data\.files: found .*\.png .*expected \.tar"),
    ({"image_field": "picture"}, r"^data\.image_field: no field 'picture'"),
    ({"caption_template": "{caption}"}, r"^data\.caption_template: .*no field 'caption'"),
    ({"caption_template": "{txt|any}"}, r"^data\.caption_template: .*any"),
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES)
def test_a_mistake_names_its_field(made, config_of, changes, message):
    folder, fields = made[0], made[1]["tar"]
    places = {"tars": folder / "tars", "lines": folder / "lines" / "train.jsonl"}
    places["images"] = folder / "lines" / "*.png"
    if "files" in changes:
        changes = {"files": tuple(pattern.format(**places) for pattern in changes["files"])}
    with pytest.raises(UserError, match=message) as error:
        training_batches(config_of(fields, **changes), made[3])
    assert "\n" not in str(error.value)
