"""Expert iteration: a start state imitates those of its own completions that earn a reward."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import optax
from jaxtyping import Array

from rwkv7_jax.checks import (
    check_count,
    check_number,
    prefix_errors,
)
from rwkv7_jax.data.batch import Batch
from rwkv7_jax.model.state import RWKV7State
from rwkv7_jax.test_time.losses import distillation_loss
from rwkv7_jax.test_time.rewards import RewardFunction
from rwkv7_jax.test_time.rollouts import (
    PromptsAt,
    RewardedBatches,
    Rollouts,
    RolloutSampler,
    reward_target,
)
from rwkv7_jax.test_time.traces import (
    Ids,
    Trace,
    completion_rows,
    trace_batch,
)
from rwkv7_jax.test_time.tuning_loop import (
    OnStep,
    Result,
    start_tuning,
)
from rwkv7_jax.training.losses import Loss
from rwkv7_jax.tuning.state_tuning import default_leaves


class ExpertBatches(RewardedBatches):
    """Batches of the model's own completions, weighted by what a reward function says of them.

    Every `updates` steps a round draws completions from the current state. With `replay` the
    batches of a round come from all completions that were kept so far, each text once. Without it
    every batch of a round is what that round drew, in the order of the draws; it then depends on
    the key, the step and the state alone, so with `updates` 1 an interrupted run goes on with the
    same batches. train.py uses that form, `expert_iteration` the other one by default.

    `metrics` has the mean `reward` of the last round and, with `replay`, the number `kept`.
    """

    def __init__(
        self,
        sampler: RolloutSampler,
        prompts_at: PromptsAt,
        reward: RewardFunction,
        *,
        key: Array,
        keep_reward: float | None = None,
        replay: bool = False,
        updates: int = 1,
        batch_size: int = 32,
    ):
        """Sets the draws and which completions count.

        Args:
            sampler: draws the completions.
            prompts_at: the prompts of a round.
            reward: `(prompt, completion) -> number`; the completion holds its stop id.
            key: one random key; round n uses the key folded with n.
            keep_reward: the reward from which a completion counts, with weight 1. None takes the
                reward itself as the weight, which then must not be negative.
            replay: whether completions of earlier rounds are used again.
            updates: batches of a round.
            batch_size: rows of a batch with `replay`; without it all rows of the round.
        """
        with prefix_errors("ExpertBatches"):
            super().__init__(sampler, prompts_at, reward, key)
            check_count(updates, 1, "`updates`")
            check_count(batch_size, 1, "`batch_size`")
            if replay and sampler.share.count > 1:
                raise ValueError(
                    "`replay` must be False where several processes share the prompts."
                )
            if keep_reward is not None:
                check_number(keep_reward, -math.inf, math.inf, "`keep_reward`")
        self._keep_reward = keep_reward
        self._replay = replay
        self._updates = updates
        self._batch_size = batch_size
        self._round: int | None = None
        self._round_batch: Batch | None = None
        self._kept: dict[tuple[Ids, Ids], Trace] = {}
        self._length = 0

    @property
    def traces(self) -> list[Trace]:
        """The completions that were kept, with `replay`."""
        return list(self._kept.values())

    def batch(self, state: RWKV7State, step: int) -> Batch | None:
        """Makes the batch of a step; None where no completion has earned anything.

        Raises:
            ValueError: a reward that is not a finite number or, where it is the weight, negative;
                or a step inside a round that this source did not begin.
        """
        round_number, index = divmod(step, self._updates)
        # Completions are drawn only here, so later batches of a round come from an older state.
        if index == 0:
            self._begin_round(state, round_number)
        elif round_number != self._round:
            # Its completions came from a state that is gone.
            raise ValueError(
                f"expert_iteration: step {step} must follow the first step of its round, "
                f"{round_number * self._updates}."
            )
        if not self._replay:
            return self._round_batch
        if not self._kept:
            # No completion of any round so far was good enough.
            return None
        return trace_batch(
            self.traces,
            index,
            batch_size=self._batch_size,
            length=self._length,
            # Another order in each round; `index` is the step within it.
            seed=round_number,
        )

    def _begin_round(self, state: RWKV7State, round_number: int) -> None:
        """Draws the completions of a round and weighs them."""
        prompts = self._prompts_at(round_number)
        drawn = self._sampler.draw(state, prompts, self._key_at(round_number))
        self.budget += drawn.budget
        rewards = self._sampler.judge(
            drawn,
            self._reward,
            name="expert_iteration: `reward`",
            # A negative weight would push the state away from a completion without any bound.
            least=0.0 if self._keep_reward is None else None,
        ).rewards
        # A reward in steps, such as 0 or 1, needs no threshold; a smooth one does.
        if self._keep_reward is None:
            weights = rewards
        else:
            weights = (rewards >= self._keep_reward).astype(np.float64)
        self._round = round_number
        self.metrics = {"reward": float(rewards.mean())}
        if self._replay:
            self._keep(drawn, weights)
            self.metrics["kept"] = len(self._kept)
        else:
            first = drawn.first * self._sampler.group
            self._round_batch = _weighted_rows(drawn, weights, first)

    def _keep(self, drawn: Rollouts, weights: np.ndarray) -> None:
        """Adds the completions with a weight to those of earlier rounds, each text once."""
        # Never shorter than before: rows of earlier rounds must fit, and a new length compiles.
        self._length = max(self._length, drawn.mask.shape[1])
        for row in np.flatnonzero(weights):
            # A text that is drawn often would otherwise crowd out the rest.
            pair = (drawn.prompts[row], drawn.completions[row])
            self._kept[pair] = Trace(
                *pair, weight=float(weights[row]), source="student"
            )


def _weighted_rows(drawn: Rollouts, weights: np.ndarray, first: int) -> Batch | None:
    """Makes a batch of all rows that were drawn here; None where no row of the step has a weight.

    Args:
        drawn: rows of this process.
        weights: of all rows of the step.
        first: the number of the first row among them.
    """
    if not weights.any():
        # The mask would sum to 0.
        return None
    # Rows of weight 0 stay in, so that every step has the same shape.
    return completion_rows(
        drawn.prompts,
        drawn.completions,
        length=drawn.mask.shape[1],
        weights=weights[first:][: len(drawn.completions)].tolist(),
    )


def expert_iteration(
    sampler: RolloutSampler,
    prompts_at: PromptsAt,
    reward: RewardFunction,
    *,
    key: Array,
    state: RWKV7State | None = None,
    rounds: int = 6,
    updates: int = 10,
    keep_reward: float | None = 1.0,
    replay: bool = True,
    batch_size: int = 32,
    loss: Loss | None = None,
    learning_rate: float = 0.3,
    tx: optax.GradientTransformation | None = None,
    statistics: Callable[[Any, Any], Any] | None = None,
    held_out: Sequence[Sequence[int]] = (),
    stop_reward: float = 0.97,
    on_step: OnStep | None = None,
) -> Result:
    """Tunes a start state on those of its own completions that the reward approves.

    Round n draws from the current state, keeps the completions whose reward is at least
    `keep_reward`, each text once, and makes `updates` updates on all that were kept so far. It ends
    early when the greedy completions of the held-out prompts, or else a round's own completions,
    earn `stop_reward`.

    Args:
        sampler: draws the completions.
        prompts_at: the prompts of a round.
        reward: `(prompt, completion) -> number`; the completion holds its stop id.
        key: one random key.
        state: where to start (batch 1); None is zeros. Of an upscaled state the memory is tuned.
        rounds: at most.
        updates: of each round.
        keep_reward: what a completion must earn to be kept, then with weight 1. None keeps
            everything above 0 with the reward as its weight; no reward may be negative then.
        replay: False learns in each round from its own completions only, all of them in one batch,
            as train.py does.
        batch_size: rows of an update with `replay`.
        loss: of `test_time.losses`; None is `distillation_loss` of the sampler's model, the cross
            entropy alone.
        learning_rate: of Adam with b2 = 0.99.
        tx: another optimizer.
        statistics: `state_statistics` where `tx` decorrelates, of the tuned leaves.
        held_out: prompts that no update sees.
        stop_reward: mean reward that is enough.
        on_step: called with a round's numbers and the state.

    Returns:
        A history of `step` (the round), `reward`, `kept` (so far, with `replay`), the last update's
        metrics, and `held_out`; a last entry may hold nothing else. The result's traces are those
        that were kept.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: an argument out of its range, or a reward that is not a finite number.
    """
    with prefix_errors("expert_iteration"):
        check_count(rounds, 0, "`rounds`")
        source = ExpertBatches(
            sampler,
            prompts_at,
            reward,
            key=key,
            keep_reward=keep_reward,
            replay=replay,
            updates=updates,
            batch_size=batch_size,
        )
        if loss is None:
            loss = distillation_loss(
                sampler.model, sampler.params, leaves=default_leaves(state)
            )
        loop = start_tuning(
            sampler.model,
            loss,
            state,
            tx=tx,
            statistics=statistics,
            learning_rate=learning_rate,
            on_step=on_step,
        )
        # A round is long, so every one of them is evaluated.
        target = reward_target(
            sampler, reward, held_out, every=1, stop_reward=stop_reward
        )
    result = loop.run(source, rounds, updates=updates, target=target)
    # The loop knows batches alone; the source has the traces.
    return dataclasses.replace(result, traces=source.traces)
