"""The Triton kernels as JAX functions, through jax-triton, which is imported at the call. Level 0.

Same doors as `chunked`; only the saved states differ: [B H C Nv Nk], scaled, in the tokens' dtype.
"""

from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .reference import Inputs, State

Starts = Float[Array, "B H C Nv Nk"]


class Tile(NamedTuple):
    """How one kernel is compiled.

    Attributes:
        warps: of 32 threads a program.
        stages: of the pipelined loads in its loop.
        values: value rows of a program, all of them where None.
    """

    warps: int
    stages: int
    values: int | None = None


class Tiles(NamedTuple):
    """The three kernels' tiles."""

    forward: Tile
    state_gradient: Tile
    gradients: Tile


# By compute capability, then by tokens of a chunk; the best chunk comes first. Chosen by registers
# and instructions that the compilers report, see `triton_report`.
TILES = {
    90: {
        32: Tiles(Tile(4, 1, 64), Tile(4, 2, 64), Tile(4, 1)),
        16: Tiles(Tile(2, 1, 32), Tile(2, 1, 32), Tile(4, 1)),
    },
    80: {
        16: Tiles(Tile(2, 1, 32), Tile(2, 1, 32), Tile(4, 1)),
        32: Tiles(Tile(4, 1, 32), Tile(4, 1, 32), Tile(4, 1)),
    },
}
# What goes together, by jax's minor version: jax-triton, and triton's minor versions.
FITTING = {"0.10": ("0.3.1", ("3.6", "3.7")), "0.11": ("0.4.1", ("3.7",))}


def _minor(name: str) -> str:
    return ".".join(version(name).split(".")[:2])


def check_versions() -> None:
    """Raise unless the installed jax, jax-triton and triton are known to work together.

    Raises:
        ImportError: one of them is missing.
        RuntimeError: they do not fit.
    """
    found, (bridge, compilers) = _minor("jax"), FITTING.get(_minor("jax"), (None, ()))
    if bridge is None:
        raise RuntimeError(
            f"The Triton kernels need jax {' or '.join(FITTING)}; installed is jax {found}."
        )
    wanted = f"jax-triton {bridge} with triton {' or '.join(compilers)} beside jax {found}"
    try:
        pair = version("jax-triton"), version("triton")
    except PackageNotFoundError as error:
        raise ImportError(f"The Triton kernels need {wanted}; {error.name} is missing.") from error
    if pair[0] != bridge or _minor("triton") not in compilers:
        raise RuntimeError(
            f"The Triton kernels need {wanted}; installed are {pair[0]} and {pair[1]}."
        )


def capability() -> int:
    """The first GPU's compute capability, 90 for 9.0."""
    return int(jax.devices("cuda")[0].compute_capability.replace(".", ""))


def best_tiles(capability: int) -> dict[int, Tiles]:
    """The tiles of the newest listed GPU that is no newer than this one, by chunk.

    Raises:
        ValueError: the GPU is older than all in the table.
    """
    fitting = [listed for listed in TILES if listed <= capability]
    if not fitting:
        raise ValueError(
            f"The Triton kernels need compute capability {min(TILES)} or newer; got {capability}."
        )
    return TILES[max(fitting)]


def launch(kernel: str, arrays: tuple, outputs: list, grid: tuple, tile: Tile, **constants) -> list:
    """Run the kernel of this name on the arrays, their tokens and heads; returns its outputs."""
    check_versions()
    import jax_triton

    from . import triton_kernels

    return jax_triton.triton_call(
        *arrays,
        *arrays[0].shape[1:3],
        kernel=getattr(triton_kernels, kernel),
        out_shape=outputs,
        grid=grid,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **constants,
    )


class _Call(NamedTuple):
    """What all launches of one call share."""

    inputs: Inputs  # log_w in float32, the others in v's dtype
    chunk: int
    tiles: Tiles

    @property
    def constants(self) -> dict:
        """The sizes that every kernel is compiled for."""
        (_, tokens, _, keys), values = self.inputs[0].shape, self.inputs[3].shape[3]
        whole = tokens % self.chunk == 0
        return dict(CHUNK=self.chunk, KEYS=keys, VALUES=values, WHOLE=whole)

    @property
    def chunks(self) -> int:
        return -(-self.inputs[0].shape[1] // self.chunk)

    @property
    def rows(self) -> int:
        """Heads of the whole batch."""
        return self.inputs[0].shape[0] * self.inputs[0].shape[2]

    @property
    def state(self) -> jax.ShapeDtypeStruct:
        (batch, _, heads, keys), values = self.inputs[0].shape, self.inputs[3].shape[3]
        return jax.ShapeDtypeStruct((batch, heads, values, keys), jnp.float32)

    @property
    def states(self) -> jax.ShapeDtypeStruct:
        """One scaled state, or its gradient, a chunk."""
        batch, heads, *matrix = self.state.shape
        return jax.ShapeDtypeStruct((batch, heads, self.chunks, *matrix), self.inputs[3].dtype)


def _prepare(inputs: Inputs, chunk: int) -> _Call:
    """Check what the kernels cannot take; at 64 tokens a chunk registers overflow: 32 serve it."""
    v = inputs[3]
    for size in (inputs[0].shape[3], v.shape[3]):
        if size < 16 or size & (size - 1):
            raise ValueError(
                f"wkv7: the Triton kernels need head sizes that are powers of two from 16 up; "
                f"got {size}."
            )
    if v.dtype not in (jnp.bfloat16, jnp.float32):
        raise TypeError(f"wkv7: the Triton kernels take bfloat16 or float32; got {v.dtype}.")
    r, log_w, *rest = inputs
    inputs = (r.astype(v.dtype), log_w.astype(jnp.float32), *(x.astype(v.dtype) for x in rest))
    chunk = min(chunk, 32)
    return _Call(inputs, chunk, best_tiles(capability())[chunk])


def _like(x: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _walk(call: _Call, kernel: str, arrays: tuple, outputs: list, tile: Tile, **constants) -> list:
    """Launch a kernel that walks the chunks, a program for every head and block of values."""
    values = call.inputs[3].shape[3]
    block = min(tile.values, values)
    grid = (values // block, call.rows)
    constants |= call.constants | {"BLOCK": block}
    return launch(kernel, arrays, outputs, grid, tile, **constants)


def _forward(inputs: Inputs, state: State, chunk: int, save: bool) -> list:
    call = _prepare(inputs, chunk)
    starts = call.states if save else jax.ShapeDtypeStruct((1,), call.states.dtype)
    outputs = [_like(call.inputs[3]), call.state, starts]
    arrays = (*call.inputs, state)
    return _walk(call, "forward", arrays, outputs, call.tiles.forward, SAVE=save)


def forward_saving(
    inputs: Inputs, state: State, chunk: int
) -> tuple[Float[Array, "B T H Nv"], State, Starts]:
    """What every token reads, the state behind the last, and the scaled state of each chunk."""
    return tuple(_forward(inputs, state, chunk, True))


def forward(inputs: Inputs, state: State, *, chunk: int) -> tuple[Float[Array, "B T H Nv"], State]:
    """As `forward_saving` without the saved states."""
    return tuple(_forward(inputs, state, chunk, False)[:2])


def backward(
    inputs: Inputs, starts: Starts, dy: Float[Array, "B T H Nv"], dend: State, *, chunk: int
) -> tuple[tuple[Array, ...], State]:
    """Gradients of the six inputs and the start state, from what `forward_saving` kept."""
    call = _prepare(inputs, chunk)
    r, log_w, _, v, a, b = call.inputs
    dy, dend = dy.astype(v.dtype), dend.astype(jnp.float32)
    ends, dstate = _walk(
        call,
        "state_gradient",
        (r, log_w, a, b, dy, dend),
        [call.states, call.state],
        call.tiles.state_gradient,
    )
    grads = launch(
        "gradients",
        (*call.inputs, dy, starts, ends),
        [_like(x) for x in call.inputs],
        (call.chunks, call.rows),
        call.tiles.gradients,
        **call.constants,
    )
    return tuple(g.astype(x.dtype) for g, x in zip(grads, inputs, strict=True)), dstate
