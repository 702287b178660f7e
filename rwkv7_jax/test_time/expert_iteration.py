"""Expert iteration: a start state learns from those of its own completions that earn a reward."""

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
    """Batches of the model's own completions, weighted by a reward function.

    Every `updates` steps, a round samples completions from the current state. With `replay` the
    batches of a round come from all completions kept so far, without duplicates.
    `expert_iteration` uses this form by default.

    Without `replay`, every batch of a round consists of all completions of that round in order. It
    depends only on the key, the step and the state, so with `updates` 1 an interrupted run resumes
    with the same batches. train.py uses this form.

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
        """Sets how completions are sampled and weighted.

        Args:
            sampler: samples the completions.
            prompts_at: returns the prompts of a round.
            reward: `(prompt, completion) -> number`; the completion includes its stop id.
            key: one random key; round n uses the key folded with n.
            keep_reward: least reward of a completion that counts, with weight 1. None uses the
                reward as the weight; it must not be negative then.
            replay: whether batches include completions of earlier rounds.
            updates: batches per round.
            batch_size: rows of a batch with `replay`; without it, all rows of the round.
        """
        with prefix_errors("ExpertBatches"):
            super().__init__(sampler, prompts_at, reward, key)
            check_count(updates, 1, "`updates`")
            check_count(batch_size, 1, "`batch_size`")
            if replay and sampler.share.count > 1:
                raise ValueError(
                    "`replay` must be False if several processes share the prompts; got True."
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
        """The kept completions, with `replay`."""
        return list(self._kept.values())

    def batch(self, state: RWKV7State, step: int) -> Batch | None:
        """Makes the batch of a step; None if no completion has a weight.

        Raises:
            ValueError: a reward is not a finite number; or it is the weight and is negative; or the
                step belongs to a round that this source did not begin.
        """
        round_number, index = divmod(step, self._updates)
        # Only the first batch of a round is sampled from the current state.
        if index == 0:
            self._begin_round(state, round_number)
        elif round_number != self._round:
            raise ValueError(
                f"expert_iteration: step {step} must follow the first step of its round, "
                f"{round_number * self._updates}."
            )
        if not self._replay:
            return self._round_batch
        if not self._kept:
            return None
        return trace_batch(
            self.traces,
            index,
            batch_size=self._batch_size,
            length=self._length,
            # A different order for each round.
            seed=round_number,
        )

    def _begin_round(self, state: RWKV7State, round_number: int) -> None:
        """Samples the completions of a round and weights them."""
        prompts = self._prompts_at(round_number)
        drawn = self._sampler.draw(state, prompts, self._key_at(round_number))
        self.budget += drawn.budget
        rewards = self._sampler.judge(
            drawn,
            self._reward,
            name="expert_iteration: `reward`",
            # With a negative weight, the loss would have no lower bound.
            least=0.0 if self._keep_reward is None else None,
        ).rewards
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
        """Adds the completions with a weight to those of earlier rounds, without duplicates."""
        # Rows of earlier rounds must fit, and a new length compiles another program.
        self._length = max(self._length, drawn.mask.shape[1])
        for row in np.flatnonzero(weights):
            # Duplicates of a frequent completion would crowd out the rest.
            pair = (drawn.prompts[row], drawn.completions[row])
            self._kept[pair] = Trace(
                *pair, weight=float(weights[row]), source="student"
            )


def _weighted_rows(drawn: Rollouts, weights: np.ndarray, first: int) -> Batch | None:
    """Makes a batch of all rows of this process; None if no row of the step has a weight.

    Args:
        drawn: rows of this process.
        weights: weights of all rows of the step.
        first: index of this process's first row among them.
    """
    if not weights.any():
        # The mask would sum to 0.
        return None
    # Rows of weight 0 stay, so that every step has the same shape.
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
    """Tunes a start state on those of its own completions that earn a reward.

    Each round samples from the current state, keeps the completions whose reward is at least
    `keep_reward`, without duplicates, and makes `updates` updates on all completions kept so far.
    Tuning ends early when the mean reward reaches `stop_reward`: that of the greedy completions of
    the held-out prompts or, without such prompts, that of a round's completions.

    Args:
        sampler: samples the completions.
        prompts_at: returns the prompts of a round.
        reward: `(prompt, completion) -> number`; the completion includes its stop id.
        key: one random key.
        state: initial state (batch 1); None for zeros. For an upscaled state, the memory is tuned.
        rounds: most rounds.
        updates: updates per round.
        keep_reward: least reward of a completion that is kept, with weight 1. None keeps every
            completion above 0 with the reward as its weight; no reward may be negative then.
        replay: False makes each round learn only from its own completions, all in one batch, as
            train.py does.
        batch_size: rows of an update with `replay`.
        loss: a loss of `test_time.losses`; None for `distillation_loss` of the sampler's model, as
            cross entropy only.
        learning_rate: learning rate of Adam with b2 = 0.99.
        tx: an optimizer in place of that Adam.
        statistics: `state_statistics` of the tuned leaves, if `tx` decorrelates.
        held_out: prompts that no update sees.
        stop_reward: mean reward that ends tuning.
        on_step: called with a round's numbers and the state.

    Returns:
        The result. Its history has `step` (the round), `reward`, `kept` (so far, with `replay`),
        the last update's metrics, and `held_out`; a last entry may have only `held_out` besides
        `step`. Its traces are the kept completions.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, or a reward is not a finite number.
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
        # A round is long, so each is evaluated.
        target = reward_target(
            sampler, reward, held_out, every=1, stop_reward=stop_reward
        )
    result = loop.run(source, rounds, updates=updates, target=target)
    # The loop knows only batches; the source has the traces.
    return dataclasses.replace(result, traces=source.traces)
