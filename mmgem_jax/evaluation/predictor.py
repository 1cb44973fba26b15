"""What a model says of images, their regions and texts, in batches of one size over a mesh.

Of a whole data set only embeddings, captions and log probabilities are held: its images are opened,
decoded and let go a batch at a time; of several processes each opens those of its own rows, and all
end up with all answers. Everything that is asked of an image, whole or not, is asked
of the feature map of one pass through the vision tower. All that is asked has `batch_size` rows,
filled up where there are fewer, so that each program is compiled once whatever the counts.

Axes: I images, T texts, B rows of a batch, C candidate texts, E joint embedding, H x W cells of
the feature map, D its width.
"""

import dataclasses

import grain
import jax
import jax.numpy as jnp
import numpy as np

from mmgem_jax import sharding
from mmgem_jax.data.tokenizer import caption_row, embedding_row
from mmgem_jax.errors import UserError
from mmgem_jax.evaluation.progress import not_shown
from mmgem_jax.generate import generate, text_log_probs
from mmgem_jax.models.mmgem import MMGem
from mmgem_jax.models.pooling import WHOLE_IMAGE, boxes_around_cells
from mmgem_jax.trained_run import caption_tokens

THREADS = 4  # that open and decode images
LOGITS_A_DEVICE = 2**28  # held at once while texts are scored: 1 GiB in fp32
MOST_CANDIDATES = 64  # texts of an image that are scored at once


class Pixels:
    """A data set's images as the model reads them, each opened and decoded when asked for."""

    def __init__(self, dataset, size):
        self.dataset, self.size = dataset, size

    def __len__(self):
        return len(self.dataset.images)

    def __getitem__(self, index):
        """Image `index`, uint8 [size, size, 3]; UserError where it is no image."""
        return self.dataset.pixels(index, self.size)


class OwnPixels:
    """A process's rows of every batch of them, batch after batch; past the last image black."""

    def __init__(self, pixels, batch_size, rows):
        self.pixels, self.batch_size, self.rows = pixels, batch_size, rows

    def __len__(self):
        return -(-len(self.pixels) // self.batch_size) * len(self.rows)

    def __getitem__(self, index):
        """Row `index`, uint8 [size, size, 3]; UserError where it is no image."""
        batch, row = divmod(index, len(self.rows))
        place = batch * self.batch_size + self.rows[row]
        if place < len(self.pixels):
            return self.pixels[place]
        return np.zeros((self.pixels.size, self.pixels.size, 3), np.uint8)


class Predictor:
    """The compiled functions of a model; call its methods within `sharding.use_mesh`."""

    def __init__(self, config, model, tokenizer, mesh, decoding, seed=0, watch=not_shown):
        """For the sizes of `config`; `watch` wraps what takes long (`progress.shown`).

        Raises:
          UserError: the mesh does not divide a batch.
        """
        self.batch_size, shards = config.eval.batch_size, sharding.batch_shards(mesh)
        if self.batch_size % shards:
            raise UserError(
                f"eval.batch_size: {self.batch_size} is not a multiple of the {shards} parts "
                "that the mesh splits a batch into"
            )
        self.text_length = config.data.text_length
        self.scored_length = max(config.data.text_length, config.data.caption_length)
        self.image_size = config.model.vision.image_size
        self.window = config.model.embedding_grid  # a cell for each bin of an embedding
        self.tokenizer, self.mesh, self.watch = tokenizer, mesh, watch
        dtype = decoding.cache_dtype or config.model.decoder.dtype
        self.decoding, self.seed = dataclasses.replace(decoding, cache_dtype=dtype), seed
        # A position of each text at a time.
        logits = self.batch_size // shards * config.model.decoder.vocab_size
        self.scored_candidates = max(1, min(MOST_CANDIDATES, LOGITS_A_DEVICE // logits))
        self.feature_map = jax.jit(make_feature_map(model))
        self.pooled = jax.jit(make_pooled(model))
        self.cells = jax.jit(make_cells(model))
        self.encode_texts = jax.jit(make_encode_texts(model))
        self.caption_rows = jax.jit(make_caption_rows(model, tokenizer, decoding))
        self.log_probs = jax.jit(make_log_probs(model, tokenizer))

    def embed_texts(self, params, texts):
        """Unit embeddings, fp32 [T, E], of texts, and whether each was cut to fit, bool [T]."""
        embeddings, cut = [], []
        starts = range(0, len(texts), self.batch_size)
        for start in self.watch(starts, len(starts), "texts"):
            own = texts[start : start + self.batch_size]
            rows = [embedding_row(self.tokenizer, text, self.text_length) for text in own]
            tokens, index, truncated = (np.asarray(column) for column in zip(*rows, strict=True))
            batch = self.to_global(tokens=tokens, embed_index=index.astype(np.int32))
            found = self.encode_texts(params, batch["tokens"], batch["embed_index"])
            embeddings.append(sharding.to_host(found)[: len(own)])
            cut.append(truncated)
        return np.concatenate(embeddings), np.concatenate(cut)

    def read_images(self, params, dataset, what="images"):
        """Every image once through the vision tower.

        Yields:
          For each batch the places of its images in the data set, [B] or fewer in the last, and
          their feature map [B, H, W, D] on the mesh, whose rows past the places are filled up.
        """
        count, rows = len(dataset.images), sharding.own_rows(self.mesh, self.batch_size)
        pixels = OwnPixels(Pixels(dataset, self.image_size), self.batch_size, rows)
        reading = grain.ReadOptions(THREADS, prefetch_buffer_size=2 * len(rows))
        batches = grain.MapDataset.source(pixels).to_iter_dataset(reading).batch(len(rows))
        starts = range(0, count, self.batch_size)
        for start, images in zip(starts, self.watch(batches, len(starts), what), strict=True):
            images = sharding.to_global({"images": images}, self.mesh)["images"]
            places = np.arange(start, min(start + self.batch_size, count))
            yield places, self.feature_map(params, images)

    def look(self, params, feature_map, rows, boxes):
        """Boxes on a batch's images, at most B at a time.

        Args:
          params: the model's parameters.
          feature_map: [B, H, W, D], from `read_images`.
          rows: int [n], which of the batch's images each box is on; 1 <= n <= B.
          boxes: fp32 [n, 4] as x0, y0, x1, y1, shares of the image.

        Returns:
          Unit embeddings, fp32 [B, E], and visual tokens [B, G, D], on the mesh; the rows from n on
          only fill up.
        """
        rows, boxes = np.asarray(rows, np.int32), np.asarray(boxes, np.float32)
        asked = self.to_global(rows=rows, boxes=boxes)
        return self.pooled(params, feature_map, asked["rows"], asked["boxes"])

    def look_at_whole(self, params, feature_map):
        """`look` at every image of a batch as a whole."""
        whole = np.tile(np.float32(WHOLE_IMAGE), (self.batch_size, 1))
        return self.look(params, feature_map, np.arange(self.batch_size), whole)

    def embed_cells(self, params, feature_map, window=0):
        """The embedding of a box of `window` x `window` cells about every cell, cut at the edge.

        Args:
          params: the model's parameters.
          feature_map: [B, H, W, D], from `read_images`.
          window: 1 or more; 0: as many cells as an embedding has bins.

        Returns:
          Unit embeddings, fp32 numpy [B, H, W, E].
        """
        height, width = feature_map.shape[1:3]
        boxes = boxes_around_cells(height, width, window or self.window).reshape(-1, 4)
        found = sharding.to_host(self.cells(params, feature_map, boxes))
        return found.reshape(-1, height, width, found.shape[-1])

    def captions(self, params, places, visual):
        """A caption for each row of `look` that is at one of the `places`, [B] or fewer.

        Where captions are sampled, the first place decides the draws.
        """
        # A key of the batch's own; the same images in batches of another size are other draws.
        key = jax.random.fold_in(jax.random.key(self.seed), int(places[0]))
        rows = sharding.to_host(self.caption_rows(params, visual, key))[: len(places)]
        return [self.tokenizer.decode(row, skip_special_tokens=True) for row in rows]

    def candidates(self, texts):
        """Rows `<s> text </s> [PAD]...` as long as the longest, and which were cut, bool [T]."""
        rows = [caption_row(self.tokenizer, text, self.scored_length) for text in texts]
        tokens, cut = (np.asarray(column) for column in zip(*rows, strict=True))
        used = (tokens != self.tokenizer.pad_token_id).any(axis=0)
        return tokens[:, used], cut

    def score(self, params, visual, candidates, chosen, block):
        """log P(text | image), fp32 [B, C], of each image's own candidates.

        Args:
          params: the model's parameters.
          visual: visual tokens of a batch, [B, G, D].
          candidates: int [T, length], from `candidates`.
          chosen: int [B, C], rows of `candidates`.
          block: how many of an image's candidates are scored at once, from `block_of`.
        """
        # Whole blocks, so that one program serves them all.
        filled = np.pad(chosen, [(0, 0), (0, -chosen.shape[1] % block)])
        scores = []
        for start in range(0, filled.shape[1], block):
            rows = candidates[filled[:, start : start + block]]  # [B, block, length]
            rows = self.to_global(rows=rows)["rows"]
            scores.append(sharding.to_host(self.log_probs(params, visual, rows)))
        return np.concatenate(scores, axis=1)[:, : chosen.shape[1]]

    def score_all(self, params, visual, candidates):
        """log P(text | image), fp32 [B, T], of every candidate [T, length] for every image."""
        every = np.tile(np.arange(len(candidates)), (self.batch_size, 1))
        block = self.block_of(len(candidates))
        return self.score(params, visual, candidates, every, block)

    def score_pairs(self, params, dataset, candidates, pairs):
        """log P(text | image), fp32 [P], of pairs [P, 2] of an image and a row of `candidates`.

        The images are read again, for the visual tokens of a whole data set are not held.
        """
        order = np.argsort(pairs[:, 0], kind="stable")
        starts = np.searchsorted(pairs[order, 0], np.arange(len(dataset.images) + 1))
        block = self.block_of(np.diff(starts).max())
        scores = np.empty(len(pairs), np.float32)
        for places, feature_map in self.read_images(params, dataset, "re-ranking"):
            _, visual = self.look_at_whole(params, feature_map)
            asked = [order[starts[i] : starts[i + 1]] for i in places]
            chosen = np.zeros((self.batch_size, max(map(len, asked))), int)
            for row, own in enumerate(asked):
                chosen[row, : len(own)] = pairs[own, 1]
            if not chosen.size:
                continue
            found = self.score(params, visual, candidates, chosen, block)
            for row, own in enumerate(asked):
                scores[own] = found[row, : len(own)]
        return scores

    def block_of(self, most):
        """How many candidates of `most` an image are scored at once."""
        return int(max(1, min(most, self.scored_candidates)))

    def to_global(self, **arrays):
        """Arrays of at most a batch's rows, filled up with the last row, on the mesh."""
        count = len(next(iter(arrays.values())))
        rows = np.arange(self.batch_size).clip(max=count - 1)
        return sharding.from_whole({name: array[rows] for name, array in arrays.items()}, self.mesh)


def make_feature_map(model):
    """The function (params, images) -> feature map [B, H, W, D]."""
    return lambda params, images: model.apply({"params": params}, images, method=MMGem.feature_map)


def make_pooled(model):
    """The function (params, feature map, rows, boxes) -> embeddings [B, E], tokens [B, G, D]."""

    def both(model, feature_map, rows, boxes):
        feature_map, boxes = feature_map[rows], boxes[:, None]
        embeddings = model.embed_regions(feature_map, boxes)
        return embeddings[:, 0], model.visual_tokens(feature_map, boxes)[:, 0]

    return lambda params, *asked: model.apply({"params": params}, *asked, method=both)


def make_cells(model):
    """The function (params, feature map, boxes [R, 4]) -> embeddings [B, R, E]."""

    def cells(params, feature_map, boxes):
        boxes = jnp.broadcast_to(boxes[None], (feature_map.shape[0], *boxes.shape))
        return model.apply({"params": params}, feature_map, boxes, method=MMGem.embed_regions)

    return cells


def make_encode_texts(model):
    """The function (params, tokens, embed_index) -> embeddings [B, E]."""

    def encode_texts(params, tokens, embed_index):
        return model.apply({"params": params}, tokens, embed_index, method=MMGem.encode_text)

    return encode_texts


def make_caption_rows(model, tokenizer, decoding):
    """The function (params, visual tokens, key) -> ids [B, length]."""
    tokens = caption_tokens(tokenizer)

    def caption_rows(params, visual, key):
        prompt = jnp.full((visual.shape[0], 1), tokens.bos, jnp.int32)
        return generate(model, params, visual, prompt, tokens, decoding, key)

    return caption_rows


def make_log_probs(model, tokenizer):
    """The function (params, visual tokens, candidates [B, C, T]) -> log P, fp32 [B, C]."""
    pad = tokenizer.pad_token_id
    return lambda params, visual, candidates: text_log_probs(model, params, visual, candidates, pad)
