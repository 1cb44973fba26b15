"""What the benchmarks share: rows of a result, clocks that take turns, the compiled train step."""

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from mmgem_jax import run, sharding, train_state
from mmgem_jax.optimizer import make_optimizer
from mmgem_jax.train_step import compile_step, make_train_step

MATMUL_SIZE = 2048
WARM_UP = 2  # rounds
NOISE = 0.05  # of random parameters


def row(name, ours, unit, reference=None, whose=None):
    """A line of the result; `ratio` is to the reference, measured in the same run.

    Args:
      name: what was measured.
      ours: the figure.
      unit: of the figure and the reference.
      reference: the figure to compare with, or None.
      whose: what the reference is; without one, why there is none.
    """
    ratio = ours / reference if reference else None  # a program may need no temporaries at all
    return {
        "name": name,
        "ours": float(np.round(ours, 4)),
        "reference": None if reference is None else float(np.round(reference, 4)),
        "ratio": ratio,
        "unit": unit,
        "whose": whose,
    }


def times_in_turns(functions, rounds, warm_up=WARM_UP):
    """Seconds of each function's calls, one call of each a round.

    The noise of a shared machine then falls on all alike.

    Args:
      functions: mapping from a name to a function without arguments that returns when it is done.
      rounds: how many rounds count, after
      warm_up: so many that do not.

    Returns:
      dict from a name to a list of seconds.
    """
    times = {name: [] for name in functions}
    for _ in range(warm_up + rounds):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - began)
    return {name: found[warm_up:] for name, found in times.items()}


def spread(times):
    """Half the distance between the quartiles, as a share of the median."""
    low, middle, high = np.quantile(times, (0.25, 0.5, 0.75))
    return (high - low) / 2 / middle


def make_matmul():
    """A function that runs a large fp32 matmul, whose rate is the machine's peak."""
    matrix = jnp.ones((MATMUL_SIZE, MATMUL_SIZE), jnp.float32)
    product = jax.jit(lambda a: a @ a)
    return lambda: jax.block_until_ready(product(matrix))


def matmul_rate(times):
    """FLOPs a second of that matmul, of its times."""
    return 2 * MATMUL_SIZE**3 / statistics.median(times)


def with_adamw(config):
    """The config with one rule for all parameters, that of torch's AdamW, and no average."""
    config = config.copy_and_resolve_references()
    config.average_decay = 0.0
    group = {"pattern": ".*", "algorithm": "adamw", "learning_rate": 1e-3, "weight_decay": 0.05}
    with config.optimizer.unlocked():
        config.optimizer.groups = {"all": group}
    return config


def random_params(abstract, temperature):
    """Parameters of these shapes of which every one matters to both losses, numpy.

    Initial ones would not do: with them no layer adds to the residual stream.
    """
    random = np.random.default_rng(0)

    def noise(path, leaf):
        around = 1.0 if sharding.path_name(path).endswith("scale") else 0.0
        return np.float32(around + NOISE * random.standard_normal(leaf.shape))

    params = jax.tree_util.tree_map_with_path(noise, abstract)
    return params | {"logit_scale": np.float32(-np.log(temperature))}


class OurStep:
    """The train step of a config, compiled for a batch, with the state that it changes.

    It begins from `params`, which are random: time does not depend on their values.

    Args:
      config: a complete config.
      batch: dict of numpy arrays (top of mmgem_jax/objective.py).
    """

    def __init__(self, config, batch):
        mesh = sharding.make_mesh(config.mesh)
        run.check_mesh(config, mesh)
        model, self.optimizer = run.build_model(config.model), make_optimizer(config.optimizer)
        keep_average = config.average_decay > 0
        self.abstract = train_state.abstract_state(model, self.optimizer, keep_average, batch, mesh)
        shardings = train_state.shardings_of(self.abstract)
        step = make_train_step(model, self.optimizer, config)
        with sharding.use_mesh(mesh):
            self.batch = sharding.to_global(batch, mesh)
            step = compile_step(step, shardings, mesh, config.tpu_options)
            self.compiled = step.lower(self.abstract, self.batch).compile()
        self.params = random_params(self.abstract.params, config.model.temperature)
        self.begin_from(self.params)

    def begin_from(self, params):
        """Starts anew from these parameters, a tree of numpy arrays."""
        layout = train_state.shardings_of(self.abstract).params
        copied = jax.device_put(params, layout, may_alias=False)
        self.state = train_state.init_state_from(copied, self.optimizer, self.abstract)

    def __call__(self):
        """One step; its metrics, when they are there."""
        self.state, metrics = self.compiled(self.state, self.batch)
        return jax.block_until_ready(metrics)

    @property
    def temporary_bytes(self):
        """What the compiled step holds at its peak, beside its arguments and results."""
        return self.compiled.memory_analysis().temp_size_in_bytes
