"""The two losses: InfoNCE over embeddings and cross-entropy over caption tokens.

Arrays in, arrays out. Under `jit` the arrays are global, so the means and the negatives are those
of the global batch whatever the mesh.
"""

import jax
import jax.numpy as jnp

from mmgem_jax.caption_loss import caption_cross_entropy
from mmgem_jax.contrastive import Marks, Masks, Pairs, rival_log_sums

__all__ = ["Pairs", "caption_cross_entropy", "info_nce"]

# Similarities of unit rows that are nearer than this differ by rounding alone: they are a tie.
TIE = 1e-5


def info_nce(images, texts, scale, pairs, mask_duplicates, mask_overlap):
    """L_Emb = L_v2t + L_t2v, symmetric InfoNCE (the sum of both directions, as in the paper).

    Args:
      images: fp32 [N, E], unit length.
      texts: fp32 [N, E], unit length; pair i is (images[i], texts[i]).
      scale: inverse temperature.
      pairs: Pairs, which of them are padding and which not each other's negatives.
      mask_duplicates: whether pairs that share an id are left out of the denominators.
      mask_overlap: intersection over union above which regions of one image are; 1 for none.

    Returns:
      The loss, and metrics: both directions' losses and in-batch accuracies, and the share of the
      negatives that is masked. A pair whose best rival ties with it is counted as wrong.
    """
    scale = jnp.asarray(scale, jnp.float32)
    masks = Masks(mask_duplicates, mask_overlap)
    marks = Marks(masks.looked_at(pairs), jnp.arange(len(images)))
    rivals = rival_log_sums(masks, images, texts, scale, marks)
    positive = scale * jnp.sum(images * texts, axis=1)
    count = pairs.valid.sum(dtype=jnp.float32)
    weight = pairs.valid / jnp.maximum(count, 1)

    def direction(log_sum, best):
        # log(exp(positive) + sum of exp(rival)) - positive, exact also where it is tiny
        loss = jax.nn.softplus(log_sum - positive)
        return jnp.sum(weight * loss), jnp.sum(weight * (positive - best > TIE * scale))

    image_to_text, image_to_text_accuracy = direction(rivals.of_images, rivals.best_of_images)
    text_to_image, text_to_image_accuracy = direction(rivals.of_texts, rivals.best_of_texts)
    return image_to_text + text_to_image, {
        "loss_image_to_text": image_to_text,
        "loss_text_to_image": text_to_image,
        "accuracy_image_to_text": image_to_text_accuracy,
        "accuracy_text_to_image": text_to_image_accuracy,
        "masked_share": rivals.masked.sum(dtype=jnp.float32) / jnp.maximum(count * (count - 1), 1),
    }
