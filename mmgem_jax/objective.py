"""The joint objective: a batch through the model into L = L_Emb + L_Gen. It serves both stages.

A batch is a dict of arrays; every image has R regions, and a whole image is one of them:
  image           uint8 [B, h, w, 3]
  boxes           fp32 [B, R, 4]      x0, y0, x1, y1 as shares of the image
  region_mask     bool [B, R]         False for padding
  group_ids       int32 [B, R, K]     regions that share an id are not each other's negatives
  truncated       bool [B, R, 2]      whether the text, the caption was cut to fit
  region_counts   int32 [B, 4]        regions of its record: drawn, over the limit, out of the
                                      view, unusable
  source          int32 [B]           which source of a mixture; all of a batch are of one

Its words are padded, and then the decoder runs once over the texts and once over the captions:
  text_tokens     int32 [B, R, T]     `<s> text [EMB] [PAD]...`
  embed_index     int32 [B, R]        where [EMB] is
  caption_tokens  int32 [B, R, T + 1] `<s> text </s> [PAD]...`
  caption_length  int32 [B, R]        tokens before the padding

or packed, and it runs once over rows that hold both (top of mmgem_jax/data/packing.py).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mmgem_jax import losses
from mmgem_jax.models.mmgem import pick


class Captions(NamedTuple):
    """What L_Gen compares: states [N, T, D], the tokens that follow them, and which count."""

    states: jax.Array
    targets: jax.Array
    mask: jax.Array


def loss_terms(model, batch, weights):
    """The two losses and their metrics; a term of weight 0 is not computed.

    Args:
      model: a bound MMGem (`model.apply(..., method=loss_terms)`).
      batch: see the top of this file.
      weights: `config.loss`, with `embedding_weight` and `generation_weight`.

    Returns:
      A dict with `emb` and `gen`, as far as computed, and a dict of metrics.
    """
    found = outputs(model, batch, weights, target_count(batch))
    return terms_of(found, model.logit_scale, batch, weights)


def outputs(model, batch, weights, targets):
    """What the model makes of a batch, or of a part of it, each row by itself.

    Args:
      model: a bound MMGem.
      batch: see the top of this file.
      weights: `config.loss`.
      targets: caption tokens of the whole batch, by which the sums over this part are divided.

    Returns:
      A dict, as far as the weights ask for it, of `regions` and `texts`, unit embeddings fp32
      [N, E] of the N = B * R regions, and of `gen` and `token_accuracy`, this part's share in L_Gen
      and in the accuracy of caption tokens.
    """
    found = {}
    # Whatever padding holds: 0 times what is no number would be none either.
    boxes = jnp.where(batch["region_mask"][..., None], batch["boxes"], 0)
    batch = batch | {"boxes": boxes}
    feature_map = model.feature_map(batch["image"])
    decode = packed_states if "tokens" in batch else padded_states
    texts, captions = decode(model, feature_map, batch, weights)
    if weights.embedding_weight:
        with jax.named_scope("embedding"):
            regions = model.embed_regions(feature_map, batch["boxes"])
            found["regions"] = regions.reshape(-1, regions.shape[-1])
            found["texts"] = model.embed_texts(texts)
    if weights.generation_weight:
        with jax.named_scope("head"):
            states, following, mask = captions
            head = model.decoder.head_kernel()
            found["gen"], found["token_accuracy"] = losses.caption_cross_entropy(
                states, head, following, mask, targets
            )
    return found


def padded_states(model, feature_map, batch, weights):
    """The decoder's states at [EMB], [N, D], and its Captions, from a pass for each; or None."""
    flat = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731  [B, R, ...] -> [N, ...]
    texts = captions = None
    if weights.embedding_weight:
        with jax.named_scope("embedding"):
            texts = model.text_states(flat(batch["text_tokens"]), flat(batch["embed_index"]))
    if weights.generation_weight:
        with jax.named_scope("generation"):
            visual_tokens = flat(model.visual_tokens(feature_map, batch["boxes"]))  # [N, G, D]
            tokens, real = flat(batch["caption_tokens"]), flat(real_targets(batch))
            states = model.caption_states(visual_tokens, tokens[:, :-1], real.astype(jnp.int32))
            mask = real & flat(batch["region_mask"])[:, None]
            captions = Captions(states, tokens[:, 1:], mask)
    return texts, captions


def packed_states(model, feature_map, batch, weights):
    """The same from packed rows, the Captions by group, whatever the weights.

    Rows of texts alone are those that `visual_index` does not go over, the first of each group, and
    get a pass of their own.
    """
    A = len(batch["targets"])
    visual_tokens = model.visual_tokens(feature_map, batch["boxes"])
    visual_tokens = visual_tokens.reshape(A, -1, visual_tokens.shape[-1])  # [A, M, D]
    rows = [batch[name] for name in ("tokens", "segment_ids", "positions")]
    L = rows[0].shape[1]
    rows = [x.reshape(A, -1, L) for x in rows]
    alone = rows[0].shape[1] - len(batch["visual_index"]) // A
    mixed = [x[:, alone:].reshape(-1, L) for x in rows]
    states = model.packed_states(visual_tokens, batch["visual_index"], *mixed)  # [A, S, D]
    if alone:
        of_texts = model.text_row_states(*(x[:, :alone].reshape(-1, L) for x in rows))
        of_texts = of_texts.reshape(A, -1, of_texts.shape[-1])
        states = jnp.concatenate([of_texts, states], axis=1)
    texts = pick(states, batch["embed_place"].reshape(A, -1))
    captions = pick(states, batch["target_place"])
    captions = Captions(captions, batch["targets"], batch["target_mask"])
    return texts.reshape(-1, texts.shape[-1]), captions


def terms_of(found, logit_scale, batch, weights):
    """The terms and metrics of `loss_terms`, from what `outputs` found for the whole batch."""
    terms, metrics = {}, batch_metrics(batch)
    if "regions" in found:
        with jax.named_scope("embedding"):
            scale = jnp.exp(logit_scale)
            terms["emb"], more = losses.info_nce(
                found["regions"],
                found["texts"],
                scale,
                pairs_of(batch),
                weights.mask_duplicates,
                weights.mask_overlap,
            )
        metrics |= more | {"temperature": 1 / scale}
    if "gen" in found:
        terms["gen"] = found["gen"]
        metrics |= {"perplexity": jnp.exp(found["gen"]), "token_accuracy": found["token_accuracy"]}
    return terms, metrics | {f"loss_{name}": value for name, value in terms.items()}


def pairs_of(batch):
    """The pairs of a batch, as `losses.info_nce` wants to know them."""
    B, R = batch["region_mask"].shape
    return losses.Pairs(
        group_ids=batch["group_ids"].reshape(B * R, -1),
        image=jnp.repeat(jnp.arange(B), R),
        boxes=batch["boxes"].reshape(B * R, 4),
        valid=batch["region_mask"].reshape(B * R),
    )


def real_targets(batch):
    """Which next tokens of padded captions count: bool [B, R, T], one for each but the first."""
    targets = batch["caption_tokens"].shape[-1] - 1
    return jnp.arange(1, targets + 1)[None, None] < batch["caption_length"][..., None]


def target_count(batch):
    """How many caption tokens L_Gen is the mean over."""
    if "target_mask" in batch:
        return batch["target_mask"].sum()
    return (real_targets(batch) & batch["region_mask"][..., None]).sum()


def batch_metrics(batch):
    """What there is to say of a batch before the model has seen it.

    A slot of a packed batch that no image fills counts as an image without rows.
    """
    valid = batch["region_mask"]
    cut = (batch["truncated"] & valid[..., None]).sum(axis=(0, 1)) / jnp.maximum(valid.sum(), 1)
    counts = batch["region_counts"].sum(axis=0)
    metrics = {
        "truncated_text_share": cut[0],
        "truncated_caption_share": cut[1],
        "regions_per_image": counts[0] / len(batch["image"]),
        "images_without_rows_share": jnp.mean(~valid.any(axis=1)),
    }
    for place, why in enumerate(("over_limit", "out_of_view", "unusable"), 1):
        metrics[f"regions_{why}_share"] = counts[place] / jnp.maximum(counts.sum(), 1)
    if "segment_ids" in batch:
        metrics["packed_share"] = jnp.mean(batch["segment_ids"] > 0)
    return metrics


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
    return sum((scale[name] * value for name, value in terms.items()), jnp.zeros(()))
