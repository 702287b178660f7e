"""Collection of completions from a teacher model, filtered by a verifier or a majority vote."""

import collections
import dataclasses
import functools
import hashlib
import json
import math
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
from rwkv7_jax.model.state import RWKV7State, check_state
from rwkv7_jax.test_time.completion_cache import CompletionCache
from rwkv7_jax.test_time.prompt_share import ALONE
from rwkv7_jax.test_time.rewards import RewardFunction, evaluate_rewards
from rwkv7_jax.test_time.rollouts import RolloutSampler
from rwkv7_jax.test_time.traces import Ids, TokenBudget, Trace

# From a completion to its answer, which is compared with the other answers.
Extract = Callable[[Ids], Hashable]

# From the student's prompt to the teacher's.
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
    """Lets the teacher complete prompts; keeps the completions that a verifier or a vote approves.

    The teacher reads each prompt once. A prompt's completions depend on the key, on its own ids and
    on how often it came before, not on its neighbours; so with `cache` a run that was killed goes
    on where it stopped and ends with the same traces and the same budget. Of several processes, as
    `teacher.share` says, each answers some of the prompts, and all have all traces; the cache of
    the first one counts.

    Args:
        teacher: the larger model, or the student itself, and how it draws `group` completions of
            each prompt. What ended a completion is part of it, for the student has to learn that;
            a stop string is not part of what is judged.
        prompts: lists of ids as the student sees them.
        key: one random key.
        state: where the teacher starts (batch 1).
        template: from a prompt to what the teacher reads in its place: an instruction, a hint, a
            demand to think aloud. The traces keep the student's prompt.
        verify: `(prompt, completion) -> number` of the student's prompt; above 0 keeps the
            completion, and is its weight (a bool counts as 0 or 1).
        vote: `(extract, margin)`, instead of `verify`: of each prompt's completions those are kept
            whose `extract(completion)` is the most frequent answer, if it leads the second by at
            least `margin`, a share of the group, and by one. An answer of None does not vote.
        source: the teacher's name in the traces.
        cache: a file to which completions are appended before they are judged, and from which
            those of the same teacher, state, prompt, key and options are taken.
        teacher_hash: identifies the teacher's weights in the cache, such as `model_hash` of
            `checkpoints`; needed with `cache`.
        at_once: prompts in one batch.
        on_progress: called with the number of prompts done and of all.

    Returns:
        The traces in the prompts' order, and the tokens they cost.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: an argument out of its range, or a verifier or a vote that raised or gave no
            number; completions in the cache stay there.
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
    # Outside the block of checks: an error in the work should name where it happened.
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
            # The same for completions from the cache: the budget says what the traces have cost,
            # in this run or in an earlier one.
            spent += len(question.teacher_prompt) + sum(map(len, completions))
            traces += _kept(question, completions, weights, source)
        # After the batch is in the cache, so a callback that raises loses nothing.
        if on_progress:
            on_progress(first + len(part), len(questions))
    return traces, TokenBudget(guide_tokens=spent)


def _weigh(
    sampler: RolloutSampler,
    judge: "_Judge",
    questions: list["_Question"],
    answers: list[list[Ids]],
) -> list[list[float]]:
    """Judges the completions of questions; of several processes, each those of its own."""
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
    """A prompt among others.

    Attributes:
        index: its place.
        prompt: as the student sees it.
        teacher_prompt: what the teacher reads in its place.
        identity: a digest of both and of how often they came before.
    """

    index: int
    prompt: Ids
    teacher_prompt: list[int]
    identity: str


# From a question and its completions to the weight of each of them; 0 drops one.
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
        filled = [_fill(template, index, row) for index, row in enumerate(rows)]
        teacher_rows = check_prompts(filled, vocab_size, name="template")
    questions: list[_Question] = []
    times_seen: collections.Counter[str] = collections.Counter()
    for index, (row, teacher_row) in enumerate(zip(rows, teacher_rows, strict=True)):
        # A prompt that comes twice has to be answered anew, so its count is part of its identity.
        # Its place is not: other prompts may be added before it.
        text = json.dumps((row, teacher_row))
        identity = _digest(text, str(times_seen[text]))
        times_seen[text] += 1
        questions.append(_Question(index, tuple(row), teacher_row, identity))
    return questions


def _fill(template: Template, index: int, row: list[int]) -> Sequence[int]:
    try:
        return template(tuple(row))
    except Exception as error:  # Of the user's function, so of any type.
        kind = type(error).__name__
        raise ValueError(
            f"`template` of prompt {index} raised {kind}: {error}"
        ) from error


def _digest(*parts: str | bytes) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        # With the length, so that two parts cannot be divided in another way.
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()


class _TeacherAnswers:
    """The teacher's completions of questions, drawn or taken from a cache."""

    def __init__(
        self,
        sampler: RolloutSampler,
        state: RWKV7State | None,
        key: Array,
        *,
        rows: int,
    ):
        """Draws every completion anew until `use_cache` is called.

        Args:
            sampler: the teacher and its options.
            state: where it starts.
            key: one random key.
            rows: questions of a batch.
        """
        self._sampler = sampler
        # What it draws is divided already.
        self._drawing = dataclasses.replace(sampler, share=ALONE)
        self._state = state
        self._key = key
        # Of several processes that draw apart, the most that one of them draws at a time.
        self._rows = rows
        if not sampler.share.drawn_together:
            self._rows = -(-rows // sampler.share.count)
        self._cache: CompletionCache | None = None
        self._stamp = ""

    def use_cache(self, cache: CompletionCache, teacher_hash: str) -> None:
        """Takes completions from a cache where it has them, and adds new ones to it."""
        self._cache = cache
        # Everything that completions depend on besides their question. Caches on disk have it in
        # their keys, so it must stay as it is.
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
        """Returns the completions of each question; new ones are in the cache before that."""
        keys = [_digest(self._stamp, question.identity) for question in questions]
        # Two questions never have the same key.
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
        """Returns the completions that the cache of the first process has."""
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

        # Only the first process's file is in the run's folder, and all must draw the same ones.
        first, *_ = self._sampler.share.gather(find)
        return {key: list(map(tuple, answers)) for key, answers in first.items()}

    def _draw(self, questions: list[_Question]) -> list[list[Ids]]:
        """Draws completions; each question has keys of its own, whatever its neighbours are."""
        share = self._sampler.share
        own = questions[share.drawn(len(questions))]
        if share.drawn_together:
            return self._draw_own(own)
        drawn = share.join(lambda: self._draw_own(own) if own else [])
        return [list(map(tuple, completions)) for completions in drawn]

    def _draw_own(self, questions: list[_Question]) -> list[list[Ids]]:
        """Draws completions in this process, or in programs of all processes."""
        samples = self._sampler.group
        # Filled with the last question, so that one compiled program serves every batch.
        filled = [*questions, *[questions[-1]] * (self._rows - len(questions))]
        # From a question's identity, not from its place: then neighbours do not matter.
        numbers = [int(question.identity[:8], 16) for question in filled]
        fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
        question_keys = fold(self._key, jnp.asarray(numbers, jnp.uint32))
        keys = jax.vmap(fold, in_axes=(0, None))(question_keys, jnp.arange(samples))
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
    """Checks a verifier or a vote and makes a judge of it; without both it keeps everything."""
    if verify is not None and vote is not None:
        raise ValueError("`verify` and `vote` exclude each other; got both.")
    if verify is not None:
        check_function(verify, "`verify`")
        return functools.partial(_verified, verify)
    if vote is None:
        return lambda question, completions: [1.0] * len(completions)
    if not (isinstance(vote, tuple) and len(vote) == 2 and callable(vote[0])):
        raise TypeError(f"`vote` must be a function and a margin; got {vote!r}.")
    extract, margin = vote
    check_number(margin, -math.inf, math.inf, "the margin of `vote`")
    if not 0 <= margin <= 1:
        raise ValueError(f"`vote` must have a margin from 0 to 1; got {margin}.")
    return functools.partial(_voted, extract, margin)


def _verified(
    verify: RewardFunction, question: _Question, completions: list[Ids]
) -> list[float]:
    """Returns what a verifier says of each completion, at least 0."""
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
    answers = [_answer(extract, question, completion) for completion in completions]
    # None is an answer that could not be read; it must not win.
    votes = collections.Counter(answer for answer in answers if answer is not None)
    ranking = votes.most_common(2)
    if not ranking:
        return [0.0] * len(completions)
    best, most = ranking[0]
    # A single answer leads by all of its votes.
    second = ranking[1][1] if len(ranking) > 1 else 0
    lead = most - second
    enough = lead > 0 and lead / len(completions) >= margin
    return [float(enough and answer == best) for answer in answers]


def _answer(extract: Extract, question: _Question, completion: Ids) -> Hashable:
    try:
        answer = extract(completion)
        # Votes are counted in a dict, where an answer such as a list would raise later.
        hash(answer)
    except Exception as error:
        raise ValueError(
            f"collect_traces: `vote` of prompt {question.index} raised "
            f"{type(error).__name__}: {error}"
        ) from error
    return answer
