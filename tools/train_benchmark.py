"""The train step of a config beside the same step in Hugging Face's PyTorch, in turns."""

import statistics

import jax
import numpy as np
from measure import (
    MATMUL_SIZE,
    OurStep,
    make_matmul,
    matmul_rate,
    row,
    spread,
    times_in_turns,
    with_adamw,
)

from mmgem_jax import run
from mmgem_jax.data.pipeline import training_batches
from mmgem_jax.data.sources import sources
from mmgem_jax.errors import UserError
from mmgem_jax.flops import train_flops

ROUNDS = 15
TOLERANCE = 1e-4  # of the losses, whose size is a few nats
FORMS = ("eager", "torch.compile")
INSTALL = "pip install -e '.[torch]'"


def benchmark_train(config):
    """Rows on the step of each source of a config's data; batches of each have another shape.

    Of padded rows, as Hugging Face's models take them.
    """
    config.data.packing.images = 0
    tokenizer = run.load_run_tokenizer(config)
    config = run.complete(config, tokenizer)
    rows = []
    for name, batch in batch_of_each_source(config, tokenizer).items():
        found = step_rows(config, batch)
        rows += [line | {"name": f"{name}: {line['name']}"} for line in found] if name else found
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


def step_rows(config, batch):
    """The step as the config has it, and with AdamW beside Hugging Face's, on a batch."""
    plain = with_adamw(config)
    own, ours = OurStep(config, batch), OurStep(plain, batch)
    theirs, absent = reference_steps(plain, batch, ours.params, FORMS)
    rows = agreement(ours(), theirs)
    steps = {"own": own, "ours": ours, **theirs, "matmul": make_matmul()}
    times = times_in_turns(steps, ROUNDS)
    time = {name: statistics.median(found) for name, found in times.items()}
    peak, flops = matmul_rate(times["matmul"]), sum(train_flops(config, batch).values())

    def rate(name, step):
        return row(name, flops / time[step] / 1e9, "GFLOP/s", peak / 1e9, "the matmul's")

    rows += [
        row("train step", time["own"], "s"),
        row("fastest train step", min(times["own"]), "s"),
        row("images a second", len(batch["image"]) / time["own"], "1/s"),
        row(f"largest matmul rate ({MATMUL_SIZE}^3, fp32)", peak / 1e9, "GFLOP/s"),
        row("spread of the matmul's time", spread(times["matmul"]), "share"),
        rate("train step's rate", "own"),
        rate("AdamW step's rate", "ours"),
    ]
    for form in FORMS:
        whose = f"Hugging Face's, {form}"
        whose += f": absent, {absent[form]}" if form in absent else ""
        # On a busy machine the threads of PyTorch wait for each other at every operation: where
        # these two ratios are far apart, neither is the steps' own.
        for name, found in (("AdamW step", statistics.median), ("fastest AdamW step", min)):
            theirs_is = found(times[form]) if form in times else None
            rows.append(row(f"{name} beside {form}", found(times["ours"]), "s", theirs_is, whose))
    return rows


def reference_steps(config, batch, params, forms):
    """Hugging Face's steps by their form, and why those that are absent are."""
    try:
        import torch_step
    except ImportError as error:
        return {}, dict.fromkeys(forms, f"{error}; {INSTALL}")
    steps, absent = {}, {}
    for form in forms:
        try:
            steps[form] = torch_step.TheirStep(config, params, batch, form == "torch.compile")
        except UserError as error:
            absent[form] = str(error)
    return steps, absent


def agreement(metrics, theirs):
    """Rows on both losses before the first step, ours (metrics) and those of theirs.

    Raises:
      UserError: they differ, so that the steps do not do the same work.
    """
    rows = []
    for form, step in theirs.items():
        for name, value in zip(("emb", "gen"), step.losses_at_start, strict=True):
            found = float(metrics[f"loss_{name}"])
            if abs(found - value) > TOLERANCE:
                raise UserError(
                    f"train: loss_{name} is {found:.6f}, Hugging Face's {value:.6f} ({form}); "
                    f"expected the same to {TOLERANCE:g}"
                )
            rows.append(row(f"loss_{name}", found, "nats", value, f"Hugging Face's, {form}"))
    return rows
