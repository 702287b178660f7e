"""Diagnosis of a tuned start state: its effect, and its cost on other text."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rwkv7_jax.array_types import Lengths, Params
from rwkv7_jax.checks import prefix_errors
from rwkv7_jax.data.batch import Batch, BatchLike
from rwkv7_jax.data.batching import row_sizes
from rwkv7_jax.evaluation.advice import (
    Diagnosis,
    MemoryStatistics,
    RetentionScore,
    advise,
)
from rwkv7_jax.evaluation.scoring import check_start, map_rows
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import RWKV7State, init_state, repeat
from rwkv7_jax.optim.whitening import effective_rank
from rwkv7_jax.training.head_loss import token_statistics
from rwkv7_jax.training.losses import check_masked_batch
from rwkv7_jax.tuning.read_statistics import (
    initial_state_read_vectors,
    memory_read_vectors,
    second_moment,
)
from rwkv7_jax.tuning.state_arithmetic import check_memory, singular_values

# Rows per batch.
ROWS = 8


class _Part(NamedTuple):
    """`ROWS` rows of a batch; the last part of a batch is padded with zero rows.

    Attributes:
        tokens: tokens of the rows.
        mask: mask of their targets, float32; 0 in padding rows.
        lengths: number of inputs of each row before its padding; 0 for padding rows.
    """

    tokens: Int[np.ndarray, "B T1"]
    mask: Float[np.ndarray, "B T"]
    lengths: Lengths


def _parts(batch: Batch) -> Iterator[_Part]:
    """Splits a batch into parts of one shape, so that one program serves all of them."""
    tokens = np.asarray(batch.tokens)
    mask = np.asarray(batch.mask, np.float32)
    lengths = _input_lengths(batch)
    for first in range(0, len(tokens), ROWS):
        rows = slice(first, first + ROWS)
        count = len(tokens[rows])
        padding = ((0, ROWS - count), (0, 0))
        yield _Part(
            tokens=np.pad(tokens[rows], padding),
            mask=np.pad(mask[rows], padding),
            lengths=np.pad(lengths[rows], padding[0]),
        )


def _input_lengths(batch: Batch) -> Int[np.ndarray, " B"]:
    """Counts the inputs of each row before its padding, which would be read as ends of text."""
    sizes = row_sizes(np.asarray(batch.tokens), np.asarray(batch.mask))
    # The last token is only a target.
    return np.maximum(sizes - 1, 0).astype(np.int32)


@functools.partial(jax.jit, static_argnums=0)
def _compare_tokens(
    model: RWKV7, params: Params, base: RWKV7State, tuned: RWKV7State, tokens: Array
) -> dict[str, Any]:
    """Computes each target's loss, whether it is the most likely id, and the KL, all [B T]."""

    def hidden(start: RWKV7State) -> Array:
        inputs = tokens[:, :-1]
        return model.apply({"params": params}, inputs, start, method="hidden")[0]

    targets = tokens[:, 1:]
    head = params["head"]["weight"]
    # Also the reference of the KL; `token_statistics` computes its logits piece by piece.
    base_hidden = hidden(repeat(base, tokens.shape[0]))
    before = token_statistics(base_hidden, head, targets)
    after = token_statistics(hidden(tuned), head, targets, reference=base_hidden)
    return {
        "base_nats": before.nats,
        "tuned_nats": after.nats,
        "base_correct": before.correct,
        "tuned_correct": after.correct,
        # KL(base || tuned).
        "divergence": after.kl,
    }


def _compare(
    model: RWKV7, params: Params, state: RWKV7State, batch: Batch
) -> dict[str, np.ndarray]:
    """Compares the zero state with `state` on all rows; returns float64 arrays [B T] by name."""
    compare = functools.partial(
        _compare_tokens, model, params, init_state(model.config)
    )
    compared = map_rows(compare, state, np.asarray(batch.tokens), ROWS)
    return {name: np.asarray(rows, np.float64) for name, rows in compared.items()}


def _retention_score(
    name: str, compared: Mapping[str, np.ndarray], mask: Any
) -> RetentionScore:
    mask = np.asarray(mask, np.float64)
    means = {}
    for key, values in compared.items():
        means[key] = float((values * mask).sum() / mask.sum())
    return RetentionScore(
        name=name,
        base_nats=means["base_nats"],
        tuned_nats=means["tuned_nats"],
        base_accuracy=means["base_correct"],
        tuned_accuracy=means["tuned_correct"],
        divergence=means["divergence"],
        tokens=int(np.count_nonzero(mask)),
    )


def retention(
    model: RWKV7, params: Params, state: RWKV7State, batches: Mapping[str, BatchLike]
) -> tuple[RetentionScore, ...]:
    """Measures how a start state changes the loss on other texts and tasks.

    Args:
        model: the network.
        params: all weights.
        state: batch 1.
        batches: tokens [B T+1] and mask [B T] of each text, by name.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the weights or the state do not fit the model, an id is out of range, or no
            target of a batch counts.
    """
    checked = {}
    with prefix_errors("retention"):
        check_start(model, params, state)
        # A single batch is a mapping too, of arrays.
        if isinstance(batches, Batch) or not isinstance(batches, Mapping):
            kind = type(batches).__name__
            raise TypeError(f"`batches` must map names to batches; got {kind}.")
        for name, batch in batches.items():
            argument = f"batches[{name!r}]"
            checked[name] = check_masked_batch(batch, model.config.vocab_size, argument)
    scores = []
    for name, batch in checked.items():
        compared = _compare(model, params, state, batch)
        scores.append(_retention_score(name, compared, batch.mask))
    return tuple(scores)


@functools.partial(jax.jit, static_argnums=0)
def _reads(
    model: RWKV7,
    params: Params,
    state: RWKV7State,
    tokens: Array,
    weights: Array,
    lengths: Array,
) -> dict[str, dict[str, Array]]:
    """Computes statistics of the read vectors of each memory.

    `tuning.read_statistics.state_statistics` computes the same without positions.

    Returns:
        For each memory "moments", E[psi psi^T] [L H M M] over weighted targets, and "reads", the
        sum [L T] over the rows without their padding of the mean |psi|^2 of the heads.
    """
    start = repeat(state, tokens.shape[0])
    *_, trace = model.apply({"params": params}, tokens[:, :-1], start, method="trace")
    implementation = model.config.implementation
    positions = jnp.arange(tokens.shape[1] - 1)
    is_read = positions[None, :] < lengths[:, None]

    def summarize(psi: Float[Array, "B T H M"]) -> dict[str, Array]:
        heads = psi.shape[2]
        squares = jnp.einsum("bthm,bthm->bt", psi, psi, precision="highest")
        reads = jnp.sum(jnp.where(is_read, squares, 0.0), axis=0) / heads
        return {"moments": second_moment(psi, weights)[0], "reads": reads}

    def read_wkv(layer: Any) -> dict[str, Array]:
        return summarize(
            initial_state_read_vectors(layer[0], implementation=implementation)
        )

    def read_memory(layer: Any) -> dict[str, Array]:
        return summarize(
            memory_read_vectors(layer[1], layer[0], implementation=implementation)
        )

    layers = (trace, state.upscaled)
    reads = {}
    if state.upscaled is None or not state.upscaled.form.replaces_wkv:
        # One layer at a time: the read vectors of all layers may not fit into memory.
        reads["wkv"] = jax.lax.map(read_wkv, layers)
    if state.upscaled is not None:
        reads["memory"] = jax.lax.map(read_memory, layers)
    return reads


@functools.partial(jax.jit, static_argnums=0)
def _square_norms(
    model: RWKV7, params: Params, start: RWKV7State, tokens: Array, lengths: Array
) -> Float[Array, "L H"]:
    """Sums the squared Frobenius norms of the WKV states after the rows without their padding."""
    start = repeat(start, tokens.shape[0])
    outputs: Any = model.apply(
        {"params": params}, tokens[:, :-1], start, lengths, method="hidden"
    )
    _, end = outputs
    squares = jnp.sum(jnp.square(end.wkv), axis=(-2, -1))
    # The caller averages the squares over all parts before it takes the root.
    return jnp.sum(jnp.where(lengths[:, None] > 0, squares, 0.0), axis=1)


def _reference_norm(
    model: RWKV7, params: Params, batch: Batch
) -> Float[np.ndarray, "L H"]:
    """Computes root mean square norms of the base model's WKV states after the batch's rows."""
    start = init_state(model.config)
    total: Any = 0.0
    for part in _parts(batch):
        squares = _square_norms(model, params, start, part.tokens, part.lengths)
        total += np.asarray(squares, np.float64)
    return np.sqrt(total / np.count_nonzero(_input_lengths(batch)))


def _read_statistics(
    model: RWKV7, params: Params, state: RWKV7State, batch: Batch
) -> dict[str, dict[str, np.ndarray]]:
    """Averages `_reads` over the targets of the batch, and over the rows at each position."""
    totals: dict[str, dict[str, Any]] = {}
    for part in _parts(batch):
        # The moments of a part are means, and the reads are sums.
        weights = {"moments": part.mask.sum(), "reads": 1.0}
        reads = _reads(model, params, state, part.tokens, part.mask, part.lengths)
        for name, statistics in reads.items():
            total = totals.setdefault(name, dict.fromkeys(statistics, 0.0))
            for key, value in statistics.items():
                # float64 on the host: float32 sums over many parts would lose precision.
                total[key] = total[key] + float(weights[key]) * np.asarray(
                    value, np.float64
                )
    targets = float(np.asarray(batch.mask, np.float64).sum())
    positions = np.arange(batch.tokens.shape[1] - 1)
    rows = np.count_nonzero(positions < _input_lengths(batch)[:, None], axis=0)
    for total in totals.values():
        total["moments"] = total["moments"] / targets
        total["reads"] = total["reads"] / np.where(rows, rows, np.nan)
    return totals


def _memory_statistics(
    memory: Float[Array, "L 1 H Nv M"],
    reads: Mapping[str, np.ndarray],
    dynamics: str,
    reference_norm: Float[np.ndarray, "L H"] | None = None,
) -> MemoryStatistics:
    values = singular_values(memory)
    squares = np.square(values)
    return MemoryStatistics(
        dynamics=dynamics,
        spectrum=values,
        norms=np.sqrt(squares.sum(-1)),
        reference_norm=reference_norm,
        rank=_rank(squares),
        read_rank=np.asarray(
            effective_rank(jnp.asarray(reads["moments"], jnp.float32))
        ),
        reads=reads["reads"],
        channels=memory.shape[-1],
    )


def _rank(squares: Float[np.ndarray, "... R"]) -> Float[np.ndarray, "..."]:
    """Computes the effective rank (sum s^2)^2 / sum s^4 from s^2; 0 for a zero state."""
    total = squares.sum(-1)
    fourth = np.square(squares).sum(-1)
    # If the denominator is 0, so is the numerator.
    return np.square(total) / np.where(fourth > 0, fourth, 1.0)


def ranks(memory: Float[Array, "L 1 H Nv M"]) -> Float[np.ndarray, "L H"]:
    """Computes the effective rank of a memory, by layer and head.

    Raises:
        TypeError: `memory` is not an array of numbers.
        ValueError: `memory` does not hold the matrices of one sequence, or is not finite.
    """
    with prefix_errors("ranks"):
        memory = check_memory(memory)
    return _rank(np.square(singular_values(memory)))


def check_finite(state: RWKV7State) -> None:
    """Raises unless all numbers of a state are finite."""
    for leaf in jax.tree.leaves(state):
        if not np.all(np.isfinite(np.asarray(leaf, np.float64))):
            raise ValueError("`state` must be finite; it holds NaN or infinity.")


def diagnose(
    model: RWKV7,
    params: Params,
    state: RWKV7State,
    batch: BatchLike,
    *,
    generic: BatchLike | None = None,
) -> Diagnosis:
    """Measures a tuned start state on one or two texts and advises what to do about it.

    Args:
        model: the network.
        params: all weights.
        state: batch 1.
        batch: tokens [B T+1] and mask [B T] of the text that the state was tuned for.
        generic: the same for other text, on which the model should not change.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the weights or the state do not fit the model, the state is not finite, an id is
            out of range, or no target of a batch counts.
    """
    with prefix_errors("diagnose"):
        check_start(model, params, state)
        check_finite(state)
        batch = check_masked_batch(batch, model.config.vocab_size)
        if generic is not None:
            generic = check_masked_batch(generic, model.config.vocab_size, "generic")
    mask = np.asarray(batch.mask, np.float64)
    compared = _compare(model, params, state, batch)
    other = None
    if generic is not None:
        (other,) = retention(model, params, state, {"generic": generic})
    diagnosis = Diagnosis(
        memories=_memories(model, params, state, batch),
        base_nats=_mean_by_position(compared["base_nats"], mask),
        tuned_nats=_mean_by_position(compared["tuned_nats"], mask),
        counts=mask.sum(0),
        own=_retention_score("own", compared, mask),
        generic=other,
    )
    return dataclasses.replace(diagnosis, advice=advise(diagnosis))


def _memories(
    model: RWKV7, params: Params, state: RWKV7State, batch: Batch
) -> dict[str, MemoryStatistics]:
    """Measures the WKV state, if it is read, and the upscaled memory, if present."""
    reads = _read_statistics(model, params, state, batch)
    memories = {}
    if "wkv" in reads:
        reference_norm = _reference_norm(model, params, batch)
        memories["wkv"] = _memory_statistics(
            state.wkv, reads["wkv"], "recurrent", reference_norm
        )
    if state.upscaled is not None:
        memories["memory"] = _memory_statistics(
            state.upscaled.memory, reads["memory"], state.upscaled.dynamics
        )
    return memories


def _mean_by_position(
    values: Float[np.ndarray, "B T"], mask: Float[np.ndarray, "B T"]
) -> Float[np.ndarray, " T"]:
    """Averages over the rows at each position; NaN if no target counts there."""
    counts = mask.sum(0)
    means = (values * mask).sum(0) / np.where(counts > 0, counts, 1.0)
    return np.where(counts > 0, means, np.nan)
