"""Statistics of how tuned memories are read: effective read vectors and their second moments."""

import dataclasses
import functools
import typing
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import Partial
from jaxtyping import Array, Float

from pallas_kernels import WKVInputs
from pallas_kernels.eager import compiled_when_eager
from rwkv7_jax.array_types import Params, SegmentIds
from rwkv7_jax.checks import (
    check_choice,
    check_count,
    check_model,
    check_params,
    prefix_errors,
)
from rwkv7_jax.data.batch import Batch, BatchLike
from rwkv7_jax.model.block import RECURRENCE
from rwkv7_jax.model.kernel_features import kernel_features
from rwkv7_jax.model.recurrence import LayerTrace, wkv7_sharded, wkv_inputs_of
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import RWKV7State, check_whole_state, repeat
from rwkv7_jax.model.upscaled_memory import RecurrentMemory, Upscaled
from rwkv7_jax.optim.decorrelation import METHODS, Decorrelator, Method, decorrelate
from rwkv7_jax.training.losses import loss_weights
from rwkv7_jax.training.shared_pass import hidden_of_batch
from rwkv7_jax.tuning.state_tuning import (
    check_leaves,
    replace_parts,
    trainable_mask,
)


def initial_state_read_vectors(
    parts: LayerTrace,
    *,
    implementation: str | None = None,
    segment_ids: SegmentIds | None = None,
    sequences: int | None = None,
) -> Float[Array, "B T H Nk"]:
    """Computes the effective read vector psi of the initial state at every token.

    y_t = S_0 psi_t + terms independent of S_0. psi_t is the product of all transitions up to t,
    times r_t.

    Args:
        parts: one layer's arrays of a trace.
        implementation: of the WKV op.
        segment_ids: the sequence of each token of packed rows.
        sequences: the number of sequences in all rows; None for one per row.
    """
    return _read_vectors(
        wkv_inputs_of(parts), implementation, segment_ids, sequences=sequences
    )


def memory_read_vectors(
    upscaled: Upscaled, parts: LayerTrace, *, implementation: str | None = None
) -> Float[Array, "B T H M"]:
    """Computes the effective read vector psi of the upscaled memory at every token.

    A static memory is read with phi(r); otherwise psi includes decay and removals.

    Args:
        upscaled: one layer's memory.
        parts: the same layer's arrays of a trace.
        implementation: of the WKV op, for a memory that changes in context.

    Raises:
        TypeError: a form that changes in context in another way than the WKV op's.
    """
    form = upscaled.form
    if form.has_own_rows and not isinstance(form, RecurrentMemory):
        raise TypeError(
            "memory_read_vectors: `upscaled` must be static or of a `RecurrentMemory`, whose reads "
            f"are known; got dynamics {upscaled.dynamics}."
        )
    if not isinstance(form, RecurrentMemory):
        return kernel_features(upscaled.features, parts["r"])
    inputs = form.wkv_inputs(upscaled, wkv_inputs_of(parts), parts["icl_rate"])
    return _read_vectors(inputs, implementation)


def _read_vectors(
    inputs: WKVInputs,
    implementation: str | None,
    segment_ids: SegmentIds | None = None,
    *,
    sequences: int | None = None,
) -> Float[Array, "B T H Nk"]:
    rows, _, heads, size = inputs.r.shape
    # From the identity and without writes (k = v = 0), the op returns psi.
    start = jnp.broadcast_to(
        jnp.eye(size, dtype=jnp.float32), (sequences or rows, heads, size, size)
    )
    nothing = jnp.zeros_like(inputs.r)
    inputs = inputs._replace(k=nothing, v=nothing)
    return wkv7_sharded(
        inputs, start, implementation=implementation, segment_ids=segment_ids
    )[0]


def second_moment(
    psi: Float[Array, "B T H M"], weights: Float[Array, "B T"]
) -> Float[Array, "1 H M M"]:
    """Averages psi psi^T per head over tokens, weighted by |weights| and without centring.

    If all weights are 0 the average is 0, which `decorrelate` ignores.
    """
    # A target of negative weight, such as one with a reward below the mean, counts like any other.
    weights = jnp.abs(weights)
    # Full precision: DBP inverts these matrices, and their small eigenvalues matter most.
    psi = psi.astype(jnp.float32)
    # Not centred: the constant part of psi affects the conditioning like any other direction.
    total = jnp.einsum("bthm,bthn,bt->hmn", psi, psi, weights, precision="highest")
    weight = jnp.sum(weights)
    # Not max(weight, ...): the weights may be small numbers of any scale.
    return (total / jnp.where(weight > 0, weight, 1.0))[None]


@dataclasses.dataclass(frozen=True)
class _StateStatistics:
    """Moments of the read vectors; the first argument of a call is the frozen weights.

    Attributes:
        model: the shell around the weights.
        leaves: the tuned arrays, of `LEAVES`.
        rows: rows of the batch that are read.
        names: of arrays in the model's trace.
    """

    model: RWKV7
    leaves: tuple[str, ...]
    rows: int
    names: tuple[str, ...] = RECURRENCE

    def __call__(
        self, params: Params, state: RWKV7State, batch: BatchLike
    ) -> RWKV7State:
        """Measures the moments in a separate forward pass."""
        with prefix_errors("state_statistics"):
            batch = Batch.of(batch, packed=True)
        read = batch.select_rows(slice(self.rows))
        start = repeat(state, read.sequences)
        _, trace = hidden_of_batch(self.model, params, start, read, self.names)
        return self.of_trace(params, state, batch, trace)

    def of_trace(
        self,
        params: Params,
        state: RWKV7State,
        batch: BatchLike,
        trace: dict[str, Array],
    ) -> RWKV7State:
        """Measures the moments in the trace of a batch."""
        del params
        trace = jax.tree.map(lambda array: array[:, : self.rows], trace)
        batch = Batch.of(batch, packed=True)
        # Computed for all rows before slicing, so that they are shares of the batch.
        weights = loss_weights(batch)[: self.rows]
        batch = batch.select_rows(slice(self.rows))
        found = _moments(
            self.leaves,
            self.model.config.implementation,
            (trace, state.upscaled),
            batch,
            weights,
        )
        moments = replace_parts(jax.tree.map(lambda _: None, state), found)
        # The moments are not part of the loss.
        return jax.lax.stop_gradient(moments)


@functools.partial(compiled_when_eager, static_argnums=(0, 1))
def _moments(
    leaves: tuple[str, ...],
    implementation: str | None,
    layers: tuple[dict[str, Array], Upscaled | None],
    batch: Batch,
    weights: Float[Array, "B T"],
) -> dict[str, Array]:
    """Computes the moments of the tuned memories that are read linearly, by name."""

    def of_wkv(layer):
        reads = initial_state_read_vectors(
            layer[0],
            implementation=implementation,
            segment_ids=batch.segment_ids,
            sequences=batch.sequences,
        )
        return second_moment(reads, weights)

    def of_memory(layer):
        parts, upscaled = layer
        reads = memory_read_vectors(upscaled, parts, implementation=implementation)
        return second_moment(reads, weights)

    # One layer at a time: the read vectors of all layers would need too much memory.
    functions = {"wkv": of_wkv, "memory": of_memory}
    return {
        name: jax.lax.map(function, layers)
        for name, function in functions.items()
        if name in leaves
    }


def state_statistics(
    model: RWKV7, params: Params, *, leaves: tuple[str, ...] = ("wkv",), rows: int = 8
) -> Partial:
    """Makes the function that measures how the tuned memories are read, for `decorrelate`.

    It is called as `statistics(state, batch)`. A memory is read linearly, y_t = S_0 psi_t + terms
    that do not depend on S_0 in this layer, so E[psi psi^T] over the targets determines the
    conditioning of its tuning. The result is a state whose "wkv" [L 1 H Nk Nk] and "memory"
    [L 1 H M M] are these moments if they are tuned, and None elsewhere.

    Args:
        model: the shell around `params`.
        params: all weights.
        leaves: the tuned arrays, of `LEAVES`.
        rows: rows of the batch that are read.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an unknown leaf, weights of another model, or rows below 1.
    """
    with prefix_errors("state_statistics"):
        check_model(model)
        check_params(params, model.config)
        check_leaves(leaves)
        check_count(rows, 1, "`rows`")
    return Partial(_StateStatistics(model, tuple(leaves), rows), params)


def state_decorrelator(
    model: RWKV7,
    params: Params,
    start: RWKV7State,
    *,
    leaves: tuple[str, ...] = ("wkv",),
    method: str = "none",
    rows: int = 8,
    **numbers: Any,
) -> Decorrelator:
    """Prepares the optimizer of a start state: masked to the tuned arrays, optionally decorrelated.

    Args:
        model: the shell around `params`.
        params: all weights.
        start: the state before tuning (batch 1).
        leaves: the tuned arrays, of `LEAVES`.
        method: "none", "dbp" (learned online) or "whiten" (once, from the first batch). The
            features of an upscaled memory are whitened at calibration, so "whiten" does not change
            its optimizer.
        rows: rows of the batch that are read.
        **numbers: further settings of `decorrelate`, such as `rate` and `damping`.

    Raises:
        ValueError: an unknown method or leaf; from `wrap`, a number out of its range.
    """
    with prefix_errors("state_decorrelator"):
        check_model(model)
        check_params(params, model.config)
        check_leaves(leaves)
        check_whole_state(start, "`start`")
        check_count(rows, 1, "`rows`")
        check_choice(method, METHODS, "`method`")
    tuned = trainable_mask(start, leaves)
    mode = METHODS[typing.cast(Method, method)]
    if mode is None or (mode == "whiten" and "memory" in leaves):
        return Decorrelator(wrap=lambda tx: optax.masked(tx, tuned))
    # Token shifts and the strength of writes are not read linearly, so they have no statistics.
    linear = [name for name in leaves if name in ("wkv", "memory")]
    mask = trainable_mask(start, tuple(linear))
    if mask.upscaled is not None:
        mask = mask.replace(upscaled=mask.upscaled.replace(write=False))

    def wrap(tx: optax.GradientTransformation) -> optax.GradientTransformation:
        # Masked outside, so frozen leaves get no moments and no weight decay.
        return optax.masked(decorrelate(tx, mode=mode, mask=mask, **numbers), tuned)

    return Decorrelator(wrap, state_statistics(model, params, leaves=leaves, rows=rows))
