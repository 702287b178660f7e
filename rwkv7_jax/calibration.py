"""Kernel features fitted to the vectors that a model reads with. Level 4."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .optim.whitening import whitening
from .state import KINDS, Features
from .upscaling import directions, evaluate

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
        prepare: "none", "centre" or "whiten" (also makes the features' covariance the unit matrix).
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
    seen = reads if kind == "gaussian_raw" else np.asarray(directions(jnp.asarray(reads)))
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
        phi = evaluate(one, x[None])[0]
        mean = jnp.mean(phi, axis=0, keepdims=True)
        centred = phi - mean
        products = jnp.einsum("rhm,rhn->hmn", centred, centred, precision="highest")
        return mean, products[None] / len(x)

    layers = [
        moments(jax.tree.map(lambda leaf, i=i: leaf[i], features), x) for i, x in enumerate(reads)
    ]
    mean, products = map(jnp.stack, zip(*layers, strict=True))
    if prepare == "centre":
        return features.replace(mean=mean)
    scale = jnp.trace(products, axis1=-2, axis2=-1)[..., None, None] / mean.shape[-1]
    scale = jnp.maximum(scale, 1e-20)
    return features.replace(mean=mean, map=whitening(products / scale, damping) / jnp.sqrt(scale))
