"""Measures how fast a config trains and a decoder writes, beside what the machine can do.

    python tools/benchmark.py train --config configs/emoji.py [--json FILE]
    python tools/benchmark.py data --config configs/emoji.py
    python tools/benchmark.py decode

`decode` needs PyTorch and takes no config: it is of SmolLM2-135M's architecture.
Times vary with the machine and its load: the ratios are taken in one run, in turns.
"""

import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from mmgem_jax import command_line, run, sharding, train_state
from mmgem_jax.data.pipeline import sources, training_batches
from mmgem_jax.errors import UserError
from mmgem_jax.optimizer import make_optimizer
from mmgem_jax.train_step import compile_step, make_train_step

ROUNDS = 15
MATMUL_SIZE = 2048


def seconds(function):
    """Wall-clock time of a call, until its result is there."""
    began = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - began


def benchmark_train(config):
    """Step time, its floating-point rate, and the largest matmul rate, measured in turns.

    Of a mixture, a step of each source: batches of each have another shape.
    """
    tokenizer = run.load_run_tokenizer(config)
    config = run.complete(config, tokenizer)
    mesh = sharding.make_mesh(config.mesh)
    run.check_mesh(config, mesh)
    model, optimizer = run.build_model(config.model), make_optimizer(config.optimizer)
    shapes = run.batch_shapes(config)
    abstract = train_state.abstract_state(model, optimizer, config.average_decay > 0, shapes, mesh)
    shardings = train_state.shardings_of(abstract)
    rows = []
    with sharding.use_mesh(mesh):
        step = compile_step(
            make_train_step(model, optimizer, config), shardings, mesh, config.tpu_options
        )
        for name, batch in batch_of_each_source(config, tokenizer).items():
            state = train_state.init_state(model, optimizer, abstract, shapes, config.seed)
            batch = sharding.to_global(batch, mesh)
            rows += measured_step(name, step.lower(state, batch).compile(), state, batch)
    return rows


def batch_of_each_source(config, tokenizer):
    """A batch of each source of a config's data, by its name."""
    names, found = tuple(sources(config.data)), {}
    batches = training_batches(config, tokenizer)
    while len(found) < len(names):
        batch = next(batches)
        # A copy, since the batch's own memory is shared with its worker and goes with it.
        found.setdefault(names[batch["source"][0]], jax.tree.map(np.array, batch))
    batches.close()
    return found


def measured_step(name, step, state, batch):
    """The rows of a compiled step and a batch of the source of that name."""
    flops = step.cost_analysis()["flops"]  # XLA's count; a scan's body counts once
    matrix = jnp.ones((MATMUL_SIZE, MATMUL_SIZE), jnp.float32)
    matmul = jax.jit(lambda a: a @ a)
    step_times, matmul_times = [], []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready(metrics)
        step_times.append(time.perf_counter() - began)
        matmul_times.append(min(seconds(lambda: matmul(matrix)) for _ in range(3)))
    step_time = statistics.median(step_times[2:])
    peak = 2 * MATMUL_SIZE**3 / statistics.median(matmul_times[2:])
    of = f"{name}: " if name else ""
    return [
        row(f"{of}train step", step_time, "s"),
        row(f"{of}fastest train step", min(step_times), "s"),
        row(f"{of}images a second", len(batch["image"]) / step_time, "1/s"),
        row(f"largest matmul rate ({MATMUL_SIZE}^3, fp32)", peak / 1e9, "GFLOP/s"),
        row(
            f"{of}train step's rate", flops / step_time / 1e9, "GFLOP/s", peak / 1e9, "the matmul's"
        ),
    ]


def benchmark_data(config):
    """Seconds of one core that a batch costs in a data worker."""
    tokenizer = run.load_run_tokenizer(config)
    config.data.workers = 0
    batches = training_batches(config, tokenizer)
    next(batches)
    began = time.process_time()
    for _ in range(ROUNDS):
        next(batches)
    used = (time.process_time() - began) / ROUNDS
    return [
        row("a batch, on one core", used, "s"),
        row("images a second and core", config.batch_size / used, "1/s"),
    ]


def row(name, ours, unit, reference=None, whose=None):
    """A line of the result; `ratio` is to the reference, measured in the same run."""
    ratio = None if reference is None else ours / reference
    return {
        "name": name,
        "ours": float(np.round(ours, 4)),
        "reference": None if reference is None else float(np.round(reference, 4)),
        "ratio": ratio,
        "unit": unit,
        "whose": whose,
    }


def decode(_):
    """`benchmark_decode`, whose PyTorch the other benchmarks do without."""
    try:
        from decode_benchmark import benchmark_decode
    except ImportError as error:
        raise UserError(f"decode: {error}; pip install -e '.[torch]'") from None
    return benchmark_decode(row)


def main(what):
    """Runs one benchmark and prints, and with --json writes, its rows."""
    if what != "decode" and CONFIG.value is None:
        raise UserError(f"--config: none; {what} expects one")
    benchmarks = {"train": benchmark_train, "data": benchmark_data, "decode": decode}
    rows = benchmarks[what](CONFIG.value)
    for line in rows:
        ratio = f"   {line['ratio']:.2f} of {line['whose']}" if line["ratio"] else ""
        print(f"{line['name']:40s}{line['ours']:12.4f} {line['unit']}{ratio}")
    if JSON.value:
        with open(JSON.value, "w") as file:
            json.dump(rows, file, indent=2)


if __name__ == "__main__":
    CONFIG = command_line.define_config(required=False)
    JSON = flags.DEFINE_string("json", None, "also write the rows to this file")
    command_line.run(main, choices=("train", "data", "decode"))
