"""What is counted of a source's batches: how much they hold, how long texts are, what is masked."""

import jax
import jax.numpy as jnp
import numpy as np

from mmgem_jax.contrastive import Marks, Masks, rivals
from mmgem_jax.data import seen
from mmgem_jax.objective import pairs_of

BARS = 16  # of a histogram at most
BAR_LETTERS = 40  # of the longest bar in print
CHUNK = 512  # pairs that are compared with the whole batch at a time
REGION_COUNTS = ("drawn", "over the limit", "out of view", "unusable")


def facts_of(config, data, source):
    """What is counted of a source, as JSON."""
    batches, visual_tokens = source.batches, config.model.generation_grid**2
    masks = np.concatenate([batch["region_mask"] for batch in batches])
    cut = np.concatenate([batch["truncated"] for batch in batches])[masks]
    texts = np.concatenate([seen.text_lengths(batch) for batch in batches])
    captions = np.concatenate([seen.caption_lengths(batch, visual_tokens) for batch in batches])
    counts = sum(batch["region_counts"].sum(axis=0) for batch in batches).tolist()
    masked = np.concatenate([masked_counts(config, batch) for batch in batches])
    negatives = sum(n * (n - 1) for n in (int(batch["region_mask"].sum()) for batch in batches))
    return {
        "batches": len(batches),
        "images": sum(source.filled),
        "empty_slots": masks.shape[0] - sum(source.filled),
        "images_without_pairs": sum(source.filled) - int(masks.any(axis=1).sum()),
        "pairs": int(masks.sum()),
        "padding_share": 1 - float(np.mean([seen.used_share(batch) for batch in batches])),
        "packed": "segment_ids" in batches[0],
        "text": lengths_of(texts, data.text_length, cut[:, 0]),
        "caption": lengths_of(captions, data.caption_length, cut[:, 1]),
        "regions": dict(zip(REGION_COUNTS, counts, strict=True)) if data.regions_field else None,
        "pairs_with_others_alike": int((masked > 0).sum()),
        "negatives_masked_share": float(masked.sum() / max(negatives, 1)),
        "examples": source.skipped,
    }


def lengths_of(lengths, most, cut):
    """Of the tokens of texts: how many at most, mean, longest, share cut, a histogram."""
    return {
        "most": most,
        "mean": float(lengths.mean()) if len(lengths) else 0.0,
        "longest": int(lengths.max(initial=0)),
        "cut_share": float(cut.mean()) if len(cut) else 0.0,
        "histogram": histogram(lengths, most),
    }


def histogram(lengths, most):
    """Counts by length or range of lengths, from the shortest that there can be, 2, to `most`."""
    width = -(-(most - 1) // BARS)
    lows = range(2, most + 1, width)
    counts = np.bincount((np.asarray(lengths, int) - 2) // width, minlength=len(lows))
    ends = [min(low + width - 1, most) for low in lows]
    names = [
        f"{low}" if low == end else f"{low}-{end}" for low, end in zip(lows, ends, strict=True)
    ]
    return dict(zip(names, counts.tolist(), strict=True))


def masked_counts(config, batch):
    """How many pairs of a batch are no negatives of each of its pairs, int [valid pairs]."""
    places = np.flatnonzero(batch["region_mask"])
    parts = np.split(places, range(CHUNK, len(places), CHUNK))
    return np.concatenate([masked_rows(config, batch, part).sum(axis=1) for part in parts])


def masked_rows(config, batch, places):
    """Which pairs are no negatives of those at these places of a batch: bool [places, B R]."""
    masks = Masks(config.loss.mask_duplicates, config.loss.mask_overlap)
    pairs = masks.looked_at(jax.tree.map(jnp.asarray, pairs_of(batch)))
    every = Marks(pairs, jnp.arange(batch["region_mask"].size))
    _, masked = rivals(jax.tree.map(lambda column: column[places], every), every, masks)
    return np.zeros((len(places), len(every.place)), bool) if masked is None else np.array(masked)


# ---- in words ------------------------------------------------------------------------------------


def fact_lines(facts):
    """What is counted of a source, as lines for people."""
    padded = "of rows" if facts["packed"] else "of padded texts and captions"
    named = {
        "batches": facts["batches"],
        "images": facts["images"],
        "pairs": facts["pairs"],
        "images without a pair": facts["images_without_pairs"],
        "empty slots": facts["empty_slots"],
    }
    counts = ", ".join(f"{name} {number}" for name, number in named.items())
    lines = [f"{counts}; {facts['padding_share']:.1%} {padded} is padding"]
    for kind in ("text", "caption"):
        own = facts[kind]
        lines.append(
            f"{kind}s: {own['mean']:.1f} tokens in the mean, {own['longest']} the longest of "
            f"{own['most']} at most; {own['cut_share']:.1%} cut to fit"
        )
    if facts["regions"]:
        found = ", ".join(f"{number} {why}" for why, number in facts["regions"].items())
        lines.append(f"regions: {found}")
    lines.append(
        f"{facts['pairs_with_others_alike']} pairs have others that are no negatives of them: "
        f"{facts['negatives_masked_share']:.2%} of negatives masked"
    )
    skipped = {cause: n for cause, n in facts["examples"].items() if n}
    lines.append("examples: " + ", ".join(f"{n} {cause}" for cause, n in skipped.items()))
    return lines


def printed(summary):
    """The summary as text, with the histograms."""
    rate = summary["images_per_second"]
    speed = f", then {rate:g} images a second" if rate else ""
    lines = [
        f"{summary['batches']} batches of {summary['batch_size']} images; first one after "
        f"{summary['seconds_to_first_batch']:g} s{speed} ({summary['workers']} workers)"
    ]
    for name, facts in summary["sources"].items():
        lines += ["", f"{name or 'data'}", *(f"  {line}" for line in fact_lines(facts))]
        for kind in ("text", "caption"):
            lines.append(f"  tokens of {kind}s")
            most = max(facts[kind]["histogram"].values(), default=0) or 1
            for name, count in facts[kind]["histogram"].items():
                bar = "#" * round(BAR_LETTERS * count / most)
                lines.append(f"  {name:>11s} {count:>8d} {bar}".rstrip())
    return "\n".join(lines)
