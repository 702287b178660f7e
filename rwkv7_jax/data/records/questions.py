"""Questions with their answers, under the names that data sets give the two, as messages."""

from collections.abc import Mapping, Sequence
from typing import Any

from rwkv7_jax.data.records.conversations import thoughts_in
from rwkv7_jax.data.records.fields import only_name, optional_name, text_field

# Names in Alpaca, Dolly, OpenOrca, MetaMathQA, GSM8K, and MATH and NuminaMath.
QUESTIONS = ("instruction", "question", "query", "problem")
ANSWERS = ("output", "response", "answer", "solution")

# Names of what belongs to a question; the first one is a question where there is no other.
CONTEXTS = ("input", "context")

# Names that are a question and its answer where both are there: a "user" alone is an account.
_USERS = ("user", "human")
_ASSISTANT = "assistant"

ANSWER_NAMES = (*ANSWERS, _ASSISTANT)

# Names of a turn's question and answer in Firefly and XTuner. Those of other sets are not among
# them: a list of questions is one of records.
_TURN_NAMES = (("user", "assistant"), ("human", "assistant"), ("input", "output"))


def _possible_names(
    record: Mapping[str, Any],
) -> tuple[Sequence[str], Sequence[str]]:
    """Returns the names that a question and an answer may have in a record."""
    if _ASSISTANT in record and any(name in record for name in _USERS):
        return (*QUESTIONS, *_USERS), ANSWER_NAMES
    # In sets of mathematics the answer is what the solution ends with.
    if "problem" in record and "solution" in record:
        return QUESTIONS, [name for name in ANSWERS if name != "answer"]
    return QUESTIONS, ANSWERS


def names_question(record: Mapping[str, Any]) -> bool:
    """Tells whether a record is meant as a question with its answer, by its keys.

    An "input" says nothing: files of other kinds have it, with an "output".
    """
    questions, answers = _possible_names(record)
    has_question = any(name in record for name in questions)
    return has_question and any(name in record for name in answers)


def question_and_answer(record: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Finds the names that a record's question and its answer have; None for one that is missing.

    Raises:
        ValueError: it has two questions, or two answers.
    """
    # Alpaca's two names count, whatever else a record holds.
    if "instruction" in record and "output" in record:
        return "instruction", "output"
    questions, answers = _possible_names(record)
    question = only_name(record, questions)
    if question is None and CONTEXTS[0] in record:
        question = CONTEXTS[0]
    return question, only_name(record, answers)


def is_pair(turn: Mapping[str, Any]) -> bool:
    """Tells whether a turn holds a question and its answer, and not one message.

    Raises:
        ValueError: it has two questions, or two answers.
    """
    if "role" in turn or "from" in turn:
        return False
    return question_and_answer(turn) in _TURN_NAMES


def question_messages(record: Mapping[str, Any], question_name: str) -> list[Any]:
    """Makes messages of a question; its context follows on a new line.

    A "history" of earlier questions and answers comes first, as LLaMA-Factory has it.
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
    """Makes messages of a record's question and answer, with the answer's thoughts.

    Returns:
        The messages; an empty list for a record without a question or without an answer.

    Raises:
        ValueError: two questions or answers, or something else than texts.
    """
    question_name, answer_name = question_and_answer(record)
    if question_name is None or answer_name is None:
        return []
    messages = question_messages(record, question_name)
    answer = text_field(record, answer_name).decode()
    messages.append({"role": "assistant", "content": answer, **thoughts_in(record)})
    return messages
