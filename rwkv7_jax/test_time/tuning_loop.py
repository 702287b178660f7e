"""A start state on its way through test-time training: updates, costs, when to stop."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rwkv7_jax.data.batch import Batch
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import RWKV7State, check_state, init_state
from rwkv7_jax.test_time.traces import TokenBudget, Trace, gradient_tokens
from rwkv7_jax.training.losses import Loss
from rwkv7_jax.training.train_step import TrainState, make_train_step

Entry = dict[str, float | int]

OnStep = Callable[[Entry, RWKV7State], Any]


@dataclasses.dataclass(frozen=True)
class Result:
    """What tuning gave.

    Attributes:
        state: the tuned start state (batch 1).
        history: numbers by name, one entry a step or round.
        budget: what it cost.
        traces: what it learned from, where those were completions of its own.
    """

    state: RWKV7State
    history: list[Entry]
    budget: TokenBudget
    traces: list[Trace] = dataclasses.field(default_factory=list)


class TuningLoop:
    """A state, how it came about and what that cost.

    Attributes:
        history: one entry a step.
        budget: so far.
    """

    def __init__(self, step: Callable, train: Any, on_step: OnStep | None = None):
        """A run before its first update.

        Args:
            step: `(train, batch) -> (train, metrics)`; consumes its input.
            train: a `TrainState` of a start state.
            on_step: called with every entry and the state, which the next update consumes.
        """
        self._step, self._train, self._on_step = step, train, on_step
        self.history, self.budget = [], TokenBudget()

    @property
    def state(self) -> RWKV7State:
        """As it is now; the next update consumes it."""
        return self._train.params

    def update(self, batch: Batch) -> Entry:
        """One update; its metrics."""
        self._train, metrics = self._step(self._train, batch)
        spent = gradient_tokens(batch)
        if batch.anchor is not None:
            spent += batch.anchor[:, 1:].size
        self.budget += TokenBudget(gradient_tokens=spent)
        return {name: float(value) for name, value in jax.device_get(metrics).items()}

    def note(self, entry: Entry) -> None:
        """The entry ends a step."""
        self.history.append(entry)
        if self._on_step:
            self._on_step(entry, self.state)


class RewardTarget:
    """The reward that is enough: of held-out prompts where there are some, else of late steps."""

    def __init__(
        self,
        look: Callable[[RWKV7State], tuple[float, TokenBudget]] | None,
        every: int,
        reward: float,
    ):
        """Nothing has been seen.

        Args:
            look: gives a state's held-out reward and what it cost; None where nothing is held out.
            every: steps between two looks, or over which rewards are averaged.
            reward: that is enough.
        """
        self._look, self._every, self._reward = look, every, reward

    def steps(self, run: TuningLoop, count: int) -> Iterator[Entry]:
        """Entries of at most `count` steps, each noted once its step is done, until it is enough.

        An entry comes with its `step`, and with the look's `held_out` where there was one.
        """
        for step in range(count + 1):
            entry = {"step": step}
            if self._reached(run, entry, last=step == count):
                return
            yield entry
            run.note(entry)

    def _reached(self, run: TuningLoop, entry: Entry, *, last: bool) -> bool:
        """Whether the run ends before the step of `entry`, which takes the look's `held_out`.

        The run's last look is noted as an entry of its own.
        """
        if self._look is None:
            recent = [past["reward"] for past in run.history[-self._every :]]
            return last or (len(recent) == self._every and float(np.mean(recent)) >= self._reward)
        if last or entry["step"] % self._every == 0:
            entry["held_out"], cost = self._look(run.state)
            run.budget += cost
        if last or entry.get("held_out", -np.inf) >= self._reward:
            run.note(entry)
            return True
        return False


def start_tuning(
    model: RWKV7,
    loss: Loss,
    state: RWKV7State | None,
    *,
    tx: optax.GradientTransformation | None,
    learning_rate: float,
    on_step: OnStep | None,
    caller: str,
) -> TuningLoop:
    """A run of a start state before its first update.

    Args:
        model: the student.
        loss: of the start state.
        state: where to start (batch 1), zeros by default; it is tuned in float32.
        tx: the optimizer; None is Adam as states like it, with a short memory of their size.
        learning_rate: of that Adam, large.
        on_step: called with every entry and the state, which the next update consumes.
        caller: for messages.

    Raises:
        ValueError: the state is of another model, or of more than one sequence.
    """
    start = _start(model, state, caller=caller)
    tx = optax.adam(learning_rate, b2=0.99) if tx is None else tx
    return TuningLoop(make_train_step(loss, tx), TrainState.create(start, tx), on_step)


def _start(model: RWKV7, state: RWKV7State | None, *, caller: str) -> RWKV7State:
    state = init_state(model.config) if state is None else state
    check_state(state, 1, model.config, caller=caller)
    shifts = {name: getattr(state, name) for name in ("att_shift", "ffn_shift")}
    return state.replace(**{name: jnp.asarray(x, jnp.float32) for name, x in shifts.items()})
