"""The log-sum-exp of each image over all texts but its own, and of each text over all images.

The matrix of similarities [N, N] never exists. Every device keeps its own images, while the texts
go round a ring of devices: each visits every device, and there a chunk at a time is compared with
the images. The backward pass goes round once more and makes each similarity again.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mmgem_jax.models.shards import around, on_shards

# Stands for log 0. Finite, so that a row without rivals has a finite gradient.
LOG_ZERO = -1e30

CHUNK = 512  # texts that are compared with a device's images at a time, at most

ROWS = ("batch",)


class Pairs(NamedTuple):
    """What says which pairs are not negatives of each other.

    Fields:
      group_ids: int32 [N, K], K ids a pair (such as hashes of its texts): pairs that share any.
      image: int32 [N], which image of the global batch: its regions, where they overlap.
      boxes: fp32 [N, 4] as x0, y0, x1, y1, the region of the image.
      valid: bool [N], False for padding, which is neither a pair nor a negative.
    """

    group_ids: jax.Array
    image: jax.Array
    boxes: jax.Array
    valid: jax.Array


class Marks(NamedTuple):
    """Pairs, and int32 [N] the place of each in the global batch."""

    pairs: Pairs
    place: jax.Array


class Masks(NamedTuple):
    """Which masks there are: those of pairs that share an id, that overlap by more than this."""

    duplicates: bool
    overlap: float

    def looked_at(self, pairs):
        """Pairs with None for what no mask looks at, and what therefore need not travel."""
        if not self.duplicates:
            pairs = pairs._replace(group_ids=None)
        return pairs if self.overlap < 1 else pairs._replace(image=None, boxes=None)


def rivals(rows, columns, masks):
    """Which of the columns are rivals of which of the rows.

    Args:
      rows: Marks of M pairs.
      columns: Marks of C pairs.
      masks: Masks.

    Returns:
      bool [M, C], True for two different pairs that are no padding and not masked; and the same
      for those that are masked, None where there are no masks.
    """
    row, column = rows.pairs, columns.pairs
    different = row.valid[:, None] & column.valid[None]
    different &= rows.place[:, None] != columns.place[None]
    masked = []
    if masks.duplicates:
        for own in row.group_ids.T:
            masked += [own[:, None] == other[None] for other in column.group_ids.T]
    if masks.overlap < 1:
        masked.append(overlapping(row, column, masks.overlap))
    if not masked:
        return different, None
    masked = functools.reduce(jnp.logical_or, masked)
    return different & ~masked, different & masked


def overlapping(row, column, threshold):
    """bool [M, C]: regions of one image whose intersection over union is above the threshold."""
    x0, y0, x1, y1 = (side[:, None] for side in row.boxes.T)
    u0, v0, u1, v1 = (side[None] for side in column.boxes.T)
    width = jnp.maximum(jnp.minimum(x1, u1) - jnp.maximum(x0, u0), 0)
    height = jnp.maximum(jnp.minimum(y1, v1) - jnp.maximum(y0, v0), 0)
    shared = width * height
    union = (x1 - x0) * (y1 - y0) + (u1 - u0) * (v1 - v0) - shared
    return (shared > threshold * union) & (row.image[:, None] == column.image[None])


def product(subscripts, *operands):
    """`einsum` in full fp32, which TPUs do not by default."""
    return jnp.einsum(subscripts, *operands, precision=jax.lax.Precision.HIGHEST)


# ---- log-sum-exps over rivals --------------------------------------------------------------------


class LogSum(NamedTuple):
    """A log-sum-exp in the making: the largest term, and the sum of exp(term - largest)."""

    top: jax.Array
    total: jax.Array


def log_sum(logits, axis):
    """The LogSum along an axis of a matrix."""
    top = logits.max(axis=axis)
    return LogSum(top, jnp.exp(logits - jnp.expand_dims(top, axis)).sum(axis=axis))


def joined(one, other):
    """The LogSum of the terms of both."""
    top = jnp.maximum(one.top, other.top)
    parts = (part.total * jnp.exp(part.top - top) for part in (one, other))
    return LogSum(top, sum(parts))


class Rivals(NamedTuple):
    """What the rivals of each image and each text amount to, [N] each.

    Fields:
      of_images: fp32, log-sum-exp of scale * similarity to the texts; LOG_ZERO without rivals.
      of_texts: fp32, the same to the images.
      best_of_images: fp32, the largest term of each; it has no gradient.
      best_of_texts: fp32.
      masked: int32, texts that were no rivals of an image only because they are masked.
    """

    of_images: jax.Array
    of_texts: jax.Array
    best_of_images: jax.Array
    best_of_texts: jax.Array
    masked: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def rival_log_sums(masks, images, texts, scale, marks):
    """Rivals of images and texts, fp32 [N, E] each, all of them split over the batch's mesh axes.

    Args:
      masks: Masks.
      images: fp32 [N, E].
      texts: fp32 [N, E]; pair i is (images[i], texts[i]).
      scale: fp32 [], inverse temperature.
      marks: Marks of the pairs.
    """
    return forward(masks, images, texts, scale, marks)[0]


def forward(masks, images, texts, scale, marks):
    """The Rivals, and what the backward pass needs."""

    def local(images, texts, scale, marks):
        M = len(images)

        def visit(own, visitor):
            of_images, masked = own
            logits, more = compared(masks, images, marks, *visitor, scale)
            if more is not None:
                masked += more.sum(axis=1, dtype=jnp.int32)
            return (joined(of_images, log_sum(logits, 1)), masked), log_sum(logits, 0)

        own = LogSum(jnp.full(M, LOG_ZERO), jnp.zeros(M)), jnp.zeros(M, jnp.int32)
        nothing = LogSum(jnp.float32(LOG_ZERO), jnp.float32(0))
        own, of_texts = around(visit, own, (texts, marks), nothing, joined, CHUNK)
        of_images, masked = own
        return *of_images, *of_texts, masked

    run = on_shards(local, (ROWS, ROWS, (), ROWS), [ROWS] * 5)
    top, total, text_top, text_total, masked = run(images, texts, scale, marks)
    of_images, of_texts = top + jnp.log(total), text_top + jnp.log(text_total)
    found = Rivals(of_images, of_texts, top, text_top, masked)
    return found, (images, texts, scale, marks, of_images, of_texts)


def compared(masks, images, marks, texts, text_marks, scale):
    """fp32 [M, C], scale * similarity of rivals, else LOG_ZERO; and which are masked, or None."""
    rival, masked = rivals(marks, text_marks, masks)
    return jnp.where(rival, scale * product("ME,CE->MC", images, texts), LOG_ZERO), masked


def backward(masks, saved, cotangents):
    """Cotangents of images, texts and scale, from those of both log-sum-exps."""

    def local(images, texts, scale, marks, logs, weights):
        def visit(pull, visitor):
            texts, text_marks, text_log, text_weight = visitor
            logits, _ = compared(masks, images, marks, texts, text_marks, scale)
            slope = weights[0][:, None] * jnp.exp(logits - logs[0][:, None])
            slope += text_weight[None] * jnp.exp(logits - text_log[None])
            pull += product("MC,CE->ME", slope, texts)
            return pull, product("MC,ME->CE", slope, images)

        visitors = texts, marks, logs[1], weights[1]
        nothing = jnp.zeros(images.shape[1])
        return around(visit, jnp.zeros_like(images), visitors, nothing, jnp.add, CHUNK)

    images, texts, scale, marks, *logs = saved
    # Without rivals a slope is weight * exp(LOG_ZERO - log): by 0 for the log it is 0.
    logs = [jnp.where(log > LOG_ZERO / 2, log, 0) for log in logs]
    weights = [cotangents.of_images, cotangents.of_texts]
    run = on_shards(local, (ROWS, ROWS, (), ROWS, ROWS, ROWS), [ROWS, ROWS])
    pull, text_pull = run(images, texts, scale, marks, logs, weights)
    return scale * pull, scale * text_pull, jnp.sum(images * pull), None


rival_log_sums.defvjp(forward, backward)
