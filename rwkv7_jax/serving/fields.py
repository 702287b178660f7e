"""The fields of a body of OpenAI's interface, and what is said of wrong ones."""

import secrets
from typing import Any

from rwkv7_jax.serving.requests import MOST_ALTERNATIVES

_MOST_STOPS = 8

# Characters of a stop string. Each answer of a call has a copy, and a longer one ends none.
_LONGEST_STOP = 1024

# The second one is about padding against eavesdroppers, of which there is none here.
_STREAM_OPTIONS = ("include_usage", "include_obfuscation")

# Clients shorten a conversation where an error has this code.
TOO_LONG = "context_length_exceeded"

# Fields of clients that change no answer.
_WITHOUT_EFFECT = (
    "user",
    "store",
    "metadata",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "prompt_cache_options",
    "parallel_tool_calls",
)

# Fields that are not served unless they have one of these values, which mean what is done without.
# Chats take some of them; the second half are those of vLLM.
_NOT_SERVED: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "min_p": (0, 0.0),
    "min_tokens": (0,),
    "repetition_penalty": (1, 1.0),
    "length_penalty": (1, 1.0),
    "use_beam_search": (False,),
    "ignore_eos": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
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


def stopped() -> Refused:
    """Makes the error of a server that takes no more calls."""
    return Refused("the server is being stopped.", status=503)


class Fields:
    """The fields of a body, each taken once; null is what a client writes for nothing."""

    def __init__(self, body: dict[str, Any]):
        """Takes a body."""
        self._left = {name: value for name, value in body.items() if value is not None}
        self._given = set(self._left)

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
            raise Refused(f"`{name}` must be {what}; got {kind_of(value)}.", name)
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
        old = self.integer(names[0], default)
        new = self.integer(names[1], old)
        if names[0] in self._given and old != new:
            raise Refused(
                f"`max_tokens` must be `max_completion_tokens`; got {old} and {new}.",
                names[0],
            )
        return new

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

    def top_k(self) -> int:
        """Takes the number of tokens to draw from; 0, and vLLM's -1, is no limit."""
        count = self.integer("top_k", 0)
        return 0 if count == -1 else count

    def seed(self) -> int:
        """Takes the seed; without one, or with llama.cpp's -1 for none, each call has another."""
        seed = self.integer("seed", -1)
        return secrets.randbits(32) if seed == -1 else seed

    def switch(self, name: str, *, default: bool = False) -> bool:
        """Takes true or false."""
        return self._take(name, (bool,), "true or false", default)

    def items(self, name: str) -> list[Any]:
        """Takes a list, which is empty without."""
        return self._take(name, (list,), "a list", [])

    def members(self, name: str) -> dict[str, Any]:
        """Takes an object, which is empty without; its nulls stand for nothing, too."""
        found = self._take(name, (dict,), "an object", {})
        return {key: value for key, value in found.items() if value is not None}

    def optional(self, name: str, default: Any) -> Any:
        """Takes a field whose value may be of several kinds."""
        return self._left.pop(name, default)

    def integers(self, name: str) -> tuple[int, ...]:
        """Takes a list of whole numbers, each of them once."""
        values = self._take(name, (list,), "a list of whole numbers", [])
        for value in values:
            if not is_id(value):
                raise Refused(
                    f"`{name}` must be a list of whole numbers; it has {kind_of(value)}.",
                    name,
                )
        return tuple(dict.fromkeys(values))

    def stops(self) -> tuple[str, ...]:
        """Takes the strings that end an answer."""
        kinds = (str, list)
        stops = self._take("stop", kinds, "a string or a list of strings", [])
        if isinstance(stops, str):
            # Forms of clients send a field that was left empty.
            stops = [stops] if stops else []
        if not all(isinstance(stop, str) and stop for stop in stops):
            raise Refused("`stop` must hold strings that are not empty.", "stop")
        if len(stops) > _MOST_STOPS:
            raise Refused(
                f"`stop` must hold at most {_MOST_STOPS} strings; got {len(stops)}.",
                "stop",
            )
        longest = max(map(len, stops), default=0)
        if longest > _LONGEST_STOP:
            raise Refused(
                f"`stop` must hold strings of at most {_LONGEST_STOP:,} characters; got one of "
                f"{longest:,}.",
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
        options = self.members("stream_options")
        if options and not stream:
            raise Refused(
                "`stream_options` must come with a `stream` that is true.",
                "stream_options",
            )
        for name, value in options.items():
            if name not in _STREAM_OPTIONS or not isinstance(value, bool):
                raise Refused(
                    f"`stream_options.{name:.60}` must be one of {', '.join(_STREAM_OPTIONS)}, and "
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
            # To Python 0 is False, and True is 1.
            if not any(
                type(value) is type(neutral) and value == neutral
                for neutral in _NOT_SERVED[name]
            ):
                raise Refused(f"`{name}` is not served here; leave it out.", name)


def kind_of(value: Any) -> str:
    """Names the kind of a value as JSON does."""
    if value is None:
        return "null"
    kinds = {bool: "a boolean", str: "a string", list: "a list", dict: "an object"}
    return kinds.get(type(value), "a number")


def is_id(value: Any) -> bool:
    """Tells whether a value is a whole number; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)
