"""Reward evaluation and group-relative advantages.

A reward is a function `(prompt, completion) -> number` of two tuples of ids. The completion holds
every id that was drawn, the stop id included, so that a reward can tell an answer that ended from
one that was cut; what a stop string cut off it does not hold. Token 0 decodes to nothing.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Float

from rwkv7_jax.checks import as_array, check_choice, check_function, prefix_errors

RewardFunction = Callable[[tuple[int, ...], tuple[int, ...]], Any]


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
    """Calls a reward function for each completion and checks what it returns.

    Args:
        judge: `(prompt, completion) -> number`; a bool counts as 0 or 1.
        prompts: one for each completion.
        completions: ids.
        name: how messages begin: the public function, and the argument in backticks.
        group: completions of each prompt, to find the prompt's number.
        first: the number of the first prompt.
        least: the smallest reward that is allowed; None allows every finite one.

    Returns:
        The rewards, float64.

    Raises:
        TypeError: not a function.
        ValueError: no completions, or not one for each prompt; the function raised, or its result
            is not a finite number or is below `least`: the message has the prompt's number.
    """
    with prefix_errors("evaluate_rewards"):
        check_function(judge, "`judge`")
        if not len(prompts) or len(prompts) != len(completions):
            raise ValueError(
                "`completions` must be one for each prompt, at least one; "
                f"got {len(completions)} for {len(prompts)}."
            )
    rewards = []
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        label = f"{name} of prompt {first + row // group}"
        try:
            value = judge(tuple(prompt), tuple(completion))
        except Exception as error:  # Of the user's function, so of any type.
            raise ValueError(
                f"{label} raised {type(error).__name__}: {error}"
            ) from error
        rewards.append(_checked_reward(value, least, label))
    return np.array(rewards)


def _checked_reward(value: Any, least: float | None, label: str) -> float:
    # An array of one number is a number; a longer one is a mistake.
    if isinstance(value, jax.Array | np.ndarray) and value.ndim == 0:
        value = value.item()
    if not isinstance(value, bool | int | float | np.number | np.bool_):
        raise ValueError(f"{label} must be a number; got {type(value).__name__}.")
    if not math.isfinite(value):
        raise ValueError(f"{label} must be finite; got {value}.")
    if least is not None and value < least:
        raise ValueError(f"{label} must be at least {least:g}; got {float(value)}.")
    return float(value)


@dataclasses.dataclass(frozen=True)
class AdvantageRule:
    """How rewards of a group become the weights of its completions.

    Attributes:
        baseline: what a reward is compared with: the "mean" of its group, or that of the other
            completions alone ("leave_one_out", RLOO), without bias.
        scale: "std" divides by the group's standard deviation; "none" does not, so that easy and
            hard prompts keep their weights (Dr. GRPO).
        average: over what the loss is a mean: all drawn "token"s of the batch; each "row" first, so
            that all completions weigh the same (the first GRPO); or the "constant" number of
            tokens that could have been drawn, so that length changes no weight (Dr. GRPO).

    Source: DeepSeekMath, arXiv 2402.03300 section 4.1.2 (GRPO); arXiv 2402.14740 (RLOO); arXiv
    2503.20783 (Dr. GRPO); arXiv 2503.14476 (means over tokens).
    """

    baseline: Literal["mean", "leave_one_out"] = "mean"
    scale: Literal["std", "none"] = "std"
    average: Literal["token", "row", "constant"] = "token"

    def __post_init__(self):
        """Checks the choices.

        Raises:
            ValueError: an unknown one.
        """
        with prefix_errors("AdvantageRule"):
            check_choice(self.baseline, ("mean", "leave_one_out"), "`baseline`")
            check_choice(self.scale, ("std", "none"), "`scale`")
            check_choice(self.average, ("token", "row", "constant"), "`average`")


def advantages(
    rewards: Float[np.ndarray, "P K"], rule: AdvantageRule | None = None
) -> Float[np.ndarray, "P K"]:
    """Compares rewards within each group; 0 where all rewards of a group are equal.

    Args:
        rewards: of P prompts, K completions each; both at least 1.
        rule: None is `(reward - mean) / (std + 1e-4)`.

    Raises:
        TypeError: no array of numbers.
        ValueError: another shape, rewards that are not finite, or one completion of each prompt
            where the others are the baseline.

    Source: group-relative advantages, DeepSeekMath (arXiv 2402.03300) section 4.1.2.
    """
    rule = rule or AdvantageRule()
    # In float64, so that small differences between large rewards are not lost.
    with prefix_errors("advantages"):
        rewards = np.asarray(as_array(rewards, "`rewards`"), np.float64)
        if rewards.ndim != 2 or not rewards.size:
            raise ValueError(
                f"`rewards` must have shape [P K], both at least 1; got {rewards.shape}."
            )
        if not np.isfinite(rewards).all():
            raise ValueError("`rewards` must be finite; they hold NaN or an infinity.")
        completions = rewards.shape[1]
        if rule.baseline == "leave_one_out" and completions == 1:
            raise ValueError(
                "`rewards` must have two completions of each prompt for 'leave_one_out'; got one."
            )
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    if rule.baseline == "leave_one_out":
        # r - (S - r) / (K - 1) is (r - S / K) times K / (K - 1).
        centred = centred * completions / (completions - 1)
    if rule.scale == "std":
        # The constant keeps a group whose rewards hardly differ from a division by almost 0.
        centred = centred / (rewards.std(axis=1, keepdims=True) + 1e-4)
    # A mean of equal numbers can differ from them by rounding, so test for equality itself.
    return np.where(np.ptp(rewards, axis=1, keepdims=True) > 0, centred, 0.0)
