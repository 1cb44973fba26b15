"""Weights of Hugging Face's Llama as a decoder's parameters."""

import numpy as np

MATRICES = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "out": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}


def decoder_params(weights, config):
    """The parameters of our `Decoder` out of a `LlamaForCausalLM`'s.

    Args:
      weights: mapping from their names to numpy arrays; their matrices are [out, in].
      config: DecoderConfig of the same sizes.
    """

    def layers(name):
        return np.stack([weights[f"model.layers.{i}.{name}.weight"] for i in range(config.depth)])

    blocks = {ours: {"kernel": layers(name).swapaxes(1, 2)} for ours, name in MATRICES.items()}
    blocks |= {ours: {"scale": layers(name)} for ours, name in NORMS.items()}
    params = {
        "embedding": weights["model.embed_tokens.weight"],
        "final_norm": {"scale": weights["model.norm.weight"]},
        "blocks": blocks,
    }
    if not config.tie_embeddings:
        params["head"] = weights["lm_head.weight"].T
    return params
