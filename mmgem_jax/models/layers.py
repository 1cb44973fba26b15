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
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

kept = jax.checkpoint_policies.save_only_these_names
# What a block keeps for the backward pass, where it does not keep all; the rest is computed again.
# The names are those that the blocks give with `checkpoint_name`.
REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "attention": kept("norm", "query", "key", "value", "attention", "gate", "up"),
    "outputs": kept("norm", "attention", "gate", "up"),
    "projections": kept("norm", "query", "key", "value", "splash", "gate", "up"),
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
    return Linear(features, axes, dtype, use_bias, initializer, name=name)


def layer_norm(epsilon, dtype, name=None):
    """LayerNorm over the last axis; statistics in fp32."""
    return LayerNorm(epsilon, dtype, name=name)


def rms_norm(epsilon, dtype, name=None):
    """RMSNorm over the last axis; statistics in fp32."""
    return RMSNorm(epsilon, dtype, name=name)


class Linear(nn.Module):
    """See `linear`."""

    features: int
    axes: tuple[str, str]
    dtype: str
    use_bias: bool = False
    initializer: nn.initializers.Initializer = FAN_IN

    @nn.compact
    def __call__(self, x):
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", named(self.initializer, *self.axes), shape)
        y = rows_product(x.astype(self.dtype), kernel.astype(self.dtype))
        if self.use_bias:
            bias = self.param("bias", named(ZEROS, self.axes[1]), (self.features,))
            y = with_bias(y, bias)
        return y


def rows_product(x, kernel):
    """x [..., in] times a kernel [in, out]: on CPUs as matrices.

    Of more axes XLA writes the gradients a second time there, transposed.
    """

    def flat(x, kernel):
        return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], -1)

    return jax.lax.platform_dependent(x, kernel, cpu=flat, default=jnp.matmul)


@jax.custom_vjp
def with_bias(y, bias):
    """y [..., D] and a bias [D], fp32, added in fp32."""
    return (y.astype(jnp.float32) + along_last(bias, y)).astype(y.dtype)


def with_bias_forward(y, bias):
    """The sum; nothing is kept for the backward pass."""
    return with_bias(y, bias), None


def with_bias_backward(_, gradient):
    """The gradient of y, and that of the bias, in fp32.

    Rows are summed as a product with ones, in the matrix unit: a sum takes many times as long.
    """
    axes = tuple(range(gradient.ndim - 1))
    ones = jnp.ones((*gradient.shape[:-1], 8), gradient.dtype)  # 8: the rows of a register
    exact = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}
    return gradient, jnp.tensordot(ones, gradient, (axes, axes), **exact)[0]


with_bias.defvjp(with_bias_forward, with_bias_backward)


class LayerNorm(nn.Module):
    """See `layer_norm`."""

    epsilon: float
    dtype: str

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", named(nn.initializers.ones_init(), "norm"), x.shape[-1:])
        bias = self.param("bias", named(ZEROS, "norm"), x.shape[-1:])
        mean, variance = mean_and_variance(x)
        mean = checkpoint_name(mean, "norm")[..., None]
        factor = inverse_root(variance, self.epsilon)
        x = x.astype(jnp.float32) - mean
        return (x * (factor * along_last(scale, x)) + along_last(bias, x)).astype(self.dtype)


class RMSNorm(nn.Module):
    """See `rms_norm`."""

    epsilon: float
    dtype: str

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", named(nn.initializers.ones_init(), "norm"), x.shape[-1:])
        x = x.astype(jnp.float32)
        factor = inverse_root(jnp.mean(jax.lax.square(x), axis=-1), self.epsilon)
        return (x * (factor * along_last(scale, x))).astype(self.dtype)


def mean_and_variance(x):
    """Over the last axis, in fp32.

    The variance is not E[x^2] - E[x]^2, which loses digits where the mean is large, but for numbers
    of 16 bits: they have lost more themselves, and one pass over them then gives both.
    """
    exact = x.astype(jnp.float32)
    mean = jnp.mean(exact, axis=-1)
    if x.dtype.itemsize > 2:
        return mean, jnp.mean(jax.lax.square(exact - mean[..., None]), axis=-1)
    square = jnp.mean(jax.lax.square(exact), axis=-1)
    return mean, jnp.maximum(square - jax.lax.square(mean), 0.0)


def inverse_root(square, epsilon):
    """1 / sqrt(square + epsilon) of a mean square of each token [...]: [..., 1].

    A block keeps it, for it is one number a token, and to make it again is to read all of x.
    """
    return checkpoint_name(jax.lax.rsqrt(square + epsilon), "norm")[..., None]


def along_last(vector, x):
    """A vector [D] shaped to be broadcast over x [..., D]."""
    return jnp.expand_dims(vector, range(x.ndim - 1))


def constrain(x):
    """Pins a [B, T, D] activation to the mesh: batch split, length and width whole."""
    return nn.with_logical_constraint(x, ("batch", "length", "activation"))


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
