"""Makes batches of the policy loss from rollouts, with rewards and advantages."""

import dataclasses
from typing import NamedTuple

import numpy as np

from rwkv7_jax.checks import (
    check_count,
    check_function,
    check_instance,
    prefix_errors,
)
from rwkv7_jax.data.batch import Batch
from rwkv7_jax.test_time.rewards import (
    AdvantageRule,
    RewardFunction,
    advantages,
    evaluate_rewards,
)
from rwkv7_jax.test_time.rollouts import Rollouts
from rwkv7_jax.test_time.traces import TokenBudget


class PolicyBatch(NamedTuple):
    """A batch for `policy_loss`, with its rewards and its cost.

    Attributes:
        batch: tokens, mask and advantages.
        rewards: [P K], by prompt and completion, of all processes.
        budget: tokens of the rollouts.
    """

    batch: Batch
    rewards: np.ndarray
    budget: TokenBudget

    @property
    def uniform_groups(self) -> np.ndarray:
        """Whether all completions of a prompt earned the same reward, [P] bool."""
        return np.ptp(self.rewards, axis=1) == 0

    @property
    def uniform(self) -> bool:
        """Whether all groups are uniform, so that there is nothing to learn."""
        return bool(self.uniform_groups.all())


def make_policy_batch(
    drawn: Rollouts,
    reward: RewardFunction,
    *,
    group: int,
    rule: AdvantageRule | None = None,
    tokens: int | None = None,
) -> PolicyBatch:
    """Evaluates the rewards of rollouts and makes a batch for `policy_loss`.

    Args:
        drawn: groups of completions.
        reward: `(prompt, completion) -> number`.
        group: completions per prompt.
        rule: how rewards become advantages, and how the loss averages tokens.
        tokens: token limit of a completion; the average "constant" needs it.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: `group` does not divide the number of completions, or a reward is not a finite
            number.
    """
    with prefix_errors("make_policy_batch"):
        check_instance(drawn, Rollouts, "`drawn`")
        check_function(reward, "`reward`")
        check_count(group, 1, "`group`")
        if len(drawn.completions) % group:
            raise ValueError(
                f"`group` must divide the {len(drawn.completions)} completions; got {group}."
            )
        rule = rule or AdvantageRule()
        if rule.average == "constant":
            check_count(tokens, 1, "`tokens`")
    rewards = evaluate_rewards(
        reward,
        drawn.prompts,
        drawn.judged,
        name="make_policy_batch: `reward`",
        group=group,
    )
    lengths = np.array([len(completion) for completion in drawn.completions])
    # The rewards are those of these rows alone, even if other processes sampled some before them.
    drawn = dataclasses.replace(drawn, first=0)
    return weigh(drawn, rewards, lengths, group=group, rule=rule, tokens=tokens)


def weigh(
    drawn: Rollouts,
    rewards: np.ndarray,
    lengths: np.ndarray,
    *,
    group: int,
    rule: AdvantageRule,
    tokens: int | None,
) -> PolicyBatch:
    """Makes a batch for `policy_loss` from the rollouts of this process.

    Args:
        drawn: groups of completions.
        rewards: rewards of all completions of the step, including other processes.
        lengths: numbers of their sampled tokens.
        group: completions per prompt.
        rule: how rewards become advantages, and how the loss averages tokens.
        tokens: token limit of a completion.
    """
    rewards = rewards.reshape(-1, group)
    mask, factor = _average(drawn, lengths, rule, tokens)
    of_rows = factor * advantages(rewards, rule).reshape(-1)
    first = drawn.first * group
    own = of_rows[first : first + len(drawn.completions)]
    batch = Batch(tokens=drawn.tokens, mask=mask, advantages=own.astype(np.float32))
    return PolicyBatch(batch=batch, rewards=rewards, budget=drawn.budget)


def _average(
    drawn: Rollouts, lengths: np.ndarray, rule: AdvantageRule, tokens: int | None
) -> tuple[np.ndarray, float]:
    """Returns a mask, and a factor for advantages, that make the loss's mean that of the rule.

    The loss is a weighted mean with the mask as weights, which need not be 1.
    """
    if rule.average == "row":
        counts = drawn.mask.sum(axis=1, keepdims=True)
        return drawn.mask / np.maximum(counts, 1), 1.0
    if rule.average == "constant":
        assert tokens is not None
        return drawn.mask, float(lengths.sum()) / (len(lengths) * tokens)
    return drawn.mask, 1.0


def replace_groups(
    drawn: Rollouts, again: Rollouts, chosen: np.ndarray, *, group: int
) -> Rollouts:
    """Replaces the chosen groups by those of second rollouts.

    Args:
        drawn: the first rollouts.
        again: the second rollouts, with the same prompts and lengths.
        chosen: whether to replace the group of each prompt, [P] bool.
        group: completions per prompt.

    Returns:
        The combined rollouts, with the budget of both.
    """
    rows = np.repeat(chosen, group)
    completions = []
    judged = []
    for row, is_chosen in enumerate(rows):
        source = again if is_chosen else drawn
        completions.append(source.completions[row])
        judged.append(source.judged[row])
    logps = None
    if drawn.logps is not None and again.logps is not None:
        logps = np.where(rows[:, None], again.logps, drawn.logps)
    return dataclasses.replace(
        drawn,
        tokens=np.where(rows[:, None], again.tokens, drawn.tokens),
        mask=np.where(rows[:, None], again.mask, drawn.mask),
        completions=completions,
        budget=drawn.budget + again.budget,
        judged=judged,
        logps=logps,
    )
