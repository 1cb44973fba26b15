"""Hugging Face's Llama with random parameters, and ours with the same ones."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mmgem_jax.convert.table import decoder_places, to_params


def rope_parameters(config):
    """Rotary positions in Hugging Face's words."""
    scaling = config.rope_scaling
    if scaling.type == "none":
        return {"rope_type": "default", "rope_theta": config.rope_theta}
    found = {"rope_type": scaling.type, "rope_theta": config.rope_theta, "factor": scaling.factor}
    if scaling.type == "llama3":
        found["low_freq_factor"] = scaling.low_freq_factor
        found["high_freq_factor"] = scaling.high_freq_factor
        found["original_max_position_embeddings"] = scaling.original_length
    return found


def torch_model(config, seed):
    """A LlamaForCausalLM of our sizes, every parameter random."""
    torch.manual_seed(seed)
    sizes = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.width,
        intermediate_size=config.mlp,
        num_hidden_layers=config.depth,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.norm_epsilon,
        rope_parameters=rope_parameters(config),
        tie_word_embeddings=config.tie_embeddings,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(sizes).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter += 0.2 * torch.randn_like(parameter)
        else:
            parameter.normal_(0, parameter.shape[1] ** -0.5)
    return model


def from_torch(model, config):
    """Our parameters with the values of a LlamaForCausalLM."""
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    return to_params(weights, decoder_places(config))
