"""The public WKV-7 op: argument checks, choice of implementation, derivatives.

In a gradient, `_saving` runs the op and saves states for the backward pass, which is `_gradients`.
Kernels cannot be differentiated, so these two have custom rules: second and higher derivatives come
from "chunked", which is plain JAX on every platform. The op does not define forward mode: JAX would
transpose that rule instead of running the kernels' backward pass.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import chunked, dispatch, packed_rows, platforms, tiles
from pallas_kernels.eager import compiled_when_eager
from pallas_kernels.reference import State, WKVInputs

CHUNKS = (16, 32, 64)
# Largest chunk for float16 tokens: factors of longer chunks pass 65,504, the largest float16.
FLOAT16_CHUNK = 16
# The factors of a chunk are finite in float32 if -log_w sums to at most this over half a chunk.
LARGEST_EXPONENT = 80.0

# The name, for `jax.checkpoint` policies, of everything that the op computes in a gradient: y, the
# last state and the saved states. A policy that saves it spares the backward pass a second run.
RESULTS = "wkv7 results"

FORWARD_MODE = (
    "wkv7: forward-mode differentiation (jax.jvp, jax.jacfwd, jax.linearize) is not defined; use "
    "reverse mode (jax.grad, jax.vjp, jax.jacrev). Forward mode over reverse mode works."
)


@contextlib.contextmanager
def explain_forward_mode() -> Iterator[None]:
    """Replaces JAX's error about forward mode with one that says what to do.

    It does not reach errors that JAX raises after the block has ended: inside `jax.jit`, and in
    functions that `jax.linearize` returns.
    """
    try:
        yield
    except TypeError as error:
        if "forward-mode" not in str(error) or str(error) == FORWARD_MODE:
            raise
        raise TypeError(FORWARD_MODE) from None


def _gradients_jvp(options, primals, tangents):
    """Differentiates the gradients, which "chunked" recomputes from the inputs."""
    owners = primals[0].owners

    def run(inputs, state):
        return chunked.forward(inputs, state, owners, chunk=options.chunk)

    def gradients(inputs, state, dy, dend):
        _, pull = jax.vjp(run, inputs, state)
        return pull((dy, dend))

    def arguments(residuals, dy, dend):
        # The saved states are left out: they depend on the inputs and the start state.
        return residuals.inputs, residuals.state, dy, dend

    _, changes = jax.jvp(gradients, arguments(*primals), arguments(*tangents))
    return _gradients(options, *primals), changes


_gradients = jax.custom_jvp(dispatch.backward, nondiff_argnums=(0,))
_gradients.defjvp(_gradients_jvp)


def _saving_jvp(options, primals, tangents):
    """Differentiates y and the last state through "chunked"."""
    y, end, residuals = _saving(options, *primals)
    inputs, state, owners = primals
    inputs_change, state_change, owners_change = tangents

    def run(inputs, state):
        return chunked.forward(inputs, state, owners, chunk=options.chunk)

    _, (y_change, end_change) = jax.jvp(
        run, (inputs, state), (inputs_change, state_change)
    )
    # The residuals hold the inputs themselves. The saved states are never differentiated.
    constant = dispatch.zeros_like(jax.typeof(residuals.starts))
    changes = dispatch.Residuals(
        inputs_change, state_change, constant, owners_change, residuals.platform
    )
    return (y, end, residuals), (y_change, end_change, changes)


_saving = jax.custom_jvp(dispatch.forward_saving, nondiff_argnums=(0,))
_saving.defjvp(_saving_jvp)


def _forward(options, inputs, state, owners):
    y, end, residuals = _saving(options, inputs, state, owners)
    # Saved with all channels on one axis. XLA for TPU would otherwise save an array with heads of
    # 64 with its tokens in the lanes, which takes a copy.
    flat = y.reshape(*y.shape[:2], y.shape[2] * y.shape[3])
    y = checkpoint_name(flat, RESULTS).reshape(y.shape)
    end = checkpoint_name(end, RESULTS)
    starts = checkpoint_name(residuals.starts, RESULTS)
    # Save the caller's arrays: those that `_saving` returns would be saved in addition.
    kept = dataclasses.replace(residuals, inputs=inputs, state=state, starts=starts)
    return (y, end), kept


def _backward(options, residuals, cotangents):
    dy, dend = cotangents
    # Owners are integers, which have no gradient.
    return *_gradients(options, residuals, dy, dend), None


_wkv7 = jax.custom_vjp(dispatch.forward, nondiff_argnums=(0,))
_wkv7.defvjp(_forward, _backward)
_call_wkv7 = compiled_when_eager(_wkv7, static_argnums=0)


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


def _check_arrays(inputs: WKVInputs, state: State, packed: bool) -> None:
    """Raises unless shapes and dtypes of the seven arrays agree."""
    r = inputs.r
    v = inputs.v
    for name, x in inputs._asdict().items():
        if x.ndim != 4:
            raise ValueError(
                f"wkv7: `{name}` must have shape [B T H N]; got {x.shape}."
            )
        # Only v may have a different number of channels.
        shape = (*r.shape[:3], v.shape[3]) if name == "v" else r.shape
        if x.shape != shape:
            raise ValueError(
                f"wkv7: `{name}` must have shape {shape} to match `r`; got {x.shape}."
            )
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"wkv7: `{name}` must be floating point; got {x.dtype}.")
    batch, _, heads, keys = r.shape
    shape = (batch, heads, v.shape[3], keys)
    rows = state.shape[0] if state.ndim else 0
    is_multiple = rows >= batch and not rows % max(batch, 1)
    if packed and (state.shape[1:] != shape[1:] or not is_multiple):
        raise ValueError(
            "wkv7: `state` must have shape [S H Nv Nk] with `segment_ids`, where S is a multiple "
            f"of the {batch} rows and [H Nv Nk] is {shape[1:]}; got {state.shape}."
        )
    if not packed and state.shape != shape:
        raise ValueError(
            f"wkv7: `state` must have shape [B H Nv Nk] = {shape}; got {state.shape}."
        )
    # A bfloat16 state would round away small writes to large entries.
    if state.dtype not in (jnp.float32, jnp.float64):
        raise TypeError(f"wkv7: `state` must be float32; got {state.dtype}.")
    for name, x in inputs._replace(log_w=state)._asdict().items():
        if x.dtype == jnp.float64 != state.dtype:
            raise TypeError(
                f"wkv7: `state` must be float64 where `{name}` is; got {state.dtype}."
            )


def _largest_exponent(log_w: Array, half: int) -> float | None:
    """Computes the largest sum of |log_w| over half a chunk; None if it is traced or remote."""
    if isinstance(log_w, Tracer) or not log_w.is_fully_addressable:
        return None
    # On the host: inside `jit`, JAX would trace even the sums of a constant.
    magnitude = abs(jax.device_get(log_w).astype("float32"))
    batch, tokens, *channels = magnitude.shape
    # Tokens from here on do not fill half a chunk.
    border = tokens - tokens % half
    halves = magnitude[:, :border].reshape(batch, border // half, half, *channels)
    return max(
        float(halves.sum(axis=2).max(initial=0)),
        float(magnitude[:, border:].sum(axis=1).max(initial=0)),
    )


def _check_chunks(
    inputs: WKVInputs, implementation: str | None, chunk: int | None
) -> str | None:
    """Raises if the factors of a chunk are known to be infinite.

    Returns:
        The implementation. None becomes "scan", which has no such factors, if they are infinite.
    """
    if implementation == "scan":
        return implementation
    if inputs.v.dtype == jnp.float16 and chunk not in (None, FLOAT16_CHUNK):
        raise ValueError(
            f"wkv7: `chunk` must be None or {FLOAT16_CHUNK} for float16 tokens; got {chunk}."
        )
    length = chunk or (tiles.XLA if implementation == "chunked" else max(CHUNKS))
    exponent = _largest_exponent(inputs.log_w, length // 2)
    if exponent is None or not exponent > LARGEST_EXPONENT:
        return implementation
    if implementation is None:
        return "scan"
    raise ValueError(
        f"wkv7: the absolute values of `log_w` must sum to at most {LARGEST_EXPONENT:g} over "
        f"{length // 2} tokens for {implementation!r}; got {exponent:.4g}. 'scan' takes any decay."
    )


def _as_array(value: Any, name: str) -> Array:
    """Converts an argument to a JAX array."""
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
    """Raises unless each row has one integer; concrete ones must lie between 0 and T."""
    if lengths.shape != (batch,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(
            f"wkv7: `lengths` must be {batch} integers, one per row; "
            f"got shape {lengths.shape} of {lengths.dtype}."
        )
    if isinstance(lengths, Tracer) or not lengths.is_fully_addressable:
        return
    wrong = [length for length in lengths.tolist() if not 0 <= length <= tokens]
    if wrong:
        raise ValueError(
            f"wkv7: `lengths` must lie between 0 and {tokens}; got {wrong[0]}."
        )


def _check_segment_ids(ids: Array, batch: int, tokens: int, sequences: int) -> None:
    """Raises unless each token has one integer; concrete ones must be in range and sorted."""
    if ids.shape != (batch, tokens) or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(
            f"wkv7: `segment_ids` must be integers of shape {(batch, tokens)}, one per token; "
            f"got shape {ids.shape} of {ids.dtype}."
        )
    if isinstance(ids, Tracer) or not ids.is_fully_addressable or not ids.size:
        return
    values = jax.device_get(ids)
    low = values.min()
    high = values.max()
    if low < 0 or high >= sequences:
        raise ValueError(
            f"wkv7: `segment_ids` must lie between 0 and {sequences - 1}, since `state` has "
            f"{sequences} rows for each row of tokens; got {low if low < 0 else high}."
        )
    for row, steps in enumerate(values[:, 1:].astype("int64") - values[:, :-1]):
        if (steps < 0).any():
            raise ValueError(
                "wkv7: `segment_ids` must not decrease from one token to the next; "
                f"row {row} does."
            )


def _is_token(
    lengths: Int[Array, " B"], batch: int, tokens: int
) -> Bool[Array, "B T 1 1"]:
    """Tells which tokens come before their row's length."""
    _check_lengths(lengths, batch, tokens)
    # `int` is the dtype of `arange`, which depends on whether JAX has 64 bits.
    return (jnp.arange(tokens)[None] < lengths.astype(int)[:, None])[..., None, None]


def _select(is_token: Bool[Array, "B T 1 1"] | None, x: Array) -> Array:
    """Sets padding to zeros, so that it writes nothing and reads zeros.

    It selects instead of multiplying by a mask: padding and its gradient may be NaN.
    """
    return x if is_token is None else jnp.where(is_token, x, 0)


def wkv7(
    r: Float[Array, "B T H Nk"],
    log_w: Float[Array, "B T H Nk"],
    k: Float[Array, "B T H Nk"],
    v: Float[Array, "B T H Nv"],
    a: Float[Array, "B T H Nk"],
    b: Float[Array, "B T H Nk"],
    state: Float[Array, "S H Nv Nk"],
    *,
    implementation: str | None = None,
    lengths: Int[Array, " B"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    chunk: int | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "B T H Nv"], Float[Array, "S H Nv Nk"]]:
    """Computes what every token reads from the recurrent state, and the state after the last token.

    For each head, S <- S (diag(exp(log_w)) + a b^T) + v k^T and y = S r, with float32 states. All
    seven arrays have gradients, also through the returned state. Second and higher derivatives are
    those of "chunked"; forward mode is not defined. Key and value sizes may differ, and T may be
    any number, zero included.

    Args:
        r: receptance, which reads the state.
        log_w: natural logarithm of the decay per key channel, in (-0.6066, 0]; preferably float32.
            "scan" takes any other value as well. The other implementations need |log_w| to sum to
            at most 80 over half a chunk, anywhere in the row. If a concrete `log_w` exceeds that,
            None runs "scan" and a named implementation raises. A traced `log_w` is not checked and
            such a chunk gives NaN, so name "scan" if this can happen.
        k: key under which the value is written.
        v: value that is written.
        a: removal key, -kk in the model.
        b: removal key times in-context learning rate, kk * a in the model.
        state: float32 (float64 for all under x64); rows are value channels, columns key channels.
            S is B, or with `segment_ids` a multiple of it.
        implementation: one of `IMPLEMENTATIONS`, which then runs or raises; None picks the best for
            the target device, the sizes and the dtype. The target is the abstract mesh's device if
            one is set, else the default device. On other platforms the same program runs in plain
            JAX.
        lengths: the number of real tokens in each row; padding is on the right. Traced lengths are
            not checked but clipped to 0 and T.
        segment_ids: the sequence of each token, where K sequences share a row, one after another.
            Sequences are numbered from 0 in each row. Sequence k of row b starts from row b K + k
            of `state` and ends in that row of the result; one without tokens ends as it starts.
            Each gives the same result as in a row of its own. Traced ids are not checked: they are
            clipped to the valid range, and one that decreases counts as the largest before it.
        chunk: tokens between two states saved for the backward pass and, except in "scan", rows of
            a matrix product: 16, 32 or 64; None picks the best for the implementation. GPU kernels
            take 16 or 32; float16 tokens take 16.
        interpret: run Pallas kernels in Pallas's interpreter on any device; slow, for tests.

    Returns:
        y in v's dtype, and the final states in the state's dtype and shape.

    Raises:
        ValueError: shapes do not match, lengths, ids or the decay are out of range, or
            `implementation` or `chunk` is unknown.
        TypeError: the state is not float32, inputs are not floating point, or the call is
            differentiated in forward mode.
        NotImplementedError: the named implementation does not support the target device, head
            sizes, chunk or dtypes; or the compiler would partition a GPU kernel (see
            `jax.shard_map`).
        ImportError: "triton" was named and the package triton is missing.
        RuntimeError: "triton" was named with an untested version of triton or jax.

    Source: BlinkDL/RWKV-LM@524481d RWKV-v7/rwkv_v7_numpy.py:39-40.
    """
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
    _check_arrays(inputs, state, packed=segment_ids is not None)
    batch, tokens = inputs.r.shape[:2]
    is_token = None
    if lengths is not None:
        lengths = _as_array(lengths, "lengths")
        is_token = _is_token(lengths, batch, tokens)
        inputs = jax.tree.map(functools.partial(_select, is_token), inputs)
    ids = None
    sequences = state.shape[0] // max(batch, 1)
    if segment_ids is not None:
        ids = _as_array(segment_ids, "segment_ids")
        _check_segment_ids(ids, batch, tokens, sequences)
    # Implementations need not handle an empty grid or scan.
    if not inputs.r.size or not inputs.v.size:
        return jnp.zeros_like(inputs.v), state
    places = None
    if ids is not None:
        chunk = chunk or dispatch.packed_chunk(implementation, inputs, state)
        places = packed_rows.find_places(ids, lengths, sequences=sequences, chunk=chunk)
        inputs = packed_rows.move_inputs(inputs, places)
    implementation = _check_chunks(inputs, implementation, chunk)
    options = dispatch.Options(implementation, chunk, interpret)
    dispatch.check(options, inputs, state, packed=places is not None)
    state = platforms.varying_as(state, inputs)
    with explain_forward_mode():
        y, end = _call_wkv7(options, inputs, state, places and places.owners)
    if places is not None:
        y = packed_rows.move(y, places.slots)
    # The padding's y is zero already. The select also stops its gradient.
    return _select(is_token, y), end
