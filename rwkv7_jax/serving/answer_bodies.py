"""Answers as bodies of OpenAI's interface; no network.

Source: platform.openai.com/docs/api-reference, completions and chat.
"""

from collections.abc import Sequence
from typing import Any

from rwkv7_jax.serving.protocol import Call, Served, named_state
from rwkv7_jax.serving.requests import Answer, Piece, TokenScore
from rwkv7_jax.text.tokenizer import Tokenizer


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


class AnswerBodies:
    """The bodies of one call's answers, whole or as events of a stream."""

    def __init__(self, call: Call, tokenizer: Tokenizer):
        """Takes what was asked for, and the vocabulary that scored tokens are spelled with."""
        self._call = call
        self._tokenizer = tokenizer
        # Answers of the stream whose first piece was sent.
        self._begun: set[int] = set()

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """Returns the body of the answers, in the order of the call's requests."""
        choices = []
        for index, answer in enumerate(answers):
            text = self._first_text(answer.text)
            choice: dict[str, Any] = {"index": index}
            if self._call.is_chat:
                choice["message"] = {"role": "assistant", "content": text}
            else:
                choice["text"] = text
            choice["logprobs"] = self._logprobs(answer.scores)
            choice["finish_reason"] = _finish_reason(answer)
            choices.append(choice)
        return self._body(choices, "chat.completion") | {"usage": self._usage(answers)}

    def openings(self) -> list[dict[str, Any]]:
        """Returns the events before the first pieces, which chats have."""
        role = {"delta": {"role": "assistant", "content": ""}}
        count = len(self._call.requests) if self._call.is_chat else 0
        return [self._event(index, role) for index in range(count)]

    def piece(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        """Returns the events of a piece of answer number `index`: one, or none."""
        text = piece.text
        if index not in self._begun:
            self._begun.add(index)
            text = self._first_text(text)
        if not text and not piece.scores:
            return []
        content = {"delta": {"content": text}} if self._call.is_chat else {"text": text}
        logprobs = {"logprobs": self._logprobs(piece.scores)}
        return [self._event(index, content | logprobs)]

    def end(self, index: int, answer: Answer) -> list[dict[str, Any]]:
        """Returns the last events of answer number `index`."""
        # An answer without text still has its opening.
        events = self.piece(index, Piece(""))
        nothing = {"delta": {}} if self._call.is_chat else {"text": ""}
        ending = {"finish_reason": _finish_reason(answer)}
        return [*events, self._event(index, nothing | ending)]

    def usage_event(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """Returns the last event of a stream whose client asked for the numbers."""
        return self._body([], "chat.completion.chunk") | {"usage": self._usage(answers)}

    def _first_text(self, text: str) -> str:
        """Returns the beginning of an answer as the client gets it.

        The opening of a thought belongs to it; the space between a speaker and the words does not.
        """
        if not self._call.is_chat:
            return text
        return (self._call.opening + text).removeprefix(" ")

    def _event(self, index: int, fields: dict[str, Any]) -> dict[str, Any]:
        choice = {"index": index, "logprobs": None, "finish_reason": None} | fields
        return self._body([choice], "chat.completion.chunk")

    def _body(self, choices: list[Any], kind: str) -> dict[str, Any]:
        return {
            "id": self._call.id,
            "object": kind if self._call.is_chat else "text_completion",
            "created": self._call.created,
            "model": self._call.model,
            "choices": choices,
        }

    def _usage(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """Counts the tokens of the call; a prompt counts once, however many answers it has."""
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

    def _logprobs(self, scores: Sequence[TokenScore]) -> dict[str, Any] | None:
        """Returns the scores of tokens as the interface has them."""
        if not scores:
            return None
        if self._call.is_chat:
            content = []
            for score in scores:
                others = [self._entry(*other) for other in score.alternatives]
                entry = self._entry(score.id, score.logp)
                content.append(entry | {"top_logprobs": others})
            return {"content": content, "refusal": None}
        most_probable = []
        for score in scores:
            named = {self._name(id): logp for id, logp in score.alternatives}
            most_probable.append(named)
        return {
            "tokens": [self._name(score.id) for score in scores],
            "token_logprobs": [score.logp for score in scores],
            "top_logprobs": most_probable,
        }

    def _entry(self, id: int, logp: float) -> dict[str, Any]:
        return {
            "token": self._name(id),
            "logprob": logp,
            "bytes": list(self._spelling(id)),
        }

    def _name(self, id: int) -> str:
        """Names a token by its text, or by what it is where that is no text."""
        spelling = self._spelling(id)
        if not spelling:
            return f"token_id:{id}"
        try:
            return spelling.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelling)

    def _spelling(self, id: int) -> bytes:
        # A model's rows may be more than its vocabulary's ids.
        is_known = id < self._tokenizer.vocab_size
        return self._tokenizer.token_bytes(id) if is_known else b""


def _finish_reason(answer: Answer) -> str:
    """Returns how an answer ended, in the interface's words."""
    return "length" if answer.ended == "length" else "stop"
