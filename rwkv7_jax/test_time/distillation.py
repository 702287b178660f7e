"""Distillation of collected completions into a start state."""

from collections.abc import Callable, Sequence

import numpy as np
import optax

from rwkv7_jax.array_types import Params
from rwkv7_jax.checks import check_count, check_tokens
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import RWKV7State
from rwkv7_jax.test_time.losses import distillation_loss
from rwkv7_jax.test_time.traces import Trace, trace_batch
from rwkv7_jax.test_time.tuning_loop import OnStep, Result, start_tuning
from rwkv7_jax.training.losses import Loss

PromptsAt = Callable[[int], Sequence[Sequence[int]]]


def distill(
    model: RWKV7,
    params: Params,
    traces: Sequence[Trace],
    *,
    steps: int = 60,
    batch_size: int = 32,
    length: int | None = None,
    seed: int = 0,
    state: RWKV7State | None = None,
    loss: Loss | None = None,
    learning_rate: float = 0.3,
    tx: optax.GradientTransformation | None = None,
    on_step: OnStep | None = None,
) -> Result:
    """A start state that has learned the traces; the weights never move.

    Args:
        model: the student.
        params: its weights.
        traces: at least one.
        steps: updates.
        batch_size: rows of an update.
        length: inputs of a row; None takes the longest trace's.
        seed: of the traces' order.
        state: where to start (batch 1); None is zeros.
        loss: of `test_time_losses`; None is `distillation_loss(model, params)`.
        learning_rate: of Adam with b2 = 0.99.
        tx: another optimizer.
        on_step: called with a step's numbers and the state, which the next update consumes.

    Raises:
        ValueError: no traces, ids outside the vocabulary, or a trace longer than `length`.
    """
    check_count(steps, 0, "distill: `steps`")
    if not traces:
        raise ValueError("distill: `traces` must hold a trace; got 0.")
    for trace in traces:
        ids = np.array([*trace.prompt, *trace.completion])
        check_tokens(ids, model.config.vocab_size, caller="distill")
    longest = max(len(trace.prompt) + len(trace.completion) - 1 for trace in traces)
    sizes = {"batch_size": batch_size, "length": length or longest, "seed": seed}
    loss = distillation_loss(model, params) if loss is None else loss
    running = {"tx": tx, "learning_rate": learning_rate, "on_step": on_step}
    run = start_tuning(model, loss, state, **running, caller="distill")
    for step in range(steps):
        run.note({"step": step} | run.update(trace_batch(traces, step, **sizes)))
    return Result(run.state, run.history, run.budget)
