"""Hugging Face's weights into our sharded parameters, one tensor at a time.

At any moment the host holds its own part of the parameters made so far, and one tensor; of a
vocabulary that grows, the old and the new table.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np

from mmgem_jax import sharding
from mmgem_jax.convert.source import Tensor
from mmgem_jax.data.tokenizer import EMB, PAD
from mmgem_jax.errors import UserError
from mmgem_jax.models.vision import interpolated_positions

# What files hold beside a tower's weights: the other half of a CLIPModel, and buffers that older
# versions of transformers saved.
NOT_OURS = {
    "vision": r"text_model\..*|(text|visual)_projection\.weight|logit_scale|.*\.position_ids",
    "decoder": r".*\.rotary_emb\.inv_freq",
}
POSITIONS = "embeddings.position_embedding.weight"
VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


def vision_tensors(source, config, interpolate):
    """The vision tower's tensors by the names of `table.VISION`.

    Args:
      source: Source of a `CLIPVisionModel` or a `CLIPModel`.
      config: VisionConfig.
      interpolate: whether position embeddings may be those of another image size.
    """
    tensors = {}
    for name, tensor in source.tensors.items():
        short = name.removeprefix("vision_model.")
        if short in tensors:
            raise UserError(f"{source.path}: tensor {short} is set twice, with and without prefix")
        if not re.fullmatch(NOT_OURS["vision"], name):
            tensors[short] = tensor
    if interpolate and POSITIONS in tensors:
        found = tensors[POSITIONS]
        cells = found.shape[0] - 1 if len(found.shape) == 2 else -1
        if cells < 1 or math.isqrt(cells) ** 2 != cells:
            raise UserError(
                f"{source.path}: {POSITIONS} is {found.shape}; expected a square and one more rows"
            )
        shape = (config.map_size**2 + 1, found.shape[1])
        read = lambda: interpolated_positions(found.read(), config.map_size)  # noqa: E731
        tensors[POSITIONS] = Tensor(shape, read)
    return tensors


def decoder_tensors(source, config, tokenizer, cut_layers):
    """The decoder's tensors by the names of `table.DECODER`, its vocabulary grown to ours.

    Args:
      source: Source of a `LlamaForCausalLM`.
      config: DecoderConfig.
      tokenizer: from `load_tokenizer`, on the decoder's own.
      cut_layers: whether the layers above `config.depth` are left out.

    Raises:
      UserError: a tied head that is not the embedding; a vocabulary that is not the tokenizer's.
    """
    tensors = {k: v for k, v in source.tensors.items() if not re.fullmatch(NOT_OURS["decoder"], k)}
    if config.tie_embeddings and all(name in tensors for name in VOCABULARY):
        table, head = (tensors[name].read() for name in VOCABULARY)
        if not np.array_equal(table, head):
            raise UserError(
                f"{source.path}: {VOCABULARY[1]} is not {VOCABULARY[0]}; expected the same, for "
                "config.json ties them"
            )
        del tensors[VOCABULARY[1]]
    if cut_layers:
        tensors = {k: v for k, v in tensors.items() if layer_of(k) < config.depth}
    old = {token: i for token, i in tokenizer.get_vocab().items() if token not in (EMB, PAD)}
    old = max(old.values()) + 1
    for name in tensors.keys() & set(VOCABULARY):
        tensors[name] = grown(source.path, name, tensors[name], old, config.vocab_size)
    return tensors


def layer_of(name):
    """The layer that a tensor is of; -1 for none."""
    found = re.search(r"\.layers\.(\d+)\.", name)
    return int(found[1]) if found else -1


def grown(path, name, tensor, old, rows):
    """A table of `rows` tokens, of which those from `old` on are new: the mean of the old ones.

    That is where a token that means nothing yet does the least harm (Hewitt 2021, "Initializing
    new word embeddings for pretrained language models").
    """
    if len(tensor.shape) != 2 or not old <= tensor.shape[0] <= rows:
        raise UserError(
            f"{path}: {name} is {tensor.shape}; expected a row for each of the {old} tokens of the "
            f"tokenizer, or more of them up to model.decoder.vocab_size, {rows}"
        )

    def read():
        table = np.empty((rows, tensor.shape[1]), np.float32)
        table[:old] = tensor.read()[:old]
        table[old:] = table[:old].mean(axis=0, dtype=np.float64)
        return table

    return Tensor((rows, tensor.shape[1]), read)


def check_tensors(path, tensors, places, abstract):
    """Raises UserError for a tensor that is left over, missing or of another shape.

    Args:
      path: of the source, for the message.
      tensors: name: Tensor.
      places: name: Place, from `table`.
      abstract: shapes of our tower's parameters.
    """
    missing, left = sorted(places.keys() - tensors), sorted(tensors.keys() - places)
    for what, names in {"missing": missing, "left over": left}.items():
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(
                f"{path}: tensor {names[0]}{more} {what}; expected what the config's sizes imply"
            )
    for name, place in places.items():
        found, expected = tensors[name].shape, place.their_shape(abstract)
        if found != expected:
            raise UserError(f"{path}: tensor {name} is {found}; expected {expected}")


def stream(tensors, places, abstract):
    """The tower's parameters, laid out as `abstract` says; one tensor is read at a time."""
    leaves = {}
    for name, place in places.items():
        layout = place.leaf(abstract)
        array = place.to_ours(tensors[name].read())
        if place.layer is None:
            leaves[place.path] = jax.device_put(array, layout.sharding)
        else:
            if place.path not in leaves:
                leaves[place.path] = jnp.zeros(layout.shape, layout.dtype, device=layout.sharding)
            array = jax.device_put(array, sharding.layer_sharding(layout.sharding))
            leaves[place.path] = set_layer(leaves[place.path], array, place.layer)
        # The next tensor is read when this one is gone.
        jax.block_until_ready(leaves[place.path])
    return jax.tree_util.tree_map_with_path(
        lambda path, _: leaves[sharding.path_name(path)], abstract
    )


@functools.partial(jax.jit, donate_argnums=0)
def set_layer(stack, tensor, layer):
    """The stack [layers, ...] with one of its layers; in the old one's memory."""
    return jax.lax.dynamic_update_index_in_dim(stack, tensor, layer, axis=0)
