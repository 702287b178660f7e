"""Tuning the start state of a frozen model. Level 6."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float

from .loss import Batch, Loss, divergence, next_token_loss
from .model import RWKV7
from .shapes import Params
from .state import RWKV7State, init_state, repeat

LEAVES = ("wkv", "att_shift", "ffn_shift")


def _frozen(state: RWKV7State, leaves: tuple[str, ...]) -> RWKV7State:
    """`state` with gradients stopped at the leaves that are not tuned."""
    kept = {name: getattr(state, name) for name in leaves}
    return jax.tree.map(jax.lax.stop_gradient, state).replace(**kept)


def _anchor(model: RWKV7, params: Params, state: RWKV7State, tokens: Array) -> Float[Array, ""]:
    """Mean KL(base || tuned) per token of unlabelled text."""
    rows = tokens.shape[0]
    hidden = functools.partial(model.apply, {"params": params}, tokens[:, :-1], method="hidden")
    tuned, _ = hidden(repeat(state, rows))
    base, _ = hidden(init_state(model.config, rows))
    base = jax.lax.stop_gradient(base)
    return jnp.mean(divergence(tuned, base, params["head"]["weight"]))


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
    for name in leaves:
        if name not in LEAVES:
            raise ValueError(
                f"state_loss: `leaves` must be among {', '.join(LEAVES)}; got {name!r}."
            )

    def loss(params: Params, state: RWKV7State, batch: Batch):
        state = _frozen(state, tuple(leaves))
        start = repeat(state, batch["tokens"].shape[0])
        value, metrics = next_token_loss(model, params, start, batch, l2wrap=l2wrap)
        if anchor:
            drift = _anchor(model, params, state, batch["anchor"])
            value, metrics = value + anchor * drift, metrics | {"anchor_nats": drift}
        size = {
            "state_max": jnp.max(jnp.abs(state.wkv)),
            "state_rms": jnp.sqrt(jnp.mean(jnp.square(state.wkv))),
        }
        return value, metrics | jax.lax.stop_gradient(size)

    return Partial(loss, params)


def scaled(state: RWKV7State, alpha: float) -> RWKV7State:
    """`alpha` times the state: between the base model at 0 and the tuned one at 1."""
    return jax.tree.map(lambda leaf: leaf * jnp.asarray(alpha, leaf.dtype), state)


def spectra(state: RWKV7State) -> Float[np.ndarray, "L H N"]:
    """The singular values of every layer's and head's WKV state, largest first; batch 1."""
    return np.linalg.svd(np.asarray(state.wkv[:, 0]), compute_uv=False)
