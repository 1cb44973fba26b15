"""Checksums of arrays, computed on the devices: of the contents, whatever the mesh and shards."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from mmgem_jax.sharding import path_name

WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}  # by bytes of an element
NUMPY_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint32}
PIECE = 2**16  # elements that the host works on at once
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


def checksums_on_host(tree):
    """The same numbers, by numpy a piece at a time: slower, and with hardly any memory."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_name(path): host_checksum(leaf) for path, leaf in leaves}


def host_checksum(array):
    """What `checksum` gives, as a plain number."""
    array = np.asarray(array).reshape(-1)
    words, total = array.view(NUMPY_WORDS[array.itemsize]), 0
    for start in range(0, len(words), PIECE):
        piece = words[start : start + PIECE].astype(np.uint32)
        places = np.arange(start, start + len(piece)).astype(np.uint32)
        total += int(mixed(piece + GOLDEN * places).sum(dtype=np.uint32))
    return total % 2**32


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
