"""Reads a packed batch back into texts and captions, by the description of its arrays alone."""

import numpy as np

OF_ROWS = ("tokens", "segment_ids", "positions", "visual_index")


def unpack(batch, visual_tokens):
    """The regions of a packed batch; everything that its arrays promise is checked on the way.

    Returns:
      By (slot of the batch, region): the ids of `<s> text [EMB]` and of `<s> text </s>`.
    """
    (groups, _), (slots, R) = batch["targets"].shape, batch["region_mask"].shape
    texts, captions = {}, {}
    rows, slots = len(batch["tokens"]) // groups, slots // groups
    batch = batch | {"visual_index": with_text_rows(batch["visual_index"], groups, rows)}
    for group in range(groups):
        own = {name: batch[name][group * rows : (group + 1) * rows] for name in OF_ROWS}
        here = slice(group * slots, (group + 1) * slots)
        mask, places = batch["region_mask"][here], batch["embed_place"][here]
        assert not places[~mask].any()
        ends = {int(places[slot, k]): (slot, k) for slot, k in np.argwhere(mask)}
        assert len(ends) == mask.sum()
        used = batch["target_mask"][group]
        assert not batch["targets"][group][~used].any()
        assert not batch["target_place"][group][~used].any()
        states = batch["target_place"][group][used].tolist()
        targets = dict(zip(states, batch["targets"][group][used].tolist(), strict=True))
        assert len(targets) == used.sum()
        for start, segment in segments(own):
            size, visual = len(segment["tokens"]), segment["visual_index"]
            assert segment["positions"].tolist() == list(range(size))
            if visual[0] < 0:
                assert (visual == -1).all()
                slot, k = ends.pop(start + size - 1)
                texts[group * slots + int(slot), int(k)] = segment["tokens"].tolist()
                continue
            slot, k = divmod(int(visual[0]) // visual_tokens, R)
            first = (slot * R + k) * visual_tokens
            assert visual[:visual_tokens].tolist() == [*range(first, first + visual_tokens)]
            assert (visual[visual_tokens:] == -1).all()
            assert not segment["tokens"][:visual_tokens].any()
            words = segment["tokens"][visual_tokens:].tolist()
            after = [targets.pop(start + place) for place in range(visual_tokens, size)]
            assert words[1:] == after[:-1]
            assert mask[slot, k] and (group * slots + slot, k) not in captions
            captions[group * slots + slot, k] = [*words, after[-1]]
        assert not ends and not targets
    assert texts.keys() == captions.keys()
    return {key: (texts[key], captions[key]) for key in texts}


def with_text_rows(visual_index, groups, rows):
    """`visual_index` over all rows: those of texts alone, the first of a group, hold none."""
    of_groups = visual_index.reshape(groups, -1, visual_index.shape[1])
    missing = rows - of_groups.shape[1]
    whole = np.pad(of_groups, ((0, 0), (missing, 0), (0, 0)), constant_values=-1)
    return whole.reshape(-1, visual_index.shape[1])


def segments(own):
    """The segments of a group's rows: their first place, and their part of every array."""
    length = own["tokens"].shape[1]
    for row, ids in enumerate(own["segment_ids"]):
        filled = int((ids > 0).sum())
        assert not ids[filled:].any()  # one after the other from the row's beginning
        assert set(np.diff(ids[:filled], prepend=0)) <= {0, 1} and (not filled or ids[0] == 1)
        assert not own["tokens"][row, filled:].any() and not own["positions"][row, filled:].any()
        assert (own["visual_index"][row, filled:] == -1).all()
        for number in range(1, int(ids.max(initial=0)) + 1):
            places = np.flatnonzero(ids == number)
            yield row * length + places[0], {name: own[name][row, places] for name in OF_ROWS}
