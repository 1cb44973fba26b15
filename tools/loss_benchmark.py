"""Memory and time of the losses beside their plain forms, and of accumulation beside none.

On 8 virtual CPU devices they are measured. With a topology they are predicted for its chips too,
for what a step of a chip has to do there: see mmgem_jax/preflight/check.py for what that means.
"""

import os
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import plain_losses
from jax.sharding import NamedSharding, PartitionSpec
from measure import OurStep, row, times_in_turns, with_adamw
from train_benchmark import batch_of_each_source

from mmgem_jax import losses, run, sharding
from mmgem_jax.preflight import cost, hlo
from mmgem_jax.preflight.collectives import find_collectives
from mmgem_jax.preflight.environment import ENVIRONMENT
from mmgem_jax.preflight.topology import absent_devices, chip_of_topology

DEVICES, ROUNDS = 8, 2
WARM_UP = 1  # a call of the plain InfoNCE takes a minute
PAIRS, JOINT_DIM = 32_768, 512
# A chip's captions, their tokens, the vocabulary, and the decoder's width: on CPUs a narrow one.
CAPTIONS, TOKENS, VOCABULARY, WIDTH, NARROW = 32, 141, 32_128, 2_048, 256
PARTS = 8


def use_virtual_devices():
    """8 CPU devices, and as many threads as their collectives can hold up at a time."""
    os.environ["NPROC"] = str(4 * DEVICES)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)


def contrastive_case(mesh, real):
    """InfoNCE of 32,768 pairs with masks: both forms, the arguments, and by which to differentiate.

    Args:
      mesh: over which the pairs are split.
      real: whether there are to be arrays and not only shapes.
    """
    random = np.random.default_rng(0)

    def unit_rows():
        rows = random.standard_normal((PAIRS, JOINT_DIM)).astype(np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    ids = random.integers(0, 2**31 - 1, (PAIRS, 2)).astype(np.int32)
    boxes = np.tile(np.float32([0, 0, 1, 1]), (PAIRS, 1))
    pairs = losses.Pairs(ids, np.arange(PAIRS, dtype=np.int32), boxes, np.ones(PAIRS, bool))
    rows = placed((unit_rows(), unit_rows(), *pairs), mesh, real)

    def plain(images, texts, *pairs):
        pairs = losses.Pairs(*pairs)
        masked = plain_losses.duplicate_mask(pairs.group_ids)
        return plain_losses.info_nce(images, texts, 1 / 0.07, masked, pairs.valid)[0]

    def ours(images, texts, *pairs):
        return losses.info_nce(images, texts, 1 / 0.07, losses.Pairs(*pairs), True, 1.0)[0]

    return {"ours": ours, "plain": plain}, rows, (0, 1)


def caption_case(mesh, real):
    """The cross-entropy of 32 captions a device: as `contrastive_case`."""
    width, dtype = (NARROW, jnp.float32) if real else (WIDTH, jnp.bfloat16)
    random, count = np.random.default_rng(0), CAPTIONS * mesh.size
    states = random.standard_normal((count, TOKENS, width), np.float32).astype(dtype)
    targets = random.integers(0, VOCABULARY, (count, TOKENS)).astype(np.int32)
    rows = placed((states, targets, np.ones((count, TOKENS), bool)), mesh, real)
    head = 0.02 * random.standard_normal((width, VOCABULARY), np.float32)
    everywhere = NamedSharding(mesh, PartitionSpec())
    head = jax.device_put(head, everywhere) if real else shape_of(head, everywhere)

    def plain(states, head, targets, mask):
        logits = jnp.einsum(
            "NTD,DV->NTV", states, head.astype(dtype), preferred_element_type=jnp.float32
        )
        return plain_losses.caption_cross_entropy(logits, targets, mask)[0]

    def ours(states, head, targets, mask):
        return losses.caption_cross_entropy(states, head, targets, mask, mask.sum())[0]

    return {"ours": ours, "plain": plain}, (rows[0], head, *rows[1:]), (0, 1)


def placed(arrays, mesh, real):
    """The arrays split over the mesh by rows, or their shapes."""
    split = sharding.batch_sharding(mesh)
    if real:
        return tuple(jax.device_put(array, split) for array in arrays)
    return tuple(shape_of(array, split) for array in arrays)


def shape_of(array, where):
    """The shape of an array that lies so."""
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=where)


def compiled_forms(case, mesh, real):
    """Both forms with their gradients, compiled; and the arguments."""
    forms, arguments, by = case(mesh, real)
    with sharding.use_mesh(mesh):
        return {
            name: jax.jit(jax.value_and_grad(form, argnums=by)).lower(*arguments).compile()
            for name, form in forms.items()
        }, arguments


def mesh_of(devices, **sizes):
    """A mesh of the devices with these sizes, `data` taking the rest."""
    return sharding.make_mesh(dict(slice=1, data=-1, fsdp=1, tensor=1) | sizes, devices)


def benchmark_loss(case, name, topology):
    """Rows on one of the losses, and with a topology its predictions."""
    use_virtual_devices()
    forms, arguments = compiled_forms(case, mesh_of(jax.devices()), real=True)
    calls = {k: lambda f=f: jax.block_until_ready(f(*arguments)) for k, f in forms.items()}
    times = times_in_turns(calls, ROUNDS, WARM_UP)
    seconds = {key: statistics.median(found) for key, found in times.items()}
    rows = compared(f"{name}, {DEVICES} CPU devices", forms, seconds, "s")
    if topology:
        os.environ.update(ENVIRONMENT)
        mesh = mesh_of(absent_devices(topology), fsdp=16)
        forms, _ = compiled_forms(case, mesh, real=False)
        chip = chip_of_topology(topology)
        seconds = {key: 1e3 * predicted_seconds(form, mesh, chip) for key, form in forms.items()}
        rows += compared(f"{name}, predicted for {topology}", forms, seconds, "ms")
    return rows


def compared(name, forms, seconds, unit):
    """Rows on memory and time of both forms."""
    held = {k: form.memory_analysis().temp_size_in_bytes / 2**20 for k, form in forms.items()}
    return [
        row(f"{name}: temporaries a device", held["ours"], "MiB", held["plain"], "the plain form"),
        row(f"{name}: time", seconds["ours"], unit, seconds["plain"], "the plain form"),
    ]


def predicted_seconds(compiled, mesh, chip):
    """What the pre-flight says of a program: its compute, and the collectives nothing hides."""
    computations, entry = hlo.parse(compiled.as_text())
    regions = hlo.regions(computations, entry)
    spent = cost.costs(regions, chip, {})
    found = find_collectives(regions, computations, mesh, chip, cost.seconds_of(spent))
    return sum(c.seconds for c in spent) + sum(c.exposed * c.trips for c in found)


def benchmark_contrastive(topology):
    """InfoNCE."""
    return benchmark_loss(contrastive_case, f"InfoNCE of {PAIRS:,} pairs", topology)


def benchmark_caption_loss(topology):
    """The cross-entropy of captions."""
    tokens = f"{CAPTIONS} x {TOKENS} tokens a device"
    return benchmark_loss(caption_case, f"caption loss of {tokens}", topology)


def benchmark_accumulation(config):
    """A train step in 8 parts, each of the config's batch, beside one in one part, with AdamW."""
    use_virtual_devices()
    config.batch_size *= PARTS
    tokenizer = run.load_run_tokenizer(config)
    config = with_adamw(run.complete(config, tokenizer))
    batch = next(iter(batch_of_each_source(config, tokenizer).values()))
    steps = {}
    for name, parts in {"ours": PARTS, "plain": 1}.items():
        config.accumulation_steps = parts
        steps[name] = OurStep(config, batch)
    times = times_in_turns(steps, ROUNDS, WARM_UP)
    held = {name: step.temporary_bytes / 2**20 for name, step in steps.items()}
    seconds = {name: statistics.median(found) for name, found in times.items()}
    whose = "one part"
    return [
        row(f"{PARTS} parts: temporaries a device", held["ours"], "MiB", held["plain"], whose),
        row(f"{PARTS} parts: step", seconds["ours"], "s", seconds["plain"], whose),
    ]
