"""Rollouts with their rewards and advantages: the batches of the policy loss."""

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
        batch: with tokens, mask and advantages.
        rewards: [P K], of prompts and their completions, those of all processes.
        budget: tokens of the rollouts.
    """

    batch: Batch
    rewards: np.ndarray
    budget: TokenBudget

    @property
    def uniform_groups(self) -> np.ndarray:
        """Of each prompt, whether all of its completions earned the same, [P] bool."""
        return np.ptp(self.rewards, axis=1) == 0

    @property
    def uniform(self) -> bool:
        """Whether all completions of every prompt earned the same: there is nothing to learn."""
        return bool(self.uniform_groups.all())


def make_policy_batch(
    drawn: Rollouts,
    reward: RewardFunction,
    *,
    group: int,
    rule: AdvantageRule | None = None,
    tokens: int | None = None,
) -> PolicyBatch:
    """Rewards rollouts and makes a batch of `policy_loss` of them.

    Args:
        drawn: groups of completions.
        reward: of a prompt and a completion.
        group: completions of each prompt.
        rule: how rewards become advantages, and over what the loss is a mean.
        tokens: most tokens of a completion, which the rule's average "constant" needs.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: groups that do not divide the completions, or a reward that is not a finite
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
    """Makes a batch of `policy_loss` of the rollouts of this process.

    Args:
        drawn: groups of completions.
        rewards: of each completion of the step, those of other processes included.
        lengths: their drawn tokens.
        group: completions of each prompt.
        rule: how rewards become advantages, and over what the loss is a mean.
        tokens: most tokens of a completion.
    """
    rewards = rewards.reshape(-1, group)
    mask, factor = _average(drawn, lengths, rule, tokens)
    # Back to one number for each row.
    of_rows = factor * advantages(rewards, rule).reshape(-1)
    first = drawn.first * group
    own = of_rows[first : first + len(drawn.completions)]
    batch = Batch(tokens=drawn.tokens, mask=mask, advantages=own.astype(np.float32))
    return PolicyBatch(batch=batch, rewards=rewards, budget=drawn.budget)


def _average(
    drawn: Rollouts, lengths: np.ndarray, rule: AdvantageRule, tokens: int | None
) -> tuple[np.ndarray, float]:
    """Returns the mask and the factor on advantages that turn the loss's mean into the rule's.

    The loss is a mean over the mask, whose weights need not be 1.
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
    """Takes the chosen groups from a second draw of the same prompts.

    Args:
        drawn: the first draw.
        again: the second one, of the same prompts and lengths.
        chosen: of each prompt, [P] bool.
        group: completions of each prompt.

    Returns:
        Both draws' costs, since all tokens were drawn.
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
