"""Tables of tile sizes for each kind of device.

`python -m pallas_kernels.tune` measures tiles on the local device and prints a table row.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import platforms


class Tile(NamedTuple):
    """Compile options and size of one GPU kernel.

    Attributes:
        warps: warps of 32 threads in a program.
        stages: stages of the pipelined loads in its loop.
        values: maximum value rows of a program; the gradient kernel takes all of them.
    """

    warps: int
    stages: int
    values: int


class GPU(NamedTuple):
    """Choices for one head size on one kind of GPU.

    Attributes:
        chunk: tokens of a chunk.
        forward: the forward kernel's tile.
        state: the tile of the kernel for the state gradients.
        gradients: the tile of the kernel for the input gradients.
        precision: JAX's name of the precision of float32 products in the Pallas kernels.
    """

    chunk: int
    forward: Tile
    state: Tile
    gradients: Tile
    precision: str = "highest"


class TPU(NamedTuple):
    """Choices for one dtype on TPU.

    Attributes:
        chunk: tokens of a chunk, and of a grid step.
        groups: maximum number of 128-lane tiles in a grid step.
    """

    chunk: int
    groups: int


# By compute capability, then by the largest head size of a row. Those of 90 for heads of 64 are the
# fastest of their neighbours on an H100 (docs/kernels.md). The others were chosen by the registers,
# spills and instructions that the compilers report: see `compile_checks`.
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
        64: GPU(32, Tile(4, 2, 64), Tile(4, 2, 64), Tile(4, 1, 64)),
        256: GPU(16, Tile(8, 1, 128), Tile(8, 1, 128), Tile(8, 1, 256)),
    },
    80: {
        64: GPU(16, Tile(2, 1, 64), Tile(2, 1, 64), Tile(4, 1, 64)),
        128: GPU(16, Tile(4, 1, 64), Tile(4, 1, 64), Tile(8, 1, 128)),
    },
}
# Exact float32 products do not use tensor cores: small tiles on every device.
FLOAT32 = GPU(16, Tile(4, 1, 32), Tile(4, 1, 64), Tile(4, 1, 256))
# Three TF32 products are as close to float64 as an exact float32 product. They pay off on Hopper,
# where warpgroups compute them; an A100 would need as many instructions as for exact products, and
# spill.
HOPPER_FLOAT32 = GPU(
    16, Tile(4, 1, 64), Tile(4, 1, 64), Tile(4, 1, 64), "TF32_TF32_F32_X3"
)
BFLOAT16_TPU = TPU(64, 8)
FLOAT32_TPU = TPU(64, 2)
# Tokens of a chunk in plain JAX.
XLA = 16
# Compute capability by a word in the device kind, for abstract devices, which do not report it.
CAPABILITY_BY_KIND = {
    "A100": 80,
    "A800": 80,
    "A30": 80,
    "H100": 90,
    "H200": 90,
    "H800": 90,
    "H20": 90,
    "GH200": 90,
}
# From this capability (Blackwell) on, no kernel runs until it has been verified on a device: there,
# Triton 3.6 and 3.7 silently miscompile two products that are chained into one accumulator
# (triton-lang/triton#10821).
UNCHECKED_CAPABILITY = 100

_override: contextvars.ContextVar = contextvars.ContextVar("override", default=None)


def capability() -> int | None:
    """Returns the target GPU's compute capability, 90 for 9.0; None if it is unknown."""
    device = platforms.target()
    version = getattr(device, "compute_capability", None)
    if version is not None:
        return round(float(version) * 10)
    words = device.device_kind.replace("-", " ").split()
    # Whole words: "H20" is a substring of "H200", and "A30" of the names of other cards.
    numbers = (CAPABILITY_BY_KIND.get(word) for word in words)
    return next((number for number in numbers if number is not None), None)


@contextlib.contextmanager
def override(choice: GPU | TPU) -> Iterator[None]:
    """Replaces the tables' choice inside the context, to measure it.

    It takes effect when a call is traced, so clear JAX's caches before and after.
    """
    token = _override.set(choice)
    try:
        yield
    finally:
        _override.reset(token)


def rows_for(table: dict, capability: int | None) -> dict[int, GPU]:
    """Returns the table's rows for the newest listed GPUs that are no newer than `capability`.

    Args:
        table: `PALLAS_GPU` or `TRITON`.
        capability: compute capability, 90 for 9.0; None if it is unknown.

    Returns:
        Rows by head size; {} for older, unchecked and unknown GPUs.
    """
    if capability is None or capability >= UNCHECKED_CAPABILITY:
        return {}
    listed = [number for number in table if number <= capability]
    # GPUs between two listed ones (8.6, 8.9) have the older one's instructions. Its rows fit into
    # their shared memory of 101,376 bytes.
    return table[max(listed)] if listed else {}


def for_gpu(
    table: dict,
    keys: int,
    values: int,
    dtype: jax.typing.DTypeLike,
    capability: int | None,
) -> GPU:
    """Returns the choices for heads and tokens on a GPU of this compute capability.

    Args:
        table: `PALLAS_GPU` or `TRITON`.
        keys: key channels of a head.
        values: value channels of a head.
        dtype: of the tokens.
        capability: compute capability, 90 for 9.0; None (no GPU, the kernels run in an interpreter)
            takes the newest rows.
    """
    replaced = _override.get()
    if replaced is not None:
        return replaced
    if jnp.dtype(dtype) != jnp.bfloat16:
        is_hopper = (capability or max(table)) // 10 == 9
        fits = table is PALLAS_GPU and max(keys, values) <= 64
        return HOPPER_FLOAT32 if is_hopper and fits else FLOAT32
    rows = rows_for(table, capability or max(table))
    return rows[min(size for size in rows if size >= max(keys, values))]


def for_tpu(dtype: jnp.dtype) -> TPU:
    """Returns the choices for tokens of this dtype."""
    replaced = _override.get()
    if replaced is not None:
        return replaced
    return BFLOAT16_TPU if jnp.dtype(dtype) == jnp.bfloat16 else FLOAT32_TPU
