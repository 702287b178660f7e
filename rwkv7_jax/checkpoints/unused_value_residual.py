"""The value residual of block 0: official files contain it, but no model uses it.

Every block mixes its values with those of block 0, so block 0 itself has nothing to mix. Official
trainers create the three tensors anyway and load strictly, so files for them must contain them. HF
files never do. Only this module decides which files get them.
"""

from collections.abc import Iterable, Iterator

import numpy as np

from rwkv7_jax.array_types import Params
from rwkv7_jax.model.config import RWKV7Config

_LEAVES = ("v0", "v1", "v2")

_NAMES = tuple(f"blocks.0.att.{leaf}" for leaf in _LEAVES)


def unused_value_residual_shapes(config: RWKV7Config) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of block 0's value residual by official name."""
    width = config.width
    rank = config.value_rank
    shapes = ((width,), (width, rank), (rank, width))
    return dict(zip(_NAMES, shapes, strict=True))


def add_unused_value_residual(
    tensors: Iterable[tuple[str, np.ndarray]], config: RWKV7Config
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the tensors, then zeros for missing tensors of block 0's value residual."""
    missing = unused_value_residual_shapes(config)
    dtype = np.dtype(np.float32)
    for name, array in tensors:
        missing.pop(name, None)
        dtype = array.dtype
        yield name, array
    for name, shape in missing.items():
        yield name, np.zeros(shape, dtype)


def drop_unused_value_residual(
    tensors: Iterable[tuple[str, np.ndarray]],
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the tensors without block 0's value residual."""
    for name, array in tensors:
        if name not in _NAMES:
            yield name, array


def without_unused_value_residual(params: Params) -> Params:
    """Returns the parameter tree without block 0's value residual; leaves are not copied."""
    block = dict(params["layer_0"])
    attention = dict(block["att"])
    for leaf in _LEAVES:
        attention.pop(leaf, None)
    block["att"] = attention
    return {**params, "layer_0": block}
