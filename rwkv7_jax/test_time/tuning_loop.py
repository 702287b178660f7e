"""The loop that tunes a start state on the batches of a source, and when it stops."""

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
from rwkv7_jax.data.batch import Batch
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import RWKV7State, check_state, init_state
from rwkv7_jax.test_time.traces import TokenBudget, Trace, gradient_tokens
from rwkv7_jax.training.losses import Loss
from rwkv7_jax.training.train_step import TrainState, make_train_step

# One line of a history: metrics by name.
Entry = dict[str, float | int]

OnStep = Callable[[Entry, RWKV7State], Any]


class StateBatchSource(abc.ABC):
    """The batches of one tuning method; `TuningLoop` and train.py both ask it for them.

    Attributes:
        budget: tokens that making the batches has cost so far.
        metrics: numbers about the batch that was made last.
    """

    def __init__(self):
        """Starts with nothing spent."""
        self.budget = TokenBudget()
        self.metrics: Entry = {}

    @abc.abstractmethod
    def batch(self, state: RWKV7State, step: int) -> Batch | None:
        """Makes the batch of a step.

        Args:
            state: the start state as it is before the update (batch 1).
            step: the number of the update, from 0.

        Returns:
            The batch, or None where the step has nothing to learn from. Then no update must be
            made: with a batch of zero weights the optimizer would still move by old momentum.
        """


@dataclasses.dataclass(frozen=True)
class Result:
    """A tuned state and how it came about.

    Attributes:
        state: the tuned start state (batch 1).
        history: numbers by name, one entry for each step or round.
        budget: tokens that it cost.
        traces: the completions it learned from, where those were its own.
    """

    state: RWKV7State
    history: list[Entry]
    budget: TokenBudget
    traces: list[Trace] = dataclasses.field(default_factory=list)


class TuningLoop:
    """A start state with its optimizer, its history and what the updates have cost.

    Attributes:
        history: one entry for each step.
        budget: tokens of the updates and of evaluations so far; a source counts its own.
    """

    def __init__(
        self,
        step: Callable,
        train: TrainState,
        on_step: OnStep | None = None,
    ):
        """Starts before the first update.

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
            source: where the batches come from.
            steps: entries of the history at most.
            updates: batches that each of them covers.
            repeats: updates with each batch.
            target: what ends the loop early.
        """
        # With a target one step more: the state after the last update is evaluated, too.
        for step in range(steps + (target is not None)):
            entry: Entry = {"step": step}
            if target is not None and target.reached(self, entry, last=step == steps):
                break
            # Sources count updates, the history counts rounds.
            first = step * updates
            for number in range(first, first + updates):
                batch = source.batch(self.state, number)
                # First, so that the entry of a step without an update has them too.
                entry |= source.metrics
                if batch is not None:
                    entry |= self.update(batch, repeats)
            self.record(entry)
        # The draws are in the source's budget, the updates and evaluations in this one.
        return Result(self.state, self.history, self.budget + source.budget)

    def update(self, batch: Batch, repeats: int = 1) -> Entry:
        """Makes updates with one batch; returns the last one's metrics."""
        metrics = {}
        for _ in range(repeats):
            self._train, metrics = self._step(self._train, batch)
        spent = gradient_tokens(batch)
        # The anchor's rows have no padding: all their inputs count.
        if batch.anchor is not None:
            spent += batch.anchor[:, 1:].size
        self.budget += TokenBudget(gradient_tokens=repeats * spent)
        # One transfer for all of them.
        return {name: float(value) for name, value in jax.device_get(metrics).items()}

    def record(self, entry: Entry) -> None:
        """Adds the entry of a finished step to the history."""
        self.history.append(entry)
        if self._on_step:
            self._on_step(entry, self.state)


class RewardTarget:
    """The mean reward that is enough: held-out, or a moving average where nothing is held out."""

    def __init__(
        self,
        evaluate: Callable[[RWKV7State], tuple[float, TokenBudget]] | None,
        every: int,
        reward: float,
    ):
        """Sets the target.

        Args:
            evaluate: returns a state's held-out reward and what it cost; None where nothing is held
                out.
            every: steps between two evaluations, or of the moving average.
            reward: the mean reward that is enough; infinity never is.

        Raises:
            TypeError: an argument of the wrong kind.
            ValueError: no steps, or NaN.
        """
        with prefix_errors("RewardTarget"):
            check_count(every, 1, "`evaluate_every`")
            if reward != math.inf:
                check_number(reward, -math.inf, math.inf, "`stop_reward`")
        self._evaluate = evaluate
        self._every = every
        self._reward = reward

    def reached(self, loop: TuningLoop, entry: Entry, *, last: bool) -> bool:
        """Returns whether the loop ends before a step; the last evaluation is an entry of its own.

        Args:
            loop: whose state is evaluated.
            entry: of the step; gets `held_out` where the state is evaluated before it.
            last: whether all steps have been made.
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
        # Without an evaluation at this step there is nothing to compare.
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
    """Makes the loop of a start state, before its first update.

    Args:
        model: the student.
        loss: of the start state.
        state: where to start (batch 1), zeros by default; it is tuned in float32.
        tx: the optimizer. None is Adam with a short second-moment memory (b2 = 0.99), because a
            state takes large steps and few of them.
        statistics: as of `make_train_step`.
        learning_rate: of that Adam.
        on_step: called with every entry and the state.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: the state is of another model, or of more than one sequence, or a rate is out of
            range.
    """
    with prefix_errors("start_tuning"):
        check_model(model)
        state = init_state(model.config) if state is None else state
        check_state(state, 1, model.config)
        check_number(learning_rate, 0, math.inf, "`learning_rate`")
        if on_step is not None:
            check_function(on_step, "`on_step`")
    # In bfloat16 small updates would round to nothing.
    start = state.replace(
        att_shift=jnp.asarray(state.att_shift, jnp.float32),
        ffn_shift=jnp.asarray(state.ffn_shift, jnp.float32),
    )
    if tx is None:
        # A start state has no good scale in advance, so the size of its updates must adapt quickly.
        tx = optax.adam(learning_rate, b2=0.99)
    # The optimizer is checked by both.
    with prefix_errors("start_tuning"):
        train = TrainState.create(start, tx)
        # A state is small, and whoever is told of a step may keep it.
        step = make_train_step(loss, tx, statistics=statistics, donate=False)
    return TuningLoop(step, train, on_step)
