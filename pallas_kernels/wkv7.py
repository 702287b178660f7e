"""The public WKV-7 op: argument checks, choice of implementation, one `custom_vjp`."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.reference import State, WKVInputs

CHUNKS = (16, 32, 64)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _wkv7(
    implementation: str | None,
    chunk: int | None,
    interpret: bool,
    inputs,
    state,
):
    return dispatch.forward(
        implementation,
        inputs,
        state,
        chunk=chunk,
        interpret=interpret,
    )


def _forward(
    implementation,
    chunk,
    interpret,
    inputs,
    state,
):
    y, end, residuals = dispatch.forward_saving(
        implementation,
        inputs,
        state,
        chunk=chunk,
        interpret=interpret,
    )
    return (y, end), residuals


def _backward(
    implementation,
    chunk,
    interpret,
    residuals,
    cotangents,
):
    dy, dend = cotangents
    return dispatch.backward(
        implementation,
        residuals,
        dy,
        dend,
        chunk=chunk,
        interpret=interpret,
    )


_wkv7.defvjp(_forward, _backward)


def _check_options(implementation: str | None, chunk: int | None) -> None:
    """Raises unless `implementation` and `chunk` have known values."""
    if implementation is not None and implementation not in dispatch.IMPLEMENTATIONS:
        raise ValueError(
            f"wkv7: `implementation` must be None or one of {', '.join(dispatch.IMPLEMENTATIONS)}; "
            f"got {implementation!r}."
        )
    if chunk is not None and (isinstance(chunk, float) or chunk not in CHUNKS):
        raise ValueError(
            f"wkv7: `chunk` must be None or one of {CHUNKS}; got {chunk!r}."
        )


def _check_arrays(inputs: WKVInputs, state: State) -> None:
    """Raises unless shapes and dtypes of the seven arrays agree."""
    r = inputs.r
    v = inputs.v
    for name, x in inputs._asdict().items():
        if x.ndim != 4:
            raise ValueError(
                f"wkv7: `{name}` must have shape [B T H N]; got {x.shape}."
            )
        # v alone may have another number of channels.
        shape = (*r.shape[:3], v.shape[3]) if name == "v" else r.shape
        if x.shape != shape:
            raise ValueError(
                f"wkv7: `{name}` must have shape {shape} to fit `r`; got {x.shape}."
            )
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"wkv7: `{name}` must be floating point; got {x.dtype}.")
    batch, _, heads, keys = r.shape
    shape = (batch, heads, v.shape[3], keys)
    if state.shape != shape:
        raise ValueError(
            f"wkv7: `state` must have shape [B H Nv Nk] = {shape}; got {state.shape}."
        )
    # A bfloat16 state would lose small writes: they vanish next to a large entry.
    if state.dtype not in (jnp.float32, jnp.float64):
        raise TypeError(f"wkv7: `state` must be float32; got {state.dtype}.")


def _as_array(value: Any, name: str) -> Array:
    """Returns an argument as an array of JAX."""
    is_array = hasattr(value, "shape") and hasattr(value, "dtype")
    if not is_array and not isinstance(value, list | tuple):
        raise TypeError(f"wkv7: `{name}` must be an array; got {type(value).__name__}.")
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError):
        raise TypeError(
            f"wkv7: `{name}` must be an array of numbers; got {type(value).__name__}."
        ) from None


def _check_lengths(lengths: Array, batch: int, tokens: int) -> None:
    """Raises unless there is one integer from 0 to T for each row, where they can be read."""
    if lengths.shape != (batch,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(
            f"wkv7: `lengths` must be {batch} integers, one a row; "
            f"got shape {lengths.shape} of {lengths.dtype}."
        )
    if isinstance(lengths, Tracer) or not lengths.is_fully_addressable:
        return
    wrong = [length for length in lengths.tolist() if not 0 <= length <= tokens]
    if wrong:
        raise ValueError(
            f"wkv7: `lengths` must lie between 0 and {tokens}; got {wrong[0]}."
        )


def _mask_padding(inputs: WKVInputs, lengths: Int[Array, " B"]) -> WKVInputs:
    """Sets tokens from each row's length on to zeros: they write nothing and read zeros."""
    batch, tokens = inputs.r.shape[:2]
    _check_lengths(lengths, batch, tokens)
    is_token = (jnp.arange(tokens)[None] < lengths[:, None])[..., None, None]
    # A select, not a product: padding may hold NaN.
    return jax.tree.map(lambda x: jnp.where(is_token, x, 0), inputs)


def wkv7(
    r: Float[Array, "B T H Nk"],
    log_w: Float[Array, "B T H Nk"],
    k: Float[Array, "B T H Nk"],
    v: Float[Array, "B T H Nv"],
    a: Float[Array, "B T H Nk"],
    b: Float[Array, "B T H Nk"],
    state: Float[Array, "B H Nv Nk"],
    *,
    implementation: str | None = None,
    lengths: Int[Array, " B"] | None = None,
    chunk: int | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "B T H Nv"], Float[Array, "B H Nv Nk"]]:
    """Computes what every token reads from the recurrent state, and the state after the last token.

    For each head, S <- S (diag(exp(log_w)) + a b^T) + v k^T and y = S r, with float32 states. All
    seven arrays have gradients, also through the returned state. Key and value sizes may differ,
    and T may be any number, zero included.

    Args:
        r: receptance, which reads the state.
        log_w: natural logarithm of the decay, per key channel, in (-0.6066, 0]. Best kept in
            float32.
        k: key, under which the value is written.
        v: value, which is written.
        a: removal key, -kk in the model.
        b: removal key times in-context learning rate, kk * a in the model.
        state: float32 (float64 for all under x64); rows are value channels, columns key channels.
        implementation: a name of `IMPLEMENTATIONS`, which then runs or raises; None takes the best
            for the target device, by sizes and dtype. The target is the abstract mesh's device if
            one is set, else the default device. On other platforms the same program runs in plain
            JAX.
        lengths: the number of real tokens in each row; padding is on the right. Traced lengths
            cannot be checked: those below 0 count as 0, those above T as T.
        chunk: tokens between two states kept for the backward pass and, except in "scan", rows of
            a matrix product: 16, 32 or 64; None takes the best for the implementation.
        interpret: run Pallas kernels in Pallas's interpreter on any device; slow, for tests.

    Returns:
        y in v's dtype, and the final state in the state's.

    Raises:
        ValueError: the shapes do not fit, lengths are out of range, or `implementation` or `chunk`
            is unknown.
        TypeError: the state is not float32, or inputs are not floating point.
        NotImplementedError: a named implementation is made for other devices, head sizes or dtypes.
        ImportError: "triton" was named without jax-triton or triton.
        RuntimeError: "triton" was named and the versions of the two do not fit.

    Source: BlinkDL/RWKV-LM@524481d RWKV-v7/rwkv_v7_numpy.py:39-40.
    """
    # From here on the six go down as one.
    inputs = WKVInputs(
        r=_as_array(r, "r"),
        log_w=_as_array(log_w, "log_w"),
        k=_as_array(k, "k"),
        v=_as_array(v, "v"),
        a=_as_array(a, "a"),
        b=_as_array(b, "b"),
    )
    state = _as_array(state, "state")
    _check_options(implementation, chunk)
    _check_arrays(inputs, state)
    if lengths is not None:
        inputs = _mask_padding(inputs, _as_array(lengths, "lengths"))
    # No implementation has to handle an empty grid or scan.
    if inputs.r.shape[1] == 0:
        # [B 0 H Nv], which is also the shape and dtype of y.
        return inputs.v, state
    if implementation is not None:
        dispatch.check(implementation, inputs, state, interpret)
    return _wkv7(implementation, chunk, interpret, inputs, state)
