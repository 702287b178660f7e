"""WKV-7 on NVIDIA GPUs: the Triton kernels' calls, through jax-triton."""

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import tiles
from pallas_kernels.gpu.segmented_passes import KernelSet
from pallas_kernels.platforms import output_like
from pallas_kernels.reference import Inputs, State

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


def missing() -> bool:
    """Whether `check_versions` raises."""
    try:
        check_versions()
    except (ImportError, RuntimeError):
        return True
    return False


def launch(kernel: str, arrays: tuple, outputs: list, grid: tuple, tile, **constants) -> list:
    """Run the kernel of this name on the arrays, their tokens and heads; returns its outputs."""
    import jax_triton

    from pallas_kernels.gpu import triton_kernels

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


def _batched(function: Callable) -> Callable:
    """A function of arrays [B ...] for `jax.vmap`, which gets one call on a larger batch."""
    run = jax.custom_batching.custom_vmap(function)

    @run.def_vmap
    def _(size: int, batched: list, *arrays: Array):
        whole = [
            x if mapped else jnp.broadcast_to(x, (size, *x.shape))
            for x, mapped in zip(arrays, batched, strict=True)
        ]
        found = run(*(x.reshape(-1, *x.shape[2:]) for x in whole))
        parts = [x.reshape(size, -1, *x.shape[1:]) for x in found]
        return parts, [True] * len(parts)

    return run


def _constants(inputs: tuple, values: int, choice: tiles.GPU) -> dict:
    """The sizes that every kernel is compiled for; segments and padding leave whole chunks."""
    return {"CHUNK": choice.chunk, "KEYS": inputs[0].shape[3], "VALUES": values}


def _walk(kernel: str, arrays: tuple, outputs: Callable, choice, tile: tiles.Tile, **constants):
    """Launch a kernel that walks the chunks, a program for every head and block of values."""
    values = arrays[-1].shape[2]
    block = tile.values
    while values % block:
        block //= 2
    constants |= _constants(arrays, values, choice) | {"BLOCK": block}

    def run(*arrays):
        grid = (arrays[0].shape[0] * arrays[0].shape[2], values // block)
        return launch(kernel, arrays, outputs(*arrays), grid, tile, **constants)

    return _batched(run)(*arrays)


def _states(state: State, v: Array, choice: tiles.GPU, save: bool | None):
    """One state a chunk in the tokens' dtype, or next to nothing."""
    batch, heads, *matrix = state.shape
    shape = (batch, heads, v.shape[1] // choice.chunk, *matrix) if save else (batch,)
    return output_like(shape, v.dtype, state, v)


def _forward(inputs: Inputs, state: State, choice: tiles.GPU, save: bool | None, interpret):
    def outputs(r, log_w, k, v, a, b, state):
        y = output_like(v.shape if save is not None else v.shape[:1], v.dtype, state, v)
        end = output_like(state.shape, jnp.float32, state, v)
        return [end, y, _states(state, v, choice, save)]

    constants = {"READ": save is not None, "SAVE": bool(save)}
    found = _walk("forward", (*inputs, state), outputs, choice, choice.forward, **constants)
    return found[: 1 if save is None else 2 + save]


def _state(r, log_w, a, b, dy, dend: State, choice: tiles.GPU, save: bool, interpret):
    def outputs(r, log_w, a, b, dy, dend):
        return [output_like(dend.shape, jnp.float32, dend, dy), _states(dend, dy, choice, save)]

    arrays = (r, log_w, a, b, dy, dend)
    found = _walk("state_gradient", arrays, outputs, choice, choice.state, SAVE=save)
    return found[: 1 + save]


def _gradients(inputs: Inputs, dy, starts, ends, choice: tiles.GPU, interpret):
    constants = _constants(inputs, dy.shape[3], choice)

    def run(*arrays):
        batch, tokens, heads, _ = arrays[0].shape
        outputs = [output_like(x.shape, x.dtype, x, arrays[6]) for x in arrays[:6]]
        grid = (batch * heads, tokens // choice.chunk)
        return launch("gradients", arrays, outputs, grid, choice.gradients, **constants)

    return _batched(run)(*inputs, dy, starts, ends)


passes = KernelSet(tiles.TRITON, _forward, _state, _gradients)
