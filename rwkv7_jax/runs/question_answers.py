"""Questions from the user's files, answered greedily from every start state in a comparison."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from typing import Any

import numpy as np

from rwkv7_jax.evaluation.task_scores import QuestionScores
from rwkv7_jax.model.state import RWKV7State
from rwkv7_jax.runs.comparison import Comparison
from rwkv7_jax.runs.learnt_questions import tuning_records
from rwkv7_jax.runs.settings import Settings
from rwkv7_jax.test_time.questions import Prompt, QuestionSet, find_verifier
from rwkv7_jax.test_time.rewards import RewardFunction
from rwkv7_jax.test_time.rollouts import RolloutSampler
from rwkv7_jax.test_time.verifiers import VERIFIERS
from rwkv7_jax.text.tokenizer import Tokenizer

# Any held-out share will do, because `every_prompt` has all questions.
_ANY_SHARE = 0.5


@dataclasses.dataclass(frozen=True)
class AskedQuestions:
    """The questions that an evaluation asks, and the reward of an answer.

    Attributes:
        settings: of the evaluation.
        prompts: the prompts of the questions.
        stop_ids: the token ids that end an answer.
        reward: a function of a prompt and a completion.
        notes: sentences for the user: which questions are asked and which are left out.
    """

    settings: Settings
    prompts: list[Prompt]
    stop_ids: tuple[int, ...]
    reward: RewardFunction
    notes: tuple[str, ...]

    @classmethod
    def read(cls, settings: Settings, tokenizer: Tokenizer) -> "AskedQuestions":
        """Reads the questions of `config.questions` without those that a state was tuned on.

        Raises:
            ValueError: the file is bad, the verifier is unknown, or no question is left.
        """
        name = settings.test_time.verifier
        is_own = name not in VERIFIERS
        questions = QuestionSet(
            settings.questions,
            tokenizer,
            held_out=_ANY_SHARE,
            verifier=None if is_own else name,
        )
        prompts, notes = _without_learnt(questions.every_prompt, settings, tokenizer)
        if settings.limit is not None:
            prompts = prompts[: settings.limit]
        if not is_own:
            unknown = sum(not questions.has_answer(prompt) for prompt in prompts)
            if unknown:
                notes.append(
                    f"the verifier finds no known answer to {unknown:,} of them; they count as "
                    "wrong"
                )
        options = settings.test_time
        notes.insert(
            0,
            f"{len(prompts):,} questions of {settings.questions}, answered greedily in at most "
            f"{options.tokens:,} tokens; verifier {name}",
        )
        return cls(
            settings,
            prompts,
            questions.stop_ids,
            find_verifier(name) if is_own else questions.reward,
            tuple(notes),
        )

    @property
    def _metric(self) -> str:
        """The name of the metric: a reward function of the user's may return any number."""
        return "accuracy" if self.settings.test_time.verifier in VERIFIERS else "reward"

    def answer(
        self,
        comparison: Comparison,
        start: RWKV7State,
        *,
        on_progress: Callable[[int, int], Any] | None = None,
    ) -> dict[str, QuestionScores]:
        """Answers every question from a start state.

        Args:
            comparison: the model, its weights and its tokenizer.
            start: the state.
            on_progress: called with the number of answered questions and the number of all.

        Returns:
            The accuracy (the mean reward for a function of the user's), and as "cut off" the share
            of answers that reached the token limit.

        Raises:
            ValueError: a reward is not a finite number.
        """
        options = self.settings.test_time
        sampler = RolloutSampler(
            comparison.model,
            comparison.params,
            group=1,
            tokens=options.tokens,
            temperature=0,
            stop_ids=self.stop_ids,
            stop_strings=options.stop,
            tokenizer=comparison.tokenizer,
        )
        rows = min(len(self.prompts), options.at_once)
        rewards = []
        cut = []
        for first in range(0, len(self.prompts), rows):
            part = self.prompts[first : first + rows]
            # Pad the batch, so that one compiled program serves all of them.
            padded = part + part[-1:] * (rows - len(part))
            drawn = sampler.draw(start, padded, None)
            found = sampler.judge(
                drawn, self.reward, name="`config.test_time.verifier`"
            )
            rewards.append(found.rewards[: len(part)])
            cut.append(found.cut[: len(part)])
            if on_progress is not None:
                on_progress(first + len(part), len(self.prompts))
        return {
            self._metric: self._scores(rewards),
            "cut off": self._scores(cut),
        }

    def _scores(self, values: list[np.ndarray]) -> QuestionScores:
        """Builds the scores from one value per question."""
        totals = np.concatenate(values).astype(np.float64)
        hashes = tuple(_prompt_hash(prompt) for prompt in self.prompts)
        return QuestionScores(totals, np.ones(len(totals)), hashes)

    def as_json(self) -> dict[str, Any]:
        """Describes how the questions were asked, for a report."""
        options = self.settings.test_time
        return {
            "file": self.settings.questions,
            "asked": len(self.prompts),
            "verifier": options.verifier,
            "tokens": options.tokens,
            "stop": list(options.stop),
            "notes": list(self.notes),
        }


def _prompt_hash(prompt: Prompt) -> str:
    return hashlib.blake2b(json.dumps(prompt).encode(), digest_size=8).hexdigest()


def _without_learnt(
    prompts: list[Prompt], settings: Settings, tokenizer: Tokenizer
) -> tuple[list[Prompt], list[str]]:
    """Removes the questions that a state was tuned on; also returns a note on each state."""
    kept = prompts
    notes = []
    for path, record in tuning_records(settings).items():
        if record is None:
            notes.append(
                f"unknown: whether {path} was tuned on some of them, because it is not in a run "
                "directory; set `config.data.path` to its data to leave them out"
            )
            continue
        try:
            learnt = record.learnt_prompts(tokenizer)
        # The run's data is gone, or does not hold questions.
        except (OSError, ValueError) as error:
            notes.append(
                f"unknown: whether some are in the training part of {record.name}: {error}"
            )
            continue
        kept = [prompt for prompt in kept if prompt not in learnt]
        count = sum(prompt in learnt for prompt in prompts)
        notes.append(
            f"left out: {count:,} in the training part of {record.name}"
            if count
            else f"in the training part of {record.name}: none of them"
        )
    if not kept:
        raise ValueError(
            f"`config.questions` must hold a question that no state was tuned on; got "
            f"{settings.questions!r}, whose {len(prompts):,} questions were all used for tuning."
        )
    return kept, notes
