"""Linear attention whose feature map is the second-order Taylor expansion of the exponential.

A key's weight for a query is 1 + s + s^2 / 2 with s = q . k / sqrt(d). This is an inner product of
two feature vectors, so the sum over all earlier tokens fits into a state of fixed size.

Source: arXiv 2402.18668, section 4.1. The features here are the symmetric half of the published
ones, with the same inner products. The published code adds 1e-12 to the normaliser. Weights are at
least 1/2, so nothing is added here.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.eager import compiled_when_eager
from rwkv7_jax.array_types import Heads, Lengths
from rwkv7_jax.checks import as_array, check_count, prefix_errors
from rwkv7_jax.model.casts import widened
from rwkv7_jax.model.inputs import safe_lengths

# Full precision for float32 operands, which GPUs and TPUs would round by default.
_einsum = functools.partial(jnp.einsum, precision="highest")


def feature_count(size: int) -> int:
    """Computes the number of features (M) of vectors of `size` channels."""
    return 1 + size + size * (size + 1) // 2


def features(x: Float[Array, "... Nk"]) -> Float[Array, "... M"]:
    """Computes phi(x) with phi(q) . phi(k) = 1 + s + s^2 / 2, s = q . k / sqrt(d).

    The features are 1, the d = Nk channels, and the products of all pairs of channels: 1 + d +
    d (d + 1) / 2 in all. The result is float32, or float64 for float64 vectors.
    """
    size = x.shape[-1]
    x = widened(x) / size**0.25
    parts = [jnp.ones_like(x[..., :1]), x]
    for i in range(size):
        # x_i x_j with j > i stands for two equal entries of x x^T, which cancel the 1/2. Slices
        # instead of a gather, whose gradient is a scatter, which is slow on CPUs.
        square = x[..., i : i + 1] * x[..., i : i + 1] * math.sqrt(0.5)
        parts += [square, x[..., i : i + 1] * x[..., i + 1 :]]
    return jnp.concatenate(parts, axis=-1)


def pair_weights(
    q: Float[Array, "B T H Nk"], k: Float[Array, "B S H Nk"]
) -> Float[Array, "B H T S"]:
    """Computes 1 + s + s^2 / 2 for all pairs, without the features."""
    s = _einsum("bthd,bshd->bhts", q, k) / math.sqrt(q.shape[-1])
    return 1 + s + 0.5 * jnp.square(s)


def quadratic_attention(
    q: Float[Array, "B T H Nk"],
    k: Float[Array, "B T H Nk"],
    v: Float[Array, "B T H Nv"],
) -> Float[Array, "B T H Nv"]:
    """Computes the definition: for each token, the weighted mean of the values up to its own.

    Time and memory are quadratic in T: this is the reference for `linear_attention`. It checks
    nothing and computes in the dtype of the arguments.

    Args:
        q: the queries.
        k: the keys.
        v: the values.
    """
    weights = jnp.tril(pair_weights(q, k))
    weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return _einsum("bhts,bshn->bthn", weights, v)


def linear_attention(
    q: Float[Array, "B T H Nk"],
    k: Float[Array, "B T H Nk"],
    v: Float[Array, "B T H Nv"],
    state: Float[Array, "B H M Nv+1"],
    *,
    chunk: int = 64,
    lengths: Lengths | None = None,
) -> tuple[Float[Array, "B T H Nv"], Float[Array, "B H M Nv+1"]]:
    """Attends to all tokens up to the current one, including those in the state.

    It serves sequences, pieces of sequences and single tokens. All arithmetic is in the state's
    dtype; the result has the dtype of `v`.

    Args:
        q: the queries; T may be 0.
        k: the keys.
        v: the values.
        state: sums of phi(k) (v, 1) over the past, float32 or float64; zeros at the start. The last
            value channel, of ones, is the normaliser.
        chunk: tokens of a chunk; it affects only time and memory.
        lengths: the number of real tokens of each row; padding on the right does not change the
            state, and its outputs are meaningless.

    Raises:
        TypeError: a state that is neither float32 nor float64, or an argument of the wrong type.
        ValueError: shapes that do not match each other, or lengths out of range.
    """
    with prefix_errors("linear_attention"):
        check_count(chunk, 1, "`chunk`")
        q = as_array(q, "`q`")
        k = as_array(k, "`k`")
        v = as_array(v, "`v`")
        state = as_array(state, "`state`")
        _check_shapes(q, k, v, state)
        if lengths is not None:
            lengths = safe_lengths(lengths, (q.shape[0], q.shape[1]))
    tokens = q.shape[1]
    dtype = v.dtype
    q = q.astype(state.dtype)
    k = k.astype(state.dtype)
    v = v.astype(state.dtype)
    v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
    if lengths is not None:
        counts = jnp.arange(tokens, dtype=jnp.int32)[None] < lengths[:, None]
        counts = counts[:, :, None, None]
        # Zeroes the values and ones too, because phi(0) is not 0.
        k = jnp.where(counts, k, 0)
        v = jnp.where(counts, v, 0)
    size = max(1, min(chunk, tokens))
    pieces = [cut(x, size) for x in (q, k, v)]
    state, y = _attend_to_chunks(state, *pieces)
    return join(y, tokens).astype(dtype), state


# Recomputed in the backward pass: the features of all chunks would take most of the memory.
@jax.checkpoint
def _step(state: Array, piece: tuple[Array, Array, Array]) -> tuple[Array, Array]:
    """Attends inside a chunk by pair weights, and to the past through features."""
    q, k, v = piece
    inside = _einsum("bhts,bshn->bthn", jnp.tril(pair_weights(q, k)), v)
    past = _einsum("bthf,bhfn->bthn", features(q), state)
    sums = inside + past
    total = sums[..., -1:]
    # Zero only for padding in a row that has not read any token.
    y = sums[..., :-1] / jnp.where(total == 0, 1, total)
    return state + _einsum("bthf,bthn->bhfn", features(k), v), y


@compiled_when_eager
def _attend_to_chunks(
    state: Array, q: Array, k: Array, v: Array
) -> tuple[Array, Array]:
    """Attends chunk by chunk, and updates the state after each."""
    return jax.lax.scan(_step, state, (q, k, v))


def cut(x: Heads, size: int) -> Float[Array, "P B C H N"]:
    """Splits tokens into pieces of `size`; the last one is padded with zeros."""
    batch, tokens, *channels = x.shape
    x = jnp.pad(x, ((0, 0), (0, -tokens % size), (0, 0), (0, 0)))
    count = x.shape[1] // size
    return jnp.moveaxis(x.reshape(batch, count, size, *channels), 1, 0)


def join(x: Float[Array, "P B C H N"], tokens: int) -> Heads:
    """Inverts `cut` for this number of tokens."""
    count, batch, size, *channels = x.shape
    x = jnp.moveaxis(x, 0, 1).reshape(batch, count * size, *channels)
    return x[:, :tokens]


def _check_shapes(q: Array, k: Array, v: Array, state: Array) -> None:
    for name, value in (("q", q), ("k", k), ("v", v), ("state", state)):
        if value.ndim != 4:
            raise ValueError(
                f"`{name}` must have 4 axes; got shape {tuple(value.shape)}."
            )
    batch, _, heads, size = q.shape
    wanted = {
        "k": (k, tuple(q.shape)),
        "v": (v, (*q.shape[:3], v.shape[3])),
        "state": (state, (batch, heads, feature_count(size), v.shape[3] + 1)),
    }
    for name, (value, shape) in wanted.items():
        if tuple(value.shape) != shape:
            raise ValueError(
                f"`{name}` must have shape {shape}, because `q` has {tuple(q.shape)}; "
                f"got {tuple(value.shape)}."
            )
    if state.dtype not in (jnp.float32, jnp.float64):
        raise TypeError(f"`state` must be float32 or float64; got {state.dtype}.")
