"""The state of training, and how it is made: each shard on its own device."""

import functools

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax.linen import meta

from mmgem_jax import sharding
from mmgem_jax.faults import Faults, no_faults
from mmgem_jax.objective import init_params


class TrainState(flax.struct.PyTreeNode):
    """All that a step changes.

    Fields:
      step: int32 [], batches seen; the updates taken are as many, less those that were skipped.
      params: the parameters.
      opt_state: the optimizer's own.
      average: the moving average of the parameters, or None.
      faults: what was skipped, and what a usual loss is.
    """

    step: jax.Array
    params: dict
    opt_state: optax.OptState
    average: dict | None
    faults: Faults

    @property
    def eval_params(self):
        """The parameters to evaluate: the average where one is kept."""
        return self.params if self.average is None else self.average


def make_state(model, optimizer, keep_average, batch, key):
    """A fresh TrainState for batches shaped like `batch`."""
    params = meta.unbox(init_params(model, zeros(batch), key))
    return state_at_start(optimizer, keep_average, params)


def state_at_start(optimizer, keep_average, params):
    """The TrainState of parameters with which training starts."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        average=jax.tree.map(jnp.copy, params) if keep_average else None,
        faults=no_faults(),
    )


def zeros(batch):
    """A batch of the same shapes, all zeros."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), batch)


def boxed_params(model, batch):
    """Shapes and dtypes of the parameters, with their logical axis names (Linen's boxes).

    Call it outside `sharding.use_mesh`.
    """
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(lambda key: init_params(model, zeros(batch), key), key)


def abstract_state(model, optimizer, keep_average, batch, mesh):
    """Shapes, dtypes and shardings of the state, without making it.

    Call it outside `sharding.use_mesh`: Linen cannot unbox abstract parameters within.

    Args:
      batch: a batch, or its shapes (`jax.ShapeDtypeStruct`).

    Returns:
      A TrainState of `jax.ShapeDtypeStruct`, each with its sharding.
    """
    key = jax.eval_shape(lambda: jax.random.key(0))
    params_shardings = sharding.param_shardings(boxed_params(model, batch), mesh)
    make = functools.partial(make_state, model, optimizer, keep_average, batch)
    state = jax.eval_shape(make, key)
    shardings = sharding.state_shardings(state, params_shardings, mesh)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings
    )


def shardings_of(abstract):
    """The tree of shardings of an abstract state."""
    return jax.tree.map(lambda x: x.sharding, abstract)


def init_state(model, optimizer, abstract, batch, seed):
    """The state that `abstract` describes; call it within `sharding.use_mesh`."""
    keep_average = abstract.average is not None
    make = functools.partial(make_state, model, optimizer, keep_average, batch)
    return jax.jit(make, out_shardings=shardings_of(abstract))(jax.random.key(seed))


def compile_init(model, abstract, batch):
    """The compiled function key -> initial parameters of those parts that `abstract` names.

    Args:
      abstract: some of the entries of an abstract state's `params`.
    """

    def make(key):
        params = meta.unbox(init_params(model, zeros(batch), key))
        return {name: params[name] for name in abstract}  # XLA makes no others

    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.jit(make, out_shardings=shardings_of(abstract)).lower(key).compile()


def init_state_from(params, optimizer, abstract):
    """The state that `abstract` describes, with these parameters, whose memory it takes over."""
    make = functools.partial(state_at_start, optimizer, abstract.average is not None)
    return jax.jit(make, out_shardings=shardings_of(abstract), donate_argnums=0)(params)
