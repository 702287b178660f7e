"""Fingerprints of arrays, made where they lie, which any flipped bit changes.

A leaf's fingerprint is two sums modulo 2^32 over its words, each word hashed together with its
place. Sums modulo 2^32 do not depend on their order, so however an array is spread over devices it
has the same fingerprint; and as the hash of a word is one to one at its place, one changed word
always changes both sums.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

# Odd, so that multiplying is one to one: those of MurmurHash3's finaliser, and two more for lanes.
_SPREAD = (0x85EBCA6B, 0xC2B2AE35)

_LANES = (0x9E3779B1, 0x7FEB352D)


def _mixed(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """A permutation of the 32-bit words that spreads every bit over all.

    Source: MurmurHash3 (public domain), `fmix32`.
    """
    x = (x ^ (x >> 16)) * jnp.uint32(_SPREAD[0])
    x = (x ^ (x >> 13)) * jnp.uint32(_SPREAD[1])
    return x ^ (x >> 16)


def _words(leaf: Array) -> UInt32[Array, "..."]:
    """The bits of an array as words of at most 32, in an axis more where its numbers are longer."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if leaf.dtype == jnp.bool_:
        return leaf.astype(jnp.uint32)
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        leaf = jnp.stack([leaf.real, leaf.imag], axis=-1)
    bits = min(8 * leaf.dtype.itemsize, 32)
    kind = jnp.dtype(f"uint{bits}")
    return jax.lax.bitcast_convert_type(leaf, kind).astype(jnp.uint32)


@jax.jit
def _sums(leaf: Array) -> UInt32[Array, "2"]:
    words = _words(leaf)
    place = jnp.zeros(words.shape, jnp.uint32)
    # Places are hashed axis by axis: a running number would need more than 32 bits for large ones.
    for axis in range(words.ndim):
        along = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        place = _mixed(place + along * jnp.uint32(_LANES[0]) + jnp.uint32(axis + 1))
    lanes = [
        jnp.sum(_mixed(words ^ _mixed(place + jnp.uint32(seed))), dtype=jnp.uint32)
        for seed in _LANES
    ]
    return jnp.stack(lanes)


def leaf_name(path: tuple) -> str:
    """A leaf's path as one string, such as "params/layers/att/w0"."""
    parts = (getattr(k, "key", getattr(k, "name", getattr(k, "idx", k))) for k in path)
    return "/".join(map(str, parts))


def fingerprints(tree: Any) -> dict[str, list]:
    """Shape, dtype and fingerprint (16 hex digits) of every leaf, by its path; can be JSON."""
    leaves = [(leaf_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
    sums = jax.device_get([_sums(leaf) for _, leaf in leaves])
    return {
        name: [list(leaf.shape), str(leaf.dtype), "".join(f"{int(lane):08x}" for lane in lanes)]
        for (name, leaf), lanes in zip(leaves, sums, strict=True)
    }


def tree_checksum(tree: Any) -> str:
    """One fingerprint of a tree: of its leaves' paths, shapes, dtypes and bits."""
    text = repr(sorted(fingerprints(tree).items())).encode()
    return "".join(f"{int(lane):08x}" for lane in _sums(np.frombuffer(text, np.uint8)))


def changed_leaves(expected: Mapping[str, list], tree: Any) -> list[str]:
    """The leaves of `tree` that are not what `expected`, from `fingerprints`, says; in order."""
    found = fingerprints(tree)
    names = dict.fromkeys([*expected, *found])
    return [name for name in names if expected.get(name) != found.get(name)]
