"""Questions with verifiable answers, from synthetic tasks or from files."""

import functools
import importlib
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rwkv7_jax.checks import (
    check_count,
    check_instance,
    check_number,
    check_tokenizer,
    prefix_errors,
)
from rwkv7_jax.data.documents import Document, Segment, held_out_threshold
from rwkv7_jax.data.jsonl import read_jsonl
from rwkv7_jax.data.records.record import AskedQuestion, parse_question, parse_record
from rwkv7_jax.data.sources import TaskSource, TextSource, parse_source
from rwkv7_jax.data.tasks.synthetic_tasks import question_batch
from rwkv7_jax.local_paths import local_path
from rwkv7_jax.test_time.rewards import RewardFunction
from rwkv7_jax.test_time.verifiers import VERIFIERS
from rwkv7_jax.text.chat_template import THOUGHT_END, without_thoughts
from rwkv7_jax.text.tokenizer import Tokenizer

Ids = Sequence[int]

# The ids of a question.
Prompt = tuple[int, ...]

_SHOWN_CHARACTERS = 60


def read_questions(
    path: str | Path, tokenizer: Tokenizer
) -> list[tuple[list[int], str]]:
    """Reads the prompts of a .jsonl file as ids, with their answers; "" for a line without one.

    A line holds a "prompt", which is taken verbatim, or a question or a chat in a format that
    tuning reads (see `data.records.record.parse_question`). Then the prompt is the text in the chat
    template up to the answer, with the same ids as in tuning.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the file has no question, or a line is not one; the message then begins with
            `file:line`.
    """
    return [
        (question.prompt, question.answer) for question in _read_hashed(path, tokenizer)
    ]


class _Question(NamedTuple):
    """A line of a file of questions.

    Attributes:
        prompt: ids of the prompt.
        answer: the reference answer; "" if there is none.
        content_hash: hash of the document that tuning on text reads from the line.
    """

    prompt: list[int]
    answer: str
    content_hash: int


def _read_hashed(path: str | Path, tokenizer: Tokenizer) -> list[_Question]:
    """Reads a file like `read_questions`, with the hashes of its lines."""
    with prefix_errors("read_questions"):
        path = local_path(path, "`path`")
        check_tokenizer(tokenizer, "encode", "decode")
    questions = list(read_jsonl(path, functools.partial(_parse_question, tokenizer)))
    if not questions:
        raise ValueError(f"read_questions: `{path}` must hold at least one question.")
    return questions


def _parse_question(tokenizer: Tokenizer, record: Any) -> _Question:
    question = parse_question(record)
    ids = [id for part in question.parts for id in tokenizer.encode(part)]
    if not ids:
        raise ValueError('"prompt" must hold a token; got none')
    return _Question(ids, question.answer, _content_hash(record, question))


def _content_hash(record: Any, question: AskedQuestion) -> int:
    """Hashes a line like tuning on text does; by its prompt if tuning cannot read the line."""
    try:
        document = parse_record(record)
    except ValueError:
        # Tuning on text rejects a question whose answer is missing or is a number.
        segments = [Segment(part.encode()) for part in question.parts]
        document = Document(tuple(segments))
    return document.content_hash()


class QuestionSet:
    """Prompts by step, and the reward of a completion: 1 for the reference answer, else 0."""

    def __init__(
        self,
        path: str,
        tokenizer: Tokenizer,
        *,
        seed: int = 0,
        held_out: float = 0.1,
        verifier: str | None = "exact",
        evaluation: str | None = None,
    ):
        """Reads the questions of files, or prepares those of a task.

        Args:
            path: "task:name", or .jsonl files of questions with their answers (see
                `read_questions`), separated by commas.
            tokenizer: the model's tokenizer.
            seed: seed of tasks, and of the training order of a file's questions.
            held_out: fraction of a file's questions used only for evaluation. They are the ones
                that `data.token_stream` holds out of the same file; equal prompts stay together.
                At least one prompt is held out and at least one is trained on; the prompt of a file
                with a single one serves both purposes.
            verifier: how the answer is extracted from a completion of a file's question, one of
                `verifiers.VERIFIERS`. None if another reward judges and answers are ignored.
            evaluation: questions for evaluation in place of those held out of `path`, in the same
                format. Questions held out of `path` are still not trained on.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: a file is invalid, a prompt has several answers, the fraction leaves nothing
                to train on or to evaluate, the task has no questions, or the verifier is unknown.
        """
        with prefix_errors("QuestionSet"):
            check_instance(path, str, "`path`")
            check_tokenizer(tokenizer, "encode", "decode")
            check_count(seed, 0, "`seed`")
            check_number(held_out, 0, 1, "`held_out`")
            if verifier is not None and verifier not in VERIFIERS:
                raise ValueError(
                    f"`verifier` must be one of {', '.join(VERIFIERS)}; got {verifier!r}."
                )
            self._source = parse_source(path)
            self._evaluation = self._source
            if evaluation is not None:
                check_instance(evaluation, str, "`evaluation`")
                self._evaluation = parse_source(evaluation, "`evaluation`")
            if isinstance(self._evaluation, TaskSource) != self._is_task:
                raise ValueError(
                    "`evaluation` must be a task if `path` is a task, and otherwise a file; got "
                    f"{evaluation!r} and {path!r}."
                )
        self._tokenizer = tokenizer
        self._seed = seed
        self._verifier = VERIFIERS[verifier or "exact"]
        self._answers_count = verifier is not None
        self._answers: dict[Prompt, str | list[int]] = {}
        self._training: list[list[int]] = []
        self._held_out: list[list[int]] = []
        if isinstance(self._source, TextSource):
            part = "held_out" if held_out == 0 else "train"
            if held_out == 1 or (held_out == 0 and evaluation is None):
                raise ValueError(
                    f"QuestionSet: `{path}` has no question in its part {part!r} if a fraction of "
                    f"{held_out:g} is held out: take another fraction, or 0 and other questions "
                    "for evaluation."
                )
            self._split(self._read(self._source), held_out)
        if isinstance(self._evaluation, TextSource) and evaluation is not None:
            self._evaluate_on(self._read(self._evaluation))

    @property
    def _is_task(self) -> bool:
        return isinstance(self._source, TaskSource)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids that end a completion: 0 for a task, the tokenizer's stop ids for text."""
        return (0,) if self._is_task else self._tokenizer.stop_ids

    def _read(self, source: TextSource) -> list[_Question]:
        """Reads the questions of files and stores their answers."""
        if not source.paths:
            raise ValueError(
                "QuestionSet: `path` must name a file of questions; got ''."
            )
        questions = []
        for path in source.paths:
            for question in _read_hashed(path, self._tokenizer):
                questions.append(question)
                answer = question.answer
                before = self._answers.setdefault(tuple(question.prompt), answer)
                if self._answers_count and before != answer:
                    text = self._tokenizer.decode(question.prompt)
                    raise ValueError(
                        f"QuestionSet: `{path}` must have one answer per prompt; "
                        f"{_shown(text)} has {_shown(before)} and {_shown(answer)}."
                    )
        return questions

    def _split(self, questions: list[_Question], held_out: float) -> None:
        """Splits a file's questions into held-out ones and training ones, in the seed's order."""
        measured = _held_out_prompts(questions, held_out)
        self._held_out = [list(prompt) for prompt in measured]
        order = np.random.default_rng(self._seed).permutation(len(questions))
        prompts = [questions[index].prompt for index in order]
        excluded = set(measured)
        # A single prompt serves both purposes.
        self._training = [
            one for one in prompts if tuple(one) not in excluded
        ] or prompts

    def _evaluate_on(self, questions: list[_Question]) -> None:
        """Replaces the held-out questions and removes them from the training questions."""
        measured = dict.fromkeys(tuple(question.prompt) for question in questions)
        # Each prompt once: its greedy answer is always the same.
        self._held_out = [list(prompt) for prompt in measured]
        kept = [one for one in self._training if tuple(one) not in measured]
        if not kept:
            raise ValueError(
                "QuestionSet: `evaluation` must leave a question to train on; it has all of them."
            )
        left_out = len(self._training) - len(kept)
        if left_out:
            warnings.warn(
                f"{left_out:,} questions are not trained on because `evaluation` has them too",
                stacklevel=3,
            )
        self._training = kept

    def prompts(
        self,
        step: int,
        count: int,
        *,
        held_out: bool = False,
    ) -> list[list[int]]:
        """Returns `count` prompts of a step, as a pure function of the arguments and the seed.

        There may be fewer held-out prompts of a file, because each comes only once.

        Raises:
            TypeError: a number is not an integer.
            ValueError: `step` is negative, or `count` is below 1.
        """
        with prefix_errors("QuestionSet.prompts"):
            check_count(step, 0, "`step`")
            check_count(count, 1, "`count`")
        source = self._evaluation if held_out else self._source
        if not isinstance(source, TaskSource):
            part = self._held_out if held_out else self._training
            if held_out:
                count = min(count, len(part))
            first = step * count
            return [part[place % len(part)] for place in range(first, first + count)]
        prompts, answers = question_batch(
            source.name,
            step,
            batch_size=count,
            seed=self._seed,
            held_out=held_out,
        )
        # A task generates its questions on demand; `reward` needs their answers.
        for prompt, answer in zip(prompts, answers, strict=True):
            self._answers[tuple(prompt)] = answer
        return prompts

    def describe(self, measured: int) -> str:
        """Describes the numbers of questions, `measured` of which an evaluation uses."""
        if self._is_task:
            return f"generated on demand, {measured:,} evaluated"
        return (
            f"{len(self._training):,} questions, and {len(self._held_out):,} held out, of which "
            f"{measured:,} are evaluated"
        )

    @property
    def can_be_answered(self) -> bool:
        """Whether the verifier finds the answer of at least one training question."""
        if self._is_task:
            return True
        return any(self.has_answer(tuple(prompt)) for prompt in self._training)

    @property
    def every_prompt(self) -> list[Prompt]:
        """The distinct prompts of all files in file order; for a task, those generated so far."""
        return list(self._answers)

    @property
    def training_prompts(self) -> set[Prompt]:
        """The training prompts of files."""
        return {tuple(prompt) for prompt in self._training}

    def has_answer(self, prompt: Prompt) -> bool:
        """Tells whether the verifier finds the reference answer of a question."""
        return self._verifier(str(self._answers[prompt])) is not None

    def reward(self, prompt: Ids, completion: Ids) -> float:
        """Returns 1.0 if the completion gives the reference answer, else 0.0.

        For text, the verifier extracts the answer, after the thoughts of a chat are removed. For a
        task, the whole completion is the answer: 123 does not count for 12.
        """
        answer = self._answers[tuple(prompt)]
        ends = self.stop_ids
        ids = [token for token in completion if token not in ends]
        if not isinstance(answer, str):
            return float(ids == list(answer))
        decode = self._tokenizer.decode
        said = without_thoughts(decode(list(prompt)), decode(ids))
        given = self._verifier(said)
        # The answer of a line without one is None, too.
        return float(given is not None and given == self._verifier(answer))

    def given_answer(self, completion: Ids) -> str | tuple[int, ...] | None:
        """Returns the answer of a completion, for a vote; None if it has none."""
        ids = [token for token in completion if token not in self.stop_ids]
        if self._is_task:
            return tuple(ids) or None
        # If the prompt ends inside the thoughts, the completion has only their end.
        *_, said = self._tokenizer.decode(ids).rpartition(THOUGHT_END.strip())
        return self._verifier(said)


def _held_out_prompts(
    questions: list[_Question], share: float
) -> list[tuple[int, ...]]:
    """Returns the distinct held-out prompts, in the order of their hashes.

    The order depends neither on the seed nor on the order of the file.
    """
    if not share:
        return []
    # Split by prompts, not by lines: an evaluated prompt must not be trained on.
    hashes: dict[tuple[int, ...], int] = {}
    for question in questions:
        prompt = tuple(question.prompt)
        content_hash = question.content_hash
        hashes[prompt] = min(hashes.get(prompt, content_hash), content_hash)
    threshold = held_out_threshold(share)
    below = sum(content_hash < threshold for content_hash in hashes.values())
    # With few questions the fraction may select none or all; keep at least one in each part.
    most = max(len(hashes) - 1, 1)
    count = min(max(below, 1), most)
    return sorted(hashes, key=hashes.__getitem__)[:count]


def _shown(text: Any) -> str:
    """Formats a value for a message, on one line and truncated."""
    shown = repr(text)
    return (
        shown if len(shown) <= _SHOWN_CHARACTERS else f"{shown[:_SHOWN_CHARACTERS]}..."
    )


def find_verifier(name: str) -> RewardFunction:
    """Imports the function named by "module:function".

    Raises:
        ValueError: the module or the function does not exist, or the import fails; the message has
            the file and line of the failure.
    """
    with prefix_errors("find_verifier"):
        check_instance(name, str, "`name`")
    module, _, function = name.partition(":")
    must = (
        f"`config.test_time.verifier` must be one of {', '.join(VERIFIERS)} or module:function; "
        f"got {name!r}"
    )
    try:
        imported = importlib.import_module(module)
    # A user's module may raise anything when it is imported.
    except (Exception, SystemExit) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{must}: {_place_of(error)}{reason}.") from None
    found = getattr(imported, function, None)
    if not callable(found):
        what = "no such name" if found is None else f"of type {type(found).__name__}"
        # A module that is built into Python has no file.
        place = getattr(imported, "__file__", None) or module
        raise ValueError(f"{must}: {function!r} is {what} in `{place}`.")
    return found


def _place_of(error: BaseException) -> str:
    """Returns the file and line at which an import failed, and the type of the error.

    "" if the module itself was not found.
    """
    kind = type(error).__name__
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}: {kind}: "
    for frame in traceback.extract_tb(error.__traceback__):
        # Skip the frames of this module and of the import system.
        if frame.filename == __file__ or "importlib" in frame.filename:
            continue
        return f"{frame.filename}, line {frame.lineno}: {kind}: "
    return ""
