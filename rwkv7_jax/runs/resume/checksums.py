"""Checksums of arrays, computed on the device. Any flipped bit changes them.

The checksum of a leaf is two sums modulo 2^32 over its words, each word hashed together with its
position. Sums modulo 2^32 do not depend on the order, so the checksum does not depend on the
sharding. The hash is one-to-one at each position, so one changed word changes both sums.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

from rwkv7_jax.sharding.layout import path_name

# Multipliers of MurmurHash3's finaliser. They are odd, so multiplication is one-to-one.
_MULTIPLIERS = (0x85EBCA6B, 0xC2B2AE35)

# One seed per sum; the first also spreads the indices of an axis.
_SEEDS = (0x9E3779B1, 0x7FEB352D)


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """Permutes 32-bit words so that every input bit affects every output bit.

    Source: MurmurHash3 (public domain), `fmix32`.
    """
    x = (x ^ (x >> 16)) * jnp.uint32(_MULTIPLIERS[0])
    x = (x ^ (x >> 13)) * jnp.uint32(_MULTIPLIERS[1])
    return x ^ (x >> 16)


def _words(leaf: Array) -> UInt32[Array, "..."]:
    """Returns the bits of an array as 32-bit words; 64-bit numbers get a trailing axis of two."""
    # Random keys have an extended dtype; only `key_data` returns their bits.
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if leaf.dtype == jnp.bool_:
        return leaf.astype(jnp.uint32)
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        leaf = jnp.stack([leaf.real, leaf.imag], axis=-1)
    # The bits, not the values: NaN payloads and the sign of zero must count as well.
    bits = min(8 * leaf.dtype.itemsize, 32)
    words = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{bits}"))
    return words.astype(jnp.uint32)


@jax.jit
def _sums(leaf: Array) -> UInt32[Array, "2"]:
    words = _words(leaf)
    position = jnp.zeros(words.shape, jnp.uint32)
    # Hash positions axis by axis: a flat index into a large array needs more than 32 bits.
    for axis in range(words.ndim):
        index = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        position = _mix(position + index * jnp.uint32(_SEEDS[0]) + jnp.uint32(axis + 1))
    sums = []
    for seed in _SEEDS:
        hashed = _mix(words ^ _mix(position + jnp.uint32(seed)))
        sums.append(jnp.sum(hashed, dtype=jnp.uint32))
    return jnp.stack(sums)


def _hex(sums: np.ndarray) -> str:
    return f"{int(sums[0]):08x}{int(sums[1]):08x}"


def run_on_leaves(program: Callable, tree: Any) -> dict[str, Any]:
    """Runs a compiled program on each leaf; returns the results on the host, by leaf name."""
    results = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        result = program(leaf)
        # Devices that share a leaf wait for each other. On CPUs a few threads serve all devices, so
        # concurrent programs could occupy all threads and deadlock.
        if isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) > 1:
            result.block_until_ready()
        results[path_name(path)] = result
    # On one device all programs start before the first wait. `device_get` keeps the order of a
    # list, but not of a dict.
    on_host = jax.device_get(list(results.values()))
    return dict(zip(results, on_host, strict=True))


def leaf_checksums(tree: Any) -> dict[str, list]:
    """Returns [shape, dtype, checksum in 16 hex digits] by leaf name, serialisable as JSON."""
    sums = run_on_leaves(_sums, tree)
    checksums = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = path_name(path)
        checksums[name] = [list(leaf.shape), str(leaf.dtype), _hex(sums[name])]
    return checksums


def tree_checksum(tree: Any) -> str:
    """Returns one checksum over the names, shapes, dtypes and bits of a tree's leaves."""
    text = repr(sorted(leaf_checksums(tree).items())).encode()
    return _hex(np.asarray(_sums(np.frombuffer(text, np.uint8))))


def changed_leaves(expected: Mapping[str, list], tree: Any) -> list[str]:
    """Returns the names of leaves that differ, are missing or are new.

    Args:
        expected: from `leaf_checksums`.
        tree: the tree to compare.
    """
    actual = leaf_checksums(tree)
    names = dict.fromkeys([*expected, *actual])
    return [name for name in names if expected.get(name) != actual.get(name)]
