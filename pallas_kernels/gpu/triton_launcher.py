"""The launch of a Triton kernel from a JAX program.

jax-triton launches the kernel if its version matches those of jax and triton. Otherwise Triton's
compiler and the custom call in jaxlib's CUDA plugin launch it without jax-triton. Both ways pass
the same instructions and parameters to the same custom call.
"""

import functools
import zlib
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import jax
from jaxtyping import Array

from pallas_kernels import tiles

# Minor versions with which the kernels have been compiled. Triton 3.8 and later emit PTX that the
# assembler of CUDA 13.0 does not support.
JAX = ("0.10", "0.11", "0.12")
TRITON = ("3.6", "3.7")

# The jax-triton version for each pair of minor versions of jax and triton; none supports jax 0.12.
JAX_TRITON = {
    ("0.10", "3.6"): "0.3.1",
    ("0.10", "3.7"): "0.3.1",
    ("0.11", "3.6"): "0.3.1",
    ("0.11", "3.7"): "0.4.1",
}


class _Launch(NamedTuple):
    """A kernel with its arguments, as `launch` takes them."""

    kernel: str
    arrays: Sequence[Array]
    outputs: list[jax.ShapeDtypeStruct]
    grid: tuple[int, int]
    tile: tiles.Tile
    constants: dict[str, Any]


# Triton's names of array types.
_POINTERS = {"bfloat16": "*bf16", "float32": "*fp32"}


def check_versions() -> None:
    """Raises unless the installed jax and triton are known to work together.

    Raises:
        ImportError: triton is missing.
        RuntimeError: an untested version is installed.
    """
    needed = (
        f"The Triton kernels need triton {' or '.join(TRITON)} and "
        f"jax {', '.join(JAX[:-1])} or {JAX[-1]}"
    )
    try:
        installed = version("triton")
    except PackageNotFoundError as error:
        raise ImportError(f"{needed}; triton is missing.") from error
    if _minor("jax") not in JAX or _minor("triton") not in TRITON:
        raise RuntimeError(
            f"{needed}; got triton {installed} and jax {version('jax')}."
        )


def missing() -> bool:
    """Tells whether `check_versions` would raise."""
    try:
        check_versions()
    except (ImportError, RuntimeError):
        return True
    return False


def has_fitting_jax_triton() -> bool:
    """Tells whether the installed jax-triton works with the installed jax and triton."""
    try:
        installed = version("jax-triton")
    except PackageNotFoundError:
        return False
    return JAX_TRITON.get((_minor("jax"), _minor("triton"))) == installed


def launch(
    kernel: str,
    arrays: Sequence[Array],
    outputs: list[jax.ShapeDtypeStruct],
    grid: tuple[int, int],
    tile: tiles.Tile,
    **constants: Any,
) -> Sequence[Array]:
    """Runs a Triton kernel.

    Args:
        kernel: its name in `triton_kernels`.
        arrays: its arrays. The first one's numbers of tokens and heads are passed after them.
        outputs: shapes and dtypes of its outputs.
        grid: its grid.
        tile: its compile options.
        **constants: its compile-time constants.
    """
    run = _launch_by_jax_triton if has_fitting_jax_triton() else _launch_by_jaxlib
    return run(_Launch(kernel, arrays, outputs, grid, tile, constants))


def _minor(name: str) -> str:
    return ".".join(version(name).split(".")[:2])


def _launch_by_jax_triton(call: _Launch) -> Sequence[Array]:
    # Optional packages: jax_triton is an extra, and triton is slow to import.
    import jax_triton

    from pallas_kernels.gpu import triton_kernels

    tokens, heads = call.arrays[0].shape[1:3]
    return jax_triton.triton_call(
        *call.arrays,
        tokens,
        heads,
        kernel=getattr(triton_kernels, call.kernel),
        out_shape=call.outputs,
        grid=call.grid,
        num_warps=call.tile.warps,
        num_stages=call.tile.stages,
        **call.constants,
    )


def _launch_by_jaxlib(call: _Launch) -> Sequence[Array]:
    library = _import_jaxlibs_call()
    scalars = call.arrays[0].shape[1:3]
    types = [
        *(_POINTERS[str(array.dtype)] for array in call.arrays),
        *("i32" for _ in scalars),
        *(_POINTERS[str(output.dtype)] for output in call.outputs),
    ]
    # No array is zeroed before the launch; JAX aligns arrays to 16 bytes.
    pointer = library.create_array_parameter(0, 16)
    parameters = [
        *(pointer for _ in call.arrays),
        *(library.create_scalar_parameter(number, "i32") for number in scalars),
        *(pointer for _ in call.outputs),
    ]
    compiled = _compile(
        call.kernel,
        tuple(types),
        tuple(call.constants.items()),
        call.tile.warps,
        call.tile.stages,
        tiles.capability(),
    )
    described = library.TritonKernelCall(compiled, *call.grid, 1, parameters)
    run = jax.ffi.ffi_call(
        "triton_kernel_call",
        call.outputs,
        custom_call_api_version=2,
        # Annotated as `str`, but passed on unchanged.
        legacy_backend_config=zlib.compress(described.to_proto(call.kernel, b"")),  # pyright: ignore
    )
    return run(*call.arrays)


@functools.cache
def _compile(
    kernel: str,
    types: tuple[str, ...],
    constants: tuple[tuple[str, int], ...],
    warps: int,
    stages: int,
    capability: int,
) -> Any:
    """Compiles a kernel; the result is jaxlib's `TritonKernel`."""
    # Optional: triton is an extra, and slow to import.
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pallas_kernels.gpu import triton_kernels

    function = getattr(triton_kernels, kernel)
    signature = dict(zip(function.arg_names, types, strict=False))
    signature |= {name: "constexpr" for name, _ in constants}
    alignment = {
        (position,): [["tt.divisibility", 16]]
        for position, name in enumerate(types)
        if name.startswith("*")
    }
    with knobs.cache.scope():
        # Importing jax-triton unsets Triton's cache directory, and Triton fails without one.
        if not knobs.cache.dir:
            knobs.cache.dir = knobs.cache.get_triton_dir("cache")
        compiled = triton.compile(
            ASTSource(function, signature, dict(constants), alignment),
            GPUTarget("cuda", capability, 32),
            {"num_warps": warps, "num_stages": stages},
        )
    return _import_jaxlibs_call().TritonKernel(
        compiled.metadata.name,
        warps,
        1,
        compiled.metadata.shared,
        compiled.asm["ptx"],
        compiled.asm["ttir"],
        capability,
    )


def _import_jaxlibs_call() -> Any:
    # A local import: it loads the CUDA plugin's library.
    from jaxlib import gpu_triton

    if not hasattr(gpu_triton, "TritonKernel"):
        raise RuntimeError(
            "The Triton kernels need JAX's CUDA plugin: pip install 'rwkv7_jax[cuda]'."
        )
    return gpu_triton
