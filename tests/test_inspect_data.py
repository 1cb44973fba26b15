"""tools/inspect_data.py: what it shows is what the batches hold, and every letter has its place."""

import json
import subprocess
import sys
from pathlib import Path

import inspect_counts
import inspect_data
import inspect_sheet
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageDraw
from unpacked import unpack

from mmgem_jax import losses, run
from mmgem_jax.data import seen
from mmgem_jax.data.pipeline import training_batches
from mmgem_jax.data.tokenizer import EMB
from mmgem_jax.errors import UserError
from mmgem_jax.objective import pairs_of

ROOT = Path(__file__).parents[1]
VISUAL_TOKENS = 4  # G of the configs below
PACKING = {
    "drawings": dict(rows=3, row_length=18, targets=15),
    "regions": dict(rows=16, row_length=24, targets=90),
    "scenes": dict(rows=3, row_length=500, targets=150, text_rows=1),
}


@pytest.fixture(scope="module")
def packed_config(regions_config):
    """Three sources, one of them with rows of texts alone, whose groups have empty slots."""
    config = regions_config({"data.packing.images": 4, "data.packing.waiting": 3})
    with config.data.mixture.unlocked():
        for name, packing in PACKING.items():
            config.data.mixture[name].packing = packing
    return config


@pytest.fixture(scope="module")
def batch_of_each(regions_config, packed_config):
    """By whether rows are packed and by the source's place: a batch."""
    found = {}
    for packed, config in ((False, regions_config()), (True, packed_config)):
        batches = training_batches(config, run.load_run_tokenizer(config))
        while sum(kind is packed for kind, _ in found) < 3:
            batch = next(batches)
            found[packed, int(batch["source"][0])] = batch
        batches.close()
    return found


def all_seen(batch):
    return seen.seen_in(batch, range(len(batch["image"])), VISUAL_TOKENS)


# ---- a batch read back ---------------------------------------------------------------------------


@pytest.mark.parametrize("source", range(3))
def test_packed_rows_are_read_back_as_by_their_description(batch_of_each, source):
    batch = batch_of_each[True, source]
    R = batch["region_mask"].shape[1]
    expected = {slot * R + k: texts for (slot, k), texts in unpack(batch, VISUAL_TOKENS).items()}
    pairs = [pair for example in all_seen(batch) for pair in example.pairs]
    assert {pair.number: (pair.text, pair.caption) for pair in pairs} == expected
    assert len(expected) > 10
    lengths = sorted(len(pair.text) for pair in pairs), sorted(len(p.caption) for p in pairs)
    assert sorted(seen.text_lengths(batch)) == lengths[0]
    assert sorted(seen.caption_lengths(batch, VISUAL_TOKENS)) == lengths[1]


@pytest.mark.parametrize("source", range(3))
def test_padded_rows_are_read_back_without_their_padding(batch_of_each, regions_config, source):
    batch = batch_of_each[False, source]
    tokenizer = run.load_run_tokenizer(regions_config())
    pad, end = tokenizer.pad_token_id, tokenizer.convert_tokens_to_ids(EMB)
    places, used = 0, 0
    for example in all_seen(batch):
        np.testing.assert_array_equal(example.image, batch["image"][example.slot])
        mask = batch["region_mask"][example.slot]
        assert (len(example.pairs), example.padding) == (mask.sum(), (~mask).sum())
        for pair, region in zip(example.pairs, np.flatnonzero(mask), strict=True):
            for name, ids in (("text_tokens", pair.text), ("caption_tokens", pair.caption)):
                row = batch[name][example.slot, region].tolist()
                assert ids == [token for token in row if token != pad]
                used += len(ids)
            assert pair.text[-1] == end and pair.caption[-1] == tokenizer.eos_token_id
            assert (pair.box == batch["boxes"][example.slot, region]).all()
        places += batch["text_tokens"][0].size + batch["caption_tokens"][0].size
    assert seen.used_share(batch) == pytest.approx(used / places)


@pytest.mark.parametrize("changes", [{}, {"loss.mask_duplicates": False}, {"loss.mask_overlap": 1}])
@pytest.mark.parametrize("packed", [False, True])
def test_masked_pairs_are_those_of_the_loss(batch_of_each, regions_config, packed, changes):
    config, batch = regions_config(changes), batch_of_each[packed, 1]
    for name in ("group_ids", "boxes"):
        batch = batch | {name: batch[name].copy()}
    batch["boxes"][:, 1] = batch["boxes"][:, 0]  # regions that overlap
    batch["group_ids"][3, :1] = batch["group_ids"][0, :1]
    size = batch["region_mask"].size
    noise = np.random.default_rng(0).standard_normal((2, size, 8)).astype(np.float32)
    weights, pairs = config.loss, pairs_of(batch)
    _, metrics = losses.info_nce(
        *jnp.asarray(noise), 1.0, pairs, weights.mask_duplicates, weights.mask_overlap
    )
    valid = batch["region_mask"].sum()
    counts = inspect_counts.masked_counts(config, batch)
    assert len(counts) == valid
    assert counts.sum() / (valid * (valid - 1)) == pytest.approx(float(metrics["masked_share"]))
    assert counts.sum() > 0


# ---- counts --------------------------------------------------------------------------------------


def test_a_histogram_counts_every_length_once():
    lengths = np.random.default_rng(0).integers(2, 78, 500)
    bars = inspect_counts.histogram(lengths, 77)
    assert len(bars) <= inspect_counts.BARS and sum(bars.values()) == 500
    ends = [[int(end) for end in name.split("-")] for name in bars]
    assert ends[0][0] == 2 and ends[-1][-1] == 77
    for (low, *high), count in zip(ends, bars.values(), strict=True):
        assert count == ((lengths >= low) & (lengths <= (high or [low])[0])).sum()


def test_the_sheets_and_the_summary_are_of_the_first_batches(packed_config, tmp_path, monkeypatch):
    drawn = {}
    real = inspect_data.draw_sheet

    def noted(title, facts, histograms, cards):
        drawn[title.partition(":")[0]] = cards
        return real(title, facts, histograms, cards)

    monkeypatch.setattr(inspect_data, "draw_sheet", noted)
    summary = inspect_data.inspect(packed_config, tmp_path / "new" / "sheets", 1, 3)
    assert summary == json.loads((tmp_path / "new" / "sheets" / "summary.json").read_text())
    assert set(drawn) == set(summary["sources"]) == {"drawings", "regions", "scenes"}
    taken, names = {}, list(packed_config.data.mixture)
    batches = training_batches(packed_config, run.load_run_tokenizer(packed_config))
    for _ in range(summary["batches"]):
        batch = next(batches)
        taken.setdefault(names[batch["source"][0]], []).append(batch)
    batches.close()
    for name, own in taken.items():
        facts = summary["sources"][name]
        assert facts["batches"] == len(own)
        assert facts["pairs"] == sum(batch["region_mask"].sum() for batch in own)
        assert facts["pairs"] == sum(facts["text"]["histogram"].values())
        assert facts["images"] == facts["examples"]["used"] <= 16 * len(own)
        shown = [example.image for example in all_seen(own[0]) if example.pairs][:3]
        for card, image in zip(drawn[name], shown, strict=True):
            np.testing.assert_array_equal(card.image, image)
            assert all(words.text.startswith("<s> ") for p in card.pairs for words in p.words)
            assert card.pairs[0].words[0].text.endswith(" [EMB]")
            assert card.pairs[0].words[1].text.endswith(" </s>")
        with Image.open(tmp_path / "new" / "sheets" / f"{name}.png") as sheet:
            assert sheet.width == 1752
    said = inspect_counts.printed(summary)
    assert f"pairs {summary['sources']['regions']['pairs']}" in said and "#" in said


# ---- the sheet -----------------------------------------------------------------------------------


def card(number, texts, alike="", title="shards/00012.tar/000123"):
    """A card whose image has a region for each text."""
    boxes = np.float32([[0.1 * k, 0.1 * k, 0.1 * k + 0.3, 1] for k in range(len(texts))])
    pairs = [
        inspect_sheet.PairCard(
            box,
            [
                inspect_sheet.Words(f"<s> {text} {end}", f"{kind}, 77 tokens", "cut to fit")
                for kind, end in (("text", "[EMB]"), ("caption", "</s>"))
            ],
            alike,
            number,
        )
        for box, text in zip(boxes, texts, strict=True)
    ]
    notes = ["64 x 48 pixels", "regions: 4 drawn, 3 over the limit, 2 out of view, 1 unusable"]
    return inspect_sheet.Card(title, np.full((48, 64, 3), number, np.uint8), pairs, notes)


def test_all_that_is_written_stands_within_its_card_and_apart(monkeypatch):
    written, real = [], ImageDraw.ImageDraw.text

    def noted(draw, corner, text, *args, **options):
        font, anchor = args[1], options.get("anchor")
        box = draw.textbbox(corner, text, font, anchor)
        written.append((draw.im, box, text))
        return real(draw, corner, text, *args, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", noted)
    long, alike = "a red fox jumps " * 30, "no negatives of it: " + ", ".join(["12.10"] * 9)
    texts = ["x", long, "w" * 400, "猫がソファで寝ている " * 9, "ﷺ", "Käfer, grün"]
    cards = [card(0, texts, alike), card(1, [long], title=long), card(2, []), card(3, ["x"] * 9)]
    bars = {f"{64 * n}-{64 * n + 63}": 10 ** (n % 9) for n in range(16)}
    histograms = [inspect_sheet.Histogram("tokens", bars)] * 2
    sheet = inspect_sheet.draw_sheet("title " * 60, [long, "facts"], histograms, cards)
    by_picture = {}  # all of them are in `written`: no two have the same id
    for picture, box, text in written:
        width, height = picture.size
        assert box[0] >= 0 and box[1] >= 0 and box[2] <= width and box[3] <= height, text
        by_picture.setdefault(id(picture), []).append((box, text))
    assert len(by_picture) > 4
    for boxes in by_picture.values():
        for place, (box, text) in enumerate(boxes):
            for other, second in boxes[:place]:
                width = min(box[2], other[2]) - max(box[0], other[0])
                height = min(box[3], other[3]) - max(box[1], other[1])
                assert width <= 1 or height <= 1, f"{text!r} over {second!r}"
    assert sheet.width == 1752


def test_of_a_long_text_both_ends_are_shown():
    lines = inspect_sheet.text_lines(f"<s> {'a red fox jumps ' * 30} [EMB]", 250, 3)
    assert len(lines) == 3
    assert lines[0][0].startswith("<s> a red") and lines[-1][0].endswith("… [EMB]")
    assert [ends for _, ends in lines] == [(True, False), (False, False), (False, True)]
    assert inspect_sheet.text_lines("<s> a [EMB]", 250, 3) == [("<s> a [EMB]", (True, True))]


# ---- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folder", "count", "shown", "message"),
    [
        ("new", 0, 1, "--batches: found 0, expected 1 or more"),
        ("new", 1, -1, "--images: found -1, expected 0 or more"),
        ("file", 1, 1, r"--out .*file: File exists; expected a folder"),
    ],
)
def test_what_cannot_be_is_refused(emoji_config, tmp_path, folder, count, shown, message):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=message):
        inspect_data.inspect(emoji_config(), tmp_path / folder, count, shown)
    assert not (tmp_path / "new").exists()


def test_a_users_mistake_is_one_line(tmp_path):
    command = ["tools/inspect_data.py", "--config", "configs/emoji_fixture.py", "--out", tmp_path]
    command += [f"--config.data.dir={tmp_path}"]
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: data.name: no data set 'emoji/fixture' in data.dir")
