"""The joint objective: a batch through the model into L = L_Emb + L_Gen. It serves both stages.

A batch is a dict of arrays; every image has R regions, and a whole image is one of them:
  image           uint8 [B, h, w, 3]
  boxes           fp32 [B, R, 4]      x0, y0, x1, y1 as shares of the image
  region_mask     bool [B, R]         False for padding
  text_tokens     int32 [B, R, T]     `<s> text [EMB] [PAD]...`
  embed_index     int32 [B, R]        where [EMB] is
  caption_tokens  int32 [B, R, T + 1] `<s> text </s> [PAD]...`
  caption_length  int32 [B, R]        tokens before the padding
  group_ids       int32 [B, R, K]     regions that share an id are not each other's negatives
  truncated       bool [B, R, 2]      whether the text, the caption was cut to fit
  region_counts   int32 [B, 4]        regions of its record: drawn, over the limit, out of the
                                      view, unusable
  source          int32 [B]           which source of a mixture; all of a batch are of one
"""

import jax
import jax.numpy as jnp

from mmgem_jax import losses

REGION_FIELDS = ("region_mask", "text_tokens", "embed_index", "caption_tokens", "caption_length")
REGION_FIELDS += ("group_ids", "truncated")


def loss_terms(model, batch, weights):
    """The two losses and their metrics; a term of weight 0 is not computed.

    Args:
      model: a bound MMGem (`model.apply(..., method=loss_terms)`).
      batch: see the top of this file.
      weights: `config.loss`, with `embedding_weight` and `generation_weight`.

    Returns:
      A dict with `emb` and `gen`, as far as computed, and a dict of metrics.
    """
    terms, metrics = {}, {}
    # From here a region is a row: [B, R, ...] -> [N, ...].
    rows = {name: batch[name].reshape(-1, *batch[name].shape[2:]) for name in REGION_FIELDS}
    feature_map = model.feature_map(batch["image"])

    if weights.embedding_weight:
        with jax.named_scope("embedding"):
            regions = model.embed_regions(feature_map, batch["boxes"])
            regions = regions.reshape(-1, regions.shape[-1])  # [N, E]
            texts = model.encode_text(rows["text_tokens"], rows["embed_index"])
            overlapping = losses.overlap_mask(batch["boxes"], weights.mask_overlap)
            masked = losses.duplicate_mask(rows["group_ids"]) & weights.mask_duplicates
            masked = masked | overlapping
            scale = jnp.exp(model.logit_scale)
            terms["emb"], more = losses.info_nce(regions, texts, scale, masked, rows["region_mask"])
        metrics |= more | {"temperature": 1 / scale}

    if weights.generation_weight:
        with jax.named_scope("generation"):
            visual_tokens = model.visual_tokens(feature_map, batch["boxes"])
            visual_tokens = visual_tokens.reshape(-1, *visual_tokens.shape[2:])  # [N, G, D]
            inputs, targets = rows["caption_tokens"][:, :-1], rows["caption_tokens"][:, 1:]
            real = jnp.arange(1, targets.shape[1] + 1)[None] < rows["caption_length"][:, None]
            logits = model.caption_logits(visual_tokens, inputs, real.astype(jnp.int32))
            mask = real & rows["region_mask"][:, None]
            terms["gen"], more = losses.caption_cross_entropy(logits, targets, mask)
        metrics |= more

    metrics |= {f"loss_{name}": value for name, value in terms.items()}
    valid = rows["region_mask"]
    cut = (rows["truncated"] & valid[:, None]).sum(axis=0) / jnp.maximum(valid.sum(), 1)
    metrics |= {"truncated_text_share": cut[0], "truncated_caption_share": cut[1]}
    counts = batch["region_counts"].sum(axis=0)
    metrics["regions_per_image"] = counts[0] / len(batch["image"])
    metrics["images_without_rows_share"] = jnp.mean(~batch["region_mask"].any(axis=1))
    for place, why in enumerate(("over_limit", "out_of_view", "unusable"), 1):
        metrics[f"regions_{why}_share"] = counts[place] / jnp.maximum(counts.sum(), 1)
    return terms, metrics


def init_params(model, batch, key):
    """Parameters with their logical axis names (boxed), for batches shaped like `batch`."""
    return model.init(key, batch, BothTerms, method=loss_terms)["params"]


class BothTerms:
    """Weights with which initialisation meets every parameter."""

    embedding_weight = generation_weight = 1.0
    mask_duplicates, mask_overlap = True, 1.0


def total_loss(terms, weights):
    """L = weighted L_Emb + weighted L_Gen."""
    scale = {"emb": weights.embedding_weight, "gen": weights.generation_weight}
    return sum(scale[name] * value for name, value in terms.items())
