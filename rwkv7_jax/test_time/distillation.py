"""Distillation of collected completions into a start state."""

from collections.abc import Callable, Sequence
from typing import Any

import optax

from rwkv7_jax.array_types import Params
from rwkv7_jax.checks import check_count, check_model, check_params, prefix_errors
from rwkv7_jax.data.batch import Batch
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import RWKV7State
from rwkv7_jax.test_time.losses import distillation_loss
from rwkv7_jax.test_time.traces import (
    Trace,
    check_trace_tokens,
    check_traces,
    longest_trace,
    trace_batch,
)
from rwkv7_jax.test_time.tuning_loop import (
    OnStep,
    Result,
    StateBatchSource,
    start_tuning,
)
from rwkv7_jax.training.losses import Loss
from rwkv7_jax.tuning.state_tuning import default_leaves


class TraceBatches(StateBatchSource):
    """Batches of given traces, every trace once an epoch; they do not depend on the state."""

    def __init__(
        self,
        traces: Sequence[Trace],
        *,
        batch_size: int = 32,
        length: int | None = None,
        seed: int = 0,
    ):
        """Sets the traces and their order.

        Args:
            traces: at least one, in a fixed order.
            batch_size: rows of a batch.
            length: inputs of a row; None takes the longest trace's.
            seed: of the traces' order.

        Raises:
            TypeError: an argument of the wrong kind.
            ValueError: no traces, or none that counts; a number out of its range; a trace that does
                not fit.
        """
        super().__init__()
        with prefix_errors("TraceBatches"):
            check_traces(traces)
            check_count(batch_size, 1, "`batch_size`")
            check_count(seed, 0, "`seed`")
            longest = longest_trace(traces)
            # 0 stands for the default in settings.
            if length and check_count(length, 0, "`length`") < longest:
                raise ValueError(
                    f"`length` must be at least {longest}, the longest trace; got {length}."
                )
        self._traces = traces
        self._batch_size = batch_size
        # One length for all batches, so that one program is compiled.
        self._length = length or longest
        self._seed = seed

    def batch(self, state: RWKV7State, step: int) -> Batch:
        """Makes the batch of a step, a function of the step and the seed alone."""
        # The teacher has written everything before, so nothing here depends on the student.
        del state
        return trace_batch(
            self._traces,
            step,
            batch_size=self._batch_size,
            length=self._length,
            seed=self._seed,
        )


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
    statistics: Callable[[Any, Any], Any] | None = None,
    on_step: OnStep | None = None,
) -> Result:
    """Tunes a start state on the traces; the weights never move.

    Args:
        model: the student.
        params: its weights.
        traces: at least one.
        steps: updates.
        batch_size: rows of an update.
        length: inputs of a row; None takes the longest trace's.
        seed: of the traces' order.
        state: where to start (batch 1); None is zeros. Of an upscaled state the memory is tuned.
        loss: of `test_time.losses`; None is `distillation_loss(model, params)`.
        learning_rate: of Adam with b2 = 0.99.
        tx: another optimizer.
        statistics: `state_statistics` where `tx` decorrelates, of the tuned leaves.
        on_step: called with a step's numbers and the state.

    Raises:
        ValueError: no traces, ids outside the vocabulary, or a trace longer than `length`.
    """
    with prefix_errors("distill"):
        check_model(model)
        check_params(params, model.config)
        check_count(steps, 0, "`steps`")
        check_trace_tokens(traces, model.config.vocab_size)
        source = TraceBatches(
            traces,
            batch_size=batch_size,
            length=length,
            seed=seed,
        )
        # Without a teacher in the loss: its completions are all that is left of it here.
        if loss is None:
            loss = distillation_loss(model, params, leaves=default_leaves(state))
        loop = start_tuning(
            model,
            loss,
            state,
            tx=tx,
            statistics=statistics,
            learning_rate=learning_rate,
            on_step=on_step,
        )
    return loop.run(source, steps)
