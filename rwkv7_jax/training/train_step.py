"""A training step for any loss and any tree of trainable parameters.

A loss is a function of the trainable parameters and a batch. If it needs large frozen arrays, such
as a model's weights, make it a `jax.tree_util.Partial` over them: the compiled step then takes them
as arguments instead of constants.
"""

import functools
import typing
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int

from rwkv7_jax.array_types import describe_fields
from rwkv7_jax.checks import prefix_errors
from rwkv7_jax.model.casts import widened
from rwkv7_jax.optim.optimizer import check_optimizer
from rwkv7_jax.sharding import constrain_layout, place, use_mesh
from rwkv7_jax.training.gradients import (
    Gradients,
    compute_gradients,
    loss_and_metrics,
    with_shares,
)
from rwkv7_jax.training.losses import Loss, Metrics
from rwkv7_jax.training.shared_pass import can_share_pass
from rwkv7_jax.training.step_checks import (
    CheckedProgram,
    as_partial,
    check_optimizer_state,
    check_parameters,
    check_step_arguments,
)

# Maps the training state and a batch to the next state and the metrics.
TrainStep = Callable[["TrainState", Mapping[str, Any]], tuple["TrainState", Metrics]]

# Optax adds integer counters, and norms of leaves of several dtypes; strict promotion forbids both.
_OPTAX_PROMOTION = "standard"


@typing.no_type_check
@struct.dataclass
class TrainState:
    """The state that training carries from step to step.

    Attributes:
        step: steps so far, skipped updates included.
        params: the trainable parameters: weights, or the start state.
        opt_state: the state of the Optax optimizer.
        skipped: updates that were skipped because a loss, gradient or update was not finite.
    """

    step: Int[Array, ""]
    params: Any
    opt_state: Any
    skipped: Int[Array, ""]
    __repr__ = describe_fields

    @classmethod
    def create(cls, params: Any, tx: optax.GradientTransformation) -> "TrainState":
        """Makes the state before the first step.

        `params` are copied: a step donates its input and would delete the caller's arrays.

        Raises:
            TypeError: parameters that are not floating-point arrays, or not an optimizer.
            ValueError: no parameters.
        """
        with prefix_errors("TrainState.create"):
            check_parameters(params)
            check_optimizer(tx, "`tx`")
        # The dtype is named because a Python number has a weak one, which the first step would make
        # strong: the second step would compile again.
        params = jax.tree.map(
            lambda leaf: jnp.array(leaf, jnp.result_type(leaf), copy=True), params
        )
        return cls(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=_without_shared_arrays(tx.init(params), params),
            skipped=jnp.zeros((), jnp.int32),
        )


def _without_shared_arrays(opt_state: Any, params: Any) -> Any:
    """Copies arrays of an optimizer's state that are shared with parameters or occur twice.

    A step donates its input, and an array cannot be donated twice.
    """
    seen = set(map(id, jax.tree.leaves(params)))

    def own(leaf):
        if id(leaf) in seen:
            return jnp.copy(leaf)
        seen.add(id(leaf))
        return leaf

    return jax.tree.map(own, opt_state)


def _optimizer_update(
    tx: optax.GradientTransformation, train: TrainState, found: Gradients
) -> tuple[Any, Any]:
    """Computes the updates and the next state of an optimizer.

    Raises:
        TypeError: an optimizer that needs more than a train step passes, such as a line search.
    """
    tx = optax.with_extra_args_support(tx)
    # Optax's names: `reduce_on_plateau` and `polyak_sgd` read the loss.
    extra = {"value": found.loss, "grad": found.gradients}
    if found.statistics is not None:
        extra["stats"] = found.statistics
    scope = jax.named_scope("optimizer")
    try:
        with jax.numpy_dtype_promotion(_OPTAX_PROMOTION), scope:
            return tx.update(found.gradients, train.opt_state, train.params, **extra)
    except (TypeError, AttributeError) as error:
        # Other errors inside a transformation stay as they are.
        is_call = "required keyword-only argument" in str(error)
        source = getattr(error, "obj", None)
        is_tree = source is found.gradients or source is train.params
        if not (is_call or is_tree):
            raise
        raise TypeError(
            f"`tx` must need only gradients, parameters and the loss's value; got {error}."
        ) from error


def _norm(tree: Any) -> Float[Array, ""]:
    """Computes the norm of a tree, in which squares of float16 would overflow above 255."""
    return optax.tree.norm(jax.tree.map(widened, tree))


def apply_update(
    loss: Partial,
    statistics: Partial | None,
    train: TrainState,
    batch: Any,
    *,
    tx: optax.GradientTransformation,
    accumulate: int,
    rate: Float[Array, ""] | None = None,
    share_pass: bool = False,
) -> tuple[TrainState, Metrics]:
    """Computes one update inside a compiled program; skips it if it is not finite.

    Args:
        loss: `(params, batch) -> (loss, metrics)`.
        statistics: `(params, batch) -> stats` for the optimizer, or None.
        train: the state before the update.
        batch: its rows.
        tx: the optimizer.
        accumulate: microbatches of the batch.
        rate: an additional factor on the update, or None.
        share_pass: whether the statistics can be read from the loss's forward pass; see
            `can_share_pass`.
    """
    check_optimizer_state(train.opt_state, statistics)
    found = compute_gradients(
        loss,
        statistics,
        train.params,
        batch,
        accumulate=accumulate,
        share_pass=share_pass,
    )
    updates, opt_state = _optimizer_update(tx, train, found)
    if rate is not None:
        updates = jax.tree.map(lambda leaf: rate.astype(leaf.dtype) * leaf, updates)
    with jax.numpy_dtype_promotion(_OPTAX_PROMOTION):
        norm = _norm(found.gradients)
        update_norm = _norm(updates)
    # A finite gradient can give a non-finite update, since the learning rate may overflow it.
    finite = jnp.isfinite(found.loss) & jnp.isfinite(norm) & jnp.isfinite(update_norm)
    params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old),
        (optax.apply_updates(train.params, updates), opt_state),
        (train.params, train.opt_state),
    )
    new = TrainState(
        step=train.step + 1,
        params=params,
        opt_state=opt_state,
        skipped=train.skipped + jnp.where(finite, 0, 1),
    )
    step_metrics = {
        "loss": found.loss,
        "grad_norm": norm,
        "updated": finite.astype(jnp.float32),
    }
    return new, found.metrics | step_metrics


def make_train_step(
    loss: Loss,
    tx: optax.GradientTransformation,
    *,
    statistics: Callable[[Any, Any], Any] | None = None,
    accumulate: int = 1,
    mesh: Mesh | None = None,
    donate: bool = True,
) -> CheckedProgram:
    """Compiles `step(train, batch) -> (train, metrics)`; the old `train` must not be used again.

    An update is skipped if its loss or gradient is not finite: parameters and moments stay
    bit-exact, `skipped` counts it, and the metric `updated` is 0 instead of 1. This includes a
    batch in which no target counts, whose loss is NaN. Metrics stay on the device.

    A batch is a `data.Batch` or a mapping with `tokens`, and `mask` or `weights`. The losses of
    this package take only the fields of `Batch`. For other losses, a mapping may hold further
    arrays; the loss gets it with `weights` added.

    `step.lower(train, batch)` and `step.trace(train, batch)` are those of `jax.jit`, after the
    checks of a call; see `CheckedProgram`.

    Args:
        loss: `(params, batch) -> (loss, metrics)`, or the loss alone. Arrays inside a `Partial` are
            passed as arguments. A loss with terms that are not sums over targets may be a
            `LossWithTotals`.
        tx: the optimizer. It gets the loss and its gradient as `value` and `grad`. A line search,
            which evaluates the loss again, is not supported.
        statistics: `(params, batch) -> stats`, computed from the full batch and passed to an
            optimizer such as `decorrelate` with every update. Those of this package use the forward
            pass of the same model's loss if `accumulate` is 1 and they read at least half as many
            rows as a device computes.
        accumulate: microbatches for gradient accumulation; any number gives the gradient of the
            full batch.
        mesh: the devices over which the rows of `batch` are sharded. `train` and the arrays of
            `loss` and `statistics` must lie as `sharding.place` puts them.
        donate: whether to reuse the memory of the old `train` for the new one, so that only one set
            of parameters and moments exists. The old one is then deleted, even if an interrupt ends
            the call before there is a new one. False keeps it.

    Raises:
        TypeError: an argument of the wrong type; from the step: an optimizer that needs more than
            gradients, parameters and the loss's value.
        ValueError: `accumulate` below 1; from the step: a batch whose arrays do not match each
            other or whose ids are out of range, rows that `accumulate` does not divide, a loss that
            divides by a microbatch's mask, a `train` that was donated, or a call inside
            `flax.linen.intercept_methods`, which belongs into the loss.
    """
    with prefix_errors("make_train_step"):
        loss, statistics = check_step_arguments(loss, tx, statistics, accumulate, mesh)

    share_pass = can_share_pass(loss, statistics, accumulate)

    @functools.partial(jax.jit, donate_argnums=(2,) if donate else ())
    def step(loss: Partial, statistics: Partial | None, train: TrainState, batch: Any):
        with use_mesh(mesh):
            moved = apply_update(
                loss,
                statistics,
                train,
                batch,
                tx=tx,
                accumulate=accumulate,
                share_pass=share_pass,
            )
            return constrain_layout(moved)

    if mesh is not None:
        loss, statistics = place(mesh, (loss, statistics))
    return CheckedProgram(
        step,
        loss,
        statistics,
        caller="make_train_step",
        trained="train",
        needs_shares=True,
        mesh=mesh,
    )


def make_eval_step(loss: Loss) -> CheckedProgram:
    """Compiles `evaluate(params, batch) -> metrics`, without gradients, as a `CheckedProgram`.

    A loss gets the batch as in a train step, with `weights` where there is a mask. Here a mapping
    may have neither, for a loss that reads neither.

    Raises:
        TypeError: not a function.
        ValueError: from `evaluate`: arrays that do not match each other, or ids out of range.
    """
    with prefix_errors("make_eval_step"):
        loss = as_partial(loss, "`loss`")

    def evaluate(loss: Partial, params: Any, batch: Mapping[str, Any]) -> Metrics:
        # As in a train step, so that the caller's own loss can be the same.
        if "mask" in batch or "weights" in batch:
            batch = with_shares(batch, 1)
        value, metrics = loss_and_metrics(loss(params, batch))
        # A loss without metrics becomes the metric.
        return metrics or {"loss": value}

    return CheckedProgram(
        jax.jit(evaluate),
        loss,
        caller="make_eval_step",
        trained="params",
        needs_shares=False,
    )
