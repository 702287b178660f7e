"""Which implementation serves a call.

Every implementation has `forward`, `forward_saving` and `backward`. A named one runs or raises.
Without a name each platform that a program is lowered for gets its own, and a gradient keeps the
states of the platform that the program is made for (`platforms.target`): on another one, which is
possible though unusual, its backward pass walks forward once more.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import chunked, platforms, scan, tiles
from pallas_kernels.gpu import pallas_calls as gpu
from pallas_kernels.gpu import triton_calls as triton_op
from pallas_kernels.reference import Inputs, State
from pallas_kernels.tpu import pallas_calls as tpu

PLATFORMS = {"pallas_tpu": "tpu", "pallas_gpu": "cuda", "triton": "cuda"}
IMPLEMENTATIONS = ("scan", "chunked", *PLATFORMS)
_BY_NAME = {
    "scan": scan,
    "chunked": chunked,
    "pallas_tpu": tpu,
    "pallas_gpu": gpu.passes,
    "triton": triton_op.passes,
}
# What None takes where a kernel can serve.
_KERNELS = {"tpu": "pallas_tpu", "cuda": "pallas_gpu"}


def _platform() -> str:
    """The target's platform by the name that lowering gives it."""
    device = platforms.target()
    return "cuda" if device.platform == "gpu" else device.platform


def available() -> tuple[str, ...]:
    """The implementations that run on this process's default device, in their listed order."""
    here = _platform()
    names = [name for name in IMPLEMENTATIONS if PLATFORMS.get(name, here) == here]
    if "triton" in names and triton_op.missing():
        names.remove("triton")
    return tuple(names)


def unsupported_reason(name: str, inputs: Inputs, state: State) -> str | None:
    """What about these arrays a kernel cannot take, if anything."""
    sizes, dtype = (inputs[0].shape[3], inputs[3].shape[3]), inputs[3].dtype
    if dtype not in (jnp.bfloat16, jnp.float32) or state.dtype != jnp.float32:
        return f"bfloat16 or float32 tokens and a float32 state; got {dtype} and {state.dtype}"
    if name == "pallas_tpu":
        if any(size % 32 for size in sizes) or max(sizes) > 256:
            return f"head sizes that are multiples of 32 up to 256; got {sizes}"
        return None
    if any(size < 16 or size & (size - 1) for size in sizes) or sizes[0] * sizes[1] > 2**14:
        return f"head sizes that are powers of two from 16, with a product up to 128^2; got {sizes}"
    if _platform() == "cuda":
        largest = max(tiles.rows_for(_BY_NAME[name].table, tiles.capability()), default=0)
        if not largest:
            return "GPUs of compute capability 8.0 or newer"
        if max(sizes) > largest:
            return f"head sizes up to {largest} on this GPU; got {sizes}"
    return None


def check(name: str, inputs: Inputs, state: State, interpret: bool) -> None:
    """Raise unless the implementation of this name can serve the call.

    Raises:
        NotImplementedError: its platform is not the target's, or it cannot take these arrays.
        ImportError: a package is missing.
        RuntimeError: packages do not fit together.
    """
    wanted = PLATFORMS.get(name)
    if wanted is None:
        return
    if _platform() != wanted and not interpret:
        raise NotImplementedError(
            f"wkv7: {name!r} is made for {wanted} devices, this program for {_platform()}; name "
            f"another implementation or, to lower from here, set an abstract mesh of that device."
        )
    unfit = unsupported_reason(name, inputs, state)
    if unfit:
        raise NotImplementedError(f"wkv7: {name!r} takes {unfit}.")
    if name == "triton":
        triton_op.check_versions()


def _options(name: str, chunk: int | None, interpret: bool) -> dict:
    return {"chunk": chunk} | ({"interpret": interpret} if name in PLATFORMS else {})


def forward(name: str | None, inputs: Inputs, state: State, *, chunk: int | None, interpret: bool):
    """y and the last state."""
    if name is not None:
        return _BY_NAME[name].forward(inputs, state, **_options(name, chunk, interpret))
    if inputs[0].shape[1] == 1:
        return scan.forward(inputs, state)
    branches = {"cpu": scan.forward, "default": functools.partial(chunked.forward, chunk=chunk)}
    for platform, kernel in _KERNELS.items():
        if not unsupported_reason(kernel, inputs, state):
            run = functools.partial(_BY_NAME[kernel].forward, chunk=chunk)
            branches[platform] = functools.partial(platforms.lower_only_on, platform, run)
    return jax.lax.platform_dependent(inputs, state, **branches)


def _kernel(inputs: Inputs, state: State) -> str | None:
    """The platform whose kernel serves a differentiated call without a name, if there is one."""
    here = _platform()
    if (
        here not in _KERNELS
        or inputs[0].shape[1] == 1
        or unsupported_reason(_KERNELS[here], inputs, state)
    ):
        return None
    return here


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["states"], meta_fields=["platform"]
)
@dataclasses.dataclass(frozen=True)
class Residuals:
    """What a backward pass needs of the states between.

    Attributes:
        states: as the implementation that kept them has them.
        platform: that of the kernel, where None took one: the backward pass may be traced where
            the target is another.
    """

    states: Array
    platform: str | None = None


def forward_saving(
    name: str | None, inputs: Inputs, state: State, *, chunk: int | None, interpret: bool
):
    """y, the last state, and what is `Kept` for `backward`."""
    platform = _kernel(inputs, state) if name is None else None
    if platform is None:
        name = name or "chunked"
        options = _options(name, chunk, interpret)
        y, end, states = _BY_NAME[name].forward_saving(inputs, state, **options)
        return y, end, Residuals(states)
    run = functools.partial(_BY_NAME[_KERNELS[platform]].forward_saving, chunk=chunk)

    def elsewhere(inputs, state):
        kept = platforms.zeros(jax.eval_shape(run, inputs, state)[2])
        return *chunked.forward(inputs, state, chunk=chunk), kept

    here = {platform: functools.partial(platforms.lower_only_on, platform, run)}
    y, end, states = jax.lax.platform_dependent(inputs, state, **here, default=elsewhere)
    return y, end, Residuals(states, platform)


def backward(name: str | None, residuals, dy, dend, *, chunk: int | None, interpret: bool):
    """Gradients of the six inputs and of the start state.

    Args:
        name: the implementation.
        residuals: the inputs, the start state and what `forward_saving` kept.
        dy: gradient of y.
        dend: gradient of the last state.
        chunk: tokens of a chunk.
        interpret: run kernels in Pallas's interpreter.
    """
    inputs, state, kept = residuals
    starts, platform = kept.states, kept.platform
    if platform is None:
        name = name or "chunked"
        options = _options(name, chunk, interpret)
        return _BY_NAME[name].backward(inputs, starts, dy, dend, **options)
    run = functools.partial(_BY_NAME[_KERNELS[platform]].backward, chunk=chunk)

    def elsewhere(inputs, state, starts, dy, dend):
        *_, kept = chunked.forward_saving(inputs, state, chunk=chunk)
        return chunked.backward(inputs, kept, dy, dend, chunk=chunk)

    def kernel(inputs, state, starts, dy, dend):
        return platforms.lower_only_on(platform, run, inputs, starts, dy, dend)

    return jax.lax.platform_dependent(
        inputs, state, starts, dy, dend, **{platform: kernel}, default=elsewhere
    )
