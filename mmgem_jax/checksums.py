"""Checksums of arrays, computed on the devices: of the contents, whatever the mesh and shards."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from mmgem_jax.sharding import path_name

WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}  # by bytes of an element
GOLDEN = np.uint32(0x9E3779B9)  # 2^32 over the golden ratio: spreads the places of the elements


def start_checksums(tree):
    """The checksum of every leaf by its path, uint32 [] on the devices, still under way.

    One leaf comes after the other, for on CPUs a computation takes as much memory as its leaf. The
    tree's arrays may be donated right after.
    """
    found, before = {}, np.uint32(0)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        found[path_name(path)] = before = checksum_after(leaf, before)
    return found


def fetched(checksums):
    """What `start_checksums` gives, as plain numbers."""
    return {name: int(value) for name, value in jax.device_get(checksums).items()}


@functools.partial(jax.jit, keep_unused=True)
def checksum_after(array, before):
    """The checksum of an array, computed when `before` has been."""
    del before
    return checksum(array)


def checksum(array):
    """A number, uint32 [], of the array's elements and of their places; of none it is 0.

    Every element's bits and place go through a mixing that is one to one in the bits, and all that
    is added up modulo 2^32. So a change of one element always changes the sum, and any other
    change leaves it as it was once in 2^32; and no shard needs another's elements. The places are
    made without a reshape, which would move a sharded array.
    """
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    words = jax.lax.bitcast_convert_type(array, WORDS[array.dtype.itemsize]).astype(jnp.uint32)
    places = jnp.zeros(words.shape, jnp.uint32)
    for axis in range(words.ndim):
        stride = np.uint32(math.prod(words.shape[axis + 1 :]) % 2**32)
        places += stride * jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    return jnp.sum(mixed(words + GOLDEN * places), dtype=jnp.uint32)


def mixed(words):
    """Every bit of a uint32 spread over all its bits, one to one.

    The last step of MurmurHash3 (https://github.com/aappleby/smhasher), 32 bits.
    """
    words = (words ^ (words >> 16)) * np.uint32(0x85EBCA6B)
    words = (words ^ (words >> 13)) * np.uint32(0xC2B2AE35)
    return words ^ (words >> 16)
