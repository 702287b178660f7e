"""Tuning the start state of a frozen model."""

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float

from rwkv7_jax.array_types import Activations, Params, Tokens
from rwkv7_jax.data.batch import Batch, BatchLike
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import RWKV7State, init_state, repeat
from rwkv7_jax.training.losses import Loss, Metrics, kl_divergence, next_token_loss

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


def stop_gradient_except(state: RWKV7State, leaves: tuple[str, ...]) -> RWKV7State:
    """`state` with gradients stopped at everything but `leaves`."""
    kept = {name: part for leaf in leaves for name, part in _part(state, leaf).items()}
    return _with_parts(jax.lax.stop_gradient(state), kept)


def trainable_mask(state: RWKV7State, leaves: tuple[str, ...]) -> RWKV7State:
    """The tree of which arrays are tuned: a mask for `optax.masked` and `decorrelate`."""
    flags = {name: True for leaf in leaves for name in _part(state, leaf)}
    return _with_parts(jax.tree.map(lambda _: False, state), flags)


def hidden_states_from(
    model: RWKV7, params: Params, state: RWKV7State, tokens: Tokens
) -> Activations:
    """The normed activations of rows that all start from `state`."""
    start = repeat(state, tokens.shape[0])
    return model.apply({"params": params}, tokens, start, method="hidden")[0]


def add_anchor_and_metrics(
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
        batch = Batch.of(batch, "anchor", caller="loss")
        tokens = jnp.asarray(batch.anchor)[:, :-1]
        base = hidden_states_from(model, params, init_state(model.config), tokens)
        tuned = hidden_states_from(model, params, state, tokens)
        apart = kl_divergence(tuned, jax.lax.stop_gradient(base), params["head"]["weight"])
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
        anchor: weight of KL(base || tuned) on `batch.anchor`, unlabelled tokens [B T+1] on which
            the tuned model shall stay what it was.
        l2wrap: as in `next_token_loss`.

    Raises:
        ValueError: an unknown leaf.
    """
    check_leaves(leaves, caller="state_loss")

    def loss(params: Params, state: RWKV7State, batch: BatchLike):
        batch = Batch.of(batch, caller="state_loss")
        state = stop_gradient_except(state, tuple(leaves))
        start = repeat(state, batch.tokens.shape[0])
        value, metrics = next_token_loss(model, params, start, batch, l2wrap=l2wrap)
        return add_anchor_and_metrics(
            model, params, state, batch, anchor=anchor, value=value, metrics=metrics
        )

    return Partial(loss, params)
