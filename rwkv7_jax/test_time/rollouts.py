"""Groups of completions that a model draws from its own start state."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int

from rwkv7_jax.array_types import Params
from rwkv7_jax.checks import (
    check_count,
    check_function,
    check_instance,
    check_model,
    check_params,
    check_prompts,
    prefix_errors,
    typed_key,
)
from rwkv7_jax.data.batch import Batch
from rwkv7_jax.generation import sampling
from rwkv7_jax.generation.generate import Generation, generate
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import RWKV7State, check_state, select
from rwkv7_jax.test_time.rewards import (
    AdvantageRule,
    RewardFunction,
    advantages,
    evaluate_rewards,
)
from rwkv7_jax.test_time.traces import Ids, TokenBudget, completion_rows

# Row lengths are rounded up to a multiple of this, so that few widths are ever compiled.
_LENGTH_MULTIPLE = 16

PromptsAt = Callable[[int], Sequence[Sequence[int]]]


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """Groups of completions: row `p * group + k` is completion k of prompt p.

    Attributes:
        tokens: prompt, completion, zeros: inputs and, one later, targets ([B T+1]).
        mask: [B T], 1 where the target was drawn.
        prompts: one for each row.
        completions: one for each row, every id that was drawn.
        budget: each prompt read once, and every drawn token.
    """

    tokens: Int[np.ndarray, "B inputs_and_target"]
    mask: Float[np.ndarray, "B T"]
    prompts: list[Ids]
    completions: list[Ids]
    budget: TokenBudget


class PolicyBatch(NamedTuple):
    """A batch for `policy_loss`, with its rewards and its cost.

    Attributes:
        batch: with tokens, mask and advantages.
        rewards: [P K], of prompts and their completions.
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


def rollouts(
    model: RWKV7,
    params: Params,
    state: RWKV7State | None,
    prompts: Sequence[Sequence[int]],
    *,
    group: int,
    tokens: int,
    key: Array | None = None,
    temperature: sampling.Number = 1.0,
    stop_ids: sampling.Ids = (0,),
    length: int | None = None,
) -> Rollouts:
    """Draws `group` completions of every prompt, which is read once.

    The same key gives the same completions: those of `generate` for every prompt repeated `group`
    times. Programs depend on the number of prompts, `group`, `length` and powers of two above the
    longest prompt and `tokens`.

    Args:
        model: static.
        params: its weights.
        state: where every row starts (batch 1); None is a model that has read nothing.
        prompts: lists of ids, none empty.
        group: completions of each prompt (K).
        tokens: ids drawn for a row at most, at least 1.
        key: one random key, folded with the row's number, or one key for each row; not needed at
            temperature 0.
        temperature: of the sampling.
        stop_ids: ids that end a row.
        length: inputs of a row (T); None takes the next multiple of 16 that holds all rows, even
            those that are drawn to their full length.

    Raises:
        ValueError: an argument out of its range, or rows that do not fit.
        TypeError: ids that are not integers.
    """
    with prefix_errors("rollouts"):
        # Its settings are checked where it is made.
        RolloutSampler(
            model,
            params,
            group=group,
            tokens=tokens,
            temperature=temperature,
            stop_ids=stop_ids,
            length=length,
        )
        if state is not None:
            check_state(state, 1, model.config)
        rows = check_prompts(prompts, model.config.vocab_size)
        length = _row_length(rows, tokens, length)
        if key is not None:
            key = typed_key(key)
        elif temperature > 0:
            raise ValueError("`key` must be given unless `temperature` is 0; got None.")
    # The prompts are read once; then their states are repeated and continued without a prompt.
    # Repeating the prompts instead would read each of them `group` times.
    read = generate(model, params, rows, state, tokens=0)
    # Completions of one prompt are neighbours: `advantages` reshapes them to [P K].
    repeats = np.repeat(np.arange(len(rows)), group)
    out = generate(
        model,
        params,
        [[]] * len(repeats),
        select(read.state, repeats),
        logits=read.logits[repeats],
        tokens=tokens,
        key=key,
        temperature=temperature,
        stop_ids=stop_ids,
    )
    completions = _completions(out)
    repeated_prompts = [tuple(rows[row]) for row in repeats]
    batch = completion_rows(repeated_prompts, completions, length=length)
    # Each prompt once, although its state continues `group` times.
    spent = sum(map(len, rows)) + sum(map(len, completions))
    return Rollouts(
        tokens=np.asarray(batch.tokens),
        mask=np.asarray(batch.mask),
        prompts=repeated_prompts,
        completions=completions,
        budget=TokenBudget(rollout_tokens=spent),
    )


def _row_length(rows: list[list[int]], tokens: int, length: int | None) -> int:
    """Returns the number of inputs of a row."""
    # The last token of a row is a target only.
    least = max(map(len, rows)) + tokens - 1
    # Even completions that end early are padded to it: otherwise each step would compile anew.
    if length is None:
        return -(-least // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
    if length < least:
        raise ValueError(
            f"`length` must be at least {least}, the longest prompt and `tokens` less one; "
            f"got {length}."
        )
    return length


def _completions(out: Generation) -> list[Ids]:
    """Returns the tokens of each row with the stop id that ended it."""
    completions: list[Ids] = []
    # `generate` leaves the stop id out, but a student has to learn it and a reward may look at it.
    for tokens, stop_token in zip(out.tokens, out.stop_tokens, strict=True):
        ending = () if stop_token is None else (stop_token,)
        completions.append((*tokens, *ending))
    return completions


# An object and not a partial of `rollouts`, because sources read `group` from it.
@dataclasses.dataclass(frozen=True)
class RolloutSampler:
    """A model with the settings of its rollouts; the attributes are the arguments of `rollouts`."""

    model: RWKV7
    params: Params
    group: int
    tokens: int
    temperature: sampling.Number = 1.0
    stop_ids: sampling.Ids = (0,)
    length: int | None = None

    def __post_init__(self):
        """Checks the settings.

        Raises:
            TypeError: an argument of the wrong kind.
            ValueError: weights of another model, or a number out of its range.
        """
        with prefix_errors("RolloutSampler"):
            check_model(self.model)
            check_params(self.params, self.model.config)
            check_count(self.group, 1, "`group`")
            check_count(self.tokens, 1, "`tokens`")
            if self.length is not None:
                check_count(self.length, 1, "`length`")
            sampling.make_options(
                self.model.config.vocab_size,
                temperature=self.temperature,
                stop_ids=self.stop_ids,
            )

    def draw(
        self,
        state: RWKV7State | None,
        prompts: Sequence[Sequence[int]],
        key: Array,
    ) -> Rollouts:
        """Draws completions from `state`, as `rollouts` does."""
        return rollouts(
            self.model,
            self.params,
            state,
            prompts,
            group=self.group,
            tokens=self.tokens,
            key=key,
            temperature=self.temperature,
            stop_ids=self.stop_ids,
            length=self.length,
        )


def policy_batch(
    model: RWKV7,
    params: Params,
    state: RWKV7State | None,
    prompts: Sequence[Sequence[int]],
    reward: RewardFunction,
    *,
    group: int,
    rule: AdvantageRule | None = None,
    **choices: Any,
) -> PolicyBatch:
    """Draws rollouts from `state` and makes a batch of `policy_loss` with their advantages.

    The result is a function of the arguments: with `key = jax.random.fold_in(key, n)` step n of a
    run depends on the seed, n and the state alone.

    Args:
        model: static.
        params: its weights.
        state: where every row starts (batch 1).
        prompts: lists of ids.
        reward: of a prompt and a completion.
        group: completions of each prompt, at least 2.
        rule: how rewards become advantages.
        **choices: `tokens`, `key`, `temperature`, `stop_ids` and `length` of `rollouts`.

    Raises:
        ValueError: as `rollouts`; or a reward that is not a finite number.
    """
    with prefix_errors("policy_batch"):
        check_count(group, 2, "`group`")
        check_function(reward, "`reward`")
    drawn = rollouts(model, params, state, prompts, group=group, **choices)
    return make_policy_batch(
        drawn, reward, group=group, rule=rule, tokens=choices["tokens"]
    )


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
        drawn.completions,
        name="policy_batch: `reward`",
        group=group,
    ).reshape(-1, group)
    mask, factor = _average(drawn, rule, tokens)
    batch = Batch(
        tokens=drawn.tokens,
        mask=mask,
        # Back to one number for each row.
        advantages=(factor * advantages(rewards, rule).reshape(-1)).astype(np.float32),
    )
    return PolicyBatch(
        batch=batch,
        rewards=rewards,
        budget=drawn.budget,
    )


def _average(
    drawn: Rollouts, rule: AdvantageRule, tokens: int | None
) -> tuple[np.ndarray, float]:
    """Returns the mask and the factor on advantages that turn the loss's mean into the rule's.

    The loss is a mean over the mask, whose weights need not be 1.
    """
    counts = drawn.mask.sum(axis=1, keepdims=True)
    if rule.average == "row":
        return drawn.mask / np.maximum(counts, 1), 1.0
    if rule.average == "constant":
        assert tokens is not None
        return drawn.mask, float(counts.sum()) / (len(counts) * tokens)
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
    for row, is_chosen in enumerate(rows):
        source = again if is_chosen else drawn
        completions.append(source.completions[row])
    return dataclasses.replace(
        drawn,
        tokens=np.where(rows[:, None], again.tokens, drawn.tokens),
        mask=np.where(rows[:, None], again.mask, drawn.mask),
        completions=completions,
        budget=drawn.budget + again.budget,
    )


def held_out_reward(
    model: RWKV7,
    params: Params,
    state: RWKV7State | None,
    prompts: Sequence[Sequence[int]],
    reward: RewardFunction,
    *,
    tokens: int,
    stop_ids: sampling.Ids = (0,),
) -> tuple[float, TokenBudget]:
    """Returns the mean reward of the greedy completions, and the tokens it cost.

    Args:
        model: static.
        params: its weights.
        state: where every row starts (batch 1).
        prompts: lists of ids that no update sees.
        reward: of a prompt and a completion.
        tokens: ids drawn for a row at most.
        stop_ids: ids that end a row.

    Raises:
        ValueError: as `rollouts`; or a reward that is not a finite number.
    """
    with prefix_errors("held_out_reward"):
        check_function(reward, "`reward`")
    drawn = rollouts(
        model,
        params,
        state,
        prompts,
        group=1,
        # Greedy: the noise of sampling would hide small improvements.
        temperature=0,
        tokens=tokens,
        stop_ids=stop_ids,
    )
    rewards = evaluate_rewards(
        reward, drawn.prompts, drawn.completions, name="held_out_reward: `reward`"
    )
    return float(rewards.mean()), drawn.budget
