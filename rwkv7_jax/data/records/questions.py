"""Conversion of records with a question and an answer, under the keys of common data sets."""

from collections.abc import Mapping, Sequence
from typing import Any

from rwkv7_jax.data.records.conversations import thoughts_in
from rwkv7_jax.data.records.fields import only_name, optional_name, text_field

# Keys in Alpaca, Dolly, OpenOrca, MetaMathQA, GSM8K, MATH and NuminaMath.
QUESTIONS = ("instruction", "question", "query", "problem")
ANSWERS = ("output", "response", "answer", "solution")

# Keys of a question's context; the first is the question if there is no other.
CONTEXTS = ("input", "context")

# Keys of a question and its answer only if both exist: a "user" by itself is an account.
_USERS = ("user", "human")
_ASSISTANT = "assistant"

ANSWER_NAMES = (*ANSWERS, _ASSISTANT)

# Keys of a turn's question and answer in Firefly and XTuner. Keys of other data sets do not count,
# because a list of such objects is a list of records.
_TURN_NAMES = (("user", "assistant"), ("human", "assistant"), ("input", "output"))


def _possible_names(
    record: Mapping[str, Any],
) -> tuple[Sequence[str], Sequence[str]]:
    """Returns the possible keys of a record's question and answer."""
    if _ASSISTANT in record and any(name in record for name in _USERS):
        return (*QUESTIONS, *_USERS), ANSWER_NAMES
    # In mathematics data sets the "answer" is only the final result of the "solution".
    if "problem" in record and "solution" in record:
        return QUESTIONS, [name for name in ANSWERS if name != "answer"]
    return QUESTIONS, ANSWERS


def names_question(record: Mapping[str, Any]) -> bool:
    """Returns whether a record's keys are those of a question and its answer.

    "input" and "output" do not suffice, because other kinds of files have them too.
    """
    questions, answers = _possible_names(record)
    has_question = any(name in record for name in questions)
    return has_question and any(name in record for name in answers)


def question_and_answer(record: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Finds the keys of a record's question and answer; None for a missing one.

    Raises:
        ValueError: the record has two questions or two answers.
    """
    # Alpaca's keys take precedence over any others.
    if "instruction" in record and "output" in record:
        return "instruction", "output"
    questions, answers = _possible_names(record)
    question = only_name(record, questions)
    if question is None and CONTEXTS[0] in record:
        question = CONTEXTS[0]
    return question, only_name(record, answers)


def is_pair(turn: Mapping[str, Any]) -> bool:
    """Returns whether a turn holds a question and its answer instead of one message.

    Raises:
        ValueError: the turn has two questions or two answers.
    """
    if "role" in turn or "from" in turn:
        return False
    return question_and_answer(turn) in _TURN_NAMES


def question_messages(record: Mapping[str, Any], question_name: str) -> list[Any]:
    """Converts a question to messages; its context follows on a new line.

    A "history" of earlier questions and answers, as in LLaMA-Factory, comes first.
    """
    question = text_field(record, question_name).decode()
    context = optional_name(record, CONTEXTS)
    if context and context != question_name:
        question += "\n" + text_field(record, context).decode()
    messages = []
    history = record.get("history") or []
    if not isinstance(history, list):
        raise ValueError('"history" must be a list of pairs')
    for pair in history:
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError('"history" must be a list of pairs')
        messages.append({"role": "user", "content": pair[0]})
        messages.append({"role": "assistant", "content": pair[1]})
    messages.append({"role": "user", "content": question})
    return messages


def answered_question(record: Mapping[str, Any]) -> list[Any]:
    """Converts a record's question and answer, with the answer's thoughts, to messages.

    Returns:
        The messages; empty if the record lacks a question or an answer.

    Raises:
        ValueError: there are two questions or answers, or one is not text.
    """
    question_name, answer_name = question_and_answer(record)
    if question_name is None or answer_name is None:
        return []
    messages = question_messages(record, question_name)
    answer = text_field(record, answer_name).decode()
    messages.append({"role": "assistant", "content": answer, **thoughts_in(record)})
    return messages
