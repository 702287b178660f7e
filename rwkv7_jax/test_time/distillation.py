"""Distils collected completions into a start state."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
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
    """Batches of fixed traces, each once per epoch, independent of the state."""

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
            traces: at least one trace, in a fixed order.
            batch_size: rows of a batch.
            length: inputs of a row; None takes that of the longest trace.
            seed: seed of the order of the traces.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: there are no traces, all have weight 0, a number is out of range, or a trace
                is longer than `length`.
        """
        super().__init__()
        with prefix_errors("TraceBatches"):
            longest = longest_trace(traces)
            check_count(batch_size, 1, "`batch_size`")
            check_count(seed, 0, "`seed`")
            # In settings, 0 means the default.
            if length and check_count(length, 0, "`length`") < longest:
                raise ValueError(
                    f"`length` must be at least {longest}, the longest trace; got {length}."
                )
        self._traces = traces
        self._batch_size = batch_size
        # One length for all batches needs only one program.
        self._length = length or longest
        self._seed = seed

    def batch(self, state: RWKV7State, step: int) -> Batch | None:
        """Makes the batch of a step, as a function of the step and the seed.

        Returns:
            The batch; None if all of its traces have weight 0.
        """
        del state
        batch = trace_batch(
            self._traces,
            step,
            batch_size=self._batch_size,
            length=self._length,
            seed=self._seed,
        )
        return batch if np.any(batch.mask) else None


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
    """Tunes a start state on traces; the weights stay frozen.

    Args:
        model: the student.
        params: its weights.
        traces: at least one trace.
        steps: number of updates.
        batch_size: rows of an update.
        length: inputs of a row; None takes that of the longest trace.
        seed: seed of the order of the traces.
        state: initial state (batch 1); None for zeros. For an upscaled state, the memory is tuned.
        loss: a loss of `test_time.losses`; None for `distillation_loss(model, params)`.
        learning_rate: learning rate of Adam with b2 = 0.99.
        tx: an optimizer in place of that Adam.
        statistics: `state_statistics` of the tuned leaves, if `tx` decorrelates.
        on_step: called with a step's numbers and the state.

    Raises:
        ValueError: there are no traces, an id is outside the vocabulary, or a trace is longer than
            `length`.
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
