"""Upscaled start states: kernel features fitted to the vectors that a model reads with."""

import functools
import math
import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rwkv7_jax.array_types import Params, Tokens
from rwkv7_jax.checks import (
    as_array,
    check_choice,
    check_count,
    check_model,
    check_number,
    check_params,
    check_seed,
    check_tokens,
    prefix_errors,
)
from rwkv7_jax.model.block import RECURRENCE
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.model.kernel_features import kernel_features, unit_vectors
from rwkv7_jax.model.recurrence import LayerTrace, wkv_inputs_of
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import (
    DYNAMICS,
    KINDS,
    Features,
    RWKV7State,
    Upscaled,
    init_state,
)
from rwkv7_jax.model.upscaled_memory import MEMORY_FORMS, RecurrentMemory
from rwkv7_jax.optim.whitening import whitening
from rwkv7_jax.sharding import to_host

LANDMARKS = ("random", "kmeans")

PREPARATIONS = ("none", "centre", "whiten")

# Rows of calibration text that the model reads at once.
_ROWS = 8

# Distinct read vectors of a head among which landmarks are placed.
_MAX_POINTS = 4096

# Points and landmarks between which distances are measured for the median.
_DISTANCE_POINTS = 512
_DISTANCE_LANDMARKS = 64


def stability_ratio(upscaled: Upscaled, parts: LayerTrace) -> Float[Array, ""]:
    """Measures the removal under "replace" in units of the stable limit; above 1 it can diverge.

    One step's matrix diag(phi(w)) - phi(k) (phi(a) phi(k))^T has its eigenvalues inside the unit
    circle if sum_m phi_m(a) phi_m(k)^2 <= 1 + min_m phi_m(w).
    """
    form = upscaled.form
    assert isinstance(form, RecurrentMemory)
    inputs = form.wkv_inputs(upscaled, wkv_inputs_of(parts), parts["icl_rate"])
    # [B T H]; a is the negative key and b the key times the rate.
    removed = -jnp.sum(inputs.a * inputs.b, axis=-1)
    return jnp.max(removed / (1 + jnp.min(jnp.exp(inputs.log_w), axis=-1)))


def empty_memory(
    features: Features, *, dynamics: str = "static", seed: int = 0
) -> Upscaled:
    """Makes a memory of zeros, batch 1, that is read through `features` [L 1 H M N]."""
    layers, _, heads, width, size = features.landmarks.shape
    lead = (layers, 1, heads)
    readout = None
    rows = size
    if MEMORY_FORMS[dynamics].replaces_wkv:
        # In the paper's form the values are features as well, and a fixed random map reads them.
        rows = width
        noise = jax.random.normal(
            jax.random.key(seed), (*lead, size, width), jnp.float32
        )
        readout = noise / math.sqrt(width)
    return Upscaled(
        memory=jnp.zeros((*lead, rows, width), jnp.float32),
        write=jnp.zeros(lead, jnp.float32),
        features=features,
        readout=readout,
        dynamics=dynamics,
    )


def fold_feature_map(upscaled: Upscaled) -> Upscaled:
    """Multiplies the feature map into the memory, so that reads are the same without it.

    Raises:
        ValueError: a memory that changes in context, where keys need the map themselves.
    """
    if upscaled.features.map is None:
        return upscaled
    if upscaled.form.erases or np.any(upscaled.write):
        raise ValueError(
            "fold_feature_map: `upscaled` must be static, or decay without writes; "
            f"got {upscaled.dynamics}, whose keys are mapped features."
        )
    memory = jnp.matmul(upscaled.memory, upscaled.features.map, precision="highest")
    return upscaled.replace(memory=memory, features=upscaled.features.replace(map=None))


class FeatureSettings(NamedTuple):
    """How features are made, without anything left open.

    Attributes:
        kind: of `KINDS`.
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
    """Fills in the settings of features that are left open; nothing else knows these defaults.

    A setting is left open by None, or by "" or () in config files.

    Args:
        dynamics: of the memory, of `DYNAMICS`.
        kind: by default "gaussian", or "gaussian_raw" under "replace".
        prepare: by default "whiten", or "none" under "replace" and where `whiten` is off.
        widths: by default 1, 4 and 16; 1 alone where `prepare` is "none".
        whiten: whether features are whitened if `prepare` does not say otherwise.

    Raises:
        ValueError: unknown dynamics.
    """
    with prefix_errors("upscale"):
        check_choice(dynamics, DYNAMICS, "`dynamics`")
        if widths is not None:
            _check_widths(widths)
    replaces = MEMORY_FORMS[dynamics].replaces_wkv
    if not kind:
        kind = "gaussian_raw" if replaces else "gaussian"
    if not prepare:
        prepare = "whiten" if whiten and not replaces else "none"
    if not widths:
        # Features of very different widths only work together once they are centred and scaled.
        widths = (1.0,) if prepare == "none" else (1.0, 4.0, 16.0)
    return FeatureSettings(kind, prepare, tuple(widths))


def describe_upscaled(
    config: RWKV7Config,
    *,
    size: int = 0,
    dynamics: str = "static",
    kind: str,
    prepare: str,
) -> Upscaled:
    """Describes the memory that `upscale` makes: no text decides its shapes.

    Args:
        config: of the model.
        size: features of a head (M); 0 takes four times the head size.
        dynamics: of the memory.
        kind: of the features.
        prepare: of the features.
    """
    count = size or 4 * config.head_size
    lead = (config.num_layers, 1, config.num_heads)

    def make() -> Upscaled:
        features = Features(
            landmarks=jnp.zeros((*lead, count, config.head_size)),
            widths=jnp.zeros((*lead, count)),
            mean=jnp.zeros((*lead, count)),
            map=None if prepare == "none" else jnp.zeros((*lead, count, count)),
            kind=kind,
        )
        return empty_memory(features, dynamics=dynamics)

    return jax.eval_shape(make)


def _kmeans(points: np.ndarray, centres: np.ndarray, rounds: int = 8) -> np.ndarray:
    """Moves the centres by Lloyd's algorithm; one nearest to no point stays in its place."""
    for _ in range(rounds):
        # [points, centres], up to |point|^2, which does not change which centre is nearest.
        distances = np.sum(centres**2, 1) - 2 * points @ centres.T
        nearest = distances.argmin(1)
        sums = np.zeros_like(centres)
        # Not `sums[nearest] += points`, which counts only one point of each centre.
        np.add.at(sums, nearest, points)
        counts = np.bincount(nearest, minlength=len(centres))[:, None]
        centres = np.where(counts > 0, sums / np.maximum(counts, 1), centres)
    return centres


def _place_landmarks(
    points: np.ndarray, count: int, rng: np.random.Generator, method: str
) -> np.ndarray:
    """Places `count` landmarks among the distinct points, with noise on points used twice."""
    # Vectors that agree to four decimals are one point: a second landmark there would add nothing.
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


def _fit_head(points, size, rng, *, kind, landmarks, widths):
    """Fits the landmarks and widths of one head (or frequencies and phases)."""
    centres = _place_landmarks(points, size, rng, landmarks)
    gamma = _inverse_median_distance(points, centres, rng)
    # Each width in turn, so that every head has features of all widths.
    gammas = gamma * np.asarray(widths)[np.arange(size) % len(widths)]
    if kind != "fourier":
        return centres, gammas
    # The Fourier transform of exp(-gamma d^2) is a Gaussian of variance 2 gamma.
    frequencies = rng.normal(size=centres.shape) * np.sqrt(2 * gammas)[:, None]
    return frequencies, rng.uniform(0, 2 * np.pi, size)


def _check_widths(widths: Any) -> None:
    if isinstance(widths, str) or not isinstance(widths, Iterable):
        raise TypeError(
            f"`widths` must be a tuple of numbers; got {type(widths).__name__}."
        )
    for width in widths:
        check_number(width, 0, math.inf, "`widths`", above=True, bounds="positive")


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
        kind: of `KINDS`; None takes "gaussian".
        landmarks: "random" takes read vectors, "kmeans" their centres.
        widths: factors on 1 / the median squared distance, given to the features in turn; None
            takes the default of `resolve_features`.
        prepare: "none", "centre" (and scale to a mean variance of 1) or "whiten" (to the unit
            matrix as covariance); None takes "whiten".
        damping: added to the covariance, as a share of its mean eigenvalue.
        seed: of the random choices.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: an unknown choice, a number out of its range, or reads that are not finite.
    """
    with prefix_errors("calibrate"):
        kind, prepare, widths = resolve_features(
            "static", kind=kind, prepare=prepare, widths=widths
        )
        check_choice(kind, KINDS, "`kind`")
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
    """Returns read vectors as float32."""
    reads = np.asarray(as_array(reads, "`reads`"), np.float32)
    if reads.ndim != 4 or not reads.size:
        raise ValueError(f"`reads` must have shape [L R H N]; got {reads.shape}.")
    # One NaN would spread over all features of its head.
    if not np.isfinite(reads).all():
        raise ValueError("`reads` must be finite; they hold NaN or an infinity.")
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


def _prepare(
    features: Features, reads: np.ndarray, prepare: str, damping: float
) -> Features:
    """Centres the features on `reads`, and whitens them if asked."""

    @jax.jit
    def moments(layer: Features, x):
        phi = kernel_features(layer, x[None])[0]
        mean = jnp.mean(phi, axis=0, keepdims=True)
        centred = phi - mean
        products = jnp.einsum("rhm,rhn->hmn", centred, centred, precision="highest")
        return mean, products[None] / len(x)

    means = []
    covariances = []
    # One layer at a time: the features of all reads of all layers may not fit.
    for index, x in enumerate(reads):
        layer = jax.tree.map(lambda leaf, index=index: leaf[index], features)
        # mean [1 H M] and covariance [1 H M M]; the axis of 1 is the batch's.
        mean, covariance = moments(layer, x)
        means.append(mean)
        covariances.append(covariance)
    mean = jnp.stack(means)
    covariance = jnp.stack(covariances)
    # The mean variance of a head's features, with which both preparations end at 1.
    scale = jnp.trace(covariance, axis1=-2, axis2=-1)[..., None, None] / mean.shape[-1]
    # Features that never vary stay zero and do not become NaN.
    scale = jnp.maximum(scale, 1e-20)
    if prepare == "whiten":
        turn = whitening(covariance, damping)
    else:
        turn = jnp.broadcast_to(
            jnp.eye(mean.shape[-1], dtype=jnp.float32), covariance.shape
        )
    return features.replace(mean=mean, map=turn / jnp.sqrt(scale))


@functools.partial(jax.jit, static_argnums=0)
def _recurrence_inputs(model: RWKV7, params: Params, tokens: Array) -> dict[str, Array]:
    """Traces the inputs of every layer's recurrence."""
    start = init_state(model.config, tokens.shape[0])
    outputs: Any = model.apply({"params": params}, tokens, start, method="trace")
    trace = outputs[-1]
    return {name: trace[name] for name in RECURRENCE}


def _read_vectors(
    model: RWKV7, params: Params, tokens: np.ndarray, *, with_keys: bool
) -> np.ndarray:
    """Collects the read vectors [L R H N] of some text, and on request its removal keys too."""
    # On the host: the read vectors of all layers of some thousand tokens may not fit on the device.
    pieces = []
    for first in range(0, len(tokens), _ROWS):
        parts = to_host(
            _recurrence_inputs(model, params, tokens[first : first + _ROWS])
        )
        pieces.append(np.asarray(parts["r"], np.float32))
        if with_keys:
            # The op's `a` is the negative of the removal key.
            pieces.append(-np.asarray(parts["a"], np.float32))
    # [L B T H N] to [L B*T H N]: which text a vector came from does not matter.
    flat = [piece.reshape(len(piece), -1, *piece.shape[3:]) for piece in pieces]
    return np.concatenate(flat, axis=1)


def upscale(
    model: RWKV7,
    params: Params,
    tokens: Tokens,
    *,
    size: int = 0,
    dynamics: str = "static",
    kind: str | None = None,
    landmarks: str = "random",
    widths: tuple[float, ...] | None = None,
    prepare: str | None = None,
    seed: int = 0,
) -> RWKV7State:
    """Makes a start state, batch 1, with an empty memory read through features fitted to some text.

    An empty memory leaves the model's outputs as they were, bit for bit, unless dynamics "replace"
    discard its own state (the paper's form, kept for comparison).

    Args:
        model: the shell around `params`.
        params: all weights.
        tokens: text of the kind that will be tuned on; some thousand tokens.
        size: features of a head (M); 0 takes four times the head size.
        dynamics: of `state.DYNAMICS`. "static" never fades and is shared by all sequences; "decay"
            fades with the mean decay; "delta" is erased where the context writes.
        kind: of `state.KINDS`; None takes "gaussian", or "gaussian_raw" under "replace".
        landmarks: "random" or "kmeans".
        widths: factors on 1 / the median squared distance, given to the landmarks in turn; None
            takes 1, 4 and 16, or 1 alone where `prepare` is "none".
        prepare: "none", "centre" or "whiten"; None takes "whiten", or "none" under "replace".
        seed: of the landmarks.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: an unknown choice, a number out of its range, weights of another model, no text,
            or ids outside the vocabulary.
    """
    with prefix_errors("upscale"):
        check_model(model)
        check_params(params, model.config)
        settings = resolve_features(dynamics, kind=kind, prepare=prepare, widths=widths)
        check_choice(settings.kind, KINDS, "`kind`")
        check_choice(landmarks, LANDMARKS, "`landmarks`")
        check_choice(settings.prepare, PREPARATIONS, "`prepare`")
        # 0 stands for the default.
        if not (isinstance(size, int | np.integer) and size == 0):
            check_count(size, 1, "`size`")
        check_seed(seed)
        tokens = np.asarray(as_array(tokens, "`tokens`"))
        if tokens.ndim != 2 or not tokens.size:
            raise ValueError(
                f"`tokens` must be rows of text, [B T]; got shape {tokens.shape}."
            )
        check_tokens(tokens, model.config.vocab_size)
    form = MEMORY_FORMS[dynamics]
    features = calibrate(
        # An additive memory that is erased is also addressed by removal keys.
        _read_vectors(
            model, params, tokens, with_keys=form.erases and not form.replaces_wkv
        ),
        size=size or 4 * model.config.head_size,
        kind=settings.kind,
        landmarks=landmarks,
        widths=settings.widths,
        prepare=settings.prepare,
        seed=seed,
    )
    upscaled = empty_memory(features, dynamics=dynamics, seed=seed)
    if form.replaces_wkv:
        _warn_of_growth(upscaled, _recurrence_inputs(model, params, tokens[:_ROWS]))
    return init_state(model.config).replace(upscaled=upscaled)


def _warn_of_growth(upscaled: Upscaled, parts: dict[str, Array]) -> None:
    """Warns if one step can make the state grow."""
    ratios = jax.lax.map(lambda layer: stability_ratio(*layer), (upscaled, parts))
    excess = float(jnp.max(ratios))
    if excess > 1:
        warnings.warn(
            f"upscale: `dynamics` {upscaled.dynamics} removes up to {excess:.3g} times what a "
            "step may remove without making the state grow; it may diverge.",
            stacklevel=3,
        )
