"""Collects completions from a teacher, filtered by a verifier or a majority vote."""

import collections
import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from rwkv7_jax.checks import (
    check_count,
    check_function,
    check_instance,
    check_key,
    check_number,
    check_prompts,
    prefix_errors,
)
from rwkv7_jax.generation.sampling import fold_keys
from rwkv7_jax.model.state import RWKV7State, check_state
from rwkv7_jax.test_time.completion_cache import CompletionCache
from rwkv7_jax.test_time.prompt_share import ALONE
from rwkv7_jax.test_time.rewards import (
    RewardFunction,
    evaluate_rewards,
    named_errors,
)
from rwkv7_jax.test_time.rollouts import RolloutSampler
from rwkv7_jax.test_time.traces import Ids, TokenBudget, Trace

# Maps a completion to its answer, which a vote compares with other answers.
Extract = Callable[[Ids], Hashable]

# Maps the student's prompt to the teacher's.
Template = Callable[[Ids], Sequence[int]]


def collect_traces(
    teacher: RolloutSampler,
    prompts: Sequence[Sequence[int]],
    *,
    key: Array,
    state: RWKV7State | None = None,
    template: Template | None = None,
    verify: RewardFunction | None = None,
    vote: tuple[Extract, float] | None = None,
    source: str = "teacher",
    cache: str | Path | None = None,
    teacher_hash: str | None = None,
    at_once: int = 8,
    on_progress: Callable[[int, int], Any] | None = None,
) -> tuple[list[Trace], TokenBudget]:
    """Samples completions from the teacher and keeps those that a verifier or a vote approves.

    The completions of a prompt depend on the key, its ids and the number of its earlier
    occurrences, not on other prompts. So with `cache` a killed run resumes, and ends with the same
    traces and the same budget. With several processes (`teacher.share`), each completes some of the
    prompts and returns all traces; only the cache of the first process is used.

    Args:
        teacher: the larger model, or the student itself, with its sampling options; `group` is the
            number of completions per prompt. Completions include the stop id or stop string, which
            the student has to learn; judging excludes a stop string.
        prompts: lists of ids as the student sees them.
        key: one random key.
        state: start state of the teacher (batch 1); None for the zero state.
        template: maps a prompt to the prompt that the teacher reads, for instance with an
            instruction, a hint or a request to think step by step. The traces keep the student's
            prompt.
        verify: `(prompt, completion) -> number`, with the student's prompt. A number above 0 keeps
            the completion and is its weight (a bool counts as 0 or 1).
        vote: `(extract, margin)`, instead of `verify`. Keeps the completions of a prompt whose
            `extract(completion)` is the most frequent answer, if it leads the second one by at
            least one vote and by at least `margin`, a fraction of the group. An answer of None does
            not count.
        source: the teacher's name in the traces.
        cache: a file of completions before judging. New ones are appended; those with the same
            teacher, state, prompt, key and options are reused.
        teacher_hash: identifies the teacher's weights in the cache, such as `model_hash` of
            `checkpoints`; required with `cache`.
        at_once: prompts per batch.
        on_progress: called with the number of finished prompts and the number of all.

    Returns:
        The traces in the order of the prompts, and the tokens that they cost.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, or the verifier or the vote raised or did not
            return a number; the cache keeps the completions.
    """
    with prefix_errors("collect_traces"):
        check_instance(teacher, RolloutSampler, "`teacher`")
        check_count(at_once, 1, "`at_once`")
        judge = _make_judge(verify, vote)
        key = check_key(key)
        if state is not None:
            check_state(state, 1, teacher.model.config)
        if on_progress is not None:
            check_function(on_progress, "`on_progress`")
        check_instance(source, str, "`source`")
        if cache is not None and teacher_hash is None:
            raise ValueError("`teacher_hash` must be given with `cache`; got None.")
        questions = _questions(prompts, teacher.model.config.vocab_size, template)
    answers = _TeacherAnswers(teacher, state, key, rows=min(at_once, len(questions)))
    if cache is not None and teacher_hash is not None:
        answers.use_cache(CompletionCache(cache), teacher_hash)
    traces: list[Trace] = []
    spent = 0
    for first in range(0, len(questions), at_once):
        part = questions[first : first + at_once]
        answered = answers.complete(part)
        weighed = _weigh(teacher, judge, part, answered)
        for question, completions, weights in zip(part, answered, weighed, strict=True):
            # Cached completions count too: the budget is the cost of the traces over all runs.
            spent += len(question.teacher_prompt) + sum(map(len, completions))
            traces += _kept(question, completions, weights, source)
        # The batch is in the cache already, so a callback that raises loses nothing.
        if on_progress:
            on_progress(first + len(part), len(questions))
    return traces, TokenBudget(guide_tokens=spent)


def _weigh(
    sampler: RolloutSampler,
    judge: "_Judge",
    questions: list["_Question"],
    answers: list[list[Ids]],
) -> list[list[float]]:
    """Judges the completions; each process judges its own and returns all weights."""
    own = sampler.share.judged(len(questions))

    def weigh_own() -> list[list[float]]:
        weights = []
        for question, completions in zip(questions[own], answers[own], strict=True):
            judged = [sampler.judged(completion) for completion in completions]
            weights.append(judge(question, judged))
        return weights

    return sampler.share.join(weigh_own)


@dataclasses.dataclass(frozen=True)
class _Question:
    """A prompt with its template applied.

    Attributes:
        index: index of the prompt.
        prompt: the prompt that the student sees.
        teacher_prompt: the prompt that the teacher reads.
        identity: digest of both and of the number of their earlier occurrences.
    """

    index: int
    prompt: Ids
    teacher_prompt: list[int]
    identity: str


# Maps a question and its completions to a weight for each completion; 0 drops it.
_Judge = Callable[[_Question, list[Ids]], list[float]]


def _kept(
    question: _Question, completions: list[Ids], weights: list[float], source: str
) -> list[Trace]:
    """Makes the traces of the completions with a weight."""
    traces = []
    for completion, weight in zip(completions, weights, strict=True):
        if weight > 0:
            traces.append(Trace(question.prompt, completion, weight, source))
    return traces


def _questions(
    prompts: Any, vocab_size: int, template: Template | None
) -> list[_Question]:
    """Checks the prompts and applies the template to them."""
    rows = check_prompts(prompts, vocab_size)
    teacher_rows = rows
    if template is not None:
        check_function(template, "`template`")
        filled = []
        for index, row in enumerate(rows):
            with named_errors(f"`template` of prompt {index}"):
                filled.append(template(tuple(row)))
        teacher_rows = check_prompts(filled, vocab_size, "`template`")
    questions: list[_Question] = []
    times_seen: collections.Counter[str] = collections.Counter()
    for index, (row, teacher_row) in enumerate(zip(rows, teacher_rows, strict=True)):
        # A repeated prompt needs new completions, so its count is part of its identity. Its index
        # is not: prompts may be inserted before it.
        text = json.dumps((row, teacher_row))
        identity = _digest(text, str(times_seen[text]))
        times_seen[text] += 1
        questions.append(_Question(index, tuple(row), teacher_row, identity))
    return questions


def _digest(*parts: str | bytes) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        # The length makes the borders between parts unambiguous.
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()


class _TeacherAnswers:
    """The teacher's completions of questions, sampled or taken from a cache."""

    def __init__(
        self,
        sampler: RolloutSampler,
        state: RWKV7State | None,
        key: Array,
        *,
        rows: int,
    ):
        """Sets the teacher; without `use_cache`, every completion is sampled.

        Args:
            sampler: the teacher and its sampling options.
            state: start state of the teacher.
            key: one random key.
            rows: questions per batch.
        """
        self._sampler = sampler
        # `_draw` divides the questions among processes, so the sampler must not.
        self._drawing = dataclasses.replace(sampler, share=ALONE)
        self._state = state
        self._key = key
        # If processes sample separately, the most questions of one process.
        self._rows = rows
        if not sampler.share.drawn_together:
            self._rows = -(-rows // sampler.share.count)
        self._cache: CompletionCache | None = None
        self._stamp = ""

    def use_cache(self, cache: CompletionCache, teacher_hash: str) -> None:
        """Makes a cache the source of known completions and the target of new ones."""
        self._cache = cache
        # Everything that completions depend on besides their question. It is part of the keys of
        # existing caches, so it must not change.
        options = {
            "samples": self._sampler.group,
            "tokens": self._sampler.tokens,
            "temperature": np.asarray(self._sampler.temperature).tolist(),
            "stop_ids": np.asarray(self._sampler.stop_ids).tolist(),
        }
        if self._sampler.stop_strings:
            options["stop_strings"] = list(self._sampler.stop_strings)
        leaves = [] if self._state is None else jax.tree.leaves(self._state)
        self._stamp = _digest(
            teacher_hash,
            str(jax.tree.structure(self._state)),
            *(np.asarray(leaf, np.float32).tobytes() for leaf in leaves),
            np.asarray(jax.random.key_data(self._key)).tobytes(),
            json.dumps(options, sort_keys=True),
        )

    def complete(self, questions: list[_Question]) -> list[list[Ids]]:
        """Returns the completions of each question, after new ones are in the cache."""
        keys = [_digest(self._stamp, question.identity) for question in questions]
        answers = self._cached(keys)
        missing: dict[str, _Question] = {}
        for key, question in zip(keys, questions, strict=True):
            if key not in answers:
                missing[key] = question
        if missing:
            drawn = self._draw(list(missing.values()))
            answers.update(zip(missing, drawn, strict=True))
        if self._cache is not None:
            for key, question in zip(keys, questions, strict=True):
                if self._cache.get(key) is None:
                    self._cache.put(key, question.prompt, answers[key])
        return [answers[key] for key in keys]

    def _cached(self, keys: list[str]) -> dict[str, list[Ids]]:
        """Returns the completions in the cache of the first process."""
        cache = self._cache
        if cache is None:
            return {}

        def find() -> dict[str, list[Ids]]:
            found = {}
            for key in keys:
                completions = cache.get(key)
                if completions is not None:
                    found[key] = completions
            return found

        # Only the first process writes to the run directory, and all must miss the same keys.
        first, *_ = self._sampler.share.gather(find)
        return {key: list(map(tuple, answers)) for key, answers in first.items()}

    def _draw(self, questions: list[_Question]) -> list[list[Ids]]:
        """Samples completions with keys that depend on each question only."""
        share = self._sampler.share
        own = questions[share.drawn(len(questions))]
        if share.drawn_together:
            return self._draw_own(own)
        drawn = share.join(lambda: self._draw_own(own) if own else [])
        return [list(map(tuple, completions)) for completions in drawn]

    def _draw_own(self, questions: list[_Question]) -> list[list[Ids]]:
        """Samples completions in this process, or in programs of all processes."""
        samples = self._sampler.group
        # Padded with the last question, so that one compiled program serves every batch.
        filled = [*questions, *[questions[-1]] * (self._rows - len(questions))]
        # Keys come from the identity, not the index, so other questions do not matter.
        numbers = [int(question.identity[:8], 16) for question in filled]
        question_keys = fold_keys(self._key, jnp.asarray(numbers, jnp.uint32))
        fold_each = jax.vmap(fold_keys, in_axes=(0, None))
        keys = fold_each(question_keys, jnp.arange(samples))
        drawn = self._drawing.draw(
            self._state,
            [question.teacher_prompt for question in filled],
            keys.reshape(-1),
        )
        completions: list[list[Ids]] = []
        for index in range(len(questions)):
            first = index * samples
            completions.append(drawn.completions[first : first + samples])
        return completions


def _make_judge(verify: RewardFunction | None, vote: Any) -> _Judge:
    """Checks a verifier or a vote and makes a judge; without either, it keeps everything."""
    if verify is not None and vote is not None:
        raise ValueError("`verify` and `vote` are mutually exclusive; got both.")
    if verify is not None:
        check_function(verify, "`verify`")
        return functools.partial(_verified, verify)
    if vote is None:
        return lambda question, completions: [1.0] * len(completions)
    if not (isinstance(vote, tuple) and len(vote) == 2 and callable(vote[0])):
        raise TypeError(f"`vote` must be a function and a margin; got {vote!r}.")
    extract, margin = vote
    check_number(margin, 0, 1, "the margin of `vote`")
    return functools.partial(_voted, extract, margin)


def _verified(
    verify: RewardFunction, question: _Question, completions: list[Ids]
) -> list[float]:
    """Returns the verifier's number for each completion, at least 0."""
    return evaluate_rewards(
        verify,
        [question.prompt] * len(completions),
        completions,
        name="collect_traces: `verify`",
        group=len(completions),
        first=question.index,
        least=0.0,
    ).tolist()


def _voted(
    extract: Extract, margin: float, question: _Question, completions: list[Ids]
) -> list[float]:
    """Returns 1 for completions with the most frequent answer if it leads by enough, else 0."""
    answers = []
    for completion in completions:
        with named_errors(f"collect_traces: `vote` of prompt {question.index}"):
            answer = extract(completion)
            # `Counter` needs hashable answers; a list must raise here, where the prompt is known.
            hash(answer)
        answers.append(answer)
    # None means that no answer was found; it must not win.
    votes = collections.Counter(answer for answer in answers if answer is not None)
    ranking = votes.most_common(2)
    if not ranking:
        return [0.0] * len(completions)
    best, most = ranking[0]
    second = ranking[1][1] if len(ranking) > 1 else 0
    lead = most - second
    enough = lead > 0 and lead / len(completions) >= margin
    return [float(enough and answer == best) for answer in answers]
