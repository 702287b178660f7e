"""Upscaled start states: creation, stability, and folding of feature maps into the memory."""

import functools
import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels import WKVInputs
from pallas_kernels.eager import compiled_when_eager
from rwkv7_jax.array_types import Params, Tokens
from rwkv7_jax.checks import (
    as_array,
    check_choice,
    check_count,
    check_instance,
    check_runnable,
    check_seed,
    check_tokens,
    is_traced,
    prefix_errors,
)
from rwkv7_jax.model.block import RECURRENCE
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.model.kernel_features import FEATURE_MAPS, Features
from rwkv7_jax.model.recurrence import LayerTrace, wkv_inputs_of
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import RWKV7State, init_state
from rwkv7_jax.model.upscaled_memory import MEMORY_FORMS, RecurrentMemory, Upscaled
from rwkv7_jax.sharding import to_host
from rwkv7_jax.tuning.calibration import (
    LANDMARKS,
    PREPARATIONS,
    calibrate,
    resolve_features,
)

# Rows of calibration text that the model reads at once.
_ROWS = 8

# With a smaller decay, less than a millionth of a state is left after 20 tokens.
_SHORTEST_DECAY = 0.5


def _memory_inputs(upscaled: Upscaled, parts: LayerTrace) -> WKVInputs:
    """Computes the inputs of the WKV op whose state is a layer's memory."""
    form = upscaled.form
    if not isinstance(form, RecurrentMemory):
        raise TypeError(
            "stability_ratio: `upscaled` must be of a `RecurrentMemory`, which a step can make "
            f"grow; got dynamics {upscaled.dynamics}."
        )
    return form.wkv_inputs(upscaled, wkv_inputs_of(parts), parts["icl_rate"])


def stability_ratio(upscaled: Upscaled, parts: LayerTrace) -> Float[Array, ""]:
    """Measures the removal under "replace" relative to the stable limit; above 1 it can diverge.

    The transition matrix diag(phi(w)) - phi(k) (phi(a) phi(k))^T has its eigenvalues inside the
    unit circle if sum_m phi_m(a) phi_m(k)^2 <= 1 + min_m phi_m(w).

    Args:
        upscaled: one layer's memory.
        parts: the same layer's arrays of a trace.

    Raises:
        TypeError: a memory whose dynamics are not those of a WKV op.
    """
    inputs = _memory_inputs(upscaled, parts)
    # [B T H]; a is the negative key and b the key times the rate.
    removed = -jnp.sum(inputs.a * inputs.b, axis=-1)
    return jnp.max(removed / (1 + jnp.min(jnp.exp(inputs.log_w), axis=-1)))


def empty_memory(
    features: Features, *, dynamics: str = "static", seed: int = 0
) -> Upscaled:
    """Makes a memory of zeros, batch 1, that is read through features.

    Args:
        features: from `calibrate`; their landmarks [L 1 H M N] determine its sizes.
        dynamics: of `model.MEMORY_FORMS`.
        seed: of the fixed readout of the paper's form; other dynamics have none.

    Raises:
        TypeError: not features, or a seed that is not an integer.
        ValueError: unknown dynamics, or a seed out of range.
    """
    with prefix_errors("empty_memory"):
        check_instance(features, Features, "`features`")
        check_choice(dynamics, tuple(MEMORY_FORMS), "`dynamics`")
        check_seed(seed)
    layers, _, heads, width, size = features.landmarks.shape
    lead = (layers, 1, heads)
    readout = None
    rows = size
    if MEMORY_FORMS[dynamics].replaces_wkv:
        # In the paper's form values are features as well, and a fixed random map reads them.
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
    """Multiplies the feature map into the memory, so that reads no longer need it.

    Raises:
        ValueError: a memory that changes in context, whose keys need the map; or a memory whose
            write strength is traced and may be nonzero.
    """
    if upscaled.features.map is None:
        return upscaled
    form = upscaled.form
    # A static memory is never written, for any write strength.
    may_write = form.has_own_rows and (
        is_traced(upscaled.write) or np.any(upscaled.write)
    )
    if form.erases or may_write:
        raise ValueError(
            "fold_feature_map: `upscaled` must have dynamics static, or decay without writes; "
            f"got {upscaled.dynamics}, whose keys need the feature map."
        )
    memory = jnp.matmul(upscaled.memory, upscaled.features.map, precision="highest")
    return upscaled.replace(memory=memory, features=upscaled.features.replace(map=None))


def describe_upscaled(
    config: RWKV7Config,
    *,
    size: int = 0,
    dynamics: str = "static",
    kind: str,
    prepare: str,
) -> Upscaled:
    """Describes the shapes of the memory that `upscale` makes, which do not depend on text.

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
    """Collects the read vectors [L R H N] of some text, and optionally its removal keys."""
    # On the host: all layers' read vectors of some thousand tokens may not fit on the device.
    pieces = []
    for first in range(0, len(tokens), _ROWS):
        parts = _recurrence_inputs(model, params, tokens[first : first + _ROWS])
        pieces.append(np.asarray(to_host(parts["r"]), np.float32))
        if with_keys:
            # The op's `a` is the negative of the removal key.
            pieces.append(-np.asarray(to_host(parts["a"]), np.float32))
    # [L B T H N] to [L B*T H N].
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
    """Makes a start state, batch 1, with an empty memory and features that are fitted to text.

    An empty memory leaves the model's outputs bit-exact, except with dynamics "replace" or
    "replace_raw", which discard the WKV state (the paper's form, kept for comparison).

    Args:
        model: the shell around `params`.
        params: all weights.
        tokens: some thousand tokens of the kind of text to tune on.
        size: features of a head (M); 0 takes four times the head size.
        dynamics: of `model.MEMORY_FORMS`. "static" never changes and is shared by all sequences;
            "decay" decays with the mean decay; "delta" is also erased where the context writes.
        kind: of `model.FEATURE_MAPS`; None takes "gaussian", or "gaussian_raw" in the paper's form.
        landmarks: "random" or "kmeans".
        widths: factors on 1 / the median squared distance, which the landmarks cycle through; None
            takes 1, 4 and 16, or only 1 if `prepare` is "none".
        prepare: "none", "centre" or "whiten"; None takes "whiten", or "none" in the paper's form.
        seed: of the landmarks.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an unknown choice, a number out of its range, weights of another model, no text,
            or ids outside the vocabulary.
    """
    with prefix_errors("upscale"):
        check_runnable(model, params)
        settings = resolve_features(dynamics, kind=kind, prepare=prepare, widths=widths)
        check_choice(settings.kind, tuple(FEATURE_MAPS), "`kind`")
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
        # Removal keys also address an additive memory that is erased.
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
        parts = _recurrence_inputs(model, params, tokens[:_ROWS])
        ratios, decays = _ratios_and_decays(upscaled, parts)
        _warn_of_growth(dynamics, float(jnp.max(ratios)))
        _warn_of_fading(dynamics, np.asarray(decays))
    return init_state(model.config).replace(upscaled=upscaled)


@compiled_when_eager
def _ratios_and_decays(
    upscaled: Upscaled, parts: dict[str, Array]
) -> tuple[Array, Array]:
    """Computes each layer's stability ratio and median decay, one layer after another."""

    def of_layer(layer):
        log_w = _memory_inputs(*layer).log_w
        return stability_ratio(*layer), jnp.exp(jnp.median(log_w))

    return jax.lax.map(of_layer, (upscaled, parts))


def _warn_of_fading(dynamics: str, decays: np.ndarray) -> None:
    """Warns if a start state decays too fast to be tuned."""
    layer = int(np.argmin(decays))
    if decays[layer] < _SHORTEST_DECAY:
        warnings.warn(
            f"upscale: `dynamics` {dynamics} keeps {decays[layer]:.2g} of a state at each "
            f"token (median of layer {layer}). A start state and its gradients vanish after a few "
            "tokens; smaller `widths` keep more.",
            stacklevel=3,
        )


def _warn_of_growth(dynamics: str, excess: float) -> None:
    """Warns if a step can make the state grow."""
    if excess > 1:
        warnings.warn(
            f"upscale: `dynamics` {dynamics} removes up to {excess:.3g} times what a "
            "step may remove without making the state grow; it may diverge.",
            stacklevel=3,
        )
