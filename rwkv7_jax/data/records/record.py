"""Records as documents: which shapes of data sets are known, and what of each is learnt.

A record is one object with one of these, or the second form of a chat:

    {"text": ...}                                         all of it is in the loss
    {"prompt": ..., "answer": ...}                        as they stand; the answer is in the loss
                                                          (also called "completion", "response"
                                                          or "output")
    {"messages": [{"role": ..., "content": ...}, ...]}    a chat; the assistant is in the loss
    [{"role": ..., "content": ...}, ...]                  the same without a name
    {"conversations": [{"from": ..., "value": ...}, ...]} the same, as ShareGPT has it
    {"data": ["...", "..."]}                              the same, as UltraChat has it
    {"prompt": [...], "completion": [...]}                two parts of a chat, as TRL has it; the
                                                          second part's assistant is in the loss
    {"instruction": ..., "input": ..., "output": ...}     the same of one question, as Alpaca has it
                                                          (`questions` has the names that other
                                                          data sets use)
    {"conversation": [{"human": ..., "assistant": ...}]}  the same of several, as Firefly has it

A record with a conversation may hold what the system says ("system"), name a think mode ("think")
and hold functions ("tools"); an assistant may have thoughts ("reasoning_content"; beside one
question they are those of its answer) and call functions ("tool_calls"), role "tool" says what they
gave, and a "weight" of 0 leaves an answer out of the loss. A key whose value is null is one that a
record, or a message, does not have.
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

# Names of conversations besides "messages".
_CONVERSATIONS = ("conversations", "conversation", "data")

# Names of what follows a prompt as it stands; the second one is of TRL.
_ANSWERS_AS_THEY_STAND = ("answer", "completion", "response", "output")

_SYSTEM_TEXTS = ("system", "system_prompt")

# Names under which KTO's data sets say whether an answer is desired: TRL's and LLaMA-Factory's.
_DESIRED = ("label", "kto_tag")

# Names of functions that may be called; the second one is of OpenAI's older interface.
_TOOLS = ("tools", "functions")


def names_record(value: Any) -> bool:
    """Tells whether a value is meant as a record by its keys, whatever stands under them."""
    if not isinstance(value, Mapping):
        return False
    if any(name in value for name in (*KINDS, "conversations")):
        return True
    return names_question(value)


def parse_record(record: Any) -> Document:
    """Makes a document of one record, or of a list of messages.

    Raises:
        ValueError: the record describes no document, or one that must not be learnt; the message is
            the reason alone.
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
    """A question that a model is to answer.

    Attributes:
        parts: of the prompt, each of which is tokenized separately.
        answer: the known one; "" where there is none.
    """

    parts: tuple[str, ...]
    answer: str


def parse_question(record: Any) -> AskedQuestion:
    """Reads the question of a record: a "prompt" as it stands, or a chat up to its last answer.

    The known answer is what stands under "answer", else the answer that `parse_record` would learn;
    of a chat without its thoughts.

    Raises:
        ValueError: the record has no question; the message is the reason alone.
    """
    if is_conversation(record):
        record = {"messages": record}
    whole = check_object(record)
    record = without_nulls(whole)
    if "prompt" in record and not isinstance(record["prompt"], list):
        prompt = text_field(record, "prompt").decode()
        return AskedQuestion((prompt,), str(record.get("answer", "")))
    answer_name = None
    name = only_name(record, ("prompt", "messages", *_CONVERSATIONS))
    if name:
        messages = _messages(record, name)
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


def _is_first_message(record: Mapping[str, Any]) -> bool:
    """Tells whether a prompt only repeats the first question of its messages, as UltraChat's do."""
    messages = record["messages"]
    if not isinstance(messages, list):
        return False
    questions = []
    for message in messages:
        if isinstance(message, Mapping) and message.get("role") == "user":
            questions.append(message.get("content"))
    return bool(questions) and questions[0] == record["prompt"]


def _refuse_undesired(record: Mapping[str, Any]) -> None:
    """Refuses a record that says of its answer that it is a bad one.

    Raises:
        ValueError: it does.
    """
    answers = (*_CONVERSATIONS, *_ANSWERS_AS_THEY_STAND, *ANSWER_NAMES)
    if not any(name in record for name in ("messages", *answers)):
        return
    for name in _DESIRED:
        # In tables they are text, and of columns with gaps pandas makes 0.0.
        value = str(record.get(name)).strip().lower()
        if value in ("false", "0", "0.0"):
            raise ValueError(
                f'"{name}" is {value}: an answer that is not desired (as KTO has it), which would '
                f'be learnt; rename "{name}" where it means something else'
            )


def _refuse_pairs(record: Mapping[str, Any]) -> None:
    """Refuses pairs of a good and a bad answer.

    Raises:
        ValueError: a pair of preferences.
    """
    if "chosen" in record or "rejected" in record:
        raise ValueError(
            'holds a pair of preferences ("chosen" and "rejected"), which is not read: to learn '
            'the chosen one, name it "completion" after a "prompt", or "messages"'
        )


def _answered_prompt(record: Mapping[str, Any]) -> Document:
    """Makes a document of a prompt and its answer, as they stand or as two parts of a chat."""
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
    """Refuses system texts, questions and contexts in a record whose prompt is read as it stands.

    Raises:
        ValueError: there is something.
    """
    for name in (*_SYSTEM_TEXTS, *QUESTIONS, *CONTEXTS, "history"):
        if record.get(name):
            raise ValueError(
                f'"{name}" next to a "prompt" that is read as it stands: begin the prompt with it, '
                'leave one of the two out, or write "messages"'
            )


def _refuse_loose_thoughts(record: Mapping[str, Any], name: str) -> None:
    """Refuses thoughts beside a conversation, or beside a prompt that is read as it stands.

    Raises:
        ValueError: there are such thoughts.
    """
    thought = next(iter(thoughts_in(record)), None)
    if thought is not None:
        raise ValueError(
            f'"{thought}" next to "{name}": write the thoughts into the answer that they precede, '
            f'or rename "{thought}" where it means something else'
        )


def _with_roles(messages: Any) -> Any:
    """Makes messages of words alone, which are of the user and the assistant in turn."""
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
    """Puts a record's system text before its messages, unless they begin with the same one.

    Raises:
        ValueError: they begin with another one, or it is no text.
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
            f'"{name}" and message 1, which is of the system too, say different things'
        )
    return messages


def _with_pairs(turns: Any) -> Any:
    """Makes messages of turns that hold a question and its answer each, as Firefly's do.

    Raises:
        ValueError: such a turn with two questions or two answers, or one that is no text.
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
    """Makes messages of a turn, which is one itself where it names a role."""
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
    """Makes a document of the conversation that a record holds under a name."""
    _refuse_loose_thoughts(record, name)
    return _chat(record, _messages(record, name), name)


def _messages(record: Mapping[str, Any], name: str) -> Any:
    """Makes messages of what a record holds under a name, with what its system says."""
    turns = record[name]
    if name in _CONVERSATIONS:
        turns = _with_roles(turns)
    # Tables hold their records under this name.
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
    """Makes a document of a conversation and what its record says of thoughts and functions."""
    choices = _template_choices(record)
    return conversation(messages, name, learn_from=learn_from, **choices)


def _template_choices(record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the think mode and the functions that a record names, as the template takes them."""
    key = optional_name(record, _TOOLS)
    tools = record[key] if key else []
    try:
        # Some data sets hold the list as text.
        texts = read_tools(tools) if isinstance(tools, str) else tool_texts(tools)
    except ValueError as error:
        raise ValueError(f'"{key}": {error}') from None
    return {"think": record.get("think") or "off", "tools": texts}
