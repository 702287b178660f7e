"""Answers as bodies of OpenAI's interface; no network.

Source: platform.openai.com/docs/api-reference, completions and chat.
"""

from collections.abc import Sequence
from typing import Any

from rwkv7_jax.serving.protocol import Call, Served, named_state
from rwkv7_jax.serving.requests import Answer


def models_body(served: Served) -> dict[str, Any]:
    """Lists the base model, and one model for each start state."""
    entries = [model_body(served, name) for name in served.models()]
    return {"object": "list", "data": entries}


def model_body(served: Served, name: str) -> dict[str, Any]:
    """Describes one model.

    Raises:
        Refused: none has the name.
    """
    named_state(None, name, served)
    body = {"id": name, "object": "model", "created": served.started}
    return body | {"owned_by": "rwkv7_jax"}


def states_body(served: Served) -> dict[str, Any]:
    """Lists the start states."""
    entries = [{"id": name, "object": "state"} for name in served.states]
    return {"object": "list", "data": entries}


def answer_body(call: Call, answers: Sequence[Answer]) -> dict[str, Any]:
    """Returns the body of the whole answers to a call's requests."""
    choices = []
    for index, answer in enumerate(answers):
        text = first_text(call, answer.text)
        choice: dict[str, Any] = {
            "index": index,
            "finish_reason": _finish_reason(answer),
        }
        if call.is_chat:
            choice["message"] = {"role": "assistant", "content": text}
        else:
            choice |= {"text": text, "logprobs": None}
        choices.append(choice)
    return _body(call, choices, "chat.completion") | {"usage": _usage(call, answers)}


def first_text(call: Call, text: str) -> str:
    """Returns the beginning of an answer as the client gets it.

    The opening of a thought belongs to it; the space between a speaker and the words does not.
    """
    return (call.opening + text).removeprefix(" ") if call.is_chat else text


def opening_chunk(call: Call, index: int) -> dict[str, Any]:
    """Returns the first event of an answer in a chat."""
    return _chunk(call, index, {"delta": {"role": "assistant", "content": ""}})


def text_chunk(call: Call, index: int, text: str) -> dict[str, Any]:
    """Returns an event with a piece of the answer number `index`."""
    if call.is_chat:
        return _chunk(call, index, {"delta": {"content": text}})
    return _chunk(call, index, {"text": text, "logprobs": None})


def last_chunk(call: Call, index: int, answer: Answer) -> dict[str, Any]:
    """Returns the event that ends an answer."""
    nothing = {"delta": {}} if call.is_chat else {"text": "", "logprobs": None}
    return _chunk(call, index, nothing | {"finish_reason": _finish_reason(answer)})


def usage_chunk(call: Call, answers: Sequence[Answer]) -> dict[str, Any]:
    """Returns the last event of a stream whose client asked for the numbers."""
    return _body(call, [], "chat.completion.chunk") | {"usage": _usage(call, answers)}


def _chunk(call: Call, index: int, fields: dict[str, Any]) -> dict[str, Any]:
    choice = {"index": index, "finish_reason": None} | fields
    return _body(call, [choice], "chat.completion.chunk")


def _finish_reason(answer: Answer) -> str:
    """Returns how an answer ended, in the interface's words."""
    return "length" if answer.ended == "length" else "stop"


def _usage(call: Call, answers: Sequence[Answer]) -> dict[str, Any]:
    """Counts the tokens of a call; a prompt counts once, however many answers it has."""
    firsts = answers[:: call.per_prompt]
    prompts = sum(answer.prompt_tokens for answer in firsts)
    cached = sum(answer.cached_tokens for answer in firsts)
    made = sum(len(answer.tokens) for answer in answers)
    return {
        "prompt_tokens": prompts,
        "completion_tokens": made,
        "total_tokens": prompts + made,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def _body(call: Call, choices: list[Any], kind: str) -> dict[str, Any]:
    return {
        "id": call.id,
        "object": kind if call.is_chat else "text_completion",
        "created": call.created,
        "model": call.model,
        "choices": choices,
    }
