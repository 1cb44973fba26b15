"""Tensors from files into sharded parameters: what is grown, cut, interpolated and refused."""

from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
import tiny

from mmgem_jax import run, sharding, train_state
from mmgem_jax.convert import import_weights
from mmgem_jax.convert.source import Source, Tensor
from mmgem_jax.convert.table import decoder_places, to_params, to_weights, vision_places
from mmgem_jax.data.tokenizer import EMB, PAD
from mmgem_jax.errors import UserError

WORDS = 100  # of the decoder's own vocabulary


class Tokenizer:
    """As much of one as growing a vocabulary needs: [PAD] and [EMB] behind the words."""

    def __init__(self, words=WORDS):
        self.words = words

    def get_vocab(self):
        return {f"word{i}": i for i in range(self.words)} | {PAD: self.words, EMB: self.words + 1}


def source(arrays):
    """A Source of arrays, which are counted as they are read."""
    tensors = {name: Tensor(x.shape, lambda x=x: np.array(x)) for name, x in arrays.items()}
    return Source(Path("weights"), {}, tensors, 0)


@pytest.fixture(scope="module")
def setup():
    """The tiny model, and its random parameters as a CLIPVisionModel's and a Llama's tensors."""
    made = tiny.setup()
    params, config = tiny.random_params(), made.model.config
    vision = dict(to_weights(params["vision"], vision_places(config.vision)))
    decoder = dict(to_weights(params["decoder"], decoder_places(config.decoder)))
    cut = {name: decoder[name][:WORDS] for name in import_weights.VOCABULARY}
    return made, vision, decoder | cut


def abstract_params(config, mesh):
    model, shapes = run.build_model(config.model), run.batch_shapes(config)
    return train_state.abstract_state(model, optax.identity(), False, shapes, mesh).params


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_streamed_into_shards_equals_the_whole(setup, shape):
    made, vision, decoder = setup
    mesh, config = tiny.mesh_of(shape), made.model.config
    abstract = abstract_params(made.config, mesh)
    tensors = {
        "vision": import_weights.vision_tensors(source(vision), config.vision, False),
        "decoder": import_weights.decoder_tensors(
            source(decoder), config.decoder, Tokenizer(), False
        ),
    }
    places = {"vision": vision_places(config.vision), "decoder": decoder_places(config.decoder)}
    for tower in tensors:
        import_weights.check_tensors("weights", tensors[tower], places[tower], abstract[tower])
        found = import_weights.stream(tensors[tower], places[tower], abstract[tower])
        whole = {name: tensor.read() for name, tensor in tensors[tower].items()}
        expected = to_params(whole, places[tower])
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), expected)
        layouts = jax.tree.map(lambda x: x.sharding, abstract[tower])
        assert jax.tree.map(lambda x: x.sharding, found) == layouts


def test_new_tokens_start_at_the_mean_of_the_old(setup):
    made, _, decoder = setup
    tensors = import_weights.decoder_tensors(
        source(decoder), made.model.config.decoder, Tokenizer(), False
    )
    for name in import_weights.VOCABULARY:
        table = tensors[name].read()
        assert table.shape == tensors[name].shape == (128, 32)
        np.testing.assert_array_equal(table[:WORDS], decoder[name])
        mean = np.broadcast_to(decoder[name].mean(axis=0), (28, 32))
        np.testing.assert_allclose(table[WORDS:], mean, rtol=0, atol=1e-7)


def test_rows_that_no_token_had_are_new_too(setup):
    """A table may be padded already; [PAD] and [EMB] then fall on rows that were never trained."""
    made, _, decoder = setup
    config = made.model.config.decoder
    few = import_weights.decoder_tensors(source(decoder), config, Tokenizer(WORDS - 10), False)
    table, name = few[import_weights.VOCABULARY[0]].read(), import_weights.VOCABULARY[0]
    mean = np.broadcast_to(decoder[name][: WORDS - 10].mean(axis=0), (38, 32))
    np.testing.assert_allclose(table[WORDS - 10 :], mean, rtol=0, atol=1e-7)


@pytest.mark.parametrize("words", [WORDS + 1, 20])
def test_a_vocabulary_that_is_not_the_tokenizer_s_is_refused(setup, words):
    made, _, decoder = setup
    decoder = decoder | {n: np.zeros((130, 32), np.float32) for n in import_weights.VOCABULARY}
    if words > WORDS:
        decoder |= {n: np.zeros((WORDS, 32), np.float32) for n in import_weights.VOCABULARY}
    message = rf"weights: .* is \((100|130), 32\); expected a row .* the {words} tokens of .*, 128"
    with pytest.raises(UserError, match=message):
        import_weights.decoder_tensors(
            source(decoder), made.model.config.decoder, Tokenizer(words), False
        )


def test_a_tied_head_may_be_there_twice_and_must_be_the_same(setup):
    made = tiny.setup({"model.decoder.tie_embeddings": True})
    config, decoder = made.model.config.decoder, setup[2]
    table, head = import_weights.VOCABULARY
    call = lambda arrays: import_weights.decoder_tensors(source(arrays), config, Tokenizer(), False)  # noqa: E731
    assert head not in call(decoder | {head: decoder[table]})
    with pytest.raises(UserError, match=r"lm_head.weight is not model.embed_tokens.weight"):
        call(decoder)


def test_layers_above_are_left_out_only_when_asked_to(setup):
    changes = {"model.decoder.depth": 1}
    config = tiny.setup(changes).model.config.decoder
    abstract = abstract_params(tiny.config(changes), tiny.mesh_of((1, 1, 1)))["decoder"]

    def check(cut):
        tensors = import_weights.decoder_tensors(source(setup[2]), config, Tokenizer(), cut)
        import_weights.check_tensors("weights", tensors, decoder_places(config), abstract)

    check(cut=True)
    with pytest.raises(UserError, match=r"tensor model.layers.1.\S+ and 8 more left over"):
        check(cut=False)


@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_of_a_clip_model_the_vision_tower_is_taken(setup, prefix):
    made, vision, _ = setup
    others = ("text_model.x", "text_projection.weight", "visual_projection.weight", "logit_scale")
    others += (f"{prefix}embeddings.position_ids",)
    arrays = {prefix + name: array for name, array in vision.items()}
    arrays |= {name: np.zeros(2, np.float32) for name in others}
    found = import_weights.vision_tensors(source(arrays), made.model.config.vision, False)
    assert found.keys() == vision.keys()


def test_a_tensor_that_is_set_twice_is_named(setup):
    made, vision, _ = setup
    twice = vision | {"vision_model.post_layernorm.bias": vision["post_layernorm.bias"]}
    with pytest.raises(UserError, match=r"tensor post_layernorm.bias is set twice"):
        import_weights.vision_tensors(source(twice), made.model.config.vision, False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("post_layernorm.bias"), "tensor post_layernorm.bias missing"),
        (lambda t: t.update(extra=t["post_layernorm.bias"]), "tensor extra left over"),
        (
            lambda t: t.update({"encoder.layers.1.mlp.fc1.bias": Tensor((47,), None)}),
            r"tensor encoder.layers.1.mlp.fc1.bias is \(47,\); expected \(48,\)",
        ),
        (
            lambda t: t.update({"encoder.layers.0.mlp.fc1.weight": Tensor((32, 48), None)}),
            r"fc1.weight is \(32, 48\); expected \(48, 32\)",
        ),
        (
            lambda t: t.update({"embeddings.patch_embedding.weight": Tensor((32, 48), None)}),
            r"patch_embedding.weight is \(32, 48\); expected \(32, 3, 4, 4\)",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(setup, change, message):
    made, vision, _ = setup
    config = made.model.config.vision
    tensors = import_weights.vision_tensors(source(vision), config, False)
    change(tensors)
    abstract = abstract_params(made.config, tiny.mesh_of((1, 1, 1)))["vision"]
    with pytest.raises(UserError, match=message):
        import_weights.check_tensors("weights", tensors, vision_places(config), abstract)


@pytest.mark.parametrize("shape", [(7, 32), (17,), (0, 32)])
def test_positions_of_no_square_are_refused(setup, shape):
    made, vision, _ = setup
    spoilt = vision | {import_weights.POSITIONS: np.zeros(shape, np.float32)}
    with pytest.raises(UserError, match=r"weights: embeddings.pos\S+ is \(\d+.*expected a squ"):
        import_weights.vision_tensors(source(spoilt), made.model.config.vision, True)


def test_the_mesh_of_one_layer():
    mesh = tiny.mesh_of((1, 2, 2))
    box = nn.LogicallyPartitioned(np.zeros((3, 4, 4)), ("layers", "embed", "mlp"))
    stacked = sharding.param_shardings({"x": box}, mesh)["x"]
    assert sharding.layer_sharding(stacked).shard_shape((4, 4)) == (2, 2)
