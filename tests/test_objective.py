"""The joint objective: which outputs of the model meet which fields of a batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import plain_losses
import pytest
import tiny

from mmgem_jax import objective
from mmgem_jax.models.mmgem import MMGem
from mmgem_jax.objective import loss_terms, total_loss

REGION_FIELDS = ("region_mask", "group_ids", "truncated", "text_tokens", "embed_index")
REGION_FIELDS += ("caption_tokens", "caption_length")


def test_a_fresh_model_knows_nothing():
    """Each direction of InfoNCE starts near ln B and the cross-entropy near ln V.

    With unit embeddings of E independent numbers the similarities have a variance of 1 / E, so
    the logits' is 1 / (0.07^2 E) = 0.27 at E = 768 and InfoNCE at most half of that above ln B.
    """
    setup = tiny.setup({"model.joint_dim": 768, "batch_size": 32})
    run = functools.partial(setup.model.apply, method=loss_terms)
    _, metrics = jax.jit(run, static_argnums=2)(
        {"params": setup.params}, setup.batch, objective.BothTerms
    )
    assert metrics["loss_image_to_text"] == pytest.approx(np.log(32), rel=0.15)
    assert metrics["loss_text_to_image"] == pytest.approx(np.log(32), rel=0.15)
    assert metrics["loss_gen"] == pytest.approx(np.log(128), rel=0.05)
    assert metrics["temperature"] == pytest.approx(0.07, rel=1e-5)
    assert metrics["masked_share"] == 0


def test_the_loss_terms_are_the_two_losses_of_the_model_s_outputs():
    """The whole objective again, from the model's public functions and the batch's fields."""
    setup = tiny.setup(regions=2)
    batch = setup.batch | {"region_mask": np.arange(16).reshape(8, 2) % 5 != 3}
    terms, metrics = tiny.applied(functools.partial(loss_terms, weights=objective.BothTerms))(batch)

    valid = batch["region_mask"].reshape(-1)
    images, boxes = batch["image"], batch["boxes"]
    flat = {name: batch[name].reshape(16, *batch[name].shape[2:]) for name in REGION_FIELDS}
    regions = tiny.applied(MMGem.encode_regions)(images, boxes).reshape(16, -1)
    texts = tiny.applied(MMGem.encode_text)(flat["text_tokens"], flat["embed_index"])
    emb, _ = plain_losses.info_nce(
        regions[valid],
        texts[valid],
        jnp.exp(tiny.random_params()["logit_scale"]),
        jnp.zeros((valid.sum(), valid.sum()), bool),
        jnp.ones(valid.sum(), bool),
    )
    assert float(terms["emb"]) == pytest.approx(float(emb), rel=1e-5)

    feature_map = tiny.applied(MMGem.feature_map)(images)
    visual = tiny.applied(MMGem.visual_tokens)(feature_map, boxes).reshape(16, 4, 32)
    tokens, length = flat["caption_tokens"], flat["caption_length"]
    logits = tiny.applied(MMGem.caption_logits)(visual, tokens, np.ones_like(tokens))
    log_probs = np.asarray(jax.nn.log_softmax(logits, axis=-1))
    found = [
        -log_probs[n, t, tokens[n, t + 1]]
        for n in np.flatnonzero(valid)
        for t in range(length[n] - 1)
    ]
    assert float(terms["gen"]) == pytest.approx(np.mean(found), rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(np.exp(np.mean(found)), rel=1e-4)
    cut = batch["truncated"][batch["region_mask"]].mean(axis=0)
    assert metrics["truncated_text_share"] == pytest.approx(cut[0])
    assert metrics["truncated_caption_share"] == pytest.approx(cut[1])
    counts = batch["region_counts"].sum(axis=0)
    assert metrics["regions_per_image"] == counts[0] / 8
    shares = [metrics[f"regions_{why}_share"] for why in ("over_limit", "out_of_view", "unusable")]
    np.testing.assert_allclose(shares, counts[1:] / counts.sum(), rtol=1e-6)
    empty = [not any(row) for row in batch["region_mask"]]
    assert metrics["images_without_rows_share"] == np.mean(empty)


@pytest.mark.parametrize(
    ("weight", "absent", "unused"),
    [
        ("embedding_weight", "emb", {"region_projection", "text_projection", "logit_scale"}),
        ("generation_weight", "gen", {"visual_token_projection"}),
    ],
)
def test_a_term_of_weight_0_is_absent(weight, absent, unused):
    config = tiny.config({f"loss.{weight}": 0.0})
    setup = tiny.setup()
    params = tiny.randomise(setup.params)

    def terms_of(params, batch):
        apply = functools.partial(setup.model.apply, method=loss_terms)
        terms, metrics = apply({"params": params}, batch, config.loss)
        return total_loss(terms, config.loss), (terms, metrics)

    gradient, (terms, metrics) = jax.jit(jax.grad(terms_of, has_aux=True))(params, setup.batch)
    other = {"emb": "gen", "gen": "emb"}[absent]
    assert set(terms) == {other}
    names = {
        "emb": {"loss_emb", "loss_image_to_text", "temperature", "masked_share"},
        "gen": {"loss_gen", "perplexity", "token_accuracy"},
    }
    assert names[other] <= set(metrics) and not names[absent] & set(metrics)
    still = {name for name, tree in gradient.items() if not any(map(np.any, jax.tree.leaves(tree)))}
    assert still == unused


def only(batch, keep):
    """The batch with one row for each region that `keep` [B, R] picks, its image repeated."""
    images = np.nonzero(keep)[0]
    regions = ("boxes", *REGION_FIELDS)
    kept = {name: batch[name][keep][:, None] for name in regions}
    return kept | {name: value[images] for name, value in batch.items() if name not in regions}


def test_padding_regions_change_no_loss_and_no_gradient():
    """Three regions an image, some padding, equal the real regions alone, each with its image."""
    setup = tiny.setup({"batch_size": 4}, regions=3)
    params = tiny.randomise(setup.params)
    mask = np.array([[1, 1, 0], [1, 1, 0], [1, 0, 1], [0, 1, 1]], bool)
    batch = setup.batch | {"region_mask": mask}
    batch["boxes"] = np.where(mask[..., None], batch["boxes"], 0)  # as the pipeline pads
    gradient = jax.jit(jax.value_and_grad(tiny.loss_of(setup.config)))
    found = gradient(params, batch)
    tiny.assert_trees_close(found, gradient(params, only(batch, mask)), rtol=1e-5)
    # A padding region is the third of every image: as if there were two.
    first_two = mask & False
    first_two[:, :2] = True
    found = gradient(params, setup.batch | {"region_mask": first_two})
    two = {
        name: value[:, :2] if name == "boxes" or name in REGION_FIELDS else value
        for name, value in setup.batch.items()
    }
    tiny.assert_trees_close(found, gradient(params, two), rtol=1e-5)


def test_neither_the_order_of_regions_nor_the_amount_of_padding_matters():
    """Also with overlapping regions and texts that are shared."""
    setup = tiny.setup({"batch_size": 4}, regions=3)
    params, random = tiny.randomise(setup.params), np.random.default_rng(0)
    mask = np.array([[1, 1, 0], [1, 1, 1], [1, 0, 1], [0, 1, 1]], bool)
    batch = setup.batch | {"region_mask": mask, "boxes": setup.batch["boxes"].copy()}
    batch["boxes"][1, 2] = batch["boxes"][1, 0]
    batch["group_ids"] = batch["group_ids"].copy()
    batch["group_ids"][0, 0] = batch["group_ids"][3, 1]
    compute = jax.jit(jax.value_and_grad(tiny.loss_of(setup.config)))
    expected = compute(params, batch)
    order = np.argsort(random.random((4, 3)), axis=1)
    shuffled, padded = {}, {}
    for name, value in batch.items():
        shuffled[name] = padded[name] = value
        if name in ("boxes", *REGION_FIELDS):
            shuffled[name] = np.stack([own[o] for own, o in zip(value, order, strict=True)])
            padded[name] = np.concatenate([value, np.zeros_like(value[:, :2])], axis=1)
    tiny.assert_trees_close(compute(params, shuffled), expected, rtol=1e-5)
    tiny.assert_trees_close(compute(params, padded), expected, rtol=1e-5)


def test_regions_of_all_images_are_negatives_of_each_other():
    setup = tiny.setup({"batch_size": 4}, regions=3)
    _, metrics = jax.jit(
        lambda batch: setup.model.apply(
            {"params": setup.params}, batch, setup.config.loss, method=loss_terms
        )
    )(setup.batch | {"group_ids": np.zeros((4, 3, 2), np.int32)})
    assert metrics["masked_share"] == 1 and metrics["loss_emb"] == 0  # all 12 share a caption


def test_duplicates_count_as_negatives_where_the_config_says_so():
    setup = tiny.setup({"loss.mask_duplicates": False})
    _, metrics = jax.jit(
        lambda batch: setup.model.apply(
            {"params": setup.params}, batch, setup.config.loss, method=loss_terms
        )
    )(setup.batch | {"group_ids": np.zeros((8, 1, 2), np.int32)})
    assert metrics["masked_share"] == 0 and metrics["loss_emb"] > 1


def test_overlapping_regions_of_an_image_are_no_negatives():
    """Two regions of an image, one box: each is as good as alone in its own row of negatives."""
    setup = tiny.setup({"batch_size": 4, "loss.mask_overlap": 0.5}, regions=2)
    batch = setup.batch | {"boxes": setup.batch["boxes"].copy()}
    batch["boxes"][:, 1] = batch["boxes"][:, 0]
    batch["boxes"][1, 1] = (0, 0, 0.05, 0.05)  # but the second image's do not overlap
    batch["boxes"][1, 0] = (0.5, 0.5, 1, 1)
    terms = functools.partial(setup.model.apply, {"params": setup.params}, method=loss_terms)
    _, metrics = jax.jit(lambda batch: terms(batch, setup.config.loss))(batch)
    assert metrics["masked_share"] == pytest.approx(3 * 2 / (8 * 7))


def test_initialisation_meets_every_parameter():
    """Also those of a term that the config leaves out: stages may differ in their weights."""
    setup = tiny.setup({"loss.embedding_weight": 0.0})
    make = functools.partial(objective.init_params, setup.model, setup.batch)
    names = set(jax.eval_shape(make, jax.random.key(0)))
    joint = {"region_projection", "visual_token_projection", "text_projection", "logit_scale"}
    assert names == {"vision", "decoder"} | joint
