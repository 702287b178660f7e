"""Completions that a model draws from its own start state, in groups."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int

from rwkv7_jax.array_types import Params
from rwkv7_jax.checks import check_count, check_function, check_prompts, typed_key
from rwkv7_jax.data.batch import Batch
from rwkv7_jax.generation import sampling
from rwkv7_jax.generation.generate import Generation, generate
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import RWKV7State, select
from rwkv7_jax.test_time.rewards import RewardFunction, advantages, evaluate_rewards
from rwkv7_jax.test_time.traces import Ids, TokenBudget, completion_rows

# Rows are filled up to a multiple of this, so that few widths are ever compiled.
_WIDTH = 16


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """Groups of completions: row `p * group + k` is completion k of prompt p.

    Attributes:
        tokens: prompt, completion, zeros: inputs and, one later, targets ([B T+1]).
        mask: [B T], 1 where the target was drawn.
        prompts: one a row.
        completions: one a row, every id that was drawn.
        budget: each prompt read once, and all that was drawn.
    """

    tokens: Int[np.ndarray, "B inputs_and_target"]
    mask: Float[np.ndarray, "B T"]
    prompts: list[Ids]
    completions: list[Ids]
    budget: TokenBudget


class PolicyBatch(NamedTuple):
    """A batch for `policy_loss`, and what it was made of.

    Attributes:
        batch: tokens [B T+1], mask [B T], advantages [B].
        rewards: [P K], of prompts and their completions.
        budget: what the rollouts cost.
    """

    batch: Batch
    rewards: np.ndarray
    budget: TokenBudget

    @property
    def uniform(self) -> bool:
        """No group tells a better completion from a worse one: there is nothing to learn."""
        return not self.batch.advantages.any()


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
    """`group` completions of every prompt, which is read once; the same key gives the same ones.

    They are those of `generate` on every prompt `group` times over, with the same key. Programs
    depend on the number of prompts, `group`, `length` and powers of two above the longest prompt
    and `tokens`.

    Args:
        model: static.
        params: its weights.
        state: what every row starts from (batch 1); None is a model that has read nothing.
        prompts: lists of ids, none empty.
        group: completions a prompt (K).
        tokens: ids drawn a row at most, at least 1.
        key: one random key, folded with the row's number, or a key a row; not needed at
            temperature 0.
        temperature: of the sampling.
        stop_ids: ids that end a row.
        length: inputs of a row (T); None takes the next multiple of 16 that holds all rows, even
            those that are drawn to their full length.

    Raises:
        ValueError: an argument out of its range, or rows that do not fit.
        TypeError: ids that are no integers.
    """
    caller = "rollouts"
    rows = check_prompts(prompts, model.config.vocab_size, caller=caller)
    for name, value in (("group", group), ("tokens", tokens)):
        check_count(value, 1, f"{caller}: `{name}`")
    length = _length(rows, tokens, length, caller=caller)
    # Checks the options here, so that messages do not name a function that the caller did not call.
    sampling.make_options(
        model.config.vocab_size, temperature=temperature, stop_ids=stop_ids, caller=caller
    )
    if key is None and temperature > 0:
        raise ValueError(f"{caller}: `key` must be given unless `temperature` is 0; got None.")
    key = None if key is None else typed_key(key, caller=caller)
    out = _continued(
        model,
        params,
        rows,
        state,
        group=group,
        tokens=tokens,
        key=key,
        temperature=temperature,
        stop_ids=stop_ids,
    )
    completions = _completions(out)
    repeated = [tuple(row) for row in rows for _ in range(group)]
    spent = sum(map(len, rows)) + sum(map(len, completions))
    return Rollouts(
        **completion_rows(repeated, completions, length=length, caller=caller),
        prompts=repeated,
        completions=completions,
        budget=TokenBudget(rollout_tokens=spent),
    )


def _length(rows: list[list[int]], tokens: int, length: int | None, *, caller: str) -> int:
    """Inputs of a row."""
    least = max(map(len, rows)) + tokens - 1
    if length is None:
        return -(-least // _WIDTH) * _WIDTH
    if check_count(length, 1, f"{caller}: `length`") < least:
        raise ValueError(
            f"{caller}: `length` must be at least {least}, the longest prompt and `tokens` "
            f"less one; got {length}."
        )
    return length


def _continued(model, params, rows: list[list[int]], state, *, group: int, **choices) -> Generation:
    """Every prompt read once and continued `group` times."""
    read = generate(model, params, rows, state, tokens=0)
    tiled = np.repeat(np.arange(len(rows)), group)
    start = select(read.state, tiled)
    return generate(model, params, [[]] * len(tiled), start, logits=read.logits[tiled], **choices)


def _completions(out: Generation) -> list[Ids]:
    """Returns the tokens of each row with the stop id that ended it."""
    completions: list[Ids] = []
    for tokens, stop_token in zip(out.tokens, out.stop_tokens, strict=True):
        ending = () if stop_token is None else (stop_token,)
        completions.append((*tokens, *ending))
    return completions


def policy_batch(
    model: RWKV7,
    params: Params,
    state: RWKV7State | None,
    prompts: Sequence[Sequence[int]],
    reward: RewardFunction,
    *,
    group: int,
    **choices: Any,
) -> PolicyBatch:
    """Rollouts from `state` and their advantages, as a batch of `policy_loss`.

    All is a function of the arguments: with `key = jax.random.fold_in(key, n)` step n of a run
    depends on the seed, n and the state alone.

    Args:
        model: static.
        params: its weights.
        state: what every row starts from (batch 1).
        prompts: lists of ids.
        reward: of a prompt and a completion.
        group: completions a prompt, at least 2.
        **choices: `tokens`, `key`, `temperature`, `stop_ids` and `length` of `rollouts`.

    Raises:
        ValueError: as `rollouts`; or a reward that is no finite number.
    """
    check_count(group, 2, "policy_batch: `group`")
    check_function(reward, "policy_batch: `reward`")
    drawn = rollouts(model, params, state, prompts, group=group, **choices)
    name = "policy_batch: `reward`"
    rewards = evaluate_rewards(reward, drawn.prompts, drawn.completions, name=name, group=group)
    rewards = rewards.reshape(-1, group)
    batch = Batch(
        tokens=drawn.tokens,
        mask=drawn.mask,
        advantages=advantages(rewards).reshape(-1).astype(np.float32),
    )
    return PolicyBatch(batch=batch, rewards=rewards, budget=drawn.budget)


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
    """The mean reward of the most probable completions, and what it cost to know.

    Args:
        model: static.
        params: its weights.
        state: what every row starts from (batch 1).
        prompts: lists of ids that no update sees.
        reward: of a prompt and a completion.
        tokens: ids drawn a row at most.
        stop_ids: ids that end a row.
    """
    choices = {"group": 1, "temperature": 0, "tokens": tokens, "stop_ids": stop_ids}
    drawn = rollouts(model, params, state, prompts, **choices)
    name = "held_out_reward: `reward`"
    return float(
        evaluate_rewards(reward, drawn.prompts, drawn.completions, name=name).mean()
    ), drawn.budget
