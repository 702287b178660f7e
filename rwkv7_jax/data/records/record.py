"""Records as documents: the supported forms, and the part of each in the loss.

A record is one of these:

    {"text": ...}                                         all of it is in the loss
    {"prompt": ..., "answer": ...}                        taken verbatim; the answer is in the loss
                                                          (also called "completion", "response"
                                                          or "output")
    {"messages": [{"role": ..., "content": ...}, ...]}    a chat; the assistant is in the loss
    [{"role": ..., "content": ...}, ...]                  a chat without a key
    {"conversations": [{"from": ..., "value": ...}, ...]} a chat in ShareGPT's form
    {"data": ["...", "..."]}                              a chat in UltraChat's form
    {"prompt": [...], "completion": [...]}                a chat in two parts, TRL's form; only the
                                                          assistant of the completion is in the loss
    {"instruction": ..., "input": ..., "output": ...}     one question and answer, Alpaca's form
                                                          (`questions` has the keys that other
                                                          data sets use)
    {"conversation": [{"human": ..., "assistant": ...}]}  several of them, Firefly's form

A record with a conversation may have further keys; a null value counts as a missing key.

* "system": the system message
* "think": a think mode
* "tools": the available functions
* "reasoning_content": an assistant's thoughts, in its message or next to a single question
* "tool_calls": an assistant's function calls, in its message; role "tool" has their outputs
* "weight": 0 in an assistant's message leaves the answer out of the loss
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from rwkv7_jax.data.documents import Document, Segment
from rwkv7_jax.data.records.conversations import (
    WEIGHTS,
    asked_conversation,
    conversation,
    is_conversation,
    read_message,
    thoughts_in,
)
from rwkv7_jax.data.records.fields import (
    check_object,
    keys_of,
    only_name,
    optional_name,
    text_field,
    without_nulls,
)
from rwkv7_jax.data.records.questions import (
    ANSWER_NAMES,
    CONTEXTS,
    QUESTIONS,
    answered_question,
    is_pair,
    names_question,
    question_and_answer,
    question_messages,
)
from rwkv7_jax.text.chat_template import (
    read_tools,
    tool_texts,
    turn_start,
    without_thoughts,
)

KINDS = ("text", "prompt", "messages")

# Keys of conversations besides "messages".
_CONVERSATIONS = ("conversations", "conversation", "data")

# Keys of the text after a verbatim prompt; the second is TRL's.
_ANSWERS_AS_THEY_STAND = ("answer", "completion", "response", "output")

_SYSTEM_TEXTS = ("system", "system_prompt")

# Keys in KTO data sets for whether an answer is desired, in TRL and in LLaMA-Factory.
_DESIRED = ("label", "kto_tag")

# Keys of the available functions; the second is of OpenAI's older API.
_TOOLS = ("tools", "functions")


def names_record(value: Any) -> bool:
    """Returns whether a value has the keys of a record, regardless of their values."""
    if not isinstance(value, Mapping):
        return False
    if any(name in value for name in (*KINDS, "conversations")):
        return True
    return names_question(value)


def parse_record(record: Any) -> Document:
    """Converts one record, or a list of messages, to a document.

    Raises:
        ValueError: the record has no known form, or must not be learnt from; the message is only
            the reason.
    """
    if is_conversation(record):
        record = {"messages": record}
    whole = check_object(record)
    record = without_nulls(whole)
    kinds = [kind for kind in KINDS if kind in record]
    if kinds == ["prompt", "messages"] and _is_first_message(record):
        kinds = ["messages"]
    if len(kinds) > 1:
        raise ValueError(f'"{kinds[0]}" and "{kinds[1]}" in one object')
    if kinds == ["text"]:
        return Document((Segment(text_field(record, "text")),))
    _refuse_undesired(record)
    if kinds == ["messages"]:
        return _named_chat(record, "messages")
    _refuse_pairs(record)
    if kinds == ["prompt"]:
        return _answered_prompt(record)
    if name := only_name(record, _CONVERSATIONS):
        return _named_chat(record, name)
    if messages := answered_question(record):
        return _chat(record, _with_system(record, messages))
    raise ValueError(
        'must have a "text", a "prompt" or "messages" (or "conversations", "instruction" and '
        f'"output", or "question" and "answer"); {keys_of(whole)}'
    )


class AskedQuestion(NamedTuple):
    """A question for a model to answer.

    Attributes:
        parts: parts of the prompt, each of which is tokenized separately.
        answer: the reference answer; "" if there is none.
    """

    parts: tuple[str, ...]
    answer: str


def parse_question(record: Any) -> AskedQuestion:
    """Parses the question of a record: a verbatim "prompt", or a chat up to its last answer.

    The reference answer is the value of "answer", or else the last answer that `parse_record` would
    put into the loss; thoughts are removed from a chat's answer.

    Raises:
        ValueError: the record has no question; the message is only the reason.
    """
    if is_conversation(record):
        record = {"messages": record}
    whole = check_object(record)
    record = without_nulls(whole)
    if "messages" in record and "prompt" in record and _is_first_message(record):
        del record["prompt"]
    if "prompt" in record and not isinstance(record["prompt"], list):
        return _asked_prompt(record)
    answer_name = None
    name = only_name(record, ("prompt", "messages", *_CONVERSATIONS))
    if name:
        messages = _messages(record, name)
        completion = record.get("completion")
        # The second part of a chat in TRL's form.
        if name == "prompt" and isinstance(completion, list):
            messages = [*messages, *completion]
    else:
        name = "messages"
        question, answer_name = question_and_answer(record)
        if question is None:
            raise ValueError(
                f'must have a "prompt", a "question" or "messages"; {keys_of(whole)}'
            )
        messages = _with_system(record, question_messages(record, question))
    parts, answer = asked_conversation(messages, name, **_template_choices(record))
    known = record.get("answer", record.get(answer_name, answer))
    return AskedQuestion(parts, without_thoughts(turn_start("assistant"), str(known)))


def _asked_prompt(record: Mapping[str, Any]) -> AskedQuestion:
    """Parses a verbatim prompt and its answer, which may be a number."""
    prompt = text_field(record, "prompt").decode()
    name = "answer"
    if name not in record:
        name = only_name(record, _ANSWERS_AS_THEY_STAND) or name
    return AskedQuestion((prompt,), str(record.get(name, "")))


def _is_first_message(record: Mapping[str, Any]) -> bool:
    """Returns whether a prompt only repeats the first question of the messages, as in UltraChat."""
    messages = record["messages"]
    if not isinstance(messages, list):
        return False
    questions = []
    for message in messages:
        if isinstance(message, Mapping) and message.get("role") == "user":
            questions.append(message.get("content"))
    return bool(questions) and questions[0] == record["prompt"]


def _refuse_undesired(record: Mapping[str, Any]) -> None:
    """Rejects a record that marks its answer as undesired.

    Raises:
        ValueError: the answer is marked as undesired.
    """
    answers = (*_CONVERSATIONS, *_ANSWERS_AS_THEY_STAND, *ANSWER_NAMES)
    if not any(name in record for name in ("messages", *answers)):
        return
    for name in _DESIRED:
        # Tables hold them as text, and pandas writes 0.0 for columns with gaps.
        value = str(record.get(name)).strip().lower()
        if value in ("false", "0", "0.0"):
            raise ValueError(
                f'"{name}" is {value}, which marks an undesired answer (KTO) that would be learnt; '
                f'if "{name}" means something else, rename it'
            )


def _refuse_pairs(record: Mapping[str, Any]) -> None:
    """Rejects preference pairs.

    Raises:
        ValueError: the record holds a preference pair.
    """
    if "chosen" in record or "rejected" in record:
        raise ValueError(
            'holds a preference pair ("chosen" and "rejected"), which is not supported: to learn '
            'the chosen answer, name it "completion" after a "prompt", or "messages"'
        )


def _answered_prompt(record: Mapping[str, Any]) -> Document:
    """Converts a prompt and its answer, verbatim or as two parts of a chat, to a document."""
    name = only_name(record, _ANSWERS_AS_THEY_STAND)
    if name is None:
        names = " or ".join(f'"{name}"' for name in _ANSWERS_AS_THEY_STAND)
        raise ValueError(f"no {names}; {keys_of(record)}")
    prompt = record["prompt"]
    completion = record[name]
    _refuse_loose_thoughts(record, "prompt")
    if isinstance(prompt, list) and isinstance(completion, list):
        prompt = _with_system(record, prompt)
        messages = [*prompt, *completion]
        return _chat(record, messages, name, learn_from=len(prompt))
    _refuse_beside_prompt(record)
    question = text_field(record, "prompt")
    answer = text_field(record, name)
    if not answer:
        raise ValueError(f'"{name}" is empty')
    return Document((Segment(question, in_loss=False), Segment(answer)))


def _refuse_beside_prompt(record: Mapping[str, Any]) -> None:
    """Rejects system texts, questions and contexts next to a verbatim prompt.

    Raises:
        ValueError: the record has one of them.
    """
    for name in (*_SYSTEM_TEXTS, *QUESTIONS, *CONTEXTS, "history"):
        if record.get(name):
            raise ValueError(
                f'"{name}" next to a "prompt" that is read verbatim: begin the prompt with it, '
                'leave one of the two out, or use "messages"'
            )


def _refuse_loose_thoughts(record: Mapping[str, Any], name: str) -> None:
    """Rejects thoughts next to a conversation or a verbatim prompt.

    Raises:
        ValueError: the record has such thoughts.
    """
    thought = next(iter(thoughts_in(record)), None)
    if thought is not None:
        raise ValueError(
            f'"{thought}" next to "{name}": put the thoughts into the answer that they precede; '
            f'if "{thought}" means something else, rename it'
        )


def _with_roles(messages: Any) -> Any:
    """Converts a list of strings to messages of the user and the assistant in turn."""
    if not isinstance(messages, list):
        return messages
    if not all(isinstance(message, str) for message in messages):
        return messages
    turns = []
    for index, words in enumerate(messages):
        role = "assistant" if index % 2 else "user"
        turns.append({"role": role, "content": words})
    return turns


def _with_system(record: Mapping[str, Any], messages: Any) -> Any:
    """Adds a record's system text before its messages, unless they already begin with it.

    Raises:
        ValueError: the messages begin with another system text, or it is not text.
    """
    name = optional_name(record, _SYSTEM_TEXTS)
    if not name or not isinstance(messages, list):
        return messages
    if not isinstance(record[name], list):
        text_field(record, name)
    turn = {"role": "system", "content": record[name]}
    system = read_message(turn, 1)
    first = read_message(messages[0], 1) if messages else None
    if first is None or first.role != "system":
        return [turn, *messages]
    if first != system:
        raise ValueError(
            f'"{name}" and message 1, which also has the role system, differ'
        )
    return messages


def _with_pairs(turns: Any) -> Any:
    """Converts turns with a question and an answer each, as in Firefly, to messages.

    Raises:
        ValueError: a turn has two questions or two answers, or one is not text.
    """
    if not isinstance(turns, list):
        return turns
    messages = []
    for number, turn in enumerate(turns, 1):
        try:
            messages += _messages_of(turn)
        except ValueError as error:
            raise ValueError(f"turn {number}: {error}") from None
    return messages


def _messages_of(turn: Any) -> list[Any]:
    """Converts a turn to messages; a turn with a role is a message itself."""
    if not isinstance(turn, Mapping):
        return [turn]
    fields = without_nulls(turn)
    if not is_pair(fields):
        return [turn]
    messages = answered_question(fields)
    for name in WEIGHTS:
        messages[-1][name] = fields.get(name)
    return _with_system(fields, messages)


def _named_chat(record: Mapping[str, Any], name: str) -> Document:
    """Converts the conversation under a key of a record to a document."""
    _refuse_loose_thoughts(record, name)
    return _chat(record, _messages(record, name), name)


def _messages(record: Mapping[str, Any], name: str) -> Any:
    """Converts the conversation under a key of a record to messages, with its system text."""
    turns = record[name]
    if name in _CONVERSATIONS:
        turns = _with_roles(turns)
    # Under "data", tables hold their records.
    if name != "data":
        turns = _with_pairs(turns)
    return _with_system(record, turns)


def _chat(
    record: Mapping[str, Any],
    messages: Any,
    name: str = "messages",
    *,
    learn_from: int = 0,
) -> Document:
    """Converts a conversation to a document, with the think mode and functions of its record."""
    choices = _template_choices(record)
    return conversation(messages, name, learn_from=learn_from, **choices)


def _template_choices(record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a record's think mode and functions as keyword arguments of the template."""
    key = optional_name(record, _TOOLS)
    tools = record[key] if key else []
    try:
        # Some data sets hold the list as text.
        texts = read_tools(tools) if isinstance(tools, str) else tool_texts(tools)
    except ValueError as error:
        raise ValueError(f'"{key}": {error}') from None
    return {"think": record.get("think") or "off", "tools": texts}
