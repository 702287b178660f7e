"""Questions whose answers can be checked: of synthetic tasks, or of a file."""

import functools
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rwkv7_jax.data.jsonl import read_jsonl
from rwkv7_jax.data.sources import TaskSource, parse_source
from rwkv7_jax.data.synthetic_tasks import question_batch
from rwkv7_jax.text.tokenizer import Tokenizer

Ids = Sequence[int]


def read_questions(path: str | Path, tokenizer: Tokenizer) -> list[tuple[list[int], str]]:
    """The prompts of a .jsonl file as ids, and their answers; "" where a line has none.

    Raises:
        ValueError: a line that is no object with a "prompt", as `file:line: reason`.
    """
    found = list(read_jsonl(path, functools.partial(_question, tokenizer)))
    if not found:
        raise ValueError(f"read_questions: `{path}` must hold a question; got none.")
    return found


def _question(tokenizer: Tokenizer, fields: Any) -> tuple[list[int], str]:
    if not isinstance(fields, dict) or not isinstance(fields.get("prompt"), str):
        raise ValueError('no object with a text "prompt"')
    ids = tokenizer.encode(fields["prompt"])
    if not ids:
        raise ValueError('"prompt" must hold a token; got none')
    return ids, str(fields.get("answer", ""))


class QuestionSet:
    """Prompts by step, and the reward of a completion: 1 for the known answer, 0 for another."""

    def __init__(self, path: str, tokenizer: Tokenizer, *, seed: int = 0, held_out: float = 0.1):
        """The questions of a path.

        Args:
            path: "task:name", or a .jsonl file of {"prompt": ..., "answer": ...}.
            tokenizer: of the model's vocabulary.
            seed: of tasks, and of the order of a file's questions.
            held_out: share of a file's questions that is only asked for measuring.

        Raises:
            ValueError: a bad file, or a task without questions.
        """
        self._source = parse_source(path)
        self._tokenizer = tokenizer
        self._seed = seed
        self._answers: dict[tuple[int, ...], str | list[int]] = {}
        self._parts: dict[bool, list[list[int]]] = {}
        if not isinstance(self._source, TaskSource):
            everything = read_questions(path, tokenizer)
            self._answers = {tuple(prompt): answer for prompt, answer in everything}
            order = np.random.default_rng(seed).permutation(len(everything))
            prompts = [everything[i][0] for i in order]
            border = max(1, int(len(prompts) * held_out))
            self._parts = {True: prompts[:border], False: prompts[border:] or prompts}

    def prompts(self, step: int, count: int, *, held_out: bool = False) -> list[list[int]]:
        """`count` prompts of a step; a pure function of its arguments and the seed."""
        if not isinstance(self._source, TaskSource):
            part = self._parts[held_out]
            return [part[(step * count + i) % len(part)] for i in range(count)]
        asked, replies = question_batch(
            self._source.name, step, batch_size=count, seed=self._seed, held_out=held_out
        )
        self._answers |= {tuple(q): reply for q, reply in zip(asked, replies, strict=True)}
        return asked

    def reward(self, prompt: Ids, completion: Ids) -> float:
        """1.0 if the completion begins with the known answer, else 0.0."""
        wanted = self._answers[tuple(prompt)]
        if isinstance(wanted, str):
            text = self._tokenizer.decode([i for i in completion if i])
            return float(bool(wanted.strip()) and text.strip().startswith(wanted.strip()))
        return float(list(completion[: len(wanted)]) == wanted)


def find_verifier(name: str):
    """The function that "module:function" names.

    Raises:
        ValueError: no such module or function.
    """
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"`config.test_time.verifier` must be exact or module:function; got {name!r}: {error}."
        ) from None
    return found
