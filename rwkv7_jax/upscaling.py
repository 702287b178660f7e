"""States read through kernel features: a memory of M > N columns per head. Level 3.

The additive forms leave the model what it was: y = S r + S~ phi(r), and S~ = 0 changes nothing, bit
for bit. The form of the paper, which replaces w, k, a, v and r by features, stays as "replace".
Source: arXiv 2504.05097, section 3.2 (the kernel method); the additive forms are this project's.
"""

import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import pallas_kernels

from .parallel import by_rows
from .shapes import Heads, Lengths
from .state import Features, Upscaled

# Directions are x / max(|x|, this).
_SHORTEST = 1e-6

Parts = Mapping[str, Array]


def _apply(maps: Float[Array, "B H O I"], x: Float[Array, "b T H I"]) -> Float[Array, "b T H O"]:
    """Each head's matrix times its vectors; one matrix may serve all rows."""
    if maps.shape[0] == 1:
        return jnp.einsum("bthi,hoi->btho", x, maps[0], precision="highest")
    return jnp.einsum("bthi,bhoi->btho", x, maps, precision="highest")


def directions(x: Float[Array, "... N"]) -> Float[Array, "... N"]:
    """x / |x| in float32."""
    x = x.astype(jnp.float32)
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, _SHORTEST**2))


def evaluate(features: Features, x: Heads) -> Float[Array, "B T H M"]:
    """phi(x) of one layer, float32: Gaussians around landmarks, or cosines; centred and mapped.

    Source: arXiv 2504.05097, section 3.2; Rahimi and Recht 2007 for the cosines.
    """
    x = x.astype(jnp.float32) if features.kind == "gaussian_raw" else directions(x)
    inner = _apply(features.landmarks, x)
    widths = features.widths[:, None]
    if features.kind == "fourier":
        phi = math.sqrt(2 / widths.shape[-1]) * jnp.cos(inner + widths)
    else:
        lengths = jnp.sum(jnp.square(features.landmarks), axis=-1)[:, None]
        square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
        phi = jnp.exp(-widths * (square + lengths - 2 * inner))
    phi = phi - features.mean[:, None]
    return phi if features.map is None else _apply(features.map, phi)


def _unit(x: Float[Array, "... M"]) -> Float[Array, "... M"]:
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))


def _per_head(parts: Parts, name: str) -> Float[Array, "B T H 1"]:
    return jnp.mean(parts[name].astype(jnp.float32), axis=-1, keepdims=True)


def _features_inputs(upscaled: Upscaled, parts: Parts) -> dict[str, Array]:
    """The inputs of the WKV op whose state is the memory, under "decay" and "delta"."""
    r = evaluate(upscaled.features, parts["r"])
    key = _unit(evaluate(upscaled.features, -parts["a"]))
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


def _replaced_inputs(upscaled: Upscaled, parts: Parts) -> dict[str, Array]:
    """The paper's inputs: every vector of the recurrence as features of itself."""
    rate, w = parts["icl_rate"], jnp.exp(parts["log_w"].astype(jnp.float32))
    r, k, v, rate, w = (
        evaluate(upscaled.features, x) for x in (parts["r"], parts["k"], parts["v"], rate, w)
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

    return by_rows(op, tuple(inputs), state, lengths)


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
        y, memory = run(_replaced_inputs(upscaled, parts), upscaled.memory)
        return _apply(upscaled.readout, y).astype(parts["r"].dtype), wkv, memory
    y, wkv = run(parts, wkv)
    if upscaled.dynamics == "static":
        read, memory = _apply(upscaled.memory, evaluate(upscaled.features, parts["r"])), None
    else:
        read, memory = run(_features_inputs(upscaled, parts), upscaled.memory)
    return y + read.astype(y.dtype), wkv, memory


def start_reads(parts: Parts, *, implementation: str | None = None) -> Float[Array, "B T H Nk"]:
    """psi, with which a WKV start state is read at every token: y_t = S_0 psi_t + what is not S_0.

    psi_t is the product of all transitions up to t, times r_t: what the op reads from the unit
    matrix when nothing is written.
    """
    rows, _, heads, size = parts["r"].shape
    start = jnp.broadcast_to(jnp.eye(size), (rows, heads, size, size))
    nothing = jnp.zeros_like(parts["r"])
    inputs = (parts["r"], parts["log_w"], nothing, nothing, parts["a"], parts["b"])
    return _wkv7(inputs, start, implementation=implementation)[0]


def memory_reads(
    upscaled: Upscaled, parts: Parts, *, implementation: str | None = None
) -> Float[Array, "B T H M"]:
    """psi of the upscaled memory: phi(r) where it is static, faded and erased elsewhere."""
    if upscaled.dynamics == "static":
        return evaluate(upscaled.features, parts["r"])
    make = _features_inputs if upscaled.readout is None else _replaced_inputs
    return start_reads(make(upscaled, parts), implementation=implementation)


def covariance(
    psi: Float[Array, "B T H M"], weights: Float[Array, "B T"]
) -> Float[Array, "1 H M M"]:
    """E[psi psi^T] per head over tokens weighted by `weights`, not centred."""
    psi = psi.astype(jnp.float32)
    total = jnp.einsum("bthm,bthn,bt->hmn", psi, psi, weights, precision="highest")
    return (total / jnp.maximum(jnp.sum(weights), 1e-9))[None]


def removal_excess(upscaled: Upscaled, parts: Parts) -> Float[Array, ""]:
    """How far the removal of "replace" exceeds what one step may remove: above 1 it can diverge.

    One step's matrix diag(phi(w)) - phi(k) (phi(a) phi(k))^T has its eigenvalues inside the unit
    circle if sum_m phi_m(a) phi_m(k)^2 <= 1 + min_m phi_m(w).
    """
    inputs = _replaced_inputs(upscaled, parts)
    removed = -jnp.sum(inputs["a"] * inputs["b"], axis=-1)
    return jnp.max(removed / (1 + jnp.min(jnp.exp(inputs["log_w"]), axis=-1)))


def empty(features: Features, *, dynamics: str = "static", seed: int = 0) -> Upscaled:
    """A memory of zeros, batch 1, read through `features` [L 1 H M N]."""
    layers, _, heads, width, size = features.landmarks.shape
    lead, literal = (layers, 1, heads), dynamics.startswith("replace")
    key = jax.random.key(seed)
    readout = jax.random.normal(key, (*lead, size, width)) / math.sqrt(width) if literal else None
    return Upscaled(
        memory=jnp.zeros((*lead, width if literal else size, width)),
        write=jnp.zeros(lead),
        features=features,
        readout=readout,
        dynamics=dynamics,
    )


def fold(upscaled: Upscaled) -> Upscaled:
    """The same reads without the map: it is multiplied into the memory.

    Raises:
        ValueError: a memory that changes in context, where keys need the map themselves.
    """
    if upscaled.features.map is None:
        return upscaled
    if upscaled.dynamics not in ("static", "decay") or np.any(upscaled.write):
        raise ValueError(
            "fold: `upscaled` must be static, or decay without writes; "
            f"got {upscaled.dynamics}, whose keys are mapped features."
        )
    memory = jnp.matmul(upscaled.memory, upscaled.features.map, precision="highest")
    return upscaled.replace(memory=memory, features=upscaled.features.replace(map=None))
