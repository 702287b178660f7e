"""Kernel features fitted to the vectors that a model reads with."""

import functools
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rwkv7_jax.array_types import Params, Tokens
from rwkv7_jax.checks import check_tokens
from rwkv7_jax.model.kernel_features import kernel_features, unit_vectors
from rwkv7_jax.model.recurrence import Parts, _paper_inputs
from rwkv7_jax.model.rwkv7 import RECURRENCE, RWKV7
from rwkv7_jax.model.state import DYNAMICS, KINDS, Features, RWKV7State, Upscaled, init_state
from rwkv7_jax.optim.whitening import whitening


def stability_ratio(upscaled: Upscaled, parts: Parts) -> Float[Array, ""]:
    """How far the removal of "replace" exceeds what one step may remove: above 1 it can diverge.

    One step's matrix diag(phi(w)) - phi(k) (phi(a) phi(k))^T has its eigenvalues inside the unit
    circle if sum_m phi_m(a) phi_m(k)^2 <= 1 + min_m phi_m(w).
    """
    inputs = _paper_inputs(upscaled, parts)
    removed = -jnp.sum(inputs["a"] * inputs["b"], axis=-1)
    return jnp.max(removed / (1 + jnp.min(jnp.exp(inputs["log_w"]), axis=-1)))


def empty_memory(features: Features, *, dynamics: str = "static", seed: int = 0) -> Upscaled:
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


def fold_feature_map(upscaled: Upscaled) -> Upscaled:
    """The same reads without the map: it is multiplied into the memory.

    Raises:
        ValueError: a memory that changes in context, where keys need the map themselves.
    """
    if upscaled.features.map is None:
        return upscaled
    if upscaled.dynamics not in ("static", "decay") or np.any(upscaled.write):
        raise ValueError(
            "fold_feature_map: `upscaled` must be static, or decay without writes; "
            f"got {upscaled.dynamics}, whose keys are mapped features."
        )
    memory = jnp.matmul(upscaled.memory, upscaled.features.map, precision="highest")
    return upscaled.replace(memory=memory, features=upscaled.features.replace(map=None))


LANDMARKS = ("random", "kmeans")

PREPARATIONS = ("none", "centre", "whiten")

# Distinct read vectors of a head that are looked at, and distances that are measured.
_MOST, _PAIRS = 4096, 512


def _kmeans(points: np.ndarray, centres: np.ndarray, rounds: int = 8) -> np.ndarray:
    """Lloyd's algorithm; a centre that nobody is nearest to stays where it was."""
    for _ in range(rounds):
        distances = np.sum(centres**2, 1) - 2 * points @ centres.T
        nearest = distances.argmin(1)
        sums = np.zeros_like(centres)
        np.add.at(sums, nearest, points)
        counts = np.bincount(nearest, minlength=len(centres))[:, None]
        centres = np.where(counts > 0, sums / np.maximum(counts, 1), centres)
    return centres


def _place(points: np.ndarray, count: int, rng: np.random.Generator, method: str) -> np.ndarray:
    """`count` landmarks among the distinct `points`; some noise on those that are used twice."""
    points = np.unique(np.round(points, 4), axis=0)
    points = points[rng.permutation(len(points))[:_MOST]]
    centres = points[rng.permutation(len(points))[:count]]
    if len(centres) < count:
        more = points[rng.integers(0, len(points), count - len(centres))]
        centres = np.concatenate([centres, more + 0.05 * rng.normal(size=more.shape)])
    return _kmeans(points, centres) if method == "kmeans" else centres


def _median_width(points: np.ndarray, centres: np.ndarray, rng: np.random.Generator) -> float:
    """1 / the median squared distance between points and centres."""
    one = points[rng.integers(0, len(points), _PAIRS)]
    two = centres[rng.integers(0, len(centres), 64)]
    return 1.0 / max(float(np.median(np.sum((one[:, None] - two) ** 2, -1))), 1e-6)


def _head_map(points, size, rng, *, kind, landmarks, widths):
    """Landmarks and widths of one head (or frequencies and phases)."""
    centres = _place(points, size, rng, landmarks)
    gamma = _median_width(points, centres, rng)
    gammas = gamma * np.asarray(widths)[np.arange(size) % len(widths)]
    if kind != "fourier":
        return centres, gammas
    frequencies = rng.normal(size=centres.shape) * np.sqrt(2 * gammas)[:, None]
    return frequencies, rng.uniform(0, 2 * np.pi, size)


def calibrate(
    reads: Float[Array | np.ndarray, "L R H N"],
    *,
    size: int,
    kind: str = "gaussian",
    landmarks: str = "random",
    widths: tuple[float, ...] = (1.0, 4.0, 16.0),
    prepare: str = "whiten",
    damping: float = 1e-3,
    seed: int = 0,
) -> Features:
    """Features fitted to the read vectors r of calibration text.

    Args:
        reads: R vectors of each layer and head, finite.
        size: features of a head (M).
        kind: of `KINDS`.
        landmarks: "random" takes read vectors, "kmeans" their centres.
        widths: factors on 1 / the median squared distance, dealt out in turn.
        prepare: "none", "centre" (and scaled to a mean variance of 1) or "whiten" (to the unit
            matrix as covariance).
        damping: added to the covariance, as a share of its mean eigenvalue.
        seed: of the choice.

    Raises:
        ValueError: an unknown choice, or a size below 1.
    """
    for name, value, known in (
        ("kind", kind, KINDS),
        ("landmarks", landmarks, LANDMARKS),
        ("prepare", prepare, PREPARATIONS),
    ):
        if value not in known:
            raise ValueError(
                f"calibrate: `{name}` must be one of {', '.join(known)}; got {value!r}."
            )
    if size < 1 or not widths or min(widths) <= 0:
        raise ValueError(
            f"calibrate: `size` must be at least 1 and `widths` positive; got {size}, {widths}."
        )
    reads, rng = np.asarray(reads, np.float32), np.random.default_rng(seed)
    seen = reads if kind == "gaussian_raw" else np.asarray(unit_vectors(jnp.asarray(reads)))
    choices = {"kind": kind, "landmarks": landmarks, "widths": widths}
    pairs = [_head_map(x, size, rng, **choices) for layer in seen for x in layer.swapaxes(0, 1)]
    lead = (reads.shape[0], 1, reads.shape[2])
    points, gammas = (
        jnp.asarray(np.stack(part).reshape(*lead, *part[0].shape), jnp.float32)
        for part in zip(*pairs, strict=True)
    )
    plain = Features(
        landmarks=points, widths=gammas, mean=jnp.zeros(gammas.shape), map=None, kind=kind
    )
    return plain if prepare == "none" else _prepared(plain, reads, prepare, damping)


def _prepared(features: Features, reads: np.ndarray, prepare: str, damping: float) -> Features:
    """`features` centred on `reads`, and whitened there if that is asked for."""

    @jax.jit
    def moments(one: Features, x):
        phi = kernel_features(one, x[None])[0]
        mean = jnp.mean(phi, axis=0, keepdims=True)
        centred = phi - mean
        products = jnp.einsum("rhm,rhn->hmn", centred, centred, precision="highest")
        return mean, products[None] / len(x)

    layers = [
        moments(jax.tree.map(lambda leaf, i=i: leaf[i], features), x) for i, x in enumerate(reads)
    ]
    mean, products = map(jnp.stack, zip(*layers, strict=True))
    scale = jnp.trace(products, axis1=-2, axis2=-1)[..., None, None] / mean.shape[-1]
    scale = jnp.maximum(scale, 1e-20)
    unit = jnp.broadcast_to(jnp.eye(mean.shape[-1]), products.shape)
    turn = whitening(products, damping) if prepare == "whiten" else unit
    return features.replace(mean=mean, map=turn / jnp.sqrt(scale))


@functools.partial(jax.jit, static_argnums=0)
def _parts(model: RWKV7, params: Params, tokens: Array) -> dict[str, Array]:
    start = init_state(model.config, tokens.shape[0])
    *_, trace = model.apply({"params": params}, tokens, start, method="trace")
    return {name: trace[name] for name in RECURRENCE}


def _reads(model: RWKV7, params: Params, tokens: np.ndarray, keys: bool) -> np.ndarray:
    """The read vectors [L R H N] of some text, and its removal keys where those are read too."""
    pieces = []
    for first in range(0, len(tokens), 8):
        parts = _parts(model, params, tokens[first : first + 8])
        pieces += [np.asarray(parts["r"], np.float32)]
        pieces += [-np.asarray(parts["a"], np.float32)] if keys else []
    return np.concatenate([p.reshape(len(p), -1, *p.shape[3:]) for p in pieces], axis=1)


def upscale(
    model: RWKV7,
    params: Params,
    tokens: Tokens,
    *,
    size: int = 0,
    dynamics: str = "static",
    kind: str = "",
    landmarks: str = "random",
    widths: tuple[float, ...] = (1.0, 4.0, 16.0),
    prepare: str = "",
    seed: int = 0,
) -> RWKV7State:
    """A start state, batch 1, with an empty memory read through features fitted to some text.

    With empty memory the model is what it was, bit for bit, unless dynamics "replace" throw its own
    state away (the paper's form, kept for comparison).

    Args:
        model: the shell around `params`.
        params: all weights.
        tokens: text of the kind that will be tuned on; some thousand tokens.
        size: features of a head (M); 0 takes four times the head size.
        dynamics: of `state.DYNAMICS`. "static" never fades and is shared by all sequences; "decay"
            fades with the mean decay; "delta" is erased where the context writes.
        kind: of `state.KINDS`; "" takes "gaussian", or "gaussian_raw" under "replace".
        landmarks: "random" or "kmeans".
        widths: factors on 1 / the median squared distance, dealt out to the landmarks in turn.
        prepare: "none", "centre" or "whiten"; "" takes "whiten", or "none" under "replace".
        seed: of the landmarks.

    Raises:
        ValueError: an unknown choice, or ids outside the vocabulary.
    """
    if dynamics not in DYNAMICS:
        raise ValueError(
            f"upscale: `dynamics` must be one of {', '.join(DYNAMICS)}; got {dynamics!r}."
        )
    config, literal = model.config, dynamics.startswith("replace")
    tokens = np.asarray(tokens)
    check_tokens(tokens, config.vocab_size, caller="upscale")
    features = calibrate(
        _reads(model, params, tokens, keys=dynamics == "delta"),
        size=size or 4 * config.head_size,
        kind=kind or ("gaussian_raw" if literal else "gaussian"),
        landmarks=landmarks,
        widths=widths,
        prepare=prepare or ("none" if literal else "whiten"),
        seed=seed,
    )
    upscaled = empty_memory(features, dynamics=dynamics, seed=seed)
    if literal:
        _warn_of_growth(upscaled, _parts(model, params, tokens[:8]))
    return init_state(config).replace(upscaled=upscaled)


def _warn_of_growth(upscaled: Upscaled, parts: dict[str, Array]) -> None:
    excess = float(jnp.max(jax.lax.map(lambda layer: stability_ratio(*layer), (upscaled, parts))))
    if excess > 1:
        warnings.warn(
            f"upscale: `dynamics` {upscaled.dynamics} removes up to {excess:.3g} times what keeps "
            "one step from growing the state; it may diverge.",
            stacklevel=3,
        )
