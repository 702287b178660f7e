"""What a tuned start state does, and what it costs, in numbers and sentences."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rwkv7_jax.array_types import Params
from rwkv7_jax.data.batch import Batch, BatchLike
from rwkv7_jax.evaluation.advice import Diagnosis, MemoryStatistics, RetentionScore, advise
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import RWKV7State, check_state, init_state, repeat
from rwkv7_jax.optim.whitening import effective_rank
from rwkv7_jax.training.losses import token_statistics
from rwkv7_jax.tuning.read_statistics import (
    initial_state_read_vectors,
    memory_read_vectors,
    second_moment,
)
from rwkv7_jax.tuning.state_arithmetic import singular_values

# Rows read at the same time.
ROWS = 8

_COMPARED = ("base_nats", "tuned_nats", "base_right", "tuned_right", "divergence")


def _pieces(batch: Batch) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Tokens, mask and which rows are there, `ROWS` rows at a time; the last piece is filled up."""
    tokens, mask = np.asarray(batch.tokens), np.asarray(batch.mask, np.float32)
    for first in range(0, len(tokens), ROWS):
        piece = slice(first, first + ROWS)
        missing = ROWS - len(tokens[piece])
        filled = [np.pad(x[piece], ((0, missing), (0, 0))) for x in (tokens, mask)]
        yield *filled, (np.arange(ROWS) < ROWS - missing).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def _compare(model: RWKV7, params: Params, base: RWKV7State, tuned: RWKV7State, tokens: Array):
    """What every target costs from either start, whether it is the likeliest id, and the KL."""

    def hidden(start: RWKV7State) -> Array:
        start = repeat(start, tokens.shape[0])
        return model.apply({"params": params}, tokens[:, :-1], start, method="hidden")[0]

    targets = tokens[:, 1:]
    head = params["head"]["weight"]
    base_hidden = hidden(base)
    before = token_statistics(base_hidden, head, targets)
    after = token_statistics(hidden(tuned), head, targets, reference=base_hidden)
    return {
        "base_nats": before.nats,
        "tuned_nats": after.nats,
        "base_right": before.correct,
        "tuned_right": after.correct,
        "divergence": after.kl,
    }


def _compared(model: RWKV7, params: Params, state: RWKV7State, batch: Batch) -> dict:
    """`_compare` on every row of the batch: float64 arrays [B T] by name."""
    base = init_state(model.config)
    found = [_compare(model, params, base, state, tokens) for tokens, _, _ in _pieces(batch)]
    rows = len(batch.tokens)
    return {
        name: np.concatenate([np.asarray(one[name], np.float64) for one in found])[:rows]
        for name in _COMPARED
    }


def _kept(name: str, found: Mapping[str, np.ndarray], mask: np.ndarray) -> RetentionScore:
    means = {key: float((x * mask).sum() / mask.sum()) for key, x in found.items()}
    return RetentionScore(
        name=name,
        base_nats=means["base_nats"],
        tuned_nats=means["tuned_nats"],
        base_accuracy=means["base_right"],
        tuned_accuracy=means["tuned_right"],
        divergence=means["divergence"],
        tokens=int(np.count_nonzero(mask)),
    )


def _mask(batch: Batch, name: str, caller: str) -> np.ndarray:
    mask = np.asarray(batch.mask, np.float64)
    if not mask.any():
        raise ValueError(f"{caller}: `{name}` must have a target that counts; its mask is all 0.")
    return mask


def retention(
    model: RWKV7, params: Params, state: RWKV7State, batches: Mapping[str, BatchLike]
) -> tuple[RetentionScore, ...]:
    """What the model loses, or gains, on other texts and tasks when it starts from `state`.

    Args:
        model: the shell around `params`.
        params: all weights.
        state: batch 1.
        batches: by name, tokens [B T+1] and mask [B T].

    Raises:
        ValueError: another model's state, or a batch in which no target counts.
    """
    check_state(state, 1, model.config, caller="retention")
    rows = []
    for name, batch in batches.items():
        batch = Batch.of(batch, "mask", caller="retention")
        mask = _mask(batch, name, "retention")
        rows.append(_kept(name, _compared(model, params, state, batch), mask))
    return tuple(rows)


@functools.partial(jax.jit, static_argnums=0)
def _reads(
    model: RWKV7, params: Params, state: RWKV7State, tokens: Array, weights: Array, rows: Array
) -> dict[str, dict[str, Array]]:
    """How each memory is read: E[psi psi^T] [L H M M] over weighted targets, |psi|^2 [L T] by rows.

    As `state_tuning.state_statistics`, which keeps no positions.
    """
    start = repeat(state, tokens.shape[0])
    *_, trace = model.apply({"params": params}, tokens[:, :-1], start, method="trace")
    implementation = model.config.implementation

    def summary(psi: Float[Array, "B T H M"]) -> dict[str, Array]:
        squares = jnp.einsum("bthm,bthm,b->t", psi, psi, rows) / (jnp.sum(rows) * psi.shape[2])
        return {"moments": second_moment(psi, weights)[0], "reads": squares}

    def plain(layer) -> dict[str, Array]:
        return summary(initial_state_read_vectors(layer[0], implementation=implementation))

    def wide(layer) -> dict[str, Array]:
        return summary(memory_read_vectors(layer[1], layer[0], implementation=implementation))

    layers, found = (trace, state.upscaled), {}
    if state.upscaled is None or not state.upscaled.form.replaces_wkv:
        found["wkv"] = jax.lax.map(plain, layers)
    if state.upscaled is not None:
        found["memory"] = jax.lax.map(wide, layers)
    return found


@functools.partial(jax.jit, static_argnums=0)
def _end(model: RWKV7, params: Params, start: RWKV7State, tokens: Array, rows: Array) -> Array:
    """Mean squared Frobenius norms [L H] of the WKV states behind the tokens."""
    start = repeat(start, tokens.shape[0])
    _, end = model.apply({"params": params}, tokens[:, :-1], start, method="hidden")
    squares = jnp.sum(jnp.square(end.wkv), axis=(-2, -1))
    return jnp.einsum("lbh,b->lh", squares, rows) / jnp.sum(rows)


def _reference_norm(model: RWKV7, params: Params, batch: Batch) -> Float[np.ndarray, "L H"]:
    """Root mean square norms of the base model's WKV states when it has read the batch's rows."""
    start, squares = init_state(model.config), 0.0
    for tokens, _, rows in _pieces(batch):
        squares += rows.sum() * np.asarray(_end(model, params, start, tokens, rows), np.float64)
    return np.sqrt(squares / len(batch.tokens))


def _read_statistics(model: RWKV7, params: Params, state: RWKV7State, batch: Batch) -> dict:
    """`_reads` over the whole batch: each piece counts by its targets, or by its rows."""
    totals: dict[str, dict[str, np.ndarray]] = {}
    for tokens, mask, rows in _pieces(batch):
        share = {"moments": mask.sum(), "reads": rows.sum()}
        for name, parts in _reads(model, params, state, tokens, mask, rows).items():
            total = totals.setdefault(name, dict.fromkeys(parts, 0.0))
            for key, part in parts.items():
                total[key] = total[key] + float(share[key]) * np.asarray(part, np.float64)
    targets = float(np.asarray(batch.mask, np.float64).sum())
    return {
        name: {"moments": t["moments"] / targets, "reads": t["reads"] / len(batch.tokens)}
        for name, t in totals.items()
    }


def _memory(
    held: Array, found: Mapping[str, np.ndarray], dynamics: str, typical=None
) -> MemoryStatistics:
    """The numbers of one memory [L 1 H Nv M] from how it is read."""
    values = singular_values(held)
    squares = np.square(values)
    return MemoryStatistics(
        dynamics=dynamics,
        spectrum=values,
        norms=np.sqrt(squares.sum(-1)),
        typical=typical,
        rank=_rank(squares),
        read_rank=np.asarray(effective_rank(jnp.asarray(found["moments"], jnp.float32))),
        reads=found["reads"],
        channels=held.shape[-1],
    )


def _rank(squares: Float[np.ndarray, "... R"]) -> Float[np.ndarray, "..."]:
    """(sum s^2)^2 / sum s^4, as `whitening.effective_rank` of S S^T; 0 of a zero state."""
    total, fourth = squares.sum(-1), np.square(squares).sum(-1)
    return np.square(total) / np.where(fourth > 0, fourth, 1.0)


def ranks(held: Array) -> Float[np.ndarray, "L H"]:
    """How many directions carry a memory [L 1 H Nv M], per layer and head."""
    return _rank(np.square(singular_values(held)))


def diagnose(
    model: RWKV7,
    params: Params,
    state: RWKV7State,
    batch: BatchLike,
    *,
    generic: BatchLike | None = None,
) -> Diagnosis:
    """Everything that can be read off a tuned start state and two texts, and what to do about it.

    Args:
        model: the shell around `params`.
        params: all weights.
        state: batch 1.
        batch: tokens [B T+1] and mask [B T] of what it was tuned for.
        generic: the same of other text, on which the model shall stay what it was.

    Raises:
        ValueError: another model's state, or a batch in which no target counts.
    """
    check_state(state, 1, model.config, caller="diagnose")
    batch = Batch.of(batch, "mask", caller="diagnose")
    mask = _mask(batch, "batch", "diagnose")
    reads, memories = _read_statistics(model, params, state, batch), {}
    if "wkv" in reads:
        typical = _reference_norm(model, params, batch)
        memories["wkv"] = _memory(state.wkv, reads["wkv"], "recurrent", typical)
    if "memory" in reads:
        upscaled = state.upscaled
        memories["memory"] = _memory(upscaled.memory, reads["memory"], upscaled.dynamics)
    found, count = _compared(model, params, state, batch), mask.sum(0)
    by_position = {
        name: np.where(count > 0, (found[name] * mask).sum(0) / np.maximum(count, 1), np.nan)
        for name in ("base_nats", "tuned_nats")
    }
    kept = retention(model, params, state, {"generic": generic}) if generic is not None else ()
    diagnosis = Diagnosis(
        memories=memories,
        **by_position,
        counts=count,
        own=_kept("own", found, mask),
        generic=kept[0] if kept else None,
    )
    return dataclasses.replace(diagnosis, advice=advise(diagnosis))
