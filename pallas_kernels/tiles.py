"""Tile choices: one small table for every kind of device.

`python -m pallas_kernels.tune` measures them anew on the device at hand and prints such a table.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import platforms


class Tile(NamedTuple):
    """How one GPU kernel is compiled.

    Attributes:
        warps: of 32 threads a program.
        stages: of the pipelined loads in its loop.
        values: value rows of a program at most; the gradients' kernel takes all of them.
    """

    warps: int
    stages: int
    values: int


class GPU(NamedTuple):
    """The choices for one size of heads on one kind of GPU.

    Attributes:
        chunk: tokens of a chunk.
        forward: the forward kernel's tile.
        state: that of the kernel for the states' gradients.
        gradients: that of the kernel for everything else.
    """

    chunk: int
    forward: Tile
    state: Tile
    gradients: Tile


class TPU(NamedTuple):
    """The choices for one dtype on TPU.

    Attributes:
        chunk: tokens of a chunk, and of a grid step.
        groups: tiles that share a grid step, at most, where they are 128 lanes wide.
    """

    chunk: int
    groups: int


# By compute capability, then by the larger head size up to which a row holds. Chosen by registers,
# spills and instructions as the compilers report them, see `gates`.
PALLAS_GPU = {
    90: {
        64: GPU(32, Tile(4, 2, 64), Tile(4, 2, 64), Tile(4, 1, 64)),
        256: GPU(16, Tile(8, 2, 128), Tile(8, 1, 128), Tile(8, 1, 256)),
    },
    80: {
        64: GPU(16, Tile(2, 1, 64), Tile(2, 1, 64), Tile(4, 1, 64)),
        128: GPU(16, Tile(4, 1, 32), Tile(4, 1, 32), Tile(8, 1, 128)),
    },
}
TRITON = {
    90: {
        64: GPU(32, Tile(4, 1, 64), Tile(4, 2, 64), Tile(4, 1, 64)),
        256: GPU(16, Tile(8, 1, 128), Tile(8, 1, 128), Tile(8, 1, 256)),
    },
    80: {
        64: GPU(16, Tile(2, 1, 32), Tile(2, 1, 32), Tile(4, 1, 64)),
        128: GPU(16, Tile(4, 1, 64), Tile(4, 1, 64), Tile(8, 1, 128)),
    },
}
# float32 products take no tensor cores: small tiles, whatever the device.
FLOAT32 = GPU(16, Tile(4, 1, 32), Tile(4, 1, 64), Tile(4, 1, 256))
BFLOAT16_TPU, FLOAT32_TPU = TPU(64, 8), TPU(64, 2)
# Tokens of a chunk in what XLA compiles.
XLA = 16
# Compute capability of devices that are not at hand, by a part of their kind's name.
OF_KIND = {"A100": 80, "A800": 80, "A30": 80}

_override = contextvars.ContextVar("override", default=None)


def capability() -> int:
    """The compute capability, 90 for 9.0, of the GPU that a program is made for; 90 if unknown."""
    device = platforms.target()
    known = getattr(device, "compute_capability", None)
    if known is not None:
        return round(float(known) * 10)
    kinds = (number for name, number in OF_KIND.items() if name in device.device_kind)
    return next(kinds, 90)


@contextlib.contextmanager
def override(choice: GPU | TPU) -> Iterator[None]:
    """This choice instead of the tables', for what is traced inside: to measure it."""
    token = _override.set(choice)
    try:
        yield
    finally:
        _override.reset(token)


def rows_for(table: dict, capability: int) -> dict[int, GPU]:
    """The table's rows for the newest listed GPUs that are no newer; none if all are."""
    listed = [number for number in table if number <= capability]
    return table[max(listed)] if listed else {}


def for_gpu(
    table: dict, keys: int, values: int, dtype: jax.typing.DTypeLike, capability: int
) -> GPU:
    """The choices of `PALLAS_GPU` or `TRITON` for these heads and tokens on such a GPU."""
    if _override.get() is not None:
        return _override.get()
    if jnp.dtype(dtype) != jnp.bfloat16:
        return FLOAT32
    rows = rows_for(table, capability)
    return rows[min(size for size in rows if size >= max(keys, values))]


def for_tpu(dtype: jnp.dtype) -> TPU:
    """The choices for tokens of this dtype."""
    if _override.get() is not None:
        return _override.get()
    return BFLOAT16_TPU if jnp.dtype(dtype) == jnp.bfloat16 else FLOAT32_TPU
