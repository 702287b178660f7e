"""The loss of a start state of a frozen model, and masks of its tuned arrays."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float

from rwkv7_jax.array_types import Activations, Params, Tokens
from rwkv7_jax.checks import (
    check_instance,
    check_model,
    check_number,
    check_params,
    prefix_errors,
)
from rwkv7_jax.data.batch import Batch, BatchLike
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import RWKV7State, init_state, repeat
from rwkv7_jax.training.head_loss import TermWeights, weighted_loss
from rwkv7_jax.training.losses import (
    Loss,
    Metrics,
    check_ids_and_shapes,
    check_targets,
    next_token_loss_with_trace,
    shares_of_known_ids,
)

LEAVES = ("wkv", "att_shift", "ffn_shift", "memory")

# The arrays of an upscaled state that "memory" selects.
_MEMORY_PARTS = ("memory", "write")


def check_leaves(leaves: tuple[str, ...]) -> None:
    """Checks that all names are among `LEAVES`.

    Raises:
        TypeError: not a sequence of names.
        ValueError: an unknown name, or no name.
    """
    # A single string is a common mistake, and is a sequence of letters.
    if isinstance(leaves, str) or not isinstance(leaves, Sequence):
        raise TypeError(
            f'`leaves` must be a tuple of names, such as ("wkv",); got {leaves!r}.'
        )
    if not leaves:
        raise ValueError("`leaves` must name an array to tune; got none.")
    for name in leaves:
        if name not in LEAVES:
            raise ValueError(
                f"`leaves` must be among {', '.join(LEAVES)}; got {name!r}."
            )


def default_leaves(state: RWKV7State | None) -> tuple[str, ...]:
    """Returns the arrays that are tuned by default: an upscaled state's memory, or the WKV state.

    Args:
        state: the state before tuning; None is zeros.
    """
    if isinstance(state, RWKV7State) and state.upscaled is not None:
        return ("memory",)
    return ("wkv",)


def tuned_parts(state: RWKV7State, leaves: tuple[str, ...]) -> dict[str, Any]:
    """Collects the tuned arrays, or their leaves in a similar tree, by name."""
    if "memory" in leaves and state.upscaled is None:
        raise ValueError(
            "`leaves` must not hold memory, because the state is not upscaled (see `upscale`)."
        )
    parts: dict[str, Any] = {}
    for leaf in leaves:
        if leaf != "memory":
            parts[leaf] = getattr(state, leaf)
            continue
        for name in _MEMORY_PARTS:
            parts[name] = getattr(state.upscaled, name)
    return parts


def replace_parts(state: RWKV7State, parts: dict[str, Any]) -> RWKV7State:
    """Replaces arrays of the state, including those of its upscaled memory."""
    inner = {}
    outer = {}
    for name, part in parts.items():
        target = inner if name in _MEMORY_PARTS else outer
        target[name] = part
    if inner:
        upscaled = state.upscaled
        assert upscaled is not None  # `tuned_parts` raises otherwise.
        outer["upscaled"] = upscaled.replace(**inner)
    return state.replace(**outer)


def stop_gradient_except(state: RWKV7State, leaves: tuple[str, ...]) -> RWKV7State:
    """Stops gradients at all arrays but those of `leaves`.

    Raises:
        ValueError: "memory" for a state that is not upscaled, or an upscaled state without it.
    """
    # Otherwise the WKV part would silently be tuned instead of the memory.
    if state.upscaled is not None and "memory" not in leaves:
        raise ValueError(
            "`leaves` must hold memory, because the state is upscaled; got "
            f"{tuple(leaves)}."
        )
    # Stops all and puts the tuned ones back: leaves that are added later are frozen by default.
    return replace_parts(jax.lax.stop_gradient(state), tuned_parts(state, leaves))


def trainable_mask(state: RWKV7State, leaves: tuple[str, ...]) -> RWKV7State:
    """Builds the mask of the tuned arrays, for `optax.masked` and `decorrelate`.

    Raises:
        TypeError: not a state, or not a sequence of names.
        ValueError: an unknown name, or "memory" for a state that is not upscaled.
    """
    with prefix_errors("trainable_mask"):
        check_instance(state, RWKV7State, "`state`")
        check_leaves(leaves)
        tuned = dict.fromkeys(tuned_parts(state, leaves), True)
    return replace_parts(jax.tree.map(lambda _: False, state), tuned)


def hidden_states_from(
    model: RWKV7, params: Params, state: RWKV7State, tokens: Tokens
) -> Activations:
    """Computes the normed activations [B T D] of rows that all start from one state.

    Args:
        model: the shell around `params`.
        params: all weights.
        state: batch 1.
        tokens: of the rows.
    """
    start = repeat(state, tokens.shape[0])
    return model.apply({"params": params}, tokens, start, method="hidden")[0]


# Compared by identity, like functions: a field of a subclass may be an array, which is not
# hashable.
@dataclasses.dataclass(frozen=True, eq=False)
class StartStateLoss:
    """The base class of the losses of a start state of a frozen model.

    Attributes:
        model: the shell around the frozen weights.
        leaves: the tuned arrays, of `LEAVES`.
        anchor: weight of KL(base || tuned) on unlabelled tokens.
    """

    model: RWKV7
    leaves: tuple[str, ...]
    anchor: float

    def check_batch(self, batch: BatchLike) -> Batch:
        """Checks a batch; a step calls it on the host, where ids are concrete."""
        return check_ids_and_shapes(batch, self.model.config.vocab_size)

    def with_anchor(
        self,
        params: Params,
        state: RWKV7State,
        batch: Batch,
        value: Float[Array, ""],
        metrics: Metrics,
    ) -> tuple[Float[Array, ""], Metrics]:
        """Adds the KL-to-base penalty to a loss; logs the KL and the state's largest entry and RMS.

        Args:
            params: all weights.
            state: the start state that is tuned (batch 1).
            batch: holds unlabelled tokens [B T+1] as `anchor` if the weight is not 0.
            value: the loss without the penalty.
            metrics: its metrics, to which `anchor_nats`, `state_max` and `state_rms` are added. The
                last two describe the upscaled memory if there is one.
        """
        if self.anchor:
            divergence = _divergence_from_base(self.model, params, state, batch)
            value = value + self.anchor * divergence
            metrics = metrics | {"anchor_nats": divergence}
        # The WKV part of an upscaled state stays zero.
        tuned_memory = state.wkv if state.upscaled is None else state.upscaled.memory
        sizes = {
            "state_max": jnp.max(jnp.abs(tuned_memory)),
            "state_rms": jnp.sqrt(jnp.mean(jnp.square(tuned_memory))),
        }
        return value, metrics | jax.lax.stop_gradient(sizes)


def _divergence_from_base(
    model: RWKV7, params: Params, state: RWKV7State, batch: Batch
) -> Float[Array, ""]:
    """Computes the mean KL(base || tuned) on the batch's unlabelled tokens."""
    ids = jnp.asarray(Batch.of(batch, "anchor", packed=True).anchor)
    tokens = ids[:, :-1]
    # The base model is this model from the zero state.
    base = hidden_states_from(model, params, init_state(model.config), tokens)
    tuned = hidden_states_from(model, params, state, tokens)
    shares = jnp.full(tokens.shape, 1 / tokens.size, jnp.float32)
    shares = shares_of_known_ids(shares, ids, model.config.vocab_size)
    divergence, _ = weighted_loss(
        tuned,
        params["head"]["weight"],
        None,
        TermWeights(kl=shares),
        reference=jax.lax.stop_gradient(base),
    )
    return divergence


@dataclasses.dataclass(frozen=True, eq=False)
class _StateLoss(StartStateLoss):
    """The loss that `state_loss` returns; the first argument of a call is the frozen weights.

    Attributes:
        l2wrap: as in `next_token_loss`.
    """

    l2wrap: float

    def __call__(
        self, params: Params, state: RWKV7State, batch: BatchLike
    ) -> tuple[Float[Array, ""], Metrics]:
        """Computes the loss and its metrics."""
        value, (metrics, _) = self.with_trace(params, state, batch, ())
        return value, metrics

    def with_trace(
        self,
        params: Params,
        state: RWKV7State,
        batch: BatchLike,
        names: tuple[str, ...],
    ):
        """Computes the loss, its metrics, and the arrays `names` of the model's trace."""
        with prefix_errors("state_loss"):
            batch = self.check_batch(batch)
            check_targets(batch)
            if self.anchor:
                Batch.of(batch, "anchor", packed=True)
            check_instance(state, RWKV7State, "`state`")
            if state.batch != 1:
                raise ValueError(f"`state` must hold one sequence; got {state.batch}.")
            state = stop_gradient_except(state, self.leaves)
        start = repeat(state, batch.sequences)
        value, (metrics, trace) = next_token_loss_with_trace(
            self.model, params, start, batch, l2wrap=self.l2wrap, names=names
        )
        value, metrics = self.with_anchor(params, state, batch, value, metrics)
        return value, (metrics, trace)

    def check_batch(self, batch: BatchLike) -> Batch:
        """Checks a batch, whose rows may hold several sequences."""
        return check_ids_and_shapes(batch, self.model.config.vocab_size, packed=True)


def state_loss(
    model: RWKV7,
    params: Params,
    *,
    leaves: tuple[str, ...] = ("wkv",),
    anchor: float = 0.0,
    l2wrap: float = 0.0,
) -> Loss:
    """Makes the loss of a start state of batch 1, with the weights as frozen arguments.

    Every row of a batch, or every packed sequence, starts from that state, so its gradient is the
    sum over them. The metric `state_max` is the state's largest entry, `state_rms` its root mean
    square. Above a few tens, the norm after the read-out makes early tokens insensitive to the
    state's scale.

    Args:
        model: the shell around `params`.
        params: all weights.
        leaves: the tuned arrays, of `LEAVES`.
        anchor: weight of KL(base || tuned) on `batch["anchor"]`, unlabelled tokens [B T+1] on which
            the tuned model should stay close to the base model.
        l2wrap: as in `next_token_loss`.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an unknown leaf, weights of another model, or a number out of its range; from
            the loss, a batch or a state that does not match the model.
    """
    with prefix_errors("state_loss"):
        check_model(model)
        check_params(params, model.config)
        check_leaves(leaves)
        check_number(anchor, 0, math.inf, "`anchor`")
        check_number(l2wrap, 0, math.inf, "`l2wrap`")
    loss = _StateLoss(model, tuple(leaves), anchor, l2wrap)
    return Partial(loss, params)
