"""One step of training, for any loss and any tree of trainables.

A loss is a function of the trainables and a batch. One that needs large frozen arrays, such as a
model's weights, is a `jax.tree_util.Partial` over them: the compiled step then takes them as
arguments instead of holding them as constants.
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
from jaxtyping import Array, Int

from rwkv7_jax.data.batch import Batch
from rwkv7_jax.sharding import BATCH_AXIS, constrain_sharding, replicate, use_mesh
from rwkv7_jax.training.losses import Loss, Metrics, loss_weights


@typing.no_type_check
@struct.dataclass
class TrainState:
    """What training carries from step to step.

    Attributes:
        step: updates tried so far.
        params: the trainables: weights, or the start state.
        opt_state: optax's.
        skipped: updates left out because the loss or a gradient was not finite.
    """

    step: Int[Array, ""]
    params: Any
    opt_state: Any
    skipped: Int[Array, ""]

    @classmethod
    def create(cls, params: Any, tx: optax.GradientTransformation) -> "TrainState":
        """The state before the first step; `params` are copied, for steps consume their input."""
        params = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), params)
        step, skipped = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
        return cls(step=step, params=params, opt_state=tx.init(params), skipped=skipped)


def _gradients(loss: Loss, params, batch: Mapping[str, Any], accumulate: int):
    """The batch's loss, metrics and gradient, in `accumulate` pieces one after the other."""
    grad = jax.value_and_grad(lambda params, piece: loss(params, piece), has_aux=True)
    rows = batch["tokens"].shape[0]
    if rows % accumulate:
        raise ValueError(
            f"make_train_step: `accumulate` must divide the batch of {rows} rows; got {accumulate}."
        )
    # Weights are shares of the whole batch; a piece's are blown up so that the pieces' mean is
    # exact.
    weights = loss_weights(batch) * accumulate
    # A mapping with names of its own stays a mapping: it belongs to the user's loss.
    if isinstance(batch, Batch):
        batch = batch.replace(weights=weights)
    else:
        batch = {**batch, "weights": weights}
    if accumulate == 1:
        return grad(params, batch)
    pieces = jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), batch)
    pieces = constrain_sharding(pieces, None, BATCH_AXIS)
    outs = jax.eval_shape(grad, params, jax.tree.map(lambda x: x[0], pieces))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), outs)

    def add(total, piece):
        return jax.tree.map(jnp.add, total, grad(params, piece)), None

    total, _ = jax.lax.scan(add, zeros, pieces)
    return jax.tree.map(lambda x: x / accumulate, total)


def make_train_step(
    loss: Loss,
    tx: optax.GradientTransformation,
    *,
    statistics: Callable[[Any, Any], Any] | None = None,
    accumulate: int = 1,
    mesh: Mesh | None = None,
) -> Callable[[TrainState, Mapping[str, Any]], tuple[TrainState, Metrics]]:
    """`step(train, batch) -> (train, metrics)`, compiled; the old `train` must not be used again.

    An update whose loss or gradient is not finite is left out: parameters and moments stay as they
    are, bit for bit, `skipped` counts it and the metric `updated` is 0 in place of 1. Metrics stay
    on the device.

    A batch is a `data.Batch` or a mapping. A mapping may hold arrays of its own for the caller's
    own loss, which gets a mapping with `weights` added; it must hold `tokens`, and `mask` or
    `weights`. The losses of this package take a mapping of `Batch`'s fields alone.

    Args:
        loss: `(params, batch) -> (loss, metrics)`; arrays inside a `Partial` are passed as
            arguments.
        tx: the optimizer.
        statistics: `(params, batch) -> stats`, which an optimizer such as `decorrelate` gets with
            every update.
        accumulate: pieces into which a batch is cut; K pieces give the gradient of the whole batch.
        mesh: devices over which the rows of `batch` are spread while `train` and the arrays of
            `loss` and `statistics` are on all of them; see `parallel`.
    """
    loss = loss if isinstance(loss, Partial) else Partial(loss)
    if statistics is not None and not isinstance(statistics, Partial):
        statistics = Partial(statistics)
    tx = optax.with_extra_args_support(tx)

    def update(loss: Partial, statistics: Partial | None, train: TrainState, batch: Any):
        (value, metrics), grads = _gradients(loss, train.params, batch, accumulate)
        extra = {} if statistics is None else {"stats": statistics(train.params, batch)}
        updates, opt_state = tx.update(grads, train.opt_state, train.params, **extra)
        norm = optax.tree.norm(grads)
        # A finite gradient may still make an update that is not, under a rate out of all bounds.
        good = jnp.isfinite(value) & jnp.isfinite(norm) & jnp.isfinite(optax.tree.norm(updates))
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(good, new, old),
            (optax.apply_updates(train.params, updates), opt_state),
            (train.params, train.opt_state),
        )
        new = TrainState(
            step=train.step + 1,
            params=params,
            opt_state=opt_state,
            skipped=train.skipped + jnp.where(good, 0, 1),
        )
        updated = good.astype(jnp.float32)
        return new, metrics | {"loss": value, "grad_norm": norm, "updated": updated}

    @functools.partial(jax.jit, donate_argnums=2)
    def step(loss: Partial, statistics: Partial | None, train: TrainState, batch: Any):
        with use_mesh(mesh):
            return constrain_sharding(update(loss, statistics, train, batch))

    loss, statistics = replicate(mesh, (loss, statistics)) if mesh else (loss, statistics)
    return functools.partial(step, loss, statistics)


def make_eval_step(loss: Loss) -> Callable[[Any, Any], Metrics]:
    """`evaluate(params, batch) -> metrics`, compiled, without gradients."""
    loss = loss if isinstance(loss, Partial) else Partial(loss)
    run = jax.jit(lambda loss, params, batch: loss(params, batch)[1])
    return functools.partial(run, loss)
