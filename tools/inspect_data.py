"""Shows what the model is given: the very batches of a run, as pictures, texts and counts.

    python tools/inspect_data.py --config configs/emoji.py --out workdirs/data
    python tools/inspect_data.py --config configs/emoji_regions.py --out workdirs/data --images 8

Of every source of the config's data a contact sheet: images after augmentation with the boxes of
their regions, texts and captions as their tokens are read back, what was cut, what is padding, and
which pairs are not each other's negatives. The counts are printed, and are in `summary.json`.
"""

import contextlib
import itertools
import time
from pathlib import Path

import numpy as np
from absl import flags
from inspect_counts import REGION_COUNTS, fact_lines, facts_of, masked_rows, printed
from inspect_sheet import Card, Histogram, PairCard, Words, draw_sheet

from mmgem_jax import command_line, run
from mmgem_jax.data import seen
from mmgem_jax.data.counted_batches import summed
from mmgem_jax.data.pipeline import training_batches
from mmgem_jax.data.sources import sources
from mmgem_jax.errors import UserError
from mmgem_jax.evaluation.drawing import save_sheet
from mmgem_jax.evaluation.results import check_writable, write_result

NAMED = 4  # pairs that a pair names as like it


def inspect(config, folder, count, shown):
    """Writes the sheets and `summary.json`.

    Args:
      config: the whole config.
      folder: where to; made if need be.
      count: batches to read; more where they lack a source.
      shown: images of each source's sheet.

    Returns:
      What is in `summary.json`.
    """
    for name, value, least in (("batches", count, 1), ("images", shown, 0)):
        if value < least:
            raise UserError(f"--{name}: found {value}, expected {least} or more")
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder}: {error.strerror}; expected a folder") from None
    check_writable(folder / "summary.json")
    tokenizer = run.load_run_tokenizer(config)
    config = run.complete(config, tokenizer)
    found = read(config, tokenizer, count, shown)
    summary = {
        "batch_size": config.batch_size,
        "workers": config.data.workers,
        "batches": sum(len(source.batches) for source in found.sources.values()),
        "seconds_to_first_batch": round(found.first_seconds, 2),
        "images_per_second": found.rate and round(found.rate, 1),
        "sources": {},
    }
    for name, source in found.sources.items():
        facts = summary["sources"][name] = facts_of(config, sources(config.data)[name], source)
        cards = cards_of(config, tokenizer, source)
        title = f"{name or 'data'}: what the model is given"
        sheet = draw_sheet(title, fact_lines(facts), histograms_of(facts), cards)
        save_sheet(sheet, folder / f"{(name or 'data').replace('/', '_')}.png")
    write_result(folder / "summary.json", summary)
    return summary


# ---- reading -------------------------------------------------------------------------------------


class Read:
    """What was read of a source.

    Attributes:
      batches: without their images.
      filled: images of each of them; slots of a packed batch may hold none.
      examples: Seen, of the first batch, and
      names: of their records.
      skipped: examples used, and skipped by cause.
    """

    def __init__(self):
        self.batches, self.filled = [], []
        self.examples, self.names, self.skipped = [], [], {}


class Found:
    """What was read: Read by source, seconds to the first batch, images a second after it."""

    def __init__(self, names):
        self.sources = {name: Read() for name in names}
        self.first_seconds = self.rate = None


def read(config, tokenizer, count, shown):
    """Reads batches as training does, of one process, until every source has come; a Found."""
    names = tuple(sources(config.data))
    found, began = Found(names), time.perf_counter()
    with contextlib.closing(training_batches(config, tokenizer)) as batches:
        for taken in itertools.count(1):
            batch = next(batches)
            source = found.sources[names[batch["source"][0]]]
            if not source.batches:
                slots = filled(batch)[:shown].tolist()
                source.examples = seen.seen_in(batch, slots, config.model.generation_grid**2)
                source.names = names_of(batches, slots)
            source.filled.append(len(batches.last[1]))
            # Copies: a batch of a worker's goes when the next one comes.
            source.batches.append({k: np.array(v) for k, v in batch.items() if k != "image"})
            if taken == 1:
                after_first, images = time.perf_counter(), 0
                found.first_seconds = after_first - began
            else:
                images += source.filled[-1]
            if taken >= count and all(source.batches for source in found.sources.values()):
                break
        seconds = time.perf_counter() - after_first
        found.rate = images / seconds if images else None
        for name, counts in summed(batches.counts()).items():
            found.sources[name].skipped = counts
    return found


def filled(batch):
    """Places of the images in a batch; of a packed one some may be empty."""
    if "segment_ids" not in batch:
        return np.arange(len(batch["image"]))
    return np.flatnonzero(batch["region_mask"].any(axis=1) | batch["image"].any(axis=(1, 2, 3)))


def names_of(batches, slots):
    """What to call the records of the first slots that hold an image."""
    source, numbers = batches.last
    return batches.names(source, numbers[: len(slots)])


# ---- what is drawn -------------------------------------------------------------------------------


def cards_of(config, tokenizer, source):
    """A Card of every example shown."""
    if not source.examples:
        return []
    batch = source.batches[0]
    labels = {
        pair.number: f"{place}.{number}"
        for place, example in enumerate(source.examples, 1)
        for number, pair in enumerate(example.pairs, 1)
    }
    rows = masked_rows(config, batch, np.array(list(labels), int))
    alike = {number: np.flatnonzero(row).tolist() for number, row in zip(labels, rows, strict=True)}
    room = None
    if "segment_ids" not in batch:
        room = batch["text_tokens"].shape[-1], batch["caption_tokens"].shape[-1]
    cards = []
    for place, (example, name) in enumerate(zip(source.examples, source.names, strict=True), 1):
        pairs = [pair_card(tokenizer, pair, labels, alike, room) for pair in example.pairs]
        title = f"{place}: {name}"
        cards.append(Card(title, example.image, pairs, notes_of(example, room)))
    return cards


def pair_card(tokenizer, pair, labels, alike, room):
    """The PairCard of a Pair.

    Args:
      tokenizer: the run's.
      pair: a seen.Pair.
      labels: what the pairs shown are called, by their number in the batch.
      alike: of each of them, the numbers of those that are no negatives of it.
      room: tokens of a padded text and caption, None where rows are packed.
    """
    kinds = (("text", pair.text, pair.text_cut), ("caption", pair.caption, pair.caption_cut))
    words = []
    for place, (kind, ids, cut) in enumerate(kinds):
        unused = room[place] - len(ids) if room else 0
        padding = f", then {unused} of padding" if unused else ""
        note = f"{kind}, {len(ids)} tokens{padding}"
        words.append(Words(read_back(tokenizer, ids), note, "cut to fit" if cut else ""))
    others = alike[pair.number]
    named = [labels[other] for other in others if other in labels][:NAMED]
    more = len(others) - len(named)
    named += [f"{more} more in the batch"] if more else []
    said = f"no negatives of it: {', '.join(named)}" if named else ""
    return PairCard(pair.box, words, said, min([pair.number, *others]))


def read_back(tokenizer, ids):
    """A row's text, with the tokens that begin and end it."""
    first, last = tokenizer.convert_ids_to_tokens([ids[0], ids[-1]])
    inner = tokenizer.decode(ids[1:-1], skip_special_tokens=False)
    return " ".join(filter(None, (first, inner.strip(), last)))


def notes_of(example, room):
    """What stands below an image."""
    notes = ["{1} x {0} pixels".format(*example.image.shape)]
    if any(example.counts):
        counts = zip(example.counts, REGION_COUNTS, strict=True)
        notes.append("regions: " + ", ".join(f"{n} {why}" for n, why in counts if n))
    if example.padding and room:
        notes.append(f"{example.padding} of its rows are padding")
    if not example.pairs:
        notes.append("no pair: it counts in no loss")
    return notes


def histograms_of(facts):
    """The two of a source."""
    return [
        Histogram(f"tokens of {kind}s", facts[kind]["histogram"]) for kind in ("text", "caption")
    ]


if __name__ == "__main__":
    CONFIG = command_line.define_config()
    OUT = flags.DEFINE_string("out", None, "folder for the sheets and summary.json", required=True)
    BATCHES = flags.DEFINE_integer("batches", 8, "how many to read and count")
    IMAGES = flags.DEFINE_integer("images", 12, "images of each source's sheet")

    def main():
        """Writes and prints what the config's batches hold."""
        print(printed(inspect(CONFIG.value, OUT.value, BATCHES.value, IMAGES.value)))

    command_line.run(main)
