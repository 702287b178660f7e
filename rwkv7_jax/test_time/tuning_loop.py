"""The loop that tunes a start state on the batches of a source, with early stopping."""

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rwkv7_jax.checks import (
    check_count,
    check_function,
    check_model,
    check_number,
    prefix_errors,
)
from rwkv7_jax.data.batch import Batch, BatchLike
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import RWKV7State, check_state, init_state
from rwkv7_jax.test_time.traces import TokenBudget, Trace, gradient_tokens
from rwkv7_jax.training.losses import Loss
from rwkv7_jax.training.train_step import TrainState, make_train_step

# One entry of a history: metrics by name.
Entry = dict[str, float | int]

OnStep = Callable[[Entry, RWKV7State], Any]


class StateBatchSource(abc.ABC):
    """The batches of one tuning method, for `TuningLoop` and train.py.

    Attributes:
        budget: tokens spent on making batches so far.
        metrics: numbers about the last batch.
    """

    def __init__(self):
        """Starts with an empty budget."""
        self.budget = TokenBudget()
        self.metrics: Entry = {}

    @abc.abstractmethod
    def batch(self, state: RWKV7State, step: int) -> Batch | None:
        """Makes the batch of a step.

        Args:
            state: the start state before the update (batch 1).
            step: index of the update, from 0.

        Returns:
            The batch, or None if the step has nothing to learn from. The caller must then skip the
            update: even a batch with zero weights would apply momentum.
        """


@dataclasses.dataclass(frozen=True)
class Result:
    """A tuned state with its history.

    Attributes:
        state: the tuned start state (batch 1).
        history: metrics by name, one entry per step or round.
        budget: tokens that tuning cost.
        traces: the completions that expert iteration kept.
    """

    state: RWKV7State
    history: list[Entry]
    budget: TokenBudget
    traces: list[Trace] = dataclasses.field(default_factory=list)


class TuningLoop:
    """A start state with its optimizer, its history and the cost of its updates.

    Attributes:
        history: one entry per step.
        budget: tokens of updates and evaluations so far; the source counts its own.
    """

    def __init__(
        self,
        step: Callable,
        train: TrainState,
        on_step: OnStep | None = None,
    ):
        """Sets the step function and the training state.

        Args:
            step: `(train, batch) -> (train, metrics)`.
            train: the training state of a start state.
            on_step: called with every entry and the state.
        """
        self.history: list[Entry] = []
        self.budget = TokenBudget()
        self._step = step
        self._train = train
        self._on_step = on_step

    @property
    def state(self) -> RWKV7State:
        """The current state."""
        return self._train.params

    def run(
        self,
        source: StateBatchSource,
        steps: int,
        *,
        updates: int = 1,
        repeats: int = 1,
        target: "RewardTarget | None" = None,
    ) -> Result:
        """Tunes on the source's batches.

        Args:
            source: source of the batches.
            steps: most steps, each with an entry in the history.
            updates: batches per step.
            repeats: updates with each batch.
            target: ends the loop early.
        """
        # A target needs one more iteration, to evaluate the state after the last update.
        for step in range(steps + (target is not None)):
            entry: Entry = {"step": step}
            if target is not None and target.reached(self, entry, last=step == steps):
                break
            # Sources count batches, the history counts steps.
            first = step * updates
            for number in range(first, first + updates):
                batch = source.batch(self.state, number)
                # A step without an update has these metrics too.
                entry |= source.metrics
                if batch is not None:
                    entry |= self.update(batch, repeats)
            self.record(entry)
        return Result(self.state, self.history, self.budget + source.budget)

    def update(self, batch: BatchLike, repeats: int = 1) -> Entry:
        """Makes updates with one batch; returns the last one's metrics."""
        metrics = {}
        for _ in range(repeats):
            self._train, metrics = self._step(self._train, batch)
        spent = gradient_tokens(batch)
        # The rows of the anchor have no padding: all their inputs count.
        if "anchor" in batch:
            spent += batch["anchor"][:, 1:].size
        self.budget += TokenBudget(gradient_tokens=repeats * spent)
        # One transfer from the device for all metrics.
        return {name: float(value) for name, value in jax.device_get(metrics).items()}

    def record(self, entry: Entry) -> None:
        """Adds the entry of a finished step to the history."""
        self.history.append(entry)
        if self._on_step:
            self._on_step(entry, self.state)


class RewardTarget:
    """The mean reward that ends tuning: on held-out prompts, or a moving average without them."""

    def __init__(
        self,
        evaluate: Callable[[RWKV7State], tuple[float, TokenBudget]] | None,
        every: int,
        reward: float,
    ):
        """Sets the target.

        Args:
            evaluate: returns a state's held-out reward and its cost; None without held-out prompts.
            every: steps between evaluations, or steps of the moving average.
            reward: mean reward that ends tuning; infinity for never.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: `every` is below 1, or `reward` is NaN.
        """
        with prefix_errors("RewardTarget"):
            check_count(every, 1, "`evaluate_every`")
            if reward != math.inf:
                check_number(reward, -math.inf, math.inf, "`stop_reward`")
        self._evaluate = evaluate
        self._every = every
        self._reward = reward

    def reached(self, loop: TuningLoop, entry: Entry, *, last: bool) -> bool:
        """Returns whether the loop ends before a step; the last evaluation gets its own entry.

        Args:
            loop: the loop whose state is evaluated.
            entry: entry of the step; receives `held_out` if the state is evaluated.
            last: whether all steps are done.
        """
        if self._evaluate is None:
            # One step's mean reward is noisy, so only a full window counts.
            recent = [past["reward"] for past in loop.history[-self._every :]]
            enough = (
                len(recent) == self._every and float(np.mean(recent)) >= self._reward
            )
            return last or enough
        if last or entry["step"] % self._every == 0:
            entry["held_out"], cost = self._evaluate(loop.state)
            loop.budget += cost
        if last or entry.get("held_out", -np.inf) >= self._reward:
            loop.record(entry)
            return True
        return False


def start_tuning(
    model: RWKV7,
    loss: Loss,
    state: RWKV7State | None,
    *,
    tx: optax.GradientTransformation | None,
    statistics: Callable[[Any, Any], Any] | None,
    learning_rate: float,
    on_step: OnStep | None,
) -> TuningLoop:
    """Makes the tuning loop of a start state.

    Args:
        model: the student.
        loss: loss of the start state.
        state: initial state (batch 1); None for zeros. It is tuned in float32.
        tx: the optimizer; None for Adam with b2 = 0.99. Its short second-moment memory fits the
            few, large steps of a start state, whose scale is not known in advance.
        statistics: as in `make_train_step`.
        learning_rate: learning rate of that Adam.
        on_step: called with every entry and the state.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the state does not fit the model or has more than one sequence, or the rate is
            out of range.
    """
    with prefix_errors("start_tuning"):
        check_model(model)
        state = init_state(model.config) if state is None else state
        check_state(state, 1, model.config)
        check_number(learning_rate, 0, math.inf, "`learning_rate`")
        if on_step is not None:
            check_function(on_step, "`on_step`")
        # In bfloat16, small updates would be rounded away.
        start = state.replace(
            att_shift=jnp.asarray(state.att_shift, jnp.float32),
            ffn_shift=jnp.asarray(state.ffn_shift, jnp.float32),
        )
        if tx is None:
            tx = optax.adam(learning_rate, b2=0.99)
        train = TrainState.create(start, tx)
        # Without donation, `on_step` may keep the state, which is small.
        step = make_train_step(loss, tx, statistics=statistics, donate=False)
    return TuningLoop(step, train, on_step)
