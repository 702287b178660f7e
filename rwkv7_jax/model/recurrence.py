"""States read through kernel features: a memory of M > N columns per head.

The additive forms leave the model what it was: y = S r + S~ phi(r), and S~ = 0 changes nothing, bit
for bit. The form of the paper, which replaces w, k, a, v and r by features, stays as "replace".
Source: arXiv 2504.05097, section 3.2 (the kernel method); the additive forms are this project's.
"""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

import pallas_kernels
from rwkv7_jax.array_types import Heads, Lengths
from rwkv7_jax.model.kernel_features import _apply, _unit, kernel_features
from rwkv7_jax.model.state import Upscaled
from rwkv7_jax.sharding import shard_map_batch

Parts = Mapping[str, Array]


def _per_head(parts: Parts, name: str) -> Float[Array, "B T H 1"]:
    return jnp.mean(parts[name].astype(jnp.float32), axis=-1, keepdims=True)


def _features_inputs(upscaled: Upscaled, parts: Parts) -> dict[str, Array]:
    """The inputs of the WKV op whose state is the memory, under "decay" and "delta"."""
    r = kernel_features(upscaled.features, parts["r"])
    key = _unit(kernel_features(upscaled.features, -parts["a"]))
    log_w = jnp.log(_per_head({"w": jnp.exp(parts["log_w"].astype(jnp.float32))}, "w"))
    rate = _per_head(parts, "icl_rate") if upscaled.dynamics == "delta" else 0.0
    return {
        "r": r,
        "log_w": jnp.broadcast_to(log_w, r.shape),
        "k": key * upscaled.write[:, None, :, None],
        "v": parts["v"].astype(jnp.float32),
        "a": -key,
        "b": key * rate,
    }


def _paper_inputs(upscaled: Upscaled, parts: Parts) -> dict[str, Array]:
    """The paper's inputs: every vector of the recurrence as features of itself."""
    rate, w = parts["icl_rate"], jnp.exp(parts["log_w"].astype(jnp.float32))
    r, k, v, rate, w = (
        kernel_features(upscaled.features, x) for x in (parts["r"], parts["k"], parts["v"], rate, w)
    )
    key = _unit(k) if upscaled.dynamics == "replace" else k
    return {
        "r": r,
        "log_w": jnp.log(jnp.maximum(w, 1e-30)),
        "k": k,
        "v": v,
        "a": -key,
        "b": key * rate,
    }


def _wkv7(inputs: Sequence[Heads], state, *, implementation: str | None, lengths=None):
    """The op, on each device with its rows."""

    def op(inputs, state, lengths):
        return pallas_kernels.wkv7(*inputs, state, implementation=implementation, lengths=lengths)

    return shard_map_batch(op, tuple(inputs), state, lengths)


def recurrence(
    parts: Parts,
    wkv: Float[Array, "B H Nv Nk"],
    upscaled: Upscaled | None,
    *,
    implementation: str | None,
    lengths: Lengths | None,
) -> tuple[Heads, Float[Array, "B H Nv Nk"], Float[Array, "..."] | None]:
    """What one layer reads, and its WKV state and upscaled memory behind the last token.

    Args:
        parts: the layer's r, log_w, k, v, a, b and icl_rate, [B T H N].
        wkv: the state before the first token.
        upscaled: the layer's, without its axis L; None reads the WKV state alone.
        implementation: of the WKV op.
        lengths: tokens of each row that count.
    """

    def run(inputs, state):
        ordered = [inputs[name] for name in ("r", "log_w", "k", "v", "a", "b")]
        return _wkv7(ordered, state, implementation=implementation, lengths=lengths)

    if upscaled is None:
        return *run(parts, wkv), None
    if upscaled.readout is not None:
        y, memory = run(_paper_inputs(upscaled, parts), upscaled.memory)
        return _apply(upscaled.readout, y).astype(parts["r"].dtype), wkv, memory
    y, wkv = run(parts, wkv)
    if upscaled.dynamics == "static":
        read, memory = _apply(upscaled.memory, kernel_features(upscaled.features, parts["r"])), None
    else:
        read, memory = run(_features_inputs(upscaled, parts), upscaled.memory)
    return y + read.astype(y.dtype), wkv, memory
