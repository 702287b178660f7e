"""A stack: K sets of parameters that are trained together and independently of each other.

All leaves of a stack's parameters and moments have a leading axis K. A batch holds K times the rows
of one run: row i belongs to set i // rows. One program computes all sets. A non-finite gradient of
one set does not affect the others.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec
from jax.tree_util import Partial
from jax.typing import ArrayLike
from jaxtyping import Array

from rwkv7_jax.checks import check_count, check_number, is_known, prefix_errors
from rwkv7_jax.sharding import (
    SETS,
    TENSOR,
    as_shards,
    constrain_layout,
    place,
    share_of_sets,
    specs,
    use_mesh,
)
from rwkv7_jax.training.gradients import check_divisible, cut_rows
from rwkv7_jax.training.losses import Loss
from rwkv7_jax.training.shared_pass import can_share_pass
from rwkv7_jax.training.step_checks import CheckedProgram, check_step_arguments
from rwkv7_jax.training.train_step import TrainState, apply_update


def _axes(of_sets: Any, shared: Any) -> Any:
    """Returns a stack's `TrainState` with one value for fields with the axis K, one for others."""
    return TrainState(step=shared, params=of_sets, opt_state=of_sets, skipped=of_sets)


def _of_sets(function: Callable, train: TrainState) -> TrainState:
    """Applies a function to the fields of a stack's `TrainState` that have the axis K."""
    return dataclasses.replace(
        train,
        params=function(train.params),
        opt_state=function(train.opt_state),
        skipped=function(train.skipped),
    )


def stack_params(params: Sequence[Any]) -> Any:
    """Stacks trees of the same structure along a new leading axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)


def params_of(stack: Any, index: int) -> Any:
    """Selects one set of parameters of a stack."""
    return jax.tree.map(lambda leaf: leaf[index], stack)


def create_stack(params: Any, tx: optax.GradientTransformation) -> TrainState:
    """Makes the state of a stack before its first step.

    Args:
        params: all leaves with the leading axis K.
        tx: the optimizer of one set.
    """
    create = functools.partial(TrainState.create, tx=tx)
    return jax.vmap(create, out_axes=_axes(0, None))(params)


def _on_each_device(update: Callable, mesh: Mesh, sets: int) -> Callable:
    """Makes each device update its own sets; only frozen weights are gathered.

    If the devices do not divide the sets evenly, some sets are updated twice and the copies
    dropped, so every device has the same number of sets.
    """
    axes = tuple(axis for axis in SETS if mesh.shape.get(axis, 1) > 1)
    parts = math.prod(mesh.shape[axis] for axis in axes)
    shared = PartitionSpec(axes or None)
    fields = _axes(shared, PartitionSpec())
    filled = np.arange(share_of_sets(sets, mesh.shape) * parts) % sets

    def update_on_each(loss, statistics, train, *own):
        weights = specs(mesh.shape, (loss, statistics))

        def update_own(frozen, *own):
            return update(*as_shards(frozen, weights), *own)

        call = jax.shard_map(
            update_own,
            mesh=mesh,
            in_specs=(weights, fields, shared, shared),
            out_specs=(fields, shared),
            # The initial carries of scans are constants, which do not vary over devices.
            check_vma=False,
        )
        if len(filled) == sets:
            return call((loss, statistics), train, *own)

        def fill(tree):
            return jax.tree.map(lambda leaf: leaf[filled], tree)

        def cut(tree):
            return jax.tree.map(lambda leaf: leaf[:sets], tree)

        train, metrics = call(
            (loss, statistics), _of_sets(fill, train), *map(fill, own)
        )
        return _of_sets(cut, train), cut(metrics)

    return update_on_each


def _update_sets(
    loss: Partial,
    statistics: Partial | None,
    train: TrainState,
    batch: Any,
    rates: Array,
    *,
    tx: optax.GradientTransformation,
    accumulate: int,
    share_pass: bool,
    at_once: int | None,
) -> tuple[TrainState, dict[str, Array]]:
    """Updates every set with its own rows and rate; see `make_stacked_step`."""

    def update_set(inputs):
        one_train, rows, rate = inputs
        return apply_update(
            loss,
            statistics,
            one_train,
            rows,
            tx=tx,
            accumulate=accumulate,
            rate=rate,
            share_pass=share_pass,
        )

    # All sets share one step counter.
    steps = jnp.broadcast_to(train.step, rates.shape)
    sets = (dataclasses.replace(train, step=steps), batch, rates)
    if at_once is None or at_once >= len(rates):
        new, metrics = jax.vmap(update_set)(sets)
    else:
        new, metrics = jax.lax.map(update_set, sets, batch_size=at_once)
    return dataclasses.replace(new, step=train.step + 1), metrics


def make_stacked_step(
    loss: Loss,
    tx: optax.GradientTransformation,
    rates: ArrayLike,
    *,
    statistics: Callable[[Any, Any], Any] | None = None,
    accumulate: int = 1,
    at_once: int | None = None,
    mesh: Mesh | None = None,
    donate: bool = True,
) -> CheckedProgram:
    """Compiles `step(train, batch) -> (train, metrics)` for a stack; see `make_train_step`.

    Gradients, clipping, moments, statistics and skipped updates are separate for each set. Each
    metric is an array [K].

    Args:
        loss: of one set and its own rows.
        tx: the optimizer of one set.
        rates: [K], a factor on each set's updates: its learning rate if that of `tx` peaks at 1.
        statistics: of one set and its own rows.
        accumulate: microbatches of each set's rows.
        at_once: sets that are computed at the same time, to limit memory; None for all.
        mesh: devices over which the sets are sharded, along `sequence` too. The arrays of `loss`
            and `statistics` are placed on it, or on the default device without a mesh.
        donate: as in `make_train_step`.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: `accumulate` below 1, no rates, a rate that is negative or not finite, or a mesh
            with a tensor axis; from the step, rows that the sets do not divide, or as in
            `make_train_step`.
    """
    with prefix_errors("make_stacked_step"):
        loss, statistics = check_step_arguments(loss, tx, statistics, accumulate, mesh)
        if at_once is not None:
            check_count(at_once, 1, "`at_once`")
        rates = _check_rates(rates)
        _check_no_shared_heads(mesh)

    update = functools.partial(
        _update_sets,
        tx=tx,
        accumulate=accumulate,
        share_pass=can_share_pass(loss, statistics, accumulate),
        at_once=at_once,
    )
    if mesh is not None:
        update = _on_each_device(update, mesh, rates.size)

    @functools.partial(jax.jit, donate_argnums=(3,) if donate else ())
    def step(
        loss: Partial,
        statistics: Partial | None,
        rates: Array,
        train: TrainState,
        batch: Any,
    ):
        # Here, where the caller's function is known: each set cuts its rows again.
        number = "the number of `rates`"
        if accumulate > 1:
            number = f"{number} x `accumulate`"
        check_divisible(batch, rates.size * accumulate, "make_stacked_step", number)
        with use_mesh(mesh):
            sets = cut_rows(batch, rates.size)
            moved = update(loss, statistics, train, sets, rates)
            return constrain_layout(moved)

    # Needed without a mesh too: frozen weights may be on more devices than the sets need.
    loss, statistics, rates = place(mesh, (loss, statistics, rates))
    return CheckedProgram(
        step,
        loss,
        statistics,
        rates,
        caller="make_stacked_step",
        trained="train",
        needs_shares=True,
    )


def _check_rates(rates: ArrayLike) -> Array:
    """Returns the rates as a vector [K] of float32."""
    rates = jnp.asarray(rates, jnp.float32)
    if rates.ndim != 1 or not rates.size:
        raise ValueError(
            f"`rates` must hold one number per set; got shape {rates.shape}."
        )
    if is_known(rates):
        for rate in np.asarray(rates):
            check_number(rate, 0, math.inf, "`rates`")
    return rates


def _check_no_shared_heads(mesh: Mesh | None) -> None:
    """Raises if a mesh shards heads."""
    if mesh is not None and mesh.shape.get(TENSOR, 1) > 1:
        raise ValueError(
            "`mesh` must have no tensor axis: each device computes all heads of its sets; "
            f"got one of {mesh.shape[TENSOR]}."
        )
