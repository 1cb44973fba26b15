"""The one table of names: where each tensor of Hugging Face's CLIP and Llama lies among ours.

Both directions read it: importing, exporting and their tests. A tensor that every layer has is a
slice of our stack `[layers, ...]`.
"""

import dataclasses
import functools

import jax
import numpy as np

from mmgem_jax.models.mmgem import MMGemConfig
from mmgem_jax.sharding import path_name

# Hugging Face's name: (our path, what becomes of the tensor: a key of TO_OURS).
VISION = {
    "embeddings.class_embedding": ("class_token", "same"),
    "embeddings.patch_embedding.weight": ("patch/kernel", "patch"),
    "embeddings.position_embedding.weight": ("position", "same"),
    "pre_layrnorm.weight": ("pre_norm/scale", "same"),  # their spelling
    "pre_layrnorm.bias": ("pre_norm/bias", "same"),
    "encoder.layers.{layer}.layer_norm1.weight": ("blocks/attention_norm/scale", "same"),
    "encoder.layers.{layer}.layer_norm1.bias": ("blocks/attention_norm/bias", "same"),
    "encoder.layers.{layer}.self_attn.q_proj.weight": ("blocks/query/kernel", "matrix"),
    "encoder.layers.{layer}.self_attn.q_proj.bias": ("blocks/query/bias", "same"),
    "encoder.layers.{layer}.self_attn.k_proj.weight": ("blocks/key/kernel", "matrix"),
    "encoder.layers.{layer}.self_attn.k_proj.bias": ("blocks/key/bias", "same"),
    "encoder.layers.{layer}.self_attn.v_proj.weight": ("blocks/value/kernel", "matrix"),
    "encoder.layers.{layer}.self_attn.v_proj.bias": ("blocks/value/bias", "same"),
    "encoder.layers.{layer}.self_attn.out_proj.weight": ("blocks/out/kernel", "matrix"),
    "encoder.layers.{layer}.self_attn.out_proj.bias": ("blocks/out/bias", "same"),
    "encoder.layers.{layer}.layer_norm2.weight": ("blocks/mlp_norm/scale", "same"),
    "encoder.layers.{layer}.layer_norm2.bias": ("blocks/mlp_norm/bias", "same"),
    "encoder.layers.{layer}.mlp.fc1.weight": ("blocks/up/kernel", "matrix"),
    "encoder.layers.{layer}.mlp.fc1.bias": ("blocks/up/bias", "same"),
    "encoder.layers.{layer}.mlp.fc2.weight": ("blocks/down/kernel", "matrix"),
    "encoder.layers.{layer}.mlp.fc2.bias": ("blocks/down/bias", "same"),
    "post_layernorm.weight": ("post_norm/scale", "same"),
    "post_layernorm.bias": ("post_norm/bias", "same"),
}
DECODER = {
    "model.embed_tokens.weight": ("embedding", "same"),
    "model.layers.{layer}.input_layernorm.weight": ("blocks/attention_norm/scale", "same"),
    "model.layers.{layer}.self_attn.q_proj.weight": ("blocks/query/kernel", "matrix"),
    "model.layers.{layer}.self_attn.k_proj.weight": ("blocks/key/kernel", "matrix"),
    "model.layers.{layer}.self_attn.v_proj.weight": ("blocks/value/kernel", "matrix"),
    "model.layers.{layer}.self_attn.o_proj.weight": ("blocks/out/kernel", "matrix"),
    "model.layers.{layer}.post_attention_layernorm.weight": ("blocks/mlp_norm/scale", "same"),
    "model.layers.{layer}.mlp.gate_proj.weight": ("blocks/gate/kernel", "matrix"),
    "model.layers.{layer}.mlp.up_proj.weight": ("blocks/up/kernel", "matrix"),
    "model.layers.{layer}.mlp.down_proj.weight": ("blocks/down/kernel", "matrix"),
    "model.norm.weight": ("final_norm/scale", "same"),
}
HEAD = {"lm_head.weight": ("head", "matrix")}  # absent where it is the embedding
JOINT = {
    "region_projection.weight": ("region_projection/kernel", "matrix"),
    "visual_token_projection.weight": ("visual_token_projection/kernel", "matrix"),
    "text_projection.weight": ("text_projection/kernel", "matrix"),
    "logit_scale": ("logit_scale", "same"),
}

# A linear map of theirs is [out, in], the patch convolution [D, channel, row, column].
TO_OURS = {
    "same": lambda x: x,
    "matrix": lambda x: x.T,
    "patch": lambda x: x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0]),
}
TO_THEIRS = {
    "same": lambda x: x,
    "matrix": lambda x: x.T,
    "patch": lambda x: x.reshape(patch_side(x), patch_side(x), 3, -1).transpose(3, 2, 0, 1),
}


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a tensor of theirs lies in a tree of ours."""

    path: str  # such as blocks/query/kernel
    layer: int | None  # of a stack
    kind: str  # same, matrix or patch

    def to_ours(self, array):
        """Their tensor as ours."""
        return TO_OURS[self.kind](array)

    def leaf(self, params):
        """The leaf of our tree that holds it, of the whole stack."""
        return functools.reduce(lambda node, name: node[name], self.path.split("/"), params)

    def to_theirs(self, params):
        """Their tensor out of our tree of numpy or jax arrays, fp32 numpy."""
        array = self.leaf(params)
        array = np.asarray(array if self.layer is None else array[self.layer], np.float32)
        return TO_THEIRS[self.kind](array).copy(order="C")

    def their_shape(self, abstract):
        """The shape of their tensor, from the shapes of our tree."""
        shape = self.leaf(abstract).shape[self.layer is not None :]
        return jax.eval_shape(TO_THEIRS[self.kind], jax.ShapeDtypeStruct(shape, np.float32)).shape


def patch_side(kernel):
    """Pixels a side of a patch, of our kernel [side * side * 3, D]."""
    return int((kernel.shape[0] // 3) ** 0.5)


def places(rules, depth):
    """Their name: Place, for every tensor of a tower of `depth` layers."""
    found = {}
    for name, (path, kind) in rules.items():
        stacked = "{layer}" in name
        for layer in range(depth) if stacked else (None,):
            found[name.format(layer=layer)] = Place(path, layer, kind)
    return found


def vision_places(config):
    """Their name: Place in `params["vision"]`, for a `CLIPVisionModel` of this VisionConfig."""
    return places(VISION, config.depth)


def decoder_places(config):
    """Their name: Place in `params["decoder"]`, for a `LlamaForCausalLM` of this DecoderConfig."""
    return places(DECODER if config.tie_embeddings else DECODER | HEAD, config.depth)


def model_places(config: MMGemConfig):
    """Name in the exported model (`modeling_mmgem.py`): Place in our parameters."""
    towers = {
        ("vision_model.", "vision/"): vision_places(config.vision),
        ("language_model.", "decoder/"): decoder_places(config.decoder),
    }
    found = {
        theirs + name: dataclasses.replace(place, path=ours + place.path)
        for (theirs, ours), inner in towers.items()
        for name, place in inner.items()
    }
    return found | places(JOINT, 0)


def to_params(weights, places):
    """Our parameters out of their tensors, whole and in memory.

    Args:
      weights: mapping from their names to numpy arrays.
      places: of the functions above; names in `weights` that are not there are left out.

    Returns:
      A tree of numpy arrays.
    """
    stacks = {}
    for name, place in places.items():
        stacks.setdefault(place.path, []).append(place.to_ours(weights[name]))
    stacked = {place.path for place in places.values() if place.layer is not None}
    params = {}
    for path, arrays in stacks.items():
        *folders, leaf = path.split("/")
        node = params
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = np.stack(arrays) if path in stacked else arrays[0]
    return params


def to_weights(params, places):
    """Yields (their name, fp32 tensor) of our parameters, one at a time."""
    known = {place.path for place in places.values()}
    leaves = jax.tree_util.tree_leaves_with_path(params)
    left = sorted({path_name(path) for path, _ in leaves} - known)
    if left:
        raise ValueError(f"no name of theirs for {left}")
    for name, place in places.items():
        yield name, place.to_theirs(params)
