"""Tokens a second of greedy decoding, beside Hugging Face's `generate` and the memory's speed."""

import functools
import os
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mmgem_jax.convert.hf_config import llama_config
from mmgem_jax.convert.table import decoder_places, to_params
from mmgem_jax.generate import CaptionTokens, Decoding, generate
from mmgem_jax.models.decoder import DecoderConfig
from mmgem_jax.models.rotary import RopeScaling

# SmolLM2-135M's architecture; speed does not depend on the weights' values.
DECODER = DecoderConfig(
    vocab_size=49_152,
    width=576,
    depth=30,
    heads=9,
    kv_heads=3,
    head_dim=64,
    mlp=1536,
    rope_theta=100_000.0,
    rope_scaling=RopeScaling(),
    norm_epsilon=1e-5,
    tie_embeddings=True,
    attention="plain",
    dtype="float32",
    remat="none",
    unroll=1,
)
# No row ends before its length: there is no </s>.
TOKENS = CaptionTokens(bos=0, eos=-1, pad=-1, emb=-1, vocabulary=DECODER.vocab_size)
VISUAL_TOKENS, NEW_TOKENS, BATCHES, ROUNDS = 16, 64, (1, 16), 5


class Model:
    """As much of an MMGem as decoding needs."""

    class config:
        decoder = DECODER


def seconds(function):
    """Wall-clock time of a call, and its result."""
    began = time.perf_counter()
    result = jax.block_until_ready(function())
    return time.perf_counter() - began, result


def torch_model():
    """Hugging Face's Llama of these sizes, random, with the attention it takes by default."""
    torch.manual_seed(0)
    torch.set_num_threads(os.cpu_count())
    config = LlamaConfig(**llama_config(DECODER))  # without </s>: no row ends before its length
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def memory_bandwidth():
    """Bytes a second that a sum over 1 GiB reads, the best of a few."""
    array = torch.ones(2**28)
    return array.nbytes / min(seconds(array.sum)[0] for _ in range(5))


def bytes_a_step(params, batch):
    """What a token costs in reading at least: the weights once, and half the way, the cache."""
    weights = sum(x.size * 4 for x in jax.tree.leaves(params))
    past = VISUAL_TOKENS + 1 + NEW_TOKENS / 2
    cache = 2 * DECODER.depth * batch * past * DECODER.kv_heads * DECODER.head_dim * 4
    return weights + cache


def benchmark_decode(row):
    """Rows (made by `row`) for each batch: ours, Hugging Face's, and the bound, in turns."""
    llama = torch_model()
    weights = {name: value.numpy() for name, value in llama.state_dict().items()}
    params = {"decoder": jax.tree.map(jnp.asarray, to_params(weights, decoder_places(DECODER)))}
    decoding = Decoding(length=NEW_TOKENS)
    rows = []
    for batch in BATCHES:
        random = np.random.default_rng(0)
        visual = random.standard_normal((batch, VISUAL_TOKENS, DECODER.width)).astype(np.float32)
        prompt = np.full((batch, 1), TOKENS.bos, np.int32)
        words = llama.model.embed_tokens(torch.from_numpy(prompt).long())
        embeds = torch.cat([torch.from_numpy(visual), words], dim=1)
        run = jax.jit(lambda *inputs: generate(Model, *inputs, TOKENS, decoding, None))
        run = functools.partial(run.lower(params, visual, prompt).compile(), params, visual, prompt)
        ours, theirs, bandwidth = [], [], []
        for _ in range(ROUNDS):
            time_ours, found = seconds(run)
            time_theirs, expected = seconds(
                lambda embeds=embeds: llama.generate(
                    inputs_embeds=embeds,
                    attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
                    max_new_tokens=NEW_TOKENS,
                    min_new_tokens=NEW_TOKENS,
                    suppress_tokens=[TOKENS.bos],
                    do_sample=False,
                    use_cache=True,
                )
            )
            ours.append(time_ours)
            theirs.append(time_theirs)
            bandwidth.append(memory_bandwidth())
        ours, theirs, bandwidth = map(statistics.median, (ours, theirs, bandwidth))
        tokens = batch * NEW_TOKENS
        name = f"decode, batch {batch}"
        same = float((np.asarray(found) == expected.numpy()).mean())
        rate = bytes_a_step(params, batch) * NEW_TOKENS / ours
        rows += [
            row(f"{name}: tokens a second", tokens / ours, "1/s", tokens / theirs, "Hugging Face"),
            row(f"{name}: memory read", rate / 1e9, "GB/s", bandwidth / 1e9, "the memory"),
            row(f"{name}: tokens equal", same, "share"),
        ]
    return rows
