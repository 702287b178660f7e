"""Samples groups of completions from a start state."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rwkv7_jax.array_types import Params
from rwkv7_jax.checks import (
    check_count,
    check_function,
    check_instance,
    check_key,
    check_model,
    check_not_intercepted,
    check_params,
    check_prompts,
    prefix_errors,
    typed_key,
)
from rwkv7_jax.generation import sampling
from rwkv7_jax.generation.generate import Generation, check_text_options, generate
from rwkv7_jax.generation.streaming import before_stop_string
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import RWKV7State, check_state, select
from rwkv7_jax.test_time.prompt_share import ALONE, PromptShare
from rwkv7_jax.test_time.rewards import (
    RewardFunction,
    evaluate_rewards,
)
from rwkv7_jax.test_time.traces import Ids, TokenBudget, completion_rows
from rwkv7_jax.test_time.tuning_loop import RewardTarget, StateBatchSource
from rwkv7_jax.text.detokenizer import Vocabulary

# Row lengths are rounded up to a multiple of this, to compile few programs.
_LENGTH_MULTIPLE = 16

PromptsAt = Callable[[int], Sequence[Sequence[int]]]


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """Groups of completions: row `p * group + k` is completion k of prompt p.

    Attributes:
        tokens: prompt, completion and zeros, as inputs and shifted targets ([B T+1]).
        mask: [B T], 1 for sampled targets.
        prompts: prompt of each row.
        completions: all sampled ids of each row.
        budget: tokens: each prompt once, and all sampled tokens.
        judged: the completions as rewards see them: without the stop string that ended them and
            anything after it. By default the completions.
        logps: [B T], log-probability of each sampled target at sampling time, 0 elsewhere; None if
            not recorded.
        first: index of the first prompt, if other processes sample those before it.
    """

    tokens: Int[np.ndarray, "B inputs_and_target"]
    mask: Float[np.ndarray, "B T"]
    prompts: list[Ids]
    completions: list[Ids]
    budget: TokenBudget
    judged: list[Ids] = dataclasses.field(default_factory=list)
    logps: Float[np.ndarray, "B T"] | None = None
    first: int = 0

    def __post_init__(self):
        """Sets the default of `judged`."""
        if not self.judged:
            object.__setattr__(self, "judged", self.completions)


class Judgement(NamedTuple):
    """Rewards and lengths of the completions of a step, of all processes.

    Attributes:
        rewards: reward of each row, [B] float64.
        lengths: number of sampled tokens of each row, [B].
        cut: whether a row ended at the token limit, [B] bool.
    """

    rewards: np.ndarray
    lengths: np.ndarray
    cut: np.ndarray


def _row_length(rows: list[list[int]], tokens: int, length: int | None) -> int:
    """Returns the number of inputs of a row."""
    # The last token of a row is a target only.
    least = max(map(len, rows)) + tokens - 1
    # Completions that end early are padded to it; otherwise each step could compile a new program.
    if length is None:
        return -(-least // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
    if length < least:
        raise ValueError(
            f"`length` must be at least {least}, the longest prompt plus `tokens` minus one; "
            f"got {length}."
        )
    return length


def _at_targets(
    logps: list[list[float]], prompts: list[Ids], length: int
) -> np.ndarray:
    """Arranges the log-probabilities of sampled ids at the target positions of their rows."""
    at_targets = np.zeros((len(prompts), length), np.float32)
    for row, (values, prompt) in enumerate(zip(logps, prompts, strict=True)):
        # The target of position t is token t + 1.
        start = len(prompt) - 1
        at_targets[row, start : start + len(values)] = values
    return at_targets


@dataclasses.dataclass(frozen=True)
class RolloutSampler:
    """A model with sampling options.

    Attributes:
        model: the network.
        params: its weights.
        group: completions per prompt (K).
        tokens: most sampled ids per row, at least 1.
        temperature: sampling temperature; 0 is greedy.
        stop_ids: ids that end a row.
        length: inputs of a row (T); None takes the next multiple of 16 that fits every row at its
            full length.
        stop_strings: stop sequences, as in `generate`; rewards do not see them.
        tokenizer: required with `stop_strings`.
        share: this process's part of the prompts of a step.
    """

    model: RWKV7
    params: Params
    group: int
    tokens: int
    temperature: sampling.Number = 1.0
    stop_ids: sampling.Ids = (0,)
    length: int | None = None
    stop_strings: Sequence[str] = ()
    tokenizer: Vocabulary | None = None
    share: PromptShare = ALONE

    def __post_init__(self):
        """Checks the options.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: the weights do not fit the model, or a number is out of range.
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
            check_text_options(self.tokenizer, self.stop_strings)

    def draw(
        self,
        state: RWKV7State | None,
        prompts: Sequence[Sequence[int]],
        key: Array | None,
    ) -> Rollouts:
        """Samples `group` completions for every prompt of this process; prefills each prompt once.

        Equal keys give equal completions: those of `generate` with every prompt repeated `group`
        times. Compiled programs depend on the number of prompts, `group`, `length`, and the powers
        of two above the longest prompt and above `tokens`.

        Args:
            state: start state of every row (batch 1); None for the zero state.
            prompts: non-empty lists of ids, of all processes.
            key: one random key, which is folded with the row index, or one key per row; not needed
                at temperature 0.

        Raises:
            TypeError: an id is not an integer, or the key is not a random key.
            ValueError: an argument is out of range, or a row does not fit.
        """
        with prefix_errors("RolloutSampler.draw"):
            check_not_intercepted()
            if state is not None:
                check_state(state, 1, self.model.config)
            rows = check_prompts(prompts, self.model.config.vocab_size)
            length = _row_length(rows, self.tokens, self.length)
            if key is not None:
                key = typed_key(key)
            elif self.temperature > 0:
                raise ValueError(
                    "`key` must be given unless `temperature` is 0; got None."
                )
        part = self.share.drawn(len(rows))
        if part != slice(0, len(rows)):
            # As in `generate` on all rows: a completion does not depend on the process.
            if key is not None:
                if not key.ndim:
                    key = sampling.fold_keys(key, jnp.arange(len(rows) * self.group))
                key = key[part.start * self.group : part.stop * self.group]
            rows = rows[part]
        # Completions of one prompt are adjacent: `advantages` reshapes them to [P K].
        repeats = np.repeat(np.arange(len(rows)), self.group)
        out = self._complete(state, rows, repeats, key)
        # Including the stop id: a student has to learn it, and a reward may check it.
        completions: list[Ids] = [tuple(drawn) for drawn in out.drawn]
        repeated_prompts = [tuple(rows[row]) for row in repeats]
        batch = completion_rows(repeated_prompts, completions, length=length)
        # Each prompt is prefilled once, although its state continues `group` times.
        spent = sum(map(len, rows)) + sum(map(len, completions))
        return Rollouts(
            tokens=np.asarray(batch.tokens),
            mask=np.asarray(batch.mask),
            prompts=repeated_prompts,
            completions=completions,
            budget=TokenBudget(rollout_tokens=spent),
            judged=[self.judged(completion) for completion in completions],
            logps=_at_targets(out.logps, repeated_prompts, length),
            first=part.start,
        )

    def judge(
        self,
        drawn: Rollouts,
        reward: RewardFunction,
        *,
        name: str,
        least: float | None = None,
    ) -> Judgement:
        """Judges the completions of `draw`; each process judges its own and returns all.

        Args:
            drawn: groups of completions.
            reward: `(prompt, completion) -> number`.
            name: name of the reward's argument, for messages.
            least: smallest allowed reward; None allows every finite reward.

        Raises:
            ValueError: as `evaluate_rewards`.
        """
        rows = self.own_rows(drawn)

        def judge_own() -> np.ndarray:
            completions = drawn.completions[rows]
            if not completions:
                # There are fewer prompts than processes.
                return np.zeros((0, 3))
            rewards = evaluate_rewards(
                reward,
                drawn.prompts[rows],
                drawn.judged[rows],
                name=name,
                group=self.group,
                first=drawn.first + rows.start // self.group,
                least=least,
            )
            lengths = [len(completion) for completion in completions]
            cut = [self.is_cut(completion) for completion in completions]
            return np.stack([rewards, lengths, cut], axis=1)

        rewards, lengths, cut = self.share.join_rows(judge_own).T
        return Judgement(rewards, lengths, cut > 0)

    def own_rows(self, drawn: Rollouts) -> slice:
        """Returns the slice of the rows of `draw` that this process judges."""
        rows = len(drawn.completions)
        if not self.share.drawn_together:
            return slice(0, rows)
        part = self.share.judged(rows // self.group)
        return slice(part.start * self.group, part.stop * self.group)

    def _complete(
        self,
        state: RWKV7State | None,
        prompts: list[list[int]],
        repeats: np.ndarray,
        key: Array | None,
    ) -> Generation:
        """Completes the prompts with the indices `repeats`; prefills each prompt once."""
        # The states after the prompts are repeated and continue with empty prompts. Repeating the
        # prompts instead would prefill each of them `group` times.
        read = generate(self.model, self.params, prompts, state, tokens=0)
        return generate(
            self.model,
            self.params,
            [[]] * len(repeats),
            select(read.state, repeats),
            logits=read.logits[repeats],
            tokens=self.tokens,
            key=key,
            temperature=self.temperature,
            stop_ids=self.stop_ids,
            stop_strings=self.stop_strings,
            # Without stop strings the text is not needed, and decoding it costs time on the host.
            tokenizer=self.tokenizer if self.stop_strings else None,
        )

    def judged(self, completion: Ids) -> Ids:
        """Returns a completion as rewards see it: without the stop string that ended it."""
        if not self.stop_strings:
            return completion
        assert self.tokenizer is not None
        has_stop_id = bool(completion) and completion[-1] in self.stop_ids
        # A stop id is not text and cannot complete a stop string.
        text = completion[:-1] if has_stop_id else completion
        kept = before_stop_string(text, self.tokenizer, self.stop_strings)
        return completion if kept is None else tuple(kept)

    def is_cut(self, completion: Ids) -> bool:
        """Tells whether a completion ended at the token limit."""
        is_full = len(completion) == self.tokens
        by_id = bool(completion) and completion[-1] in self.stop_ids
        return is_full and not by_id and self.judged(completion) == completion

    def greedy_rewards(
        self,
        state: RWKV7State | None,
        prompts: Sequence[Sequence[int]],
        reward: RewardFunction,
    ) -> tuple[Float[np.ndarray, " P"], TokenBudget]:
        """Returns the rewards of the prompts' greedy completions, and their tokens.

        Args:
            state: start state of every row (batch 1); None for the zero state.
            prompts: lists of ids that no update sees.
            reward: `(prompt, completion) -> number`.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: as `draw`; or a reward is not a finite number.
        """
        with prefix_errors("RolloutSampler.greedy_rewards"):
            check_function(reward, "`reward`")
        # Sampling noise would hide small improvements.
        greedy = dataclasses.replace(self, group=1, temperature=0, length=None)
        if len(prompts) < self.share.count:
            # Some processes would have no prompt, so each completes all of them.
            greedy = dataclasses.replace(greedy, share=ALONE)
        drawn = greedy.draw(state, prompts, None)
        found = greedy.judge(
            drawn, reward, name="RolloutSampler.greedy_rewards: `reward`"
        )
        return found.rewards, drawn.budget

    def mean_reward(
        self,
        state: RWKV7State | None,
        prompts: Sequence[Sequence[int]],
        reward: RewardFunction,
    ) -> tuple[float, TokenBudget]:
        """Returns the mean of `greedy_rewards`, and the tokens that it costs.

        Args:
            state: start state of every row (batch 1); None for the zero state.
            prompts: lists of ids that no update sees.
            reward: `(prompt, completion) -> number`.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: as `greedy_rewards`.
        """
        with prefix_errors("RolloutSampler.mean_reward"):
            check_function(reward, "`reward`")
        rewards, budget = self.greedy_rewards(state, prompts, reward)
        return float(rewards.mean()), budget


class RewardedBatches(StateBatchSource):
    """Batches of rewarded completions, sampled from the current state."""

    def __init__(
        self,
        sampler: RolloutSampler,
        prompts_at: PromptsAt,
        reward: RewardFunction,
        key: Array,
    ):
        """Checks and stores the arguments that all such sources share.

        Args:
            sampler: samples the completions.
            prompts_at: returns the prompts of a step.
            reward: `(prompt, completion) -> number`; the completion includes its stop id.
            key: one random key.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: there are several keys.
        """
        super().__init__()
        check_instance(sampler, RolloutSampler, "`sampler`")
        check_function(prompts_at, "`prompts_at`")
        check_function(reward, "`reward`")
        self._sampler = sampler
        self._prompts_at = prompts_at
        self._reward = reward
        self._key = check_key(key)

    def _key_at(self, number: int) -> Array:
        """Returns the key of a step or a round."""
        # Folding needs no earlier key, which a resumed run would not have.
        return jax.random.fold_in(self._key, number)


def reward_target(
    sampler: RolloutSampler,
    reward: RewardFunction,
    held_out: Sequence[Sequence[int]],
    *,
    every: int,
    stop_reward: float,
) -> RewardTarget:
    """Makes the reward target of a tuning loop.

    Args:
        sampler: samples the completions.
        reward: `(prompt, completion) -> number`.
        held_out: prompts that no update sees; without any, the rewards in training count.
        every: steps between evaluations, or steps of the moving average.
        stop_reward: mean reward that ends tuning.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range.
    """
    if not len(held_out):
        return RewardTarget(None, every, stop_reward)
    check_prompts(held_out, sampler.model.config.vocab_size, "`held_out`")

    def evaluate(state: RWKV7State) -> tuple[float, TokenBudget]:
        return sampler.mean_reward(state, held_out, reward)

    return RewardTarget(evaluate, every, stop_reward)
