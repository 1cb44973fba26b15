"""Model FLOPs: the paper's count against JAX's program and against XLA's own count."""

import functools
import importlib
import math

import jax
import jax.numpy as jnp
import plain_losses
import pytest
import tiny
from flax.linen import meta
from jax.extend.core import jaxprs_in_params

from mmgem_jax import flops, objective, run, train_state
from mmgem_jax.evaluation import predictor
from mmgem_jax.generate import Decoding, generate
from mmgem_jax.models import layers
from mmgem_jax.optimizer import stop_frozen

SWAP = (8, 8)  # head_dim of the tiny decoder; batches here are of 5, so that nothing else is


def products_of(jaxpr):
    """FLOPs of the matrix products of a jaxpr, a scan's body once for each turn.

    A product with a matrix of 0 and 1 that turns rotary pairs is none of the model's.
    """
    found = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general" and equation.invars[1].aval.shape != SWAP:
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            inner = math.prod(shape[axis] for axis in contracted)
            found += 2 * inner * math.prod(equation.outvars[0].aval.shape)
        inner = [products_of(jaxpr) for jaxpr in jaxprs_in_params(equation.params)]
        turns = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        # Of the branches of a `cond`, which platforms choose, one is taken.
        found += max(inner) if equation.primitive.name == "cond" else turns * sum(inner)
    return found


def forward_flops(config, batch):
    """By part, without what a backward pass takes."""
    return flops.total(flops.step_products(config, batch), backward=False)


@pytest.fixture(autouse=True)
def plain_forms(monkeypatch):
    """What makes other products than on paper, as it is there.

    Blockwise the losses make some products twice, to save memory; the gradient of a bias is a sum,
    which is made as a product with ones.
    """

    def info_nce(images, texts, scale, pairs, *_):
        masked = plain_losses.duplicate_mask(pairs.group_ids)
        return plain_losses.info_nce(images, texts, scale, masked, pairs.valid)

    def caption_cross_entropy(states, head, targets, mask, _):
        logits = jnp.einsum("NTD,DV->NTV", states, head)
        loss, metrics = plain_losses.caption_cross_entropy(logits, targets, mask)
        return loss, metrics["token_accuracy"]

    def with_bias(y, bias):
        return y + layers.along_last(bias, y)

    monkeypatch.setattr(layers, "with_bias", with_bias)
    monkeypatch.setattr(objective.losses, "info_nce", info_nce)
    monkeypatch.setattr(objective.losses, "caption_cross_entropy", caption_cross_entropy)


class Shapes:
    """The tiny model with changes, and shapes of its parameters and of a batch."""

    def __init__(self, changes=(), regions=1):
        self.config = tiny.config({"batch_size": 5} | dict(changes))
        self.model = run.build_model(self.config.model)
        self.batch = jax.eval_shape(lambda: tiny.batch(self.config, regions=regions))
        init = functools.partial(objective.init_params, self.model, train_state.zeros(self.batch))
        self.params = meta.unbox(jax.eval_shape(init, jax.random.key(0)))

    def loss(self, params, batch):
        """What a train step differentiates."""
        params = stop_frozen(self.config.optimizer.groups, params)
        apply = functools.partial(self.model.apply, method=objective.loss_terms)
        terms, _ = apply({"params": params}, batch, self.config.loss)
        return objective.total_loss(terms, self.config.loss)

    def step_flops(self):
        """FLOPs of the products of the loss and its gradient."""
        step = jax.value_and_grad(self.loss)
        return products_of(jax.make_jaxpr(step)(self.params, self.batch).jaxpr)


SETUPS = {
    "plain": {},
    "grids": {"model.embedding_grid": 2, "model.generation_grid": 4},
    "embedding": {"loss.generation_weight": 0.0},
    "generation": {"loss.embedding_weight": 0.0},
    "tied": {"model.decoder.tie_embeddings": True},
    "deep": {"model.vision.depth": 5, "model.decoder.depth": 3},
}


@pytest.mark.parametrize(("name", "regions"), [*((name, 1) for name in SETUPS), ("grids", 3)])
def test_forward_and_backward_are_those_of_the_program(name, regions):
    shapes = Shapes(SETUPS[name], regions)
    forward = jax.make_jaxpr(shapes.loss)(shapes.params, shapes.batch).jaxpr
    paper = forward_flops(shapes.config, shapes.batch)
    assert sum(paper.values()) == products_of(forward)
    paper = flops.train_flops(shapes.config, shapes.batch)
    assert sum(paper.values()) == shapes.step_flops()


FROZEN = {
    "vision": "vision/.*",
    "decoder": "decoder/.*",
    "towers": "(vision|decoder)/.*",
    "decoder's layers": "decoder/blocks/.*",
    "all but the text projection": "(?!text_projection).*",
    "attention of the vision tower": "vision/blocks/(query|key|value)/.*",
}


@pytest.mark.parametrize("name", FROZEN)
def test_what_is_frozen_needs_no_gradients(name):
    groups = tiny.groups(
        frozen=(FROZEN[name], "frozen", 0.0, 0.0),
        rest=(f"(?!{FROZEN[name]}$).*", "adamw", 1e-3, 0.0),
    )
    shapes = Shapes({"optimizer.groups": groups})
    found = sum(flops.train_flops(shapes.config, shapes.batch).values())
    assert found == shapes.step_flops()
    assert found < sum(flops.train_flops(tiny.config(), shapes.batch).values())


def test_xla_counts_as_many_and_its_elementwise_work():
    """XLA also counts softmax, norms, activations and masks: some per cent at this width."""
    changes = {"model.vision.width": 256, "model.vision.mlp": 1024, "model.vision.depth": 1}
    changes |= {"model.decoder.width": 256, "model.decoder.mlp": 1024, "model.decoder.depth": 1}
    changes |= {"model.decoder.head_dim": 64}
    shapes = Shapes(changes)
    step = jax.jit(jax.value_and_grad(shapes.loss))
    theirs = step.lower(shapes.params, shapes.batch).cost_analysis()["flops"]
    ours = sum(flops.train_flops(shapes.config, shapes.batch).values())
    assert 1.0 <= theirs / ours < 1.03


def test_the_flagship_s_image_costs_what_it_costs_on_paper():
    config = importlib.import_module("vitl_tinyllama_stage1").get_config()
    config.data.packing.images = 0
    shapes = run.batch_shapes(config)
    D, F, S = 1024, 4096, 257
    vision = 2 * 256 * 588 * D + 24 * (8 * S * D * D + 4 * S * D * F + 4 * S * S * D)
    layer = 2 * (2 * 2048 * 2048 + 2 * 2048 * 256 + 3 * 2048 * 5632)
    rows = {T: 22 * (T * layer + 4 * T * T * 2048) for T in (77, 64 + 76)}
    forward = forward_flops(config, shapes)
    an_image = {part: found / config.batch_size for part, found in forward.items()}
    assert an_image["vision"] == vision
    assert (an_image["text decoder"], an_image["caption decoder"]) == tuple(rows.values())
    assert an_image["head"] == 2 * 76 * 2048 * 32_128
    assert sum(an_image.values()) == pytest.approx(597e9, rel=1e-3)
    whole = sum(flops.train_flops(config, shapes).values()) / config.batch_size
    # Pixels need no gradient, nor do boxes: a little below three times the forward pass.
    assert whole == pytest.approx(1.792e12, rel=1e-3)


def test_evaluation_and_captions_cost_what_their_programs_do():
    shapes, B = Shapes({"eval.batch_size": 8}), 8
    config, model = shapes.config, shapes.model
    zeros = jax.numpy.zeros
    arguments = {
        "feature map": (predictor.make_feature_map(model), zeros((B, 16, 16, 3), "uint8")),
        "embeddings and visual tokens": (
            *(predictor.make_pooled(model), zeros((B, 4, 4, 32))),
            *(zeros(B, int), zeros((B, 4))),
        ),
        "text embeddings": (predictor.make_encode_texts(model), zeros((B, 7), int), zeros(B, int)),
    }
    paper = flops.evaluation_flops(config)
    assert set(paper) == set(arguments)
    for name, (function, *inputs) in arguments.items():
        jaxpr = jax.make_jaxpr(function)(shapes.params, *inputs).jaxpr
        assert products_of(jaxpr) == sum(paper[name].values()), name

    def captions(params, visual):
        prompt, decoding = zeros((B, 1), "int32"), Decoding(length=2)
        return generate(model, params, visual, prompt, tiny.TOKENS, decoding, None)

    # A loop's body is once in the jaxpr: the one turn that a caption of two tokens takes.
    jaxpr = jax.make_jaxpr(captions)(shapes.params, zeros((B, 4, 32))).jaxpr
    assert products_of(jaxpr) == sum(flops.decode_flops(config, 2).values())
