"""Diagnosis of a tuned start state: what it does, and what it costs other text."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rwkv7_jax.array_types import Params
from rwkv7_jax.checks import prefix_errors
from rwkv7_jax.data.batch import Batch, BatchLike
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

# Rows that are read at the same time.
ROWS = 8


class _Part(NamedTuple):
    """`ROWS` rows of a batch; the last part of a batch is filled up with zeros.

    Attributes:
        tokens: of the rows.
        mask: of their targets, float32; 0 in rows that were filled up.
        present: 1 for rows of the batch, 0 for those that were filled up.
    """

    tokens: Int[np.ndarray, "B T1"]
    mask: Float[np.ndarray, "B T"]
    present: Float[np.ndarray, " B"]


def _parts(batch: Batch) -> Iterator[_Part]:
    """Cuts a batch into parts of one shape, so that a program is compiled once."""
    tokens = np.asarray(batch.tokens)
    mask = np.asarray(batch.mask, np.float32)
    for first in range(0, len(tokens), ROWS):
        rows = slice(first, first + ROWS)
        count = len(tokens[rows])
        padding = ((0, ROWS - count), (0, 0))
        yield _Part(
            tokens=np.pad(tokens[rows], padding),
            mask=np.pad(mask[rows], padding),
            present=(np.arange(ROWS) < count).astype(np.float32),
        )


@functools.partial(jax.jit, static_argnums=0)
def _compare_tokens(
    model: RWKV7, params: Params, base: RWKV7State, tuned: RWKV7State, tokens: Array
) -> dict[str, Any]:
    """Computes for each target the loss and whether it is the likeliest id, and the KL [B T]."""

    def hidden(start: RWKV7State) -> Array:
        inputs = tokens[:, :-1]
        return model.apply({"params": params}, inputs, start, method="hidden")[0]

    targets = tokens[:, 1:]
    head = params["head"]["weight"]
    # The reference of the KL as well, whose logits are made piece by piece in `token_statistics`.
    base_hidden = hidden(repeat(base, tokens.shape[0]))
    before = token_statistics(base_hidden, head, targets)
    after = token_statistics(hidden(tuned), head, targets, reference=base_hidden)
    return {
        "base_nats": before.nats,
        "tuned_nats": after.nats,
        "base_correct": before.correct,
        "tuned_correct": after.correct,
        # KL(base || tuned): how surprised the tuned model is by what the base model would write.
        "divergence": after.kl,
    }


def _compare(
    model: RWKV7, params: Params, state: RWKV7State, batch: Batch
) -> dict[str, np.ndarray]:
    """Compares the zero state with `state` on all rows: float64 arrays [B T] by name."""
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
        model: the shell around `params`.
        params: all weights.
        state: batch 1.
        batches: by name, tokens [B T+1] and mask [B T].

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: weights or a state of another model, ids out of range, or a batch in which no
            target counts.
    """
    checked = {}
    with prefix_errors("retention"):
        check_start(model, params, state)
        # A batch is a mapping as well, of arrays.
        if isinstance(batches, Batch) or not isinstance(batches, Mapping):
            kind = type(batches).__name__
            raise TypeError(f"`batches` must be batches by their names; got {kind}.")
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
    present: Array,
) -> dict[str, dict[str, Array]]:
    """Computes how each memory is read.

    As `tuning.read_statistics.state_statistics`, which keeps no positions.

    Returns:
        By memory: "moments", E[psi psi^T] [L H M M] over weighted targets; and "reads", the mean
        |psi|^2 [L T] over the rows that are present.
    """
    start = repeat(state, tokens.shape[0])
    *_, trace = model.apply({"params": params}, tokens[:, :-1], start, method="trace")
    implementation = model.config.implementation

    def summarize(psi: Float[Array, "B T H M"]) -> dict[str, Array]:
        heads = psi.shape[2]
        # [T]; rows that were filled up have weight 0.
        squares = jnp.einsum("bthm,bthm,b->t", psi, psi, present) / (
            jnp.sum(present) * heads
        )
        return {"moments": second_moment(psi, weights)[0], "reads": squares}

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
        # One layer at a time, [L ...]: the read vectors of all layers may not fit.
        reads["wkv"] = jax.lax.map(read_wkv, layers)
    if state.upscaled is not None:
        reads["memory"] = jax.lax.map(read_memory, layers)
    return reads


@functools.partial(jax.jit, static_argnums=0)
def _mean_square_norms(
    model: RWKV7, params: Params, start: RWKV7State, tokens: Array, present: Array
) -> Float[Array, "L H"]:
    """Computes the mean squared Frobenius norms of the WKV states after the tokens."""
    start = repeat(start, tokens.shape[0])
    outputs: Any = model.apply(
        {"params": params}, tokens[:, :-1], start, method="hidden"
    )
    _, end = outputs
    squares = jnp.sum(jnp.square(end.wkv), axis=(-2, -1))
    # Squares are averaged here, and the root is taken over all parts of the batch.
    return jnp.einsum("lbh,b->lh", squares, present) / jnp.sum(present)


def _reference_norm(
    model: RWKV7, params: Params, batch: Batch
) -> Float[np.ndarray, "L H"]:
    """Computes root mean square norms of the base model's WKV states after the batch's rows."""
    start = init_state(model.config)
    total: Any = 0.0
    for part in _parts(batch):
        norms = _mean_square_norms(model, params, start, part.tokens, part.present)
        total += part.present.sum() * np.asarray(norms, np.float64)
    return np.sqrt(total / len(batch.tokens))


def _read_statistics(
    model: RWKV7, params: Params, state: RWKV7State, batch: Batch
) -> dict[str, dict[str, np.ndarray]]:
    """Averages `_reads` over the batch, each part weighted by its targets or by its rows."""
    totals: dict[str, dict[str, Any]] = {}
    for part in _parts(batch):
        weights = {"moments": part.mask.sum(), "reads": part.present.sum()}
        reads = _reads(model, params, state, part.tokens, part.mask, part.present)
        for name, statistics in reads.items():
            total = totals.setdefault(name, dict.fromkeys(statistics, 0.0))
            for key, value in statistics.items():
                # In float64 on the host: sums over many parts would lose digits in float32.
                total[key] = total[key] + float(weights[key]) * np.asarray(
                    value, np.float64
                )
    targets = float(np.asarray(batch.mask, np.float64).sum())
    for total in totals.values():
        total["moments"] = total["moments"] / targets
        total["reads"] = total["reads"] / len(batch.tokens)
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
    """Computes the effective rank (sum s^2)^2 / sum s^4 from s^2; 0 of a zero state."""
    total = squares.sum(-1)
    fourth = np.square(squares).sum(-1)
    # The numerator is 0 as well where the fourth powers are.
    return np.square(total) / np.where(fourth > 0, fourth, 1.0)


def ranks(memory: Float[Array, "L 1 H Nv M"]) -> Float[np.ndarray, "L H"]:
    """Computes the effective rank of a memory, by layer and head.

    Raises:
        TypeError: not an array of numbers.
        ValueError: not the matrices of one sequence.
    """
    with prefix_errors("ranks"):
        memory = check_memory(memory)
    return _rank(np.square(singular_values(memory)))


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
        model: the shell around `params`.
        params: all weights.
        state: batch 1.
        batch: tokens [B T+1] and mask [B T] of the text that it was tuned for.
        generic: the same of other text, on which the model should not change.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: weights or a state of another model, ids out of range, or a batch in which no
            target counts.
    """
    with prefix_errors("diagnose"):
        check_start(model, params, state)
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
    """Measures the WKV state, if it is read, and the upscaled memory, if there is one."""
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
    """Averages over the rows at each position; NaN where nothing counts."""
    counts = mask.sum(0)
    means = (values * mask).sum(0) / np.where(counts > 0, counts, 1.0)
    return np.where(counts > 0, means, np.nan)
