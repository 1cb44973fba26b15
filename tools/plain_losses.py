"""The two losses written out over whole matrices: what those of `mmgem_jax` have to equal."""

import jax
import jax.numpy as jnp
import optax

# Stands for log 0. Finite, so that a row with every pair masked has a finite gradient.
LOG_ZERO = -1e30


def duplicate_mask(group_ids):
    """Pairs that are not true negatives of each other: they share a caption or a text.

    Args:
      group_ids: int32 [N, K], K ids a pair (such as hashes of its texts).

    Returns:
      bool [N, N], True where two different pairs share any id: one's text may be the other's
      caption.
    """
    same = (group_ids[:, None, :, None] == group_ids[None, :, None, :]).any(axis=(-1, -2))
    return same & ~jnp.eye(len(group_ids), dtype=bool)


def overlap_mask(boxes, threshold):
    """Pairs of regions of one image that overlap: each may be what the other's text says.

    Args:
      boxes: fp32 [B, R, 4] as x0, y0, x1, y1.
      threshold: above which intersection over union two regions overlap; 1: none do.

    Returns:
      bool [B * R, B * R], True where two different regions of an image overlap.
    """
    B, R, _ = boxes.shape
    low, high = boxes[..., :2], boxes[..., 2:]
    shared = jnp.minimum(high[:, :, None], high[:, None]) - jnp.maximum(
        low[:, :, None], low[:, None]
    )
    shared = jnp.prod(jnp.maximum(shared, 0), axis=-1)  # [B, R, R]
    area = jnp.prod(high - low, axis=-1)
    union = area[:, :, None] + area[:, None] - shared
    overlap = (shared > threshold * union) & ~jnp.eye(R, dtype=bool)[None]
    overlap = overlap[:, :, None] & jnp.eye(B, dtype=bool)[:, None, :, None]  # [B, R, B, R]
    return overlap.reshape(B * R, B * R)


def info_nce(images, texts, scale, masked, valid):
    """L_Emb = L_v2t + L_t2v, symmetric InfoNCE (the sum of both directions, as in the paper).

    Args:
      images: fp32 [N, E], unit length.
      texts: fp32 [N, E], unit length; pair i is (images[i], texts[i]).
      scale: inverse temperature.
      masked: bool [N, N], True for pairs left out of the denominators; the diagonal stays.
      valid: bool [N], False for padding, which is neither a pair nor a negative.

    Returns:
      The loss, and metrics: both directions' losses and in-batch accuracies, and the share of the
      negatives that is masked.
    """
    N = len(images)
    similarity = jnp.einsum("NE,ME->NM", images, texts, precision=jax.lax.Precision.HIGHEST)
    both_valid = valid[:, None] & valid[None, :]
    logits = jnp.where(both_valid & ~masked, scale * similarity, LOG_ZERO)  # [N, N]
    positive = jnp.diagonal(logits)
    weight = valid / jnp.maximum(valid.sum(), 1)

    def direction(axis):
        loss = jax.nn.logsumexp(logits, axis=axis) - positive
        right = jnp.argmax(logits, axis=axis) == jnp.arange(N)
        return jnp.sum(weight * loss), jnp.sum(weight * right)

    image_to_text, image_to_text_accuracy = direction(1)
    text_to_image, text_to_image_accuracy = direction(0)
    negatives = jnp.maximum(both_valid.sum() - valid.sum(), 1)
    return image_to_text + text_to_image, {
        "loss_image_to_text": image_to_text,
        "loss_text_to_image": text_to_image,
        "accuracy_image_to_text": image_to_text_accuracy,
        "accuracy_text_to_image": text_to_image_accuracy,
        "masked_share": (masked & both_valid).sum() / negatives,
    }


def caption_cross_entropy(logits, targets, mask):
    """L_Gen: mean negative log-likelihood over the target tokens of the global batch.

    Args:
      logits: fp32 [N, T, V].
      targets: int32 [N, T].
      mask: bool [N, T], True for tokens that count.

    Returns:
      The loss, and metrics: perplexity and token accuracy.
    """
    nll = optax.losses.softmax_cross_entropy_with_integer_labels(logits, targets)
    weight = mask / jnp.maximum(mask.sum(), 1)
    loss = jnp.sum(weight * nll)
    return loss, {
        "perplexity": jnp.exp(loss),
        "token_accuracy": jnp.sum(weight * (jnp.argmax(logits, axis=-1) == targets)),
    }
