"""Groups of completions that a model draws from its own start state."""

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
        judged: the completions as rewards see them, without the stop string that ended them and
            what came with it; by default as they were drawn.
        logps: [B T], the log-probability of each drawn target when it was drawn, 0 elsewhere; None
            where it was not recorded.
        first: the number of the first prompt, where other processes draw those before it.
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
        """Fills in what rewards see where it is not given."""
        if not self.judged:
            object.__setattr__(self, "judged", self.completions)


class Judgement(NamedTuple):
    """Rewards and lengths of the completions of a step, those of all processes together.

    Attributes:
        rewards: of each row, [B] float64.
        lengths: drawn tokens of each row, [B].
        cut: of each row, whether it ended because it had the most tokens allowed, [B] bool.
    """

    rewards: np.ndarray
    lengths: np.ndarray
    cut: np.ndarray


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


def _at_targets(drawn: Rollouts, logps: list[list[float]]) -> np.ndarray:
    """Lays numbers of drawn ids out as the targets of their rows."""
    at_targets = np.zeros(drawn.mask.shape, np.float32)
    for row, values in enumerate(logps):
        # The target of position t is token t + 1.
        start = len(drawn.prompts[row]) - 1
        at_targets[row, start : start + len(values)] = values
    return at_targets


def _some_row_keys(key: Array, first: int, stop: int) -> Array:
    """Returns the keys of some of the rows, those that `generate` gives them among all rows."""
    if key.ndim:
        return key[first:stop]
    fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    return fold(key, jnp.arange(first, stop))


@dataclasses.dataclass(frozen=True)
class RolloutSampler:
    """A model with the options by which its completions are drawn.

    Attributes:
        model: the shell around `params`.
        params: its weights.
        group: completions of each prompt (K).
        tokens: ids drawn for a row at most, at least 1.
        temperature: of the sampling; 0 is greedy.
        stop_ids: ids that end a row.
        length: inputs of a row (T); None takes the next multiple of 16 that holds all rows, even
            those that are drawn to their full length.
        stop_strings: strings that end a row, as in `generate`; rewards do not see them.
        tokenizer: needed with `stop_strings`.
        share: of the prompts of a step, those that this process answers.
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
            check_text_options(self.tokenizer, self.stop_strings)

    def draw(
        self,
        state: RWKV7State | None,
        prompts: Sequence[Sequence[int]],
        key: Array | None,
    ) -> Rollouts:
        """Draws `group` completions of every prompt of this process's, which is read once.

        The same key gives the same completions: those of `generate` for every prompt repeated
        `group` times. Programs depend on the number of prompts, `group`, `length` and powers of two
        above the longest prompt and `tokens`.

        Args:
            state: where every row starts (batch 1); None is a model that has read nothing.
            prompts: lists of ids, none empty; those of all processes.
            key: one random key, folded with the row's number, or one key for each row; not needed
                at temperature 0.

        Raises:
            TypeError: ids that are not integers, or no random key.
            ValueError: an argument out of its range, or rows that do not fit.
        """
        with prefix_errors("RolloutSampler.draw"):
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
            # A completion is the same whichever process draws it.
            if key is not None:
                first = part.start * self.group
                key = _some_row_keys(key, first, part.stop * self.group)
            rows = rows[part]
        # Completions of one prompt are neighbours: `advantages` reshapes them to [P K].
        repeats = np.repeat(np.arange(len(rows)), self.group)
        out = self._complete(state, rows, repeats, key)
        # With what ended them: a student has to learn it, and a reward may look at the stop id.
        completions: list[Ids] = [tuple(drawn) for drawn in out.drawn]
        repeated_prompts = [tuple(rows[row]) for row in repeats]
        batch = completion_rows(repeated_prompts, completions, length=length)
        # Each prompt once, although its state continues `group` times.
        spent = sum(map(len, rows)) + sum(map(len, completions))
        drawn = Rollouts(
            tokens=np.asarray(batch.tokens),
            mask=np.asarray(batch.mask),
            prompts=repeated_prompts,
            completions=completions,
            budget=TokenBudget(rollout_tokens=spent),
            judged=[self.judged(completion) for completion in completions],
            first=part.start,
        )
        return dataclasses.replace(drawn, logps=_at_targets(drawn, out.logps))

    def judge(
        self,
        drawn: Rollouts,
        reward: RewardFunction,
        *,
        name: str,
        least: float | None = None,
    ) -> Judgement:
        """Judges completions that `draw` returned; of several processes, each judges its own.

        Args:
            drawn: groups of completions.
            reward: of a prompt and a completion.
            name: of the reward's argument, for messages.
            least: the smallest reward that is allowed; None allows every finite one.

        Raises:
            ValueError: as `evaluate_rewards`.
        """
        rows = self.own_rows(drawn)

        def judge_own() -> np.ndarray:
            completions = drawn.completions[rows]
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
        """Returns which rows of what `draw` returned this process judges."""
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
        """Completes the prompts that `repeats` counts, each of which is read once."""
        # The prompts are read once; then their states are repeated and continued without a prompt.
        # Repeating the prompts instead would read each of them `group` times.
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
            # Without stop strings the text is not read, and making it costs time on the host.
            tokenizer=self.tokenizer if self.stop_strings else None,
        )

    def judged(self, completion: Ids) -> Ids:
        """Returns a completion as rewards see it: without the stop string that ended it."""
        if not self.stop_strings:
            return completion
        assert self.tokenizer is not None
        has_stop_id = bool(completion) and completion[-1] in self.stop_ids
        # A stop id is no text: it ends a row without completing a stop string.
        text = completion[:-1] if has_stop_id else completion
        kept = before_stop_string(text, self.tokenizer, self.stop_strings)
        return completion if kept is None else tuple(kept)

    def is_cut(self, completion: Ids) -> bool:
        """Tells whether a completion ended because it had the most tokens allowed."""
        is_full = len(completion) == self.tokens
        by_id = bool(completion) and completion[-1] in self.stop_ids
        return is_full and not by_id and self.judged(completion) == completion

    def greedy_rewards(
        self,
        state: RWKV7State | None,
        prompts: Sequence[Sequence[int]],
        reward: RewardFunction,
    ) -> tuple[Float[np.ndarray, " P"], TokenBudget]:
        """Returns the reward of each prompt's greedy completion, and the tokens they cost.

        Args:
            state: where every row starts (batch 1).
            prompts: lists of ids that no update sees.
            reward: of a prompt and a completion.

        Raises:
            TypeError: an argument of the wrong kind.
            ValueError: as `draw`; or a reward that is not a finite number.
        """
        with prefix_errors("RolloutSampler.greedy_rewards"):
            check_function(reward, "`reward`")
        # Greedy: the noise of sampling would hide small improvements.
        greedy = dataclasses.replace(self, group=1, temperature=0, length=None)
        if len(prompts) < self.share.count:
            # Some processes would have none: each answers all of these few.
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
        """Returns the mean of `greedy_rewards`, and the tokens it cost.

        Args:
            state: where every row starts (batch 1).
            prompts: lists of ids that no update sees.
            reward: of a prompt and a completion.

        Raises:
            TypeError: an argument of the wrong kind.
            ValueError: as `greedy_rewards`.
        """
        with prefix_errors("RolloutSampler.mean_reward"):
            check_function(reward, "`reward`")
        rewards, budget = self.greedy_rewards(state, prompts, reward)
        return float(rewards.mean()), budget


class RewardedBatches(StateBatchSource):
    """Batches of the completions that a sampler draws from the state and a reward judges."""

    def __init__(
        self,
        sampler: RolloutSampler,
        prompts_at: PromptsAt,
        reward: RewardFunction,
        key: Array,
    ):
        """Checks and keeps what every such source has.

        Args:
            sampler: draws the completions.
            prompts_at: the prompts of a step.
            reward: `(prompt, completion) -> number`; the completion holds its stop id.
            key: one random key.

        Raises:
            TypeError: an argument of the wrong kind.
            ValueError: several keys.
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
        """Returns the key of a step, or of a round, by its number."""
        # Folded with the number, not split from the last key: a resumed run does not have that one.
        return jax.random.fold_in(self._key, number)


def reward_target(
    sampler: RolloutSampler,
    reward: RewardFunction,
    held_out: Sequence[Sequence[int]],
    *,
    every: int,
    stop_reward: float,
) -> RewardTarget:
    """Makes the target of a loop on rewards.

    Args:
        sampler: draws the completions.
        reward: of a prompt and a completion.
        held_out: prompts that no update sees; the loop's own rewards count where there are none.
        every: steps between two evaluations, or of the moving average.
        stop_reward: mean reward that is enough.

    Raises:
        TypeError: prompts or numbers of the wrong kind.
        ValueError: prompts or numbers out of their range.
    """
    if not len(held_out):
        return RewardTarget(None, every, stop_reward)
    check_prompts(held_out, sampler.model.config.vocab_size, name="held_out")

    def evaluate(state: RWKV7State) -> tuple[float, TokenBudget]:
        return sampler.mean_reward(state, held_out, reward)

    return RewardTarget(evaluate, every, stop_reward)
