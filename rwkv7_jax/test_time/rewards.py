"""Reward evaluation and group-relative advantages.

A reward is a function `(prompt, completion) -> number` of two tuples of ids. The completion
includes its stop id, so a reward can tell a finished answer from a truncated one. It excludes a
stop string and everything after it. Token 0 decodes to nothing.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Float

from rwkv7_jax.checks import (
    as_array,
    as_float,
    check_choice,
    check_function,
    is_real_number,
    prefix_errors,
)

RewardFunction = Callable[[tuple[int, ...], tuple[int, ...]], Any]


@contextlib.contextmanager
def named_errors(label: str) -> Iterator[None]:
    """Turns anything that a user's function raises into a `ValueError` that begins with a label."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{label} raised {type(error).__name__}: {error}") from error


def evaluate_rewards(
    judge: RewardFunction,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    *,
    name: str,
    group: int = 1,
    first: int = 0,
    least: float | None = None,
) -> np.ndarray:
    """Calls a reward function for each completion and checks the results.

    Args:
        judge: `(prompt, completion) -> number`; a bool counts as 0 or 1.
        prompts: the prompt of each completion.
        completions: ids of each completion.
        name: prefix of messages: the public function, and the argument in backticks.
        group: completions per prompt, to find the prompt's index.
        first: index of the first prompt.
        least: smallest allowed reward; None allows every finite reward.

    Returns:
        The rewards, float64.

    Raises:
        TypeError: `judge` is not a function.
        ValueError: there are no completions, or not one per prompt; or the function raised, or its
            result is not a finite number or is below `least`: the message has the prompt's index.
    """
    with prefix_errors("evaluate_rewards"):
        check_function(judge, "`judge`")
        if not len(prompts) or len(prompts) != len(completions):
            raise ValueError(
                "`completions` must hold one entry per prompt, and at least one; "
                f"got {len(completions)} for {len(prompts)} prompts."
            )
    rewards = []
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        label = f"{name} of prompt {first + row // group}"
        with named_errors(label):
            value = judge(tuple(prompt), tuple(completion))
        rewards.append(_checked_reward(value, least, label))
    return np.array(rewards)


def _checked_reward(value: Any, least: float | None, label: str) -> float:
    # An array without axes counts as a number.
    if isinstance(value, jax.Array | np.ndarray) and value.ndim == 0:
        value = value.item()
    if not is_real_number(value):
        raise ValueError(f"{label} must be a number; got {type(value).__name__}.")
    reward = as_float(value)
    if not math.isfinite(reward):
        raise ValueError(f"{label} must be finite; got {reward}.")
    if least is not None and reward < least:
        raise ValueError(f"{label} must be at least {least:g}; got {reward}.")
    return reward


@dataclasses.dataclass(frozen=True)
class AdvantageRule:
    """How the rewards of a group become the weights of its completions.

    Attributes:
        baseline: subtracted from a reward: the "mean" of its group, or the unbiased mean of the
            other completions ("leave_one_out", RLOO).
        scale: "std" divides by the group's standard deviation. "none" does not, so the difficulty
            of a prompt does not change its weight (Dr. GRPO).
        average: how the loss averages. "token": over all sampled tokens of the batch. "row": over
            each row first, so all completions have the same weight (the original GRPO).
            "constant": by the token limit, so length does not change the weight of a token (Dr.
            GRPO).

    Source: DeepSeekMath, arXiv 2402.03300 section 4.1.2 (GRPO); arXiv 2402.14740 (RLOO); arXiv
    2503.20783 (Dr. GRPO); arXiv 2503.14476 (means over tokens).
    """

    baseline: Literal["mean", "leave_one_out"] = "mean"
    scale: Literal["std", "none"] = "std"
    average: Literal["token", "row", "constant"] = "token"

    def __post_init__(self):
        """Checks the choices.

        Raises:
            ValueError: a choice is unknown.
        """
        with prefix_errors("AdvantageRule"):
            check_choice(self.baseline, ("mean", "leave_one_out"), "`baseline`")
            check_choice(self.scale, ("std", "none"), "`scale`")
            check_choice(self.average, ("token", "row", "constant"), "`average`")


def advantages(
    rewards: Float[np.ndarray, "P K"], rule: AdvantageRule | None = None
) -> Float[np.ndarray, "P K"]:
    """Computes group-relative advantages; 0 if all rewards of a group are equal.

    Args:
        rewards: rewards of P prompts with K completions each; both at least 1.
        rule: None for `(reward - mean) / (std + 1e-4)`.

    Raises:
        TypeError: `rewards` is not an array of numbers.
        ValueError: the shape is wrong, a reward is not finite, or "leave_one_out" has only one
            completion per prompt.

    Source: group-relative advantages, DeepSeekMath (arXiv 2402.03300) section 4.1.2.
    """
    rule = rule or AdvantageRule()
    # float64 keeps small differences between large rewards; `as_array` would not.
    with prefix_errors("advantages"):
        as_array(rewards, "`rewards`")
        rewards = np.asarray(rewards, np.float64)
        if rewards.ndim != 2 or not rewards.size:
            raise ValueError(
                f"`rewards` must have shape [P K], both at least 1; got {rewards.shape}."
            )
        if not np.isfinite(rewards).all():
            raise ValueError("`rewards` must be finite; got NaN or infinity.")
        completions = rewards.shape[1]
        if rule.baseline == "leave_one_out" and completions == 1:
            raise ValueError(
                "`rewards` must have at least two completions per prompt for 'leave_one_out'; "
                "got one."
            )
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    if rule.baseline == "leave_one_out":
        # r - (S - r) / (K - 1) is (r - S / K) times K / (K - 1).
        centred = centred * completions / (completions - 1)
    if rule.scale == "std":
        # The constant avoids a division by almost 0 if rewards hardly differ.
        centred = centred / (rewards.std(axis=1, keepdims=True) + 1e-4)
    # The mean of equal numbers may differ from them by rounding, so test for equality.
    return np.where(np.ptp(rewards, axis=1, keepdims=True) > 0, centred, 0.0)
