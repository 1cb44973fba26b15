"""What packed rows save: the share of positions that are no padding, and what the planner costs."""

import time

import numpy as np

from mmgem_jax.data.caption_lengths import typical_words
from mmgem_jax.data.packing import CAPTION, TEXT, Candidate, Packing, Segment, plan_group

VISUAL_TOKENS, GROUPS = 64, 500

# For each kind of data the most tokens of a text and of a caption, and the flagship's groups.
KINDS = {
    "short captions": (77, Packing(40, 17, 256, 860, 0, 8, VISUAL_TOKENS)),
    "long captions": (1024, Packing(32, 8, 1536, 5056, 0, 32, VISUAL_TOKENS)),
}


def candidates(length, count):
    """Images in random order, each with a text and a caption of as many words."""
    words = np.random.default_rng(0).permutation(typical_words(length, count)).tolist()
    found = []
    for number, size in enumerate(words):
        text = Segment(size + 2, TEXT, 0)
        caption = Segment(VISUAL_TOKENS + size + 1, CAPTION, 0)
        found.append(Candidate(number, {}, [caption, text], text.length + caption.length))
    return found


def benchmark_packing(row):
    """Rows (made by `row`) for each kind: positions and slots in use, and the planner's speed."""
    rows = []
    for name, (length, packing) in KINDS.items():
        drawn = candidates(length, packing.images * GROUPS + packing.waiting)
        stream, waiting, used, images = iter(drawn), [], 0, 0
        began = time.process_time()
        for _ in range(GROUPS):
            placed, waiting = plan_group(packing, waiting, stream.__next__)
            images += len(placed)
            used += sum(candidate.tokens for candidate, _ in placed)
        spent = time.process_time() - began
        packed = used / (GROUPS * packing.rows * packing.row_length)
        # Of padded rows a text has one, and a caption, without its </s>, one with visual tokens.
        padded = np.mean([candidate.tokens for candidate in drawn])
        padded /= length + VISUAL_TOKENS + length - 1
        filled = images / (GROUPS * packing.images)
        rows += [
            row(f"{name}: positions in use", packed, "share", padded, "padded rows"),
            row(f"{name}: image slots in use", filled, "share"),
            row(f"{name}: images planned a second and core", images / spent, "1/s"),
        ]
    return rows
