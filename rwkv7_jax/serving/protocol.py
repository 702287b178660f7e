"""Bodies of OpenAI's interface, read as requests; no network.

Fields that change nothing here are passed over, all others that are not known are refused: an
answer that ignores what was asked for looks like one that does not.

Sources: platform.openai.com/docs/api-reference, completions and chat; the fields `state`,
`penalty_decay` and `stop_token_ids` are those of RWKV's servers (josStorer/RWKV-Runner@64269f0
backend-python/routes/completion.py).
"""

import dataclasses
import secrets
import time
from collections.abc import Sequence
from typing import Any

from rwkv7_jax.data.records.conversations import read_message
from rwkv7_jax.serving.requests import MOST_ALTERNATIVES, Request
from rwkv7_jax.text.chat_template import (
    CHAT_STOP,
    THINK_MODES,
    answer_opening,
    write_conversation,
)
from rwkv7_jax.text.tokenizer import Tokenizer

# What every model may be called, besides its name.
ANY_MODEL = "rwkv"

_MOST_STOPS = 8

# Tokens of an answer, where the client does not say.
_LENGTH = 256

# The second one is about padding against eavesdroppers, of which there is none here.
_STREAM_OPTIONS = ("include_usage", "include_obfuscation")

# Fields of clients that change no answer.
_WITHOUT_EFFECT = ("user", "store", "metadata", "service_tier")

# Fields that are not served unless they have this value, which is what they are without.
_NOT_SERVED = {
    "best_of": 1,
    "echo": False,
    "suffix": "",
    "logit_bias": {},
    "tools": [],
    "tool_choice": "none",
    "response_format": {"type": "text"},
}


class Refused(Exception):
    """An error that the client gets in place of an answer.

    Attributes:
        message: one sentence.
        param: the field that is wrong; None where it is none.
        status: of HTTP.
        code: a word for programs; None where there is none.
    """

    def __init__(
        self,
        message: str,
        param: str | None = None,
        *,
        status: int = 400,
        code: str | None = None,
    ):
        """Stores the parts of the error object."""
        super().__init__(message)
        self.message = message
        self.param = param
        self.status = status
        self.code = code

    def body(self) -> dict[str, Any]:
        """Returns the error object."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": self.message, "type": kind}
        return {"error": error | {"param": self.param, "code": self.code}}


@dataclasses.dataclass(frozen=True)
class Served:
    """What a server offers.

    Attributes:
        name: of the model.
        states: names of the start states.
        tokenizer: of the model.
        longest_answer: new ids of an answer at most.
        most_answers: of one call.
        started: seconds since 1970.
    """

    name: str
    states: Sequence[str]
    tokenizer: Tokenizer
    longest_answer: int
    most_answers: int
    started: int = 0

    def models(self) -> list[str]:
        """Lists what a call may name as its model: the base, and each state on it."""
        return [self.name, *(f"{self.name}:{state}" for state in self.states)]


@dataclasses.dataclass(frozen=True)
class Call:
    """A body that was read.

    Attributes:
        requests: for the engine, one for each answer; those of one prompt follow each other.
        per_prompt: answers to each prompt.
        is_chat: whether a message or a text is asked for.
        stream: whether it is sent as it is made.
        include_usage: whether a stream ends with the numbers of tokens.
        model: as the client named it.
        opening: beginning of the answer that the prompt has already.
        id: of the answer.
        created: seconds since 1970.
    """

    requests: tuple[Request, ...]
    per_prompt: int
    is_chat: bool
    stream: bool
    include_usage: bool
    model: str
    opening: str
    id: str
    created: int


def read_call(body: Any, served: Served, *, is_chat: bool) -> Call:
    """Reads the body of a call.

    Raises:
        Refused: a field that is unknown, is not served, or has a value of another kind. Ranges are
            the engine's to check.
    """
    if not isinstance(body, dict):
        raise Refused(f"the body must be an object; got {_kind(body)}.")
    fields = _Fields(body)
    model = fields.text("model", served.name)
    state = named_state(fields.text("state", None), model, served)
    opening = ""
    stops = fields.stops()
    if is_chat:
        think = fields.text("think", "off")
        prompts = [_chat_prompt(fields.take("messages"), think, served.tokenizer)]
        opening = answer_opening(think)
        stops = (*stops, CHAT_STOP)
    else:
        prompts = _text_prompts(fields.take("prompt"), served.tokenizer)
    per_prompt = fields.answers(len(prompts), served.most_answers)
    first = Request(
        prompt=(),
        state=state,
        tokens=fields.length(min(_LENGTH, served.longest_answer)),
        seed=fields.integer("seed", secrets.randbits(32)),
        temperature=fields.number("temperature", 1.0),
        top_p=fields.number("top_p", 1.0),
        top_k=fields.integer("top_k", 0),
        presence_penalty=fields.number("presence_penalty", 0.0),
        frequency_penalty=fields.number("frequency_penalty", 0.0),
        penalty_decay=fields.number("penalty_decay", 0.996),
        stop_ids=fields.integers("stop_token_ids"),
        stop_strings=stops,
        alternatives=fields.alternatives(is_chat=is_chat),
    )
    requests = []
    for prompt in prompts:
        for answer in range(per_prompt):
            one = dataclasses.replace(
                first, prompt=tuple(prompt), seed=first.seed + answer
            )
            requests.append(one)
    stream = fields.switch("stream")
    call = Call(
        requests=tuple(requests),
        per_prompt=per_prompt,
        is_chat=is_chat,
        stream=stream,
        include_usage=fields.includes_usage(stream=stream),
        model=model or served.name,
        opening=opening,
        id=("chatcmpl-" if is_chat else "cmpl-") + secrets.token_hex(12),
        created=int(time.time()),
    )
    fields.refuse_others()
    return call


class _Fields:
    """The fields of a body, each taken once; null is what a client writes for nothing."""

    def __init__(self, body: dict[str, Any]):
        """Takes a body."""
        self._left = {name: value for name, value in body.items() if value is not None}

    def take(self, name: str) -> Any:
        """Takes a field that must be there."""
        if name not in self._left:
            raise Refused(f"`{name}` must be given.", name)
        return self._left.pop(name)

    def _take(self, name: str, kinds: tuple[type, ...], what: str, default: Any) -> Any:
        value = self._left.pop(name, default)
        # True is a number to Python.
        is_wrong = isinstance(value, bool) and bool not in kinds
        if value is not default and (is_wrong or not isinstance(value, kinds)):
            raise Refused(f"`{name}` must be {what}; got {_kind(value)}.", name)
        return value

    def text(self, name: str, default: str | None) -> Any:
        """Takes a string."""
        return self._take(name, (str,), "a string", default)

    def number(self, name: str, default: float) -> float:
        """Takes a number."""
        try:
            return float(self._take(name, (int, float), "a number", default))
        except OverflowError:
            raise Refused(f"`{name}` must be a number below 1e308.", name) from None

    def integer(self, name: str, default: int) -> int:
        """Takes a whole number."""
        return self._take(name, (int,), "a whole number", default)

    def length(self, default: int) -> int:
        """Takes the limit of new tokens, which has an old name and a new one."""
        names = ("max_tokens", "max_completion_tokens")
        if all(name in self._left for name in names):
            raise Refused("`max_tokens` must be given by one of its names.", names[0])
        return self.integer(names[1], self.integer(names[0], default))

    def answers(self, prompts: int, most: int) -> int:
        """Takes the number of answers to each of so many prompts."""
        count = self.integer("n", 1)
        if count < 1:
            raise Refused(f"`n` must be at least 1; got {count}.", "n")
        if count * prompts > most:
            raise Refused(
                f"`n` times the number of prompts must be at most {most}, the requests that may "
                f"wait here; got {count * prompts}.",
                "n",
            )
        return count

    def switch(self, name: str) -> bool:
        """Takes true or false, which it is without."""
        return self._take(name, (bool,), "true or false", False)

    def integers(self, name: str) -> tuple[int, ...]:
        """Takes a list of whole numbers."""
        values = self._take(name, (list,), "a list of whole numbers", [])
        for value in values:
            if not _is_id(value):
                raise Refused(
                    f"`{name}` must be a list of whole numbers; it has {_kind(value)}.",
                    name,
                )
        return tuple(values)

    def stops(self) -> tuple[str, ...]:
        """Takes the strings that end an answer."""
        kinds = (str, list)
        stops = self._take("stop", kinds, "a string or a list of strings", [])
        if isinstance(stops, str):
            stops = [stops]
        if not all(isinstance(stop, str) and stop for stop in stops):
            raise Refused("`stop` must hold strings that are not empty.", "stop")
        if len(stops) > _MOST_STOPS:
            raise Refused(
                f"`stop` must hold at most {_MOST_STOPS} strings; got {len(stops)}.",
                "stop",
            )
        return tuple(stops)

    def alternatives(self, *, is_chat: bool) -> int | None:
        """Takes how many probable tokens to report beside each; None reports no token's score."""
        name = "top_logprobs" if is_chat else "logprobs"
        # Some clients write false, which chats have for nothing, in both interfaces.
        asked = self._left.get("logprobs", False) is not False
        if is_chat or not asked:
            asked = self.switch("logprobs")
        count = self.integer(name, 0)
        if count and not asked:
            raise Refused("`top_logprobs` must come with a true `logprobs`.", name)
        if not 0 <= count <= MOST_ALTERNATIVES:
            raise Refused(
                f"`{name}` must be between 0 and {MOST_ALTERNATIVES}; got {count}.",
                name,
            )
        return count if asked else None

    def includes_usage(self, *, stream: bool) -> bool:
        """Takes the options of a stream."""
        options = self._take("stream_options", (dict,), "an object", {})
        if options and not stream:
            raise Refused(
                "`stream_options` must come with a `stream` that is true.",
                "stream_options",
            )
        for name, value in options.items():
            if name not in _STREAM_OPTIONS or not isinstance(value, bool):
                raise Refused(
                    f"`stream_options.{name}` must be one of {', '.join(_STREAM_OPTIONS)}, and "
                    "true or false.",
                    "stream_options",
                )
        return options.get("include_usage", False)

    def refuse_others(self) -> None:
        """Refuses the fields that nobody took."""
        for name, value in self._left.items():
            if name in _WITHOUT_EFFECT:
                continue
            if name not in _NOT_SERVED:
                raise Refused(f"`{name:.60}` is no field of this interface.", name[:60])
            neutral = _NOT_SERVED[name]
            # To Python 0 is False, and True is 1.
            if type(value) is not type(neutral) or value != neutral:
                raise Refused(f"`{name}` is not served here; leave it out.", name)


def _kind(value: Any) -> str:
    """Names the kind of a value as JSON does."""
    if value is None:
        return "null"
    kinds = {bool: "a boolean", str: "a string", list: "a list", dict: "an object"}
    return kinds.get(type(value), "a number")


def named_state(state: str | None, model: str, served: Served) -> str | None:
    """Finds the state that a call names, in `state` or in `model` after a colon.

    Raises:
        Refused: the model or the state is not served.
    """
    base, colon, after = model.partition(":")
    if base not in (served.name, ANY_MODEL):
        raise Refused(
            f"`model` must be one of {', '.join(served.models())}; got {model!r:.60}.",
            "model",
            status=404,
            code="model_not_found",
        )
    if colon and state is not None and state != after:
        raise Refused(
            f"`state` must be that of `model`, {after!r}, or left out; got {state!r:.60}.",
            "state",
        )
    param = "model" if colon else "state"
    state = after if colon else state
    if state is not None and state not in served.states:
        known = ", ".join(served.states) or "there is none"
        raise Refused(
            f"`{param}` must name a state that is served ({known}); got {state!r:.60}.",
            param,
            status=404,
            code="state_not_found",
        )
    return state


def _chat_prompt(messages: Any, think: str, tokenizer: Tokenizer) -> list[int]:
    """Encodes a conversation up to the beginning of the next answer.

    Each part has its own ids, as in tuning: those of the messages so far do not change by what
    follows, and the cache finds them again.
    """
    if think not in THINK_MODES:
        raise Refused(
            f"`think` must be one of {', '.join(THINK_MODES)}; got {think!r:.60}.",
            "think",
        )
    if not isinstance(messages, list) or not messages:
        raise Refused("`messages` must be a list of messages.", "messages")
    try:
        turns = [read_message(message, at) for at, message in enumerate(messages, 1)]
        # As in `rwkv7 generate`, a system that says nothing has no turn.
        turns = [turn for turn in turns if turn.content or turn.role != "system"]
        parts = write_conversation(turns, think=think, ask=True)
        ids = [id for part in parts for id in tokenizer.encode(part.text.encode())]
    except UnicodeEncodeError:
        raise Refused("`messages` has a lone surrogate.", "messages") from None
    except ValueError as error:
        raise Refused(f"`messages`: {error}.", "messages") from None
    if not turns or turns[-1].role == "assistant":
        raise Refused(
            "`messages` must end with one that the assistant is to answer.", "messages"
        )
    return ids


def _text_prompts(prompt: Any, tokenizer: Tokenizer) -> list[Sequence[int]]:
    """Reads one prompt, or a list of them."""
    is_list = isinstance(prompt, list) and prompt and not _is_id(prompt[0])
    prompts = prompt if is_list else [prompt]
    return [_text_prompt(one, tokenizer) for one in prompts]


def _text_prompt(prompt: Any, tokenizer: Tokenizer) -> Sequence[int]:
    """Reads a text or a list of ids; an empty text becomes the id that ends documents."""
    if isinstance(prompt, str):
        try:
            return tokenizer.encode(prompt.encode()) or tokenizer.stop_ids
        except UnicodeEncodeError:
            raise Refused("`prompt` has a lone surrogate.", "prompt") from None
    if not isinstance(prompt, list) or not all(map(_is_id, prompt)):
        raise Refused(
            "`prompt` must be a text, a list of ids, or a list of such prompts.",
            "prompt",
        )
    return prompt


def _is_id(value: Any) -> bool:
    """Tells whether a value is a whole number; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)
