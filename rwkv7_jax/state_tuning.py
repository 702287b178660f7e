"""Tuning the start state of a frozen model. Level 6."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float

from . import upscaling
from .calibration import calibrate
from .loss import Batch, Loss, Metrics, divergence, next_token_loss, token_weights
from .model import RECURRENCE, RWKV7
from .shapes import Activations, Params, Tokens
from .state import (
    DYNAMICS,
    RWKV7State,
    Upscaled,
    check_tokens,
    init_state,
    map_memory,
    repeat,
)

LEAVES = ("wkv", "att_shift", "ffn_shift", "memory")


def check_leaves(leaves: tuple[str, ...], *, caller: str) -> None:
    """Return if all are among `LEAVES`.

    Raises:
        ValueError: one is not.
    """
    for name in leaves:
        if name not in LEAVES:
            raise ValueError(f"{caller}: `leaves` must be among {', '.join(LEAVES)}; got {name!r}.")


def _part(state: RWKV7State, leaf: str) -> dict:
    """The tuned arrays that a name of `LEAVES` stands for, by their names in the state."""
    if leaf != "memory":
        return {leaf: getattr(state, leaf)}
    if state.upscaled is None:
        raise ValueError(
            "state_loss: `leaves` has memory, but the state is not upscaled (see `upscale`)."
        )
    return {name: getattr(state.upscaled, name) for name in ("memory", "write")}


def _with_parts(state: RWKV7State, parts: dict) -> RWKV7State:
    """`state` with some of its arrays exchanged."""
    inner = {name: parts[name] for name in ("memory", "write") if name in parts}
    outer = {name: part for name, part in parts.items() if name not in inner}
    if inner:
        outer["upscaled"] = state.upscaled.replace(**inner)
    return state.replace(**outer)


def frozen(state: RWKV7State, leaves: tuple[str, ...]) -> RWKV7State:
    """`state` with gradients stopped at everything but `leaves`."""
    kept = {name: part for leaf in leaves for name, part in _part(state, leaf).items()}
    return _with_parts(jax.lax.stop_gradient(state), kept)


def moving(state: RWKV7State, leaves: tuple[str, ...]) -> RWKV7State:
    """The tree of which arrays are tuned: a mask for `optax.masked` and `decorrelate`."""
    flags = {name: True for leaf in leaves for name in _part(state, leaf)}
    return _with_parts(jax.tree.map(lambda _: False, state), flags)


def hidden_from(model: RWKV7, params: Params, state: RWKV7State, tokens: Tokens) -> Activations:
    """The normed activations of rows that all start from `state`."""
    start = repeat(state, tokens.shape[0])
    return model.apply({"params": params}, tokens, start, method="hidden")[0]


def watched(
    model: RWKV7,
    params: Params,
    state: RWKV7State,
    batch: Batch,
    *,
    anchor: float,
    value: Float[Array, ""],
    metrics: Metrics,
) -> tuple[Float[Array, ""], Metrics]:
    """A loss kept near the base model, with metrics of how far it went and of the state's size.

    Args:
        model: the shell around `params`.
        params: all weights.
        state: the start state that is tuned (batch 1).
        batch: holds unlabelled tokens [B T+1] as `anchor` where the weight is not 0.
        anchor: weight of the mean KL(base || tuned) on them.
        value: the loss so far.
        metrics: so far; `anchor_nats`, `state_max` and `state_rms` come beside them, the sizes
            being the upscaled memory's where there is one.
    """
    if anchor:
        tokens = jnp.asarray(batch["anchor"])[:, :-1]
        base = hidden_from(model, params, init_state(model.config), tokens)
        tuned = hidden_from(model, params, state, tokens)
        apart = divergence(tuned, jax.lax.stop_gradient(base), params["head"]["weight"])
        drift = jnp.mean(apart)
        value, metrics = value + anchor * drift, metrics | {"anchor_nats": drift}
    wide = state.wkv if state.upscaled is None else state.upscaled.memory
    largest, mean_square = jnp.max(jnp.abs(wide)), jnp.mean(jnp.square(wide))
    sizes = {"state_max": largest, "state_rms": jnp.sqrt(mean_square)}
    return value, metrics | jax.lax.stop_gradient(sizes)


def state_loss(
    model: RWKV7,
    params: Params,
    *,
    leaves: tuple[str, ...] = ("wkv",),
    anchor: float = 0.0,
    l2wrap: float = 0.0,
) -> Loss:
    """The loss as a function of a start state of batch 1 alone; the weights are frozen arguments.

    Every row of a batch starts from that state, so its gradient is the sum over rows. The metrics
    watch the state: `state_max` is its largest entry, `state_rms` its root mean square. Above a few
    tens the norm behind the read-out has made the early tokens insensitive to the state's size.

    Args:
        model: the shell around `params`.
        params: all weights.
        leaves: what is tuned, of `LEAVES`.
        anchor: weight of KL(base || tuned) on `batch["anchor"]`, unlabelled tokens [B T+1] on which
            the tuned model shall stay what it was.
        l2wrap: as in `next_token_loss`.

    Raises:
        ValueError: an unknown leaf.
    """
    check_leaves(leaves, caller="state_loss")

    def loss(params: Params, state: RWKV7State, batch: Batch):
        state = frozen(state, tuple(leaves))
        start = repeat(state, batch["tokens"].shape[0])
        value, metrics = next_token_loss(model, params, start, batch, l2wrap=l2wrap)
        return watched(model, params, state, batch, anchor=anchor, value=value, metrics=metrics)

    return Partial(loss, params)


def state_statistics(
    model: RWKV7, params: Params, *, leaves: tuple[str, ...] = ("wkv",), rows: int = 8
) -> Partial:
    """`statistics(state, batch)` for `decorrelate`: how the tuned memories are read.

    A memory is read linearly, y_t = S_0 psi_t + what does not depend on S_0 in this layer, so that
    E[psi psi^T] over the targets that count is what makes its tuning well or badly conditioned. The
    result is a state whose "wkv" [L 1 H Nk Nk] and "memory" [L 1 H M M] hold it where they are
    tuned, and None elsewhere.

    Args:
        model: the shell around `params`.
        params: all weights.
        leaves: what is tuned, of `LEAVES`.
        rows: rows of the batch that are looked at.

    Raises:
        ValueError: an unknown leaf.
    """
    check_leaves(leaves, caller="state_statistics")
    implementation = model.config.implementation

    def statistics(params: Params, state: RWKV7State, batch: Batch) -> RWKV7State:
        tokens = jnp.asarray(batch["tokens"])[:rows, :-1]
        weights = token_weights(batch)[:rows]
        start = repeat(state, tokens.shape[0])
        *_, trace = model.apply({"params": params}, tokens, start, method="trace")

        def plain(parts, upscaled):
            reads = upscaling.start_reads(parts, implementation=implementation)
            return upscaling.covariance(reads, weights)

        def wide(parts, upscaled):
            reads = upscaling.memory_reads(upscaled, parts, implementation=implementation)
            return upscaling.covariance(reads, weights)

        def by_layer(one):
            return jax.lax.map(lambda layer: one(*layer), (trace, state.upscaled))

        found = jax.tree.map(lambda _: None, state)
        if "wkv" in leaves:
            found = found.replace(wkv=by_layer(plain))
        if "memory" in leaves:
            found = found.replace(upscaled=found.upscaled.replace(memory=by_layer(wide)))
        return jax.lax.stop_gradient(found)

    return Partial(statistics, params)


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
    upscaled = upscaling.empty(features, dynamics=dynamics, seed=seed)
    if literal:
        _warn_of_growth(upscaled, _parts(model, params, tokens[:8]))
    return init_state(config).replace(upscaled=upscaled)


def _warn_of_growth(upscaled: Upscaled, parts: dict[str, Array]) -> None:
    excess = float(
        jnp.max(jax.lax.map(lambda layer: upscaling.removal_excess(*layer), (upscaled, parts)))
    )
    if excess > 1:
        warnings.warn(
            f"upscale: `dynamics` {upscaled.dynamics} removes up to {excess:.3g} times what keeps "
            "one step from growing the state; it may diverge.",
            stacklevel=3,
        )


def scaled(state: RWKV7State, alpha: float) -> RWKV7State:
    """`alpha` times the state: between the base model at 0 and the tuned one at 1."""
    return map_memory(lambda leaf: leaf * jnp.asarray(alpha, leaf.dtype), state)


def spectra(state: RWKV7State) -> Float[np.ndarray, "L H N"]:
    """The singular values of every layer's and head's WKV state, largest first; batch 1."""
    return np.linalg.svd(np.asarray(state.wkv[:, 0]), compute_uv=False)
