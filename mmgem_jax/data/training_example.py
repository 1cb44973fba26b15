"""One record to one row of a batch: a view of its image, its boxes, its words as tokens."""

import numpy as np

from mmgem_jax.data import images, text
from mmgem_jax.data.broken import CAUSES, Broken
from mmgem_jax.data.image_files import Limits
from mmgem_jax.data.sources import regions_an_image
from mmgem_jax.data.tokenizer import caption_row, embedding_row
from mmgem_jax.errors import UserError
from mmgem_jax.models.pooling import WHOLE_IMAGE, good_boxes

MOST_IN_A_ROW = 100  # broken records, after which there seem to be no others


def corners(boxes):
    """TFDS's boxes [R, 4] (ymin, xmin, ymax, xmax) as ours: x0, y0, x1, y1."""
    return np.asarray(boxes, np.float32).reshape(-1, 4)[:, [1, 0, 3, 2]]


def columns_of(record, field):
    """Texts and boxes [R, 4] of the regions of a record; raises Broken.

    TFDS has them as a dict of lists, JSON as a list of dicts. A text that is none is empty.
    """
    regions = record.get(field)
    try:
        if isinstance(regions, (list, tuple)):
            regions = {name: [r[name] for r in regions] for name in ("bbox", "text")}
        boxes = corners(regions["bbox"])
        words = [text_of(value) for value in regions["text"]]
    except (LookupError, TypeError, ValueError, OverflowError):
        raise Broken("annotation", f"{field} is no list of bbox and text") from None
    if len(words) != len(boxes):
        raise Broken("annotation", f"{field} has {len(boxes)} boxes and {len(words)} texts")
    return words, boxes


def text_of(value):
    """The text of a region; none where it cannot be read, which does not break its image."""
    try:
        return text.as_text(value).strip()
    except Broken:
        return ""


class TrainingExample:
    """The examples of a source: rows of a batch (shapes at the top of mmgem_jax/objective.py).

    Beside what the model is given, three entries are for the host:
      record          int64 []        number of the record in its source
      skipped         int32 [CAUSES]  broken records met before it, by cause
      skipped_record  int64 []        the first of them; -1: none

    Args:
      records: the source (mmgem_jax/data/sources.py).
      image_size: pixels a side.
      data: the source's config.
      tokenizer: from `load_tokenizer`.
      source: the source's place among all.
    """

    def __init__(self, records, image_size, data, tokenizer, source=0):
        self.records = records
        self.image_size, self.tokenizer, self.source = image_size, tokenizer, np.int32(source)
        # Plain values: looked up for every example, a ConfigDict and a tokenizer's properties cost
        # more than the work between.
        self.pad = tokenizer.pad_token_id
        self.image_field, self.templates = data.image_field, list(data.text_templates)
        self.shares = np.cumsum(data.text_weights) / np.sum(data.text_weights)
        self.caption_template = data.caption_template
        self.text_length, self.caption_length = data.text_length, data.caption_length
        self.augment = images.Augmentation(**data.augment)
        self.limits = Limits(data.max_pixels, data.max_aspect)
        self.whole_image, self.regions_field = data.whole_image, data.regions_field
        self.max_regions, self.min_visible = data.max_regions, data.min_visible
        empty = self.row(WHOLE_IMAGE, "", "")
        self.padding = {name: np.zeros_like(value) for name, value in empty.items()}
        self.rows = regions_an_image(data)

    def __call__(self, number, rng):
        """The example of a record, or, where that is broken, of another one at random.

        So a position in the sequence is one example, whatever is broken: it says where a run is.

        Raises:
          UserError: hardly any record is whole.
        """
        skipped, first = np.zeros(len(CAUSES), np.int32), -1
        while skipped.sum() < MOST_IN_A_ROW:
            try:
                example = self.example(self.records[number], rng)
            except Broken as broken:
                last, why = number, broken
                skipped[CAUSES.index(broken.cause)] += 1
                first = number if first < 0 else first
                number = int(rng.integers(len(self.records)))
                continue
            host = {"record": number, "skipped_record": first}
            host = {name: np.int64(value) for name, value in host.items()}
            return example | host | {"skipped": skipped}
        raise UserError(
            f"{self.records.name_of(last)}: {why}; so were {MOST_IN_A_ROW} records in a row; "
            "expected whole ones"
        )

    def example(self, record, rng):
        """What the model is given of a record; raises Broken."""
        rows = [self.row(*self.draw_whole_image(record, rng))] if self.whole_image else []
        encoded = record.get(self.image_field)
        if encoded is None or len(encoded) == 0:
            raise Broken("no_image")
        if not isinstance(encoded, bytes):
            raise Broken("image", f"{self.image_field} is a {type(encoded).__name__}, not bytes")
        pixels, view = images.augment(
            encoded,
            self.image_size,
            self.augment,
            rng,
            squashed=bool(self.regions_field),
            limits=self.limits,
        )
        counts = (0, 0, 0, 0)
        if self.regions_field:
            regions, counts = self.draw_regions(columns_of(record, self.regions_field), view, rng)
            rows += [self.row(*region) for region in regions]
        rows += [self.padding] * (self.rows - len(rows))
        columns = {name: np.stack([row[name] for row in rows]) for name in self.padding}
        counts = np.asarray(counts, np.int32)
        return {"image": pixels} | columns | {"region_counts": counts, "source": self.source}

    def draw_whole_image(self, record, rng):
        """Box, text and caption of the whole image."""
        template = self.templates[np.searchsorted(self.shares, rng.random(), side="right")]
        words = text.fill(template, record, rng)
        return WHOLE_IMAGE, words, text.fill(self.caption_template, record, rng)

    def draw_regions(self, regions, view, rng):
        """Box, text and caption of regions of a record that a view of its image shows.

        Args:
          regions: of `columns_of`.
          view: of `images.augment`.
          rng: numpy Generator.

        Returns:
          At most `max_regions` of them, drawn at random; and how many were drawn, over that limit,
          out of the view, and unusable (without a text, or with no box within the image).
        """
        words, boxes = regions
        usable = good_boxes(boxes) & np.asarray([bool(word) for word in words], bool)
        words, boxes = [w for w, kept in zip(words, usable, strict=True) if kept], boxes[usable]
        boxes, visible = images.boxes_in_view(view, boxes)
        seen = np.flatnonzero(visible >= self.min_visible)
        drawn = rng.permutation(seen)[: self.max_regions]
        over, unseen = len(seen) - len(drawn), len(boxes) - len(seen)
        counts = len(drawn), over, unseen, len(usable) - len(boxes)
        return [(boxes[i], words[i], words[i]) for i in drawn], counts

    def row(self, box, words, caption):
        """The arrays of one region."""
        text_row, embed_index, text_cut = embedding_row(self.tokenizer, words, self.text_length)
        caption_tokens, caption_cut = caption_row(self.tokenizer, caption, self.caption_length)
        return {
            "boxes": np.asarray(box, np.float32),
            "region_mask": np.bool_(True),
            "text_tokens": text_row,
            "embed_index": np.int32(embed_index),
            "caption_tokens": caption_tokens,
            "caption_length": np.int32(np.count_nonzero(caption_tokens != self.pad)),
            "group_ids": np.asarray([text.text_id(caption), text.text_id(words)], np.int32),
            "truncated": np.asarray([text_cut, caption_cut]),
        }
