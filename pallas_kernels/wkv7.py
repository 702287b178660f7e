"""The public WKV-7 op: checks, choice of implementation, one `custom_vjp`."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.reference import NAMES, Inputs, State

CHUNKS = (16, 32, 64)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _wkv7(implementation: str | None, chunk: int | None, interpret: bool, inputs, state):
    return dispatch.forward(implementation, inputs, state, chunk=chunk, interpret=interpret)


def _forward(implementation, chunk, interpret, inputs, state):
    y, end, starts = dispatch.forward_saving(
        implementation, inputs, state, chunk=chunk, interpret=interpret
    )
    return (y, end), (inputs, state, starts)


def _backward(implementation, chunk, interpret, residuals, cotangents):
    return dispatch.backward(
        implementation, residuals, *cotangents, chunk=chunk, interpret=interpret
    )


_wkv7.defvjp(_forward, _backward)


def _check(inputs: Inputs, state: State, implementation: str | None, chunk: int | None) -> None:
    r, v = inputs[0], inputs[3]
    if implementation is not None and implementation not in dispatch.IMPLEMENTATIONS:
        raise ValueError(
            f"wkv7: `implementation` must be None or one of {', '.join(dispatch.IMPLEMENTATIONS)}; "
            f"got {implementation!r}."
        )
    if chunk is not None and chunk not in CHUNKS:
        raise ValueError(f"wkv7: `chunk` must be None or one of {CHUNKS}; got {chunk!r}.")
    for name, x in zip(NAMES, inputs, strict=True):
        if x.ndim != 4:
            raise ValueError(f"wkv7: `{name}` must have shape [B T H N]; got {x.shape}.")
        shape = (*r.shape[:3], v.shape[3]) if name == "v" else r.shape
        if x.shape != shape:
            raise ValueError(f"wkv7: `{name}` must have shape {shape} beside `r`; got {x.shape}.")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"wkv7: `{name}` must be floating point; got {x.dtype}.")
    batch, _, heads, keys = r.shape
    if state.shape != (batch, heads, v.shape[3], keys):
        raise ValueError(
            f"wkv7: `state` must have shape [B H Nv Nk] = {(batch, heads, v.shape[3], keys)}; "
            f"got {state.shape}."
        )
    if state.dtype not in (jnp.float32, jnp.float64):
        raise TypeError(f"wkv7: `state` must be float32; got {state.dtype}.")


def _mask(inputs: Inputs, lengths: Int[Array, " B"]) -> Inputs:
    """Tokens at and behind each row's length become zeros: they write nothing and read zeros."""
    batch, tokens = inputs[0].shape[:2]
    if lengths.shape != (batch,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(
            f"wkv7: `lengths` must be {batch} integers, one a row; "
            f"got shape {lengths.shape} of {lengths.dtype}."
        )
    real = (jnp.arange(tokens)[None] < lengths[:, None])[..., None, None]
    return tuple(jnp.where(real, x, 0) for x in inputs)


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
    """What every token reads from the recurrent state, and the state behind the last token.

    For each head, S <- S (diag(exp(log_w)) + a b^T) + v k^T and y = S r, with float32 states. All
    seven inputs have gradients, also through the returned state. Key and value sizes may differ;
    any T, zero included.

    Args:
        r: receptance, what is read.
        log_w: natural logarithm of the decay, per key channel, in (-0.6066, 0]. Best kept in
            float32.
        k: key that is written.
        v: value that is written.
        a: removal key, -kk in the model.
        b: removal key times in-context learning rate, kk * a in the model.
        state: float32 (float64 for all under x64); rows are value channels, columns key channels.
        implementation: a name of `IMPLEMENTATIONS`, which then runs or raises; None takes the best
            for the platform the program is lowered for, by sizes and dtype.
        lengths: tokens of each row that count; the rest is padding on the right.
        chunk: tokens between two states kept for the backward pass, and rows of a matrix product
            except in "scan": 16, 32 or 64; None takes what is best for the implementation.
        interpret: run Pallas kernels in Pallas's interpreter on any device; slow, for tests.

    Returns:
        y in v's dtype, and the final state in the state's.

    Raises:
        ValueError: shapes that do not fit, or an unknown `implementation` or `chunk`.
        TypeError: a state that is not float32, or inputs that are not floating point.
        NotImplementedError: a named implementation that is made for other devices, head sizes or
            dtypes.
        ImportError: "triton" without jax-triton or triton.
        RuntimeError: "triton" with versions of them that do not fit.

    Source: BlinkDL/RWKV-LM@524481d RWKV-v7/rwkv_v7_numpy.py:39-40.
    """
    inputs = tuple(jnp.asarray(x) for x in (r, log_w, k, v, a, b))
    state = jnp.asarray(state)
    _check(inputs, state, implementation, chunk)
    if lengths is not None:
        inputs = _mask(inputs, jnp.asarray(lengths))
    if inputs[0].shape[1] == 0:
        return inputs[3], state
    if implementation is not None:
        dispatch.check(implementation, inputs, state, interpret)
    return _wkv7(implementation, chunk, interpret, inputs, state)
