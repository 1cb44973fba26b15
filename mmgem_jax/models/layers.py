"""What both towers are made of: linear maps, norms, stacks of blocks.

Every kernel is a matrix `[in, out]` (`[layers, in, out]` in a stack) and carries logical axis
names; `mmgem_jax.sharding` is the one place that says what the names mean on a mesh.

Axis letters, used in every einsum and shape comment of the package:
  B batch, R regions, H W feature-map rows and columns, G visual tokens, T text, S key positions,
  D width, N heads, K kv heads, C head dim, F mlp, E joint embedding, V vocabulary.
"""

import functools

import flax.linen as nn
import jax

kept = jax.checkpoint_policies.save_only_these_names
# What a block keeps for the backward pass, where it does not keep all; the rest is computed again.
# The names are those that the blocks give with `checkpoint_name`.
REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "attention": kept("query", "key", "value", "attention", "gate", "up"),
    "projections": kept("query", "key", "value", "gate", "up"),
    "full": jax.checkpoint_policies.nothing_saveable,
}

ACTIVATIONS = {
    "gelu": functools.partial(nn.gelu, approximate=False),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),  # CLIP's
}

FAN_IN = nn.initializers.lecun_normal()
# For what a block adds to the residual stream: from scratch, a stack of identities learns faster.
ZEROS = nn.initializers.zeros_init()


def named(initializer, *axes):
    """The initializer, with a logical axis name for each axis of what it makes."""
    return nn.with_logical_partitioning(initializer, axes)


def linear(features, axes, dtype, name=None, use_bias=False, initializer=FAN_IN):
    """A linear map [..., in] -> [..., features] whose kernel's axes are named `axes`."""
    return nn.Dense(
        features,
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=named(initializer, *axes),
        bias_init=named(ZEROS, axes[1]),
        name=name,
    )


def layer_norm(epsilon, dtype, name=None):
    """LayerNorm over the last axis; statistics in fp32, the variance not by E[x^2] - E[x]^2."""
    return nn.LayerNorm(
        epsilon=epsilon,
        dtype=dtype,
        use_fast_variance=False,
        scale_init=named(nn.initializers.ones_init(), "norm"),
        bias_init=named(ZEROS, "norm"),
        name=name,
    )


def rms_norm(epsilon, dtype, name=None):
    """RMSNorm over the last axis; statistics in fp32."""
    scale_init = named(nn.initializers.ones_init(), "norm")
    return nn.RMSNorm(epsilon=epsilon, dtype=dtype, scale_init=scale_init, name=name)


def constrain(x):
    """Pins a [B, T, D] activation to the mesh: batch split, length and width whole."""
    return nn.with_logical_constraint(x, ("batch", "length", "activation"))


def on_each_device(run, in_axes, out_axes):
    """`run` on each device's own part of its arguments: for kernels, opaque to the compiler.

    Args:
      run: a function of arrays.
      in_axes: of each argument, the logical names of its axes.
      out_axes: of the result.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return run
    in_specs = tuple(nn.logical_to_mesh_axes(axes) for axes in in_axes)
    out_specs = nn.logical_to_mesh_axes(out_axes)
    return jax.shard_map(run, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def stack(block, depth, remat, unroll):
    """`depth` copies of a block as one scanned module with parameters [layers, ...].

    The block's `__call__(x, *broadcast)` returns (x, None); `broadcast` is the same for all.

    Args:
      block: a Linen module class.
      remat: a name in REMAT_POLICIES, or "none".
      unroll: copies laid out one after the other in the compiled loop; `depth` for no loop.

    Returns:
      A module class, to be built with the block's own arguments.
    """
    if remat != "none":
        block = nn.remat(block, prevent_cse=False, policy=REMAT_POLICIES[remat])
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=depth,
        unroll=unroll,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
