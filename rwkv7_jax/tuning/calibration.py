"""Kernel features fitted to a model's read vectors."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rwkv7_jax.checks import (
    as_array,
    check_choice,
    check_count,
    check_number,
    check_seed,
    prefix_errors,
)
from rwkv7_jax.model.kernel_features import (
    FEATURE_MAPS,
    Features,
    kernel_features,
    unit_vectors,
)
from rwkv7_jax.model.upscaled_memory import MEMORY_FORMS
from rwkv7_jax.optim.whitening import whitening

LANDMARKS = ("random", "kmeans")

PREPARATIONS = ("none", "centre", "whiten")

# Maximum number of distinct read vectors of a head for placing landmarks.
_MAX_POINTS = 4096

_KMEANS_ROUNDS = 8

# Points and landmarks whose distances give the median.
_DISTANCE_POINTS = 512
_DISTANCE_LANDMARKS = 64

# Variances below this fraction of the features' mean square are rounding errors.
_LEAST_VARIANCE = 1e-6


class FeatureSettings(NamedTuple):
    """The settings of features, with all defaults filled in.

    Attributes:
        kind: of `model.FEATURE_MAPS`.
        prepare: of `PREPARATIONS`.
        widths: factors on 1 / the median squared distance.
    """

    kind: str
    prepare: str
    widths: tuple[float, ...]


def resolve_features(
    dynamics: str,
    *,
    kind: str | None = None,
    prepare: str | None = None,
    widths: tuple[float, ...] | None = None,
    whiten: bool = True,
) -> FeatureSettings:
    """Fills in the defaults of the settings of features.

    A setting takes its default if it is None, or "" or () in config files.

    Args:
        dynamics: of the memory, of `model.MEMORY_FORMS`.
        kind: by default "gaussian", or "gaussian_raw" in the paper's form.
        prepare: by default "whiten", or "none" in the paper's form and if `whiten` is off.
        widths: by default 1, 4 and 16; only 1 if `prepare` is "none".
        whiten: whether the default of `prepare` may be "whiten".

    Raises:
        ValueError: unknown dynamics.
    """
    with prefix_errors("upscale"):
        check_choice(dynamics, tuple(MEMORY_FORMS), "`dynamics`")
        widths = () if widths is None else _check_widths(widths)
    replaces = MEMORY_FORMS[dynamics].replaces_wkv
    if not kind:
        kind = "gaussian_raw" if replaces else "gaussian"
    if not prepare:
        prepare = "whiten" if whiten and not replaces else "none"
    if not widths:
        # Features of different widths can be combined only if they are centred and scaled.
        widths = (1.0,) if prepare == "none" else (1.0, 4.0, 16.0)
    return FeatureSettings(kind, prepare, widths)


def _kmeans(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Moves the centres by Lloyd's algorithm; a centre without points does not move."""
    for _ in range(_KMEANS_ROUNDS):
        # [points, centres], without |point|^2, which does not affect the nearest centre.
        distances = np.sum(centres**2, 1) - 2 * points @ centres.T
        nearest = distances.argmin(1)
        sums = np.zeros_like(centres)
        # Not `sums[nearest] += points`, which would add only one point per centre.
        np.add.at(sums, nearest, points)
        counts = np.bincount(nearest, minlength=len(centres))[:, None]
        centres = np.where(counts > 0, sums / np.maximum(counts, 1), centres)
    return centres


def _place_landmarks(
    points: np.ndarray, count: int, rng: np.random.Generator, method: str
) -> np.ndarray:
    """Places `count` landmarks among the distinct points, with noise on repeated points."""
    # Vectors that agree to four decimals count as one point.
    points = np.unique(np.round(points, 4), axis=0)
    points = points[rng.permutation(len(points))[:_MAX_POINTS]]
    centres = points[rng.permutation(len(points))[:count]]
    if len(centres) < count:
        more = points[rng.integers(0, len(points), count - len(centres))]
        centres = np.concatenate([centres, more + 0.05 * rng.normal(size=more.shape)])
    return _kmeans(points, centres) if method == "kmeans" else centres


def _inverse_median_distance(
    points: np.ndarray, centres: np.ndarray, rng: np.random.Generator
) -> float:
    """Computes 1 / the median squared distance between points and centres."""
    some_points = points[rng.integers(0, len(points), _DISTANCE_POINTS)]
    some_centres = centres[rng.integers(0, len(centres), _DISTANCE_LANDMARKS)]
    squares = np.sum((some_points[:, None] - some_centres) ** 2, -1)
    return 1.0 / max(float(np.median(squares)), 1e-6)


def _fit_head(
    points: Float[np.ndarray, "R N"],
    size: int,
    rng: np.random.Generator,
    *,
    kind: str,
    landmarks: str,
    widths: tuple[float, ...],
) -> tuple[Float[np.ndarray, "M N"], Float[np.ndarray, " M"]]:
    """Fits the landmarks and widths of one head; for "fourier", the frequencies and phases."""
    centres = _place_landmarks(points, size, rng, landmarks)
    gamma = _inverse_median_distance(points, centres, rng)
    # Cycles through the widths, so every head has features of all widths.
    gammas = gamma * np.asarray(widths)[np.arange(size) % len(widths)]
    if kind != "fourier":
        return centres, gammas
    # The Fourier transform of exp(-gamma d^2) is a Gaussian of variance 2 gamma.
    frequencies = rng.normal(size=centres.shape) * np.sqrt(2 * gammas)[:, None]
    return frequencies, rng.uniform(0, 2 * np.pi, size)


def _check_widths(widths: Any) -> tuple[float, ...]:
    """Checks widths and returns them as a tuple, whose truth value is defined."""
    if isinstance(widths, str) or not isinstance(widths, Iterable):
        raise TypeError(
            f"`widths` must be a tuple of numbers; got {type(widths).__name__}."
        )
    widths = tuple(widths)
    for width in widths:
        check_number(width, 0, math.inf, "`widths`", above=True, bounds="positive")
    return widths


def calibrate(
    reads: Float[Array | np.ndarray, "L R H N"],
    *,
    size: int,
    kind: str | None = None,
    landmarks: str = "random",
    widths: tuple[float, ...] | None = None,
    prepare: str | None = None,
    damping: float = 1e-3,
    seed: int = 0,
) -> Features:
    """Fits features to the read vectors r of calibration text.

    Args:
        reads: R vectors of each layer and head, finite.
        size: features of a head (M).
        kind: of `model.FEATURE_MAPS`; None takes "gaussian".
        landmarks: "random" takes read vectors, "kmeans" their cluster centres.
        widths: factors on 1 / the median squared distance, which the features cycle through; None
            takes the default of `resolve_features`.
        prepare: "none", "centre" (and scale to a mean variance of 1) or "whiten" (to the identity
            as covariance); None takes "whiten".
        damping: added to the covariance, as a fraction of its mean eigenvalue.
        seed: of the random choices.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an unknown choice, a number out of its range, non-finite reads, or too small a
            damping for reads whose features have a singular covariance.
    """
    with prefix_errors("calibrate"):
        kind, prepare, widths = resolve_features(
            "static", kind=kind, prepare=prepare, widths=widths
        )
        check_choice(kind, tuple(FEATURE_MAPS), "`kind`")
        check_choice(landmarks, LANDMARKS, "`landmarks`")
        check_choice(prepare, PREPARATIONS, "`prepare`")
        check_count(size, 1, "`size`")
        check_number(damping, 0, math.inf, "`damping`")
        check_seed(seed)
        reads = _check_reads(reads)
    features = _fit_features(
        reads,
        size,
        kind=kind,
        landmarks=landmarks,
        widths=widths,
        rng=np.random.default_rng(seed),
    )
    if prepare == "none":
        return features
    return _prepare(features, reads, prepare, damping)


def _check_reads(reads: Any) -> np.ndarray:
    """Checks read vectors and converts them to float32."""
    reads = np.asarray(as_array(reads, "`reads`"), np.float32)
    if reads.ndim != 4 or not reads.size:
        raise ValueError(f"`reads` must have shape [L R H N]; got {reads.shape}.")
    # One NaN would spread over all features of its head.
    if not np.isfinite(reads).all():
        raise ValueError("`reads` must be finite; they hold NaN or infinity.")
    return reads


def _fit_features(
    reads: Float[np.ndarray, "L R H N"],
    size: int,
    *,
    kind: str,
    landmarks: str,
    widths: tuple[float, ...],
    rng: np.random.Generator,
) -> Features:
    """Fits the features of every head of every layer, neither centred nor whitened."""
    layers, _, heads, width = reads.shape
    directions = reads
    if kind != "gaussian_raw":
        directions = np.asarray(unit_vectors(jnp.asarray(reads)))
    all_points = []
    all_gammas = []
    for layer in directions:
        for head in layer.swapaxes(0, 1):
            points, gammas = _fit_head(
                head,
                size,
                rng,
                kind=kind,
                landmarks=landmarks,
                widths=widths,
            )
            all_points.append(points)
            all_gammas.append(gammas)
    points = np.stack(all_points).reshape(layers, 1, heads, size, width)
    gammas = np.stack(all_gammas).reshape(layers, 1, heads, size)
    return Features(
        landmarks=jnp.asarray(points, jnp.float32),
        widths=jnp.asarray(gammas, jnp.float32),
        mean=jnp.zeros(gammas.shape, jnp.float32),
        map=None,
        kind=kind,
    )


@jax.jit
def _moments(
    layer: Features, reads: Float[Array, "R H Nk"]
) -> tuple[Float[Array, "1 H M"], Float[Array, "1 H M M"]]:
    """Computes the mean and the covariance of a layer's features."""
    phi = kernel_features(layer, reads[None])[0]
    mean = jnp.mean(phi, axis=0, keepdims=True)
    centred = phi - mean
    products = jnp.einsum("rhm,rhn->hmn", centred, centred, precision="highest")
    return mean, products[None] / len(reads)


def _prepare(
    features: Features, reads: np.ndarray, prepare: str, damping: float
) -> Features:
    """Centres the features on `reads`, and whitens or scales them."""
    means = []
    covariances = []
    # One layer at a time: the features of all layers may not fit into memory.
    for index, x in enumerate(reads):
        layer = jax.tree.map(lambda leaf, index=index: leaf[index], features)
        # mean [1 H M] and covariance [1 H M M]; the axis of 1 is the batch's.
        mean, covariance = _moments(layer, x)
        means.append(mean)
        covariances.append(covariance)
    mean = jnp.stack(means)
    covariance = jnp.stack(covariances)
    # [L 1 H 1 1], per head; both preparations give a mean variance of 1.
    size = mean.shape[-1]
    variance = jnp.trace(covariance, axis1=-2, axis2=-1)[..., None, None] / size
    mean_square = variance + jnp.mean(jnp.square(mean), axis=-1)[..., None, None]
    # Features that are constant in `reads` may vary in other text: scaled to a variance of 1 here,
    # they would become enormous there.
    varies = variance > _LEAST_VARIANCE * mean_square
    scale = jnp.where(varies, variance, jnp.where(mean_square > 0, mean_square, 1.0))
    whitener = jnp.broadcast_to(jnp.eye(size, dtype=jnp.float32), covariance.shape)
    if prepare == "whiten":
        whitener = jnp.where(varies, whitening(covariance, damping), whitener)
        if not np.isfinite(whitener).all():
            raise ValueError(
                f"calibrate: `damping` must be larger, because {reads.shape[1]} reads of a head "
                f"give a singular covariance of {size} features; got {damping:g}."
            )
    return features.replace(mean=mean, map=whitener / jnp.sqrt(scale))
