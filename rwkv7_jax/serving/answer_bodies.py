"""Answers as response bodies of OpenAI's API; no network.

Sources: platform.openai.com/docs/api-reference, completions and chat; api-docs.deepseek.com for
`reasoning_content`.
"""

import secrets
from collections.abc import Sequence
from typing import Any

from rwkv7_jax.serving.protocol import Call, Served, named_state
from rwkv7_jax.serving.requests import Answer, Piece, TokenScore
from rwkv7_jax.text.chat_answers import (
    AnswerParts,
    AnswerReader,
    ToolCall,
    read_answer,
)
from rwkv7_jax.text.detokenizer import StreamingDetokenizer
from rwkv7_jax.text.tokenizer import Tokenizer


def models_body(served: Served) -> dict[str, Any]:
    """Returns the list of models: the base model, and one model per start state."""
    entries = [model_body(served, name) for name in served.models()]
    return {"object": "list", "data": entries}


def model_body(served: Served, name: str) -> dict[str, Any]:
    """Returns the description of one model.

    Raises:
        Refused: no model has the name.
    """
    named_state(None, name, served)
    body = {"id": name, "object": "model", "created": served.started}
    return body | {"owned_by": "rwkv7_jax"}


def states_body(served: Served) -> dict[str, Any]:
    """Returns the list of start states."""
    entries = [{"id": name, "object": "state"} for name in served.states]
    return {"object": "list", "data": entries}


class _TextOffsets:
    """The offsets of an answer's tokens in its text, which may arrive in pieces."""

    def __init__(self):
        """Starts at the beginning of the text."""
        self._detokenizer = StreamingDetokenizer()
        self._characters = 0

    def add(self, spelling: bytes) -> int:
        """Returns the number of complete characters before the next token."""
        before = self._characters
        self._characters += len(self._detokenizer.push(spelling))
        return before


class AnswerBodies:
    """The bodies of one call's answers, complete or as events of a stream."""

    def __init__(self, call: Call, tokenizer: Tokenizer):
        """Stores the call, and the tokenizer that decodes scored tokens."""
        self._call = call
        self._tokenizer = tokenizer
        # One per answer of a stream of completions.
        self._offsets = [_TextOffsets() for _ in call.requests]
        # One reader per answer of a chat.
        self._readers: list[AnswerReader] = []
        if chat := call.chat:
            for _ in call.requests:
                reader = AnswerReader(chat.tools, parallel=chat.parallel)
                # The opening is at most the start of a thought, which produces no event.
                reader.push(chat.opening)
                self._readers.append(reader)

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """Returns the body with all answers, in the order of the call's requests."""
        choices = []
        for index, answer in enumerate(answers):
            choice: dict[str, Any] = {"index": index}
            called = False
            if chat := self._call.chat:
                text = chat.opening + answer.text
                parts = read_answer(text, chat.tools, parallel=chat.parallel)
                choice["message"] = _message(parts)
                choice["logprobs"] = self._chat_logprobs(answer.scores)
                called = bool(parts.calls)
            else:
                choice["text"] = answer.text
                choice["logprobs"] = self._logprobs(answer.scores, _TextOffsets())
            choice["finish_reason"] = _finish_reason(answer, called=called)
            choices.append(choice)
        return self._body(choices, "chat.completion") | {"usage": self._usage(answers)}

    def openings(self) -> list[dict[str, Any]]:
        """Returns the events before the first pieces; only chats have any."""
        role = {"delta": {"role": "assistant", "content": ""}}
        return [self._event(index, role) for index in range(len(self._readers))]

    def piece(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        """Returns the events of a piece of answer number `index`; there may be none."""
        if self._call.chat:
            parts = self._readers[index].push(piece.text)
            return self._deltas(index, parts, piece.scores)
        if not piece.text and not piece.scores:
            return []
        logprobs = self._logprobs(piece.scores, self._offsets[index])
        return [self._event(index, {"text": piece.text, "logprobs": logprobs})]

    def end(self, index: int, answer: Answer) -> list[dict[str, Any]]:
        """Returns the last events of answer number `index`."""
        if not self._call.chat:
            ending = {"text": "", "finish_reason": _finish_reason(answer)}
            return [self._event(index, ending)]
        reader = self._readers[index]
        events = self._deltas(index, reader.close(), ())
        reason = _finish_reason(answer, called=reader.calls_read > 0)
        return [*events, self._event(index, {"delta": {}, "finish_reason": reason})]

    def usage_event(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """Returns the last event of a stream whose client asked for the token counts."""
        return self._body([], "chat.completion.chunk") | {"usage": self._usage(answers)}

    def _deltas(
        self, index: int, parts: AnswerParts, scores: Sequence[TokenScore]
    ) -> list[dict[str, Any]]:
        """Returns the events of parts of a message; the first event also has the scores."""
        deltas: list[dict[str, Any]] = []
        if parts.thought:
            deltas.append({"reasoning_content": parts.thought})
        if parts.words:
            deltas.append({"content": parts.words})
        if parts.calls:
            first = self._readers[index].calls_read - len(parts.calls)
            calls = []
            for number, call in enumerate(parts.calls, first):
                calls.append({"index": number} | _tool_call(call))
            deltas.append({"tool_calls": calls})
        if scores and not deltas:
            # The text of these tokens is held back or is not part of the message.
            deltas.append({})
        events = []
        for delta in deltas:
            logprobs = self._chat_logprobs(() if events else scores)
            events.append(self._event(index, {"delta": delta, "logprobs": logprobs}))
        return events

    def _event(self, index: int, fields: dict[str, Any]) -> dict[str, Any]:
        choice = {"index": index, "logprobs": None, "finish_reason": None} | fields
        return self._body([choice], "chat.completion.chunk")

    def _body(self, choices: list[Any], kind: str) -> dict[str, Any]:
        return {
            "id": self._call.id,
            "object": kind if self._call.chat else "text_completion",
            "created": self._call.created,
            "model": self._call.model,
            "choices": choices,
        }

    def _usage(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """Returns the token counts of the call; each prompt counts once for all its answers."""
        firsts = answers[:: self._call.per_prompt]
        prompts = sum(answer.prompt_tokens for answer in firsts)
        cached = sum(answer.cached_tokens for answer in firsts)
        made = sum(len(answer.tokens) for answer in answers)
        return {
            "prompt_tokens": prompts,
            "completion_tokens": made,
            "total_tokens": prompts + made,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def _chat_logprobs(self, scores: Sequence[TokenScore]) -> dict[str, Any] | None:
        """Returns the scores of a message's tokens; None without scores."""
        if not scores:
            return None
        content = []
        for score in scores:
            others = [self._entry(*other) for other in score.alternatives]
            entry = self._entry(score.id, score.logp)
            content.append(entry | {"top_logprobs": others})
        return {"content": content, "refusal": None}

    def _logprobs(
        self, scores: Sequence[TokenScore], offsets: _TextOffsets
    ) -> dict[str, Any] | None:
        """Returns the scores of a completion's next tokens; None without scores."""
        if not scores:
            return None
        most_probable = []
        places = []
        for score in scores:
            places.append(offsets.add(self._tokenizer.token_bytes(score.id)))
            named = {self._name(id): logp for id, logp in score.alternatives}
            most_probable.append(named)
        return {
            "tokens": [self._name(score.id) for score in scores],
            "token_logprobs": [score.logp for score in scores],
            "top_logprobs": most_probable,
            "text_offset": places,
        }

    def _entry(self, id: int, logp: float) -> dict[str, Any]:
        return {
            "token": self._name(id),
            "logprob": logp,
            "bytes": list(self._tokenizer.token_bytes(id)),
        }

    def _name(self, id: int) -> str:
        """Returns the text of a token; its bytes or its id if it has no text."""
        spelling = self._tokenizer.token_bytes(id)
        if not spelling:
            return f"token_id:{id}"
        try:
            return spelling.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelling)


def _message(parts: AnswerParts) -> dict[str, Any]:
    """Returns an assistant message; one with only function calls has the content None."""
    content = None if parts.calls and not parts.words else parts.words
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if parts.thought:
        message["reasoning_content"] = parts.thought
    if parts.calls:
        message["tool_calls"] = [_tool_call(call) for call in parts.calls]
    return message


def _tool_call(call: ToolCall) -> dict[str, Any]:
    """Returns a function call with a new id."""
    function = {"name": call.name, "arguments": call.arguments}
    id = "call_" + secrets.token_hex(12)
    return {"id": id, "type": "function", "function": function}


def _finish_reason(answer: Answer, *, called: bool = False) -> str:
    """Returns the finish reason of an answer in the terms of the API.

    Args:
        answer: the complete answer.
        called: whether it calls functions.
    """
    if answer.ended == "length":
        return "length"
    return "tool_calls" if called else "stop"
