"""The choice of an implementation for a call.

A named implementation runs or raises. Without a name, the kernel of the target platform
(`platforms.target`) runs if it supports the arrays; otherwise XLA compiles "scan" or "chunked". The
choice is made when the call is traced.

The program may still be lowered for another platform: by `jit` on arrays that are committed to
another device, by the AOT interface, or because `jax.default_device` changed between the forward
and the backward pass. `jax.lax.platform_dependent` covers these cases: the kernel's branch is
lowered only for the kernel's platform, and other platforms run plain JAX. A program that is lowered
for several platforms at once needs `multi_platform_export`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import chunked, platforms, scan, tiles
from pallas_kernels.gpu import pallas_calls as pallas_gpu
from pallas_kernels.gpu import triton_calls, triton_launcher
from pallas_kernels.packed_rows import Owners
from pallas_kernels.reference import State, WKVInputs
from pallas_kernels.tpu import pallas_calls as pallas_tpu


class Options(NamedTuple):
    """The options of a call.

    Attributes:
        implementation: its name; None picks the best.
        chunk: tokens of a chunk; None takes the implementation's default.
        interpret: run kernels in Pallas's interpreter.
    """

    implementation: str | None
    chunk: int | None
    interpret: bool


class Implementation(Protocol):
    """The three functions that every implementation has.

    With `owners`, from `packed_rows`, a row holds several sequences, each with its own state; then
    `chunk` must be given and the tokens must fill their chunks. Without, a `chunk` of None takes
    the implementation's default. `interpret` runs kernels in Pallas's interpreter and has no effect
    in plain JAX.
    """

    def forward(
        self,
        inputs: WKVInputs,
        state: State,
        owners: Owners | None = None,
        *,
        chunk: int | None = None,
        interpret: bool = False,
    ) -> tuple[Array, State]:
        """Computes y and the state after the last token."""
        ...

    def forward_saving(
        self,
        inputs: WKVInputs,
        state: State,
        owners: Owners | None = None,
        *,
        chunk: int | None = None,
        interpret: bool = False,
    ) -> tuple[Array, State, Array]:
        """Computes y, the state after the last token, and the states that `backward` reads."""
        ...

    def backward(
        self,
        inputs: WKVInputs,
        starts: Array,
        dy: Array,
        dend: State,
        owners: Owners | None = None,
        *,
        chunk: int | None = None,
        interpret: bool = False,
    ) -> tuple[WKVInputs, State]:
        """Computes the gradients of the six inputs and of the start state.

        Args:
            inputs: as given to `forward_saving`, as are `owners`, `chunk` and `interpret`.
            starts: the states that `forward_saving` returned.
            dy: gradient of y.
            dend: gradient of the last state.
            owners: see inputs.
            chunk: see inputs.
            interpret: see inputs.
        """
        ...


PLATFORMS = {"pallas_tpu": "tpu", "pallas_gpu": "cuda", "triton": "cuda"}
IMPLEMENTATIONS = ("scan", "chunked", *PLATFORMS)
_BY_NAME: dict[str, Implementation] = {
    "scan": scan,
    "chunked": chunked,
    "pallas_tpu": pallas_tpu,
    "pallas_gpu": pallas_gpu.KERNELS,
    "triton": triton_calls.KERNELS,
}
# With longer chunks, Hopper computes products of a chunk's [L L] matrices with warpgroups. Triton
# miscompiles those whose left operand is a transposed 16-bit product (triton-lang/triton#6124).
GPU_CHUNKS = (16, 32)
GPU_TABLES = {"pallas_gpu": tiles.PALLAS_GPU, "triton": tiles.TRITON}
# The kernel that None picks on each platform, if it supports the arrays.
_BEST_KERNELS = {"tpu": "pallas_tpu", "cuda": "pallas_gpu"}


def available() -> tuple[str, ...]:
    """Lists the implementations that run on this process's default device."""
    platform = platforms.target_platform()
    names = []
    for name in IMPLEMENTATIONS:
        if PLATFORMS.get(name, platform) != platform:
            continue
        if name == "triton" and triton_launcher.missing():
            continue
        table = GPU_TABLES.get(name)
        if table is not None and not tiles.rows_for(table, tiles.capability()):
            continue
        names.append(name)
    return tuple(names)


def unsupported_reason(
    name: str, inputs: WKVInputs, state: State, chunk: int | None
) -> str | None:
    """Describes what a kernel supports instead of these arrays; None if it supports them."""
    dtype = inputs.v.dtype
    sizes = (inputs.r.shape[3], inputs.v.shape[3])
    if dtype not in (jnp.bfloat16, jnp.float32) or state.dtype != jnp.float32:
        return f"bfloat16 or float32 tokens and a float32 state; got {dtype} and {state.dtype}"
    if name == "pallas_tpu":
        return _unsupported_tpu_reason(sizes)
    if chunk not in (None, *GPU_CHUNKS):
        return f"chunks of {' or '.join(map(str, GPU_CHUNKS))} tokens; got {chunk}"
    return _unsupported_gpu_reason(name, sizes)


def _unsupported_tpu_reason(sizes: tuple[int, int]) -> str | None:
    """Describes which head sizes the TPU kernels support; None if they support these."""
    # Heads are packed into tiles of 128 lanes.
    if any(size % 32 for size in sizes) or max(sizes) > 256:
        return f"head sizes that are multiples of 32 up to 256; got {sizes}"
    return None


def _unsupported_gpu_reason(name: str, sizes: tuple[int, int]) -> str | None:
    """Describes which head sizes or GPUs a GPU kernel supports; None if it supports these."""
    # Triton's blocks are powers of two, and a head's state must fit into one program's registers.
    if (
        any(size < 16 or size & (size - 1) for size in sizes)
        or sizes[0] * sizes[1] > 2**14
    ):
        return f"head sizes that are powers of two from 16, with a product up to 128^2; got {sizes}"
    # In the interpreter, or in an export from another machine, no GPU's limits apply.
    if platforms.target_platform() != "cuda":
        return None
    table = GPU_TABLES[name]
    capability = tiles.capability()
    largest = max(tiles.rows_for(table, capability), default=0)
    if not largest:
        kind = platforms.target().device_kind
        number = "unknown" if capability is None else capability / 10
        return (
            "GPUs of compute capability 8.0 to 9.0, on which its results are known to be correct; "
            f"got {kind}, whose capability is {number}"
        )
    if max(sizes) > largest:
        return f"head sizes up to {largest} on this GPU; got {sizes}"
    return None


def check(options: Options, inputs: WKVInputs, state: State, *, packed: bool) -> None:
    """Raises if the call names an implementation that does not support it.

    Args:
        options: of the call, as are the next two.
        inputs: see options.
        state: see options.
        packed: whether several sequences share a row.

    Raises:
        NotImplementedError: the target is another platform, or the arrays are not supported.
        ImportError: a package is missing.
        RuntimeError: the packages' versions are not known to work together.
    """
    name = options.implementation
    # "scan" and "chunked" are plain JAX: they run everywhere.
    if name not in PLATFORMS:
        return
    wanted = PLATFORMS[name]
    platform = platforms.target_platform()
    if platform != wanted and not options.interpret:
        raise NotImplementedError(
            f"wkv7: {name!r} runs on {wanted} devices, but this program targets {platform}; name "
            "another implementation or, to lower from here, set an abstract mesh of that device."
        )
    reason = unsupported_reason(name, inputs, state, options.chunk)
    if reason:
        raise NotImplementedError(f"wkv7: {name!r} takes {reason}.")
    if name == "triton":
        if packed:
            raise NotImplementedError(
                "wkv7: 'triton' takes no `segment_ids`; name 'pallas_gpu', 'chunked' or 'scan'."
            )
        triton_launcher.check_versions()


def _takes_kernel(
    platform: str, inputs: WKVInputs, state: State, chunk: int | None
) -> bool:
    """Tells whether a call without `implementation` runs this platform's kernel."""
    if platform not in _BEST_KERNELS:
        return False
    # XLA computes single tokens. On TPUs a decoding loop runs a kernel instead, on states that it
    # keeps in the kernel's layout (`takes_tiles`). On GPUs a kernel can be named. It reads the
    # state once where XLA reads it three times, but no measurement says yet from which batch size
    # on it is faster.
    if inputs.r.shape[1] == 1:
        return False
    return not unsupported_reason(_BEST_KERNELS[platform], inputs, state, chunk)


def takes_tiles(implementation: str | None, state: Array) -> bool:
    """Tells whether a loop over single tokens should hold its states as the TPU's kernel does.

    Args:
        implementation: of the op; None picks the best.
        state: WKV states, [... H Nv Nk].
    """
    if implementation not in (None, "pallas_tpu") or state.dtype != jnp.float32:
        return False
    # A program that is exported for several platforms has states of one shape.
    if platforms.kernel_wrapper.get() is not None:
        return False
    *_, values, keys = state.shape
    is_tpu = platforms.target_platform() == "tpu"
    return is_tpu and not _unsupported_tpu_reason((keys, values))


def packed_chunk(name: str | None, inputs: WKVInputs, state: State) -> int:
    """Returns the default chunk length for packed rows."""
    if name is None:
        platform = platforms.target_platform()
        if _takes_kernel(platform, inputs, state, None):
            name = _BEST_KERNELS[platform]
    if name == "pallas_tpu":
        return tiles.for_tpu(inputs.v.dtype).chunk
    if name not in GPU_TABLES:
        return tiles.XLA
    keys = inputs.r.shape[3]
    values = inputs.v.shape[3]
    table = GPU_TABLES[name]
    capability = tiles.capability()
    return tiles.for_gpu(table, keys, values, inputs.v.dtype, capability).chunk


def _kernel_branch(platform: str, function: Callable) -> Callable:
    """Returns a kernel's branch, wrapped if the program is exported for several platforms."""
    wrapper = platforms.kernel_wrapper.get()
    if wrapper is None:
        return function
    return functools.partial(wrapper, platform, function)


@jax.named_scope("wkv7")
def forward(
    options: Options, inputs: WKVInputs, state: State, owners: Owners | None = None
) -> tuple[Array, State]:
    """Computes y and the state after the last token."""
    name, chunk, interpret = options
    if name is not None:
        return _BY_NAME[name].forward(
            inputs, state, owners, chunk=chunk, interpret=interpret
        )
    if inputs.r.shape[1] == 1:
        return scan.forward(inputs, state)
    branches: dict[str, Callable] = {}
    exports_all = platforms.kernel_wrapper.get() is not None
    for platform, kernel in _BEST_KERNELS.items():
        # Tracing a kernel takes 0.1 to 0.2 seconds, so unused kernels are not traced.
        is_wanted = exports_all or platform == platforms.target_platform()
        if is_wanted and _takes_kernel(platform, inputs, state, chunk):
            run = functools.partial(_BY_NAME[kernel].forward, chunk=chunk)
            branches[platform] = _kernel_branch(platform, run)
    return jax.lax.platform_dependent(
        inputs,
        state,
        owners,
        cpu=functools.partial(scan.forward, chunk=chunk),
        default=functools.partial(chunked.forward, chunk=chunk),
        **branches,
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Residuals:
    """What the forward pass saves for the backward pass.

    Attributes:
        inputs: the six inputs.
        state: the start state.
        starts: the state at the start of every chunk, in the layout of the implementation.
        owners: the sequence of each chunk of packed rows; else None.
        platform: the platform of the kernel that saved them; None for a named implementation or
            "chunked". The target may differ when the backward pass is traced.
    """

    # No array types: `tree.map` also builds this class from leaves that are not arrays.
    inputs: Any
    state: Any
    starts: Any
    owners: Any = None
    platform: str | None = dataclasses.field(default=None, metadata={"static": True})


def zeros_like(shape: Any) -> Array:
    """Returns zeros of an array's type or description, varying over the same mesh axes."""
    zeros = jnp.zeros(shape.shape, shape.dtype)
    axes = tuple(shape.manual_axis_type.varying) if shape.manual_axis_type else ()
    # Inside `shard_map` all branches of a conditional must vary over the same axes.
    return jax.lax.pcast(zeros, axes, to="varying") if axes else zeros


@jax.named_scope("wkv7")
def forward_saving(
    options: Options, inputs: WKVInputs, state: State, owners: Owners | None = None
) -> tuple[Array, State, Residuals]:
    """Computes y, the state after the last token, and what `backward` needs."""
    name, chunk, interpret = options
    platform = platforms.target_platform()
    # "chunked" on CPUs too: "scan" has the faster forward pass there, but the slower gradient.
    if name is not None or not _takes_kernel(platform, inputs, state, chunk):
        implementation = _BY_NAME[name or "chunked"]
        y, end, starts = implementation.forward_saving(
            inputs, state, owners, chunk=chunk, interpret=interpret
        )
        return y, end, Residuals(inputs, state, starts, owners)
    kernel = _BY_NAME[_BEST_KERNELS[platform]]
    run = functools.partial(kernel.forward_saving, chunk=chunk)

    def other_platforms(inputs, state, owners):
        # All branches must return the same shapes. On these platforms `backward` reads no starts.
        starts = zeros_like(jax.eval_shape(run, inputs, state, owners)[2])
        return *chunked.forward(inputs, state, owners, chunk=chunk), starts

    # Only the target's kernel: those of other platforms save states of other shapes.
    branches = {platform: _kernel_branch(platform, run)}
    y, end, starts = jax.lax.platform_dependent(
        inputs, state, owners, default=other_platforms, **branches
    )
    return y, end, Residuals(inputs, state, starts, owners, platform)


@jax.named_scope("wkv7_gradients")
def backward(
    options: Options, residuals: Residuals, dy: Array, dend: State
) -> tuple[WKVInputs, State]:
    """Computes the gradients of the six inputs and of the start state.

    Args:
        options: as given to `forward_saving`.
        residuals: from `forward_saving`.
        dy: gradient of y.
        dend: gradient of the last state.
    """
    name, chunk, interpret = options
    # The forward pass chose the implementation; the target may have changed since.
    platform = residuals.platform
    if platform is None:
        return _BY_NAME[name or "chunked"].backward(
            residuals.inputs,
            residuals.starts,
            dy,
            dend,
            residuals.owners,
            chunk=chunk,
            interpret=interpret,
        )
    run = functools.partial(_BY_NAME[_BEST_KERNELS[platform]].backward, chunk=chunk)
    run = _kernel_branch(platform, run)

    def kernel_branch(residuals, dy, dend):
        return run(residuals.inputs, residuals.starts, dy, dend, residuals.owners)

    def other_platforms(residuals, dy, dend):
        # The saved states are zeros here, so they are recomputed.
        inputs = residuals.inputs
        owners = residuals.owners
        *_, starts = chunked.forward_saving(
            inputs, residuals.state, owners, chunk=chunk
        )
        return chunked.backward(inputs, starts, dy, dend, owners, chunk=chunk)

    return jax.lax.platform_dependent(
        residuals,
        dy,
        dend,
        default=other_platforms,
        **{platform: kernel_branch},
    )
