"""Group-relative policy optimization (GRPO) of a start state; the weights stay frozen.

The parts also fit other loops: `PolicyBatches` makes the batch of a step, and `losses.policy_loss`
is a loss for `training.make_train_step`. The other methods of test-time tuning are
`teacher.collect_traces` with `distillation.distill`, and `expert_iteration.expert_iteration`.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import Array

from rwkv7_jax.checks import (
    check_count,
    check_function,
    check_instance,
    check_model,
    check_number,
    prefix_errors,
)
from rwkv7_jax.data.batch import Batch
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import RWKV7State
from rwkv7_jax.sharding import to_host
from rwkv7_jax.test_time.losses import PolicyLoss, drawn_logps, policy_loss
from rwkv7_jax.test_time.rewarded_rollouts import (
    PolicyBatch,
    replace_groups,
    weigh,
)
from rwkv7_jax.test_time.rewards import AdvantageRule, RewardFunction
from rwkv7_jax.test_time.rollouts import (
    Judgement,
    PromptsAt,
    RewardedBatches,
    Rollouts,
    RolloutSampler,
    reward_target,
)
from rwkv7_jax.test_time.traces import TokenBudget, gradient_tokens
from rwkv7_jax.test_time.tuning_loop import (
    OnStep,
    Result,
    start_tuning,
)
from rwkv7_jax.training.losses import Loss
from rwkv7_jax.tuning.state_tuning import default_leaves


class PolicyBatches(RewardedBatches):
    """Batches of the model's own completions with their group-relative advantages.

    A batch depends only on the key, the step and the state, so an interrupted run resumes with the
    same completions. With `several_updates` a batch holds the log-probabilities of its tokens under
    the state that sampled them, and serves more than one update.

    `metrics` has these numbers:

    * `reward`: mean reward.
    * `updated`: 0 if the step has no batch, otherwise 1.
    * `uniform_groups`: fraction of prompts whose completions all earned the same reward.
    * `completion_tokens`: mean length of a completion.
    * `cut_completions`: fraction of completions that ended at the token limit.
    * `importance_mean`, `importance_max`: with `importance_cap`, the mean and the largest ratio
      before the cap.
    * `importance_capped`: with `importance_cap`, the fraction of ratios above the cap.
    """

    def __init__(
        self,
        sampler: RolloutSampler,
        prompts_at: PromptsAt,
        reward: RewardFunction,
        *,
        key: Array,
        anchor_at: Callable[[int], np.ndarray] | None = None,
        rule: AdvantageRule | None = None,
        redraws: int = 0,
        several_updates: bool = False,
        importance_cap: float | None = None,
        trainer: RWKV7 | None = None,
    ):
        """Sets how completions are sampled and rewarded.

        Args:
            sampler: samples the completions, at least 2 per prompt.
            prompts_at: returns the prompts of a step.
            reward: `(prompt, completion) -> number`; the completion includes its stop id.
            key: one random key; step n uses the key folded with n.
            anchor_at: returns the unlabelled text of a step, ids [B T+1], for the anchor term.
            rule: how rewards become advantages.
            redraws: most times that uniform groups are sampled again. Each time costs as many
                tokens as the first (DAPO's dynamic sampling, arXiv 2503.14476, with the same
                prompts).
            several_updates: whether batches have `old_logp`, for more than one update per batch.
            importance_cap: largest weight of a token in truncated importance sampling: the ratio of
                its probability in training to that in sampling. None for no such weights.
            trainer: the trained model, if that of `sampler` differs, for instance in dtype; the
                weights are the same.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: groups have fewer than 2 completions, or a number is out of range.

        Source: ratios with a cap, IMPALA, arXiv 1802.01561 section 4.1; here per token.
        """
        with prefix_errors("PolicyBatches"):
            super().__init__(sampler, prompts_at, reward, key)
            check_count(sampler.group, 2, "`group`")
            if anchor_at is not None:
                check_function(anchor_at, "`anchor_at`")
            if rule is not None:
                check_instance(rule, AdvantageRule, "`rule`")
            check_count(redraws, 0, "`redraws`")
            if importance_cap is not None:
                check_number(
                    importance_cap, 0, math.inf, "`importance_cap`", above=True
                )
            if trainer is not None:
                check_model(trainer, "`trainer`")
        self._anchor_at = anchor_at
        self._rule = rule or AdvantageRule()
        self._redraws = redraws
        self._several_updates = several_updates
        self._importance_cap = importance_cap
        self._trainer = sampler.model if trainer is None else trainer

    def batch(self, state: RWKV7State, step: int) -> Batch | None:
        """Samples the batch of a step from `state`; None if every group is uniform."""
        made, drawn, found = self._draw_and_judge(state, step)
        self.budget += made.budget
        self.metrics = {
            "reward": float(made.rewards.mean()),
            "updated": int(not made.uniform),
            "uniform_groups": float(made.uniform_groups.mean()),
            "completion_tokens": float(found.lengths.mean()),
            "cut_completions": float(found.cut.mean()),
        }
        if made.uniform:
            # All advantages are 0, but an update would still apply momentum.
            return None
        batch = self._with_ratios(made.batch, drawn, state)
        if self._anchor_at is None:
            return batch
        # Different text at each step: fixed text would anchor the state to that text only.
        return batch.replace(anchor=self._anchor_at(step))

    def _with_ratios(self, batch: Batch, drawn: Rollouts, state: RWKV7State) -> Batch:
        """Adds the log-probabilities and importance weights that the batch needs."""
        if not self._several_updates and self._importance_cap is None:
            return batch
        old_logp = drawn_logps(
            self._trainer,
            self._sampler.params,
            state,
            drawn.tokens,
            self._sampler.temperature,
        )
        old_logp = np.where(drawn.mask > 0, to_host(old_logp), 0)
        # The trainer's forward pass over all rows.
        self.budget += TokenBudget(rollout_tokens=gradient_tokens(batch))
        if self._importance_cap is not None:
            assert drawn.logps is not None
            # In float64, ratios of float32 probabilities do not overflow.
            ratios = np.exp(np.float64(old_logp) - drawn.logps)
            self._measure_ratios(ratios, drawn)
            weights = np.minimum(ratios, self._importance_cap)
            batch = batch.replace(importance=weights.astype(np.float32))
        if self._several_updates:
            batch = batch.replace(old_logp=old_logp.astype(np.float32))
        return batch

    def _measure_ratios(self, ratios: np.ndarray, drawn: Rollouts) -> None:
        """Adds statistics of the ratios of all sampled tokens to the metrics."""
        rows = self._sampler.own_rows(drawn)
        cap = self._importance_cap

        def measure() -> np.ndarray:
            is_drawn = drawn.mask[rows] > 0
            counted = np.where(is_drawn, ratios[rows], 0)
            numbers = [counted.sum(1), counted.max(1), (counted > cap).sum(1)]
            return np.stack([*numbers, is_drawn.sum(1)], axis=1)

        sums, largest, capped, counts = self._sampler.share.join_rows(measure).T
        self.metrics["importance_mean"] = float(sums.sum() / counts.sum())
        self.metrics["importance_max"] = float(largest.max())
        self.metrics["importance_capped"] = float(capped.sum() / counts.sum())

    def _draw_and_judge(
        self, state: RWKV7State, step: int
    ) -> tuple[PolicyBatch, Rollouts, Judgement]:
        """Samples completions, and uniform groups again up to `redraws` times."""
        group = self._sampler.group
        prompts = self._prompts_at(step)
        key = self._key_at(step)
        drawn = self._sampler.draw(state, prompts, key)
        made, found = self._make(drawn)
        for attempt in range(1, self._redraws + 1):
            if not made.uniform_groups.any():
                break
            # All prompts are sampled again: fewer would need another program.
            again = self._sampler.draw(state, prompts, jax.random.fold_in(key, attempt))
            own = made.uniform_groups[drawn.first :][: len(drawn.completions) // group]
            drawn = replace_groups(drawn, again, own, group=group)
            made, found = self._make(drawn)
        return made, drawn, found

    def _make(self, drawn: Rollouts) -> tuple[PolicyBatch, Judgement]:
        found = self._sampler.judge(drawn, self._reward, name="grpo: `reward`")
        made = weigh(
            drawn,
            found.rewards,
            found.lengths,
            group=self._sampler.group,
            rule=self._rule,
            tokens=self._sampler.tokens,
        )
        return made, found


def grpo(
    sampler: RolloutSampler,
    prompts_at: PromptsAt,
    reward: RewardFunction,
    *,
    key: Array,
    state: RWKV7State | None = None,
    steps: int = 60,
    updates: int = 1,
    loss: Loss | None = None,
    learning_rate: float = 0.1,
    tx: optax.GradientTransformation | None = None,
    statistics: Callable[[Any, Any], Any] | None = None,
    anchor_at: Callable[[int], np.ndarray] | None = None,
    rule: AdvantageRule | None = None,
    redraws: int = 0,
    importance_cap: float | None = None,
    held_out: Sequence[Sequence[int]] = (),
    evaluate_every: int = 10,
    stop_reward: float = 0.97,
    on_step: OnStep | None = None,
) -> Result:
    """Tunes a start state by group-relative policy optimization (GRPO).

    Step n samples a group of completions for every prompt of `prompts_at(n)` from the current
    state, with the key folded with n, and makes `updates` updates. A step whose groups are all
    uniform makes none. A step depends only on the key, n and the current state.

    Tuning ends early when the mean reward reaches `stop_reward`. With held-out prompts, that is the
    reward of their greedy completions, evaluated before the first update and every
    `evaluate_every` steps. Without them, it is the mean over the last `evaluate_every` steps.

    Args:
        sampler: samples the completions, at least 2 per prompt.
        prompts_at: returns the prompts of a step; a different number compiles new programs.
        reward: `(prompt, completion) -> number`; the completion includes its stop id.
        key: one random key.
        state: initial state (batch 1); None for zeros. For an upscaled state, the memory is tuned.
        steps: most steps.
        updates: updates with each step's completions (num_iterations). From the second one on, the
            loss uses the clipped ratio of probabilities.
        loss: a loss of `policy_loss` at the sampler's temperature; None for its defaults. The
            loss's model is trained. The sampler's model may differ in dtype or implementation but
            has the same weights.
        learning_rate: learning rate of Adam with b2 = 0.99.
        tx: an optimizer in place of that Adam.
        statistics: `state_statistics` of the tuned leaves, if `tx` decorrelates.
        anchor_at: returns the unlabelled text of a step, ids [B T+1], if the loss has an anchor.
        rule: how rewards become advantages.
        redraws: most times that uniform groups are sampled again; see `PolicyBatches`.
        importance_cap: largest weight of a token; see `PolicyBatches`.
        held_out: prompts that no update sees.
        evaluate_every: steps between evaluations.
        stop_reward: mean reward that ends tuning.
        on_step: called with a step's numbers and the state.

    Returns:
        The result. Its history has `step`, `reward` and `updated` (0 or 1), the update's metrics,
        and `held_out` if the state was evaluated; a last entry may have only `held_out` besides
        `step`.

    Raises:
        TypeError: an argument has the wrong type, such as a loss that `policy_loss` did not make.
        ValueError: an argument is out of range, the loss has another temperature, or a reward is
            not a finite number.
    """
    with prefix_errors("grpo"):
        check_count(steps, 0, "`steps`")
        check_count(evaluate_every, 1, "`evaluate_every`")
        check_count(updates, 1, "`updates`")
        check_instance(sampler, RolloutSampler, "`sampler`")
        if loss is None:
            loss = policy_loss(
                sampler.model,
                sampler.params,
                temperature=sampler.temperature,
                leaves=default_leaves(state),
            )
        model = _trained_model(loss, sampler, has_anchor=anchor_at is not None)
        source = PolicyBatches(
            sampler,
            prompts_at,
            reward,
            key=key,
            anchor_at=anchor_at,
            rule=rule,
            redraws=redraws,
            several_updates=updates > 1,
            importance_cap=importance_cap,
            trainer=model,
        )
        loop = start_tuning(
            model,
            loss,
            state,
            tx=tx,
            statistics=statistics,
            learning_rate=learning_rate,
            on_step=on_step,
        )
        target = reward_target(
            dataclasses.replace(sampler, model=model),
            reward,
            held_out,
            every=evaluate_every,
            stop_reward=stop_reward,
        )
    return loop.run(source, steps, repeats=updates, target=target)


def _trained_model(loss: Loss, sampler: RolloutSampler, *, has_anchor: bool) -> RWKV7:
    """Returns the model of a policy loss and checks that the loss fits the sampler and anchor."""
    policy = getattr(loss, "func", None)
    if not isinstance(policy, PolicyLoss):
        raise TypeError(
            f"`loss` must be made by policy_loss; got {type(policy or loss).__name__}."
        )
    # At another temperature, log p would not be that of the sampled distribution.
    if not np.array_equal(policy.temperature, sampler.temperature):
        raise ValueError(
            f"`loss` must have the temperature of `sampler`, {sampler.temperature}; "
            f"got {policy.temperature}."
        )
    # A weight without text has no effect, and text without a weight wastes time.
    if bool(policy.anchor) != has_anchor:
        raise ValueError(
            "`anchor_at` and the weight `anchor` of `loss` must be given together; got only one."
        )
    return policy.model
