"""Runs that are stopped at a chosen place, and what they leave."""

import contextlib
import json

import jax
import pytest

from mmgem_jax import preemption, run, sharding, train, train_state
from mmgem_jax.checkpoint import Checkpoints
from mmgem_jax.optimizer import make_optimizer


class Stopped(Exception):
    """What ends a run too early."""


def on_devices(patch, count):
    """The run's mesh takes the first devices, as if there were no others."""
    make_mesh = sharding.make_mesh
    patch.setattr(sharding, "make_mesh", lambda sizes: make_mesh(sizes, jax.devices()[:count]))


def stop_at_batch(patch, number):
    """The data end with an error at this batch of a start."""
    make = train.training_batches

    def training_batches(*arguments):
        batches = make(*arguments)
        parent, taken = type(batches), []

        class Failing(parent):
            def __next__(self):
                taken.append(1)
                if len(taken) == number:
                    raise Stopped
                return parent.__next__(self)

        batches.__class__ = Failing
        return batches

    patch.setattr(train, "training_batches", training_batches)


def stop_at_line(patch, step, name):
    """The writer fails at the line of this step that has a metric of this name."""

    class Failing(train.MetricWriter):
        def write(self, at, metrics):
            if at == step and any(key.startswith(name) for key in metrics):
                raise Stopped
            super().write(at, metrics)

    patch.setattr(train, "MetricWriter", Failing)


def stop_after(patch, step):
    """SIGTERM comes within a step."""

    @contextlib.contextmanager
    def notice():
        yield lambda taken: taken == step

    patch.setattr(preemption, "notice", notice)


def start(config, workdir, devices, stop=None, *arguments):
    """Starts a run; `stop` is what stops it."""
    with pytest.MonkeyPatch.context() as patch:
        on_devices(patch, devices)
        if not stop:
            return train.train(config, workdir)
        stop(patch, *arguments)
        with pytest.raises(Stopped):
            train.train(config, workdir)


def lines_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def reproducible(lines):
    """The lines without what depends on the clock."""
    return [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in lines]


def parts_of(config):
    """The completed config, mesh, model, tokenizer and abstract state of a run."""
    tokenizer = run.load_run_tokenizer(config)
    config = run.complete(config, tokenizer)
    mesh = sharding.make_mesh(config.mesh)
    model, optimizer = run.build_model(config.model), make_optimizer(config.optimizer)
    shapes = run.batch_shapes(config)
    abstract = train_state.abstract_state(model, optimizer, config.average_decay > 0, shapes, mesh)
    return config, mesh, model, tokenizer, abstract


def state_of(workdir, abstract):
    with Checkpoints(workdir) as checkpoints:
        return checkpoints.restore_params(abstract)
