"""The fields of a request body in OpenAI's API, and the errors for invalid ones."""

import secrets
from typing import Any

from rwkv7_jax.serving.requests import MOST_ALTERNATIVES

_MOST_STOPS = 8

# The maximum number of characters of a stop string: each answer of a call holds a copy.
_LONGEST_STOP = 1024

# `include_obfuscation` asks for padding against eavesdroppers; this server never pads.
_STREAM_OPTIONS = ("include_usage", "include_obfuscation")

# The error code on which clients shorten a conversation.
TOO_LONG = "context_length_exceeded"

# Fields that do not affect answers and are ignored.
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

# Unsupported fields, with the neutral values that are accepted because they change nothing. Chats
# support some of them. The fields from `min_p` on are vLLM's.
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
    """An error response for the client.

    Attributes:
        message: one sentence.
        param: the invalid field; None if the error concerns no field.
        status: the HTTP status.
        code: the machine-readable error code; None if there is none.
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
        """Returns the error object of the API."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": self.message, "type": kind}
        return {"error": error | {"param": self.param, "code": self.code}}


def stopped() -> Refused:
    """Returns the error of a server that accepts no more calls."""
    return Refused("the server is shutting down.", status=503)


class Fields:
    """The fields of a body, each taken once. A field with the value null counts as absent."""

    def __init__(self, body: dict[str, Any]):
        """Stores the fields of a body."""
        self._left = {name: value for name, value in body.items() if value is not None}
        self._given = set(self._left)

    def take(self, name: str) -> Any:
        """Takes a required field."""
        if name not in self._left:
            raise Refused(f"`{name}` must be given.", name)
        return self._left.pop(name)

    def _take(self, name: str, kinds: tuple[type, ...], what: str, default: Any) -> Any:
        value = self._left.pop(name, default)
        # To Python, True is also a number.
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
        """Takes an integer."""
        return self._take(name, (int,), "a whole number", default)

    def length(self, default: int) -> int:
        """Takes the limit on new tokens, which has an old and a new name."""
        names = ("max_tokens", "max_completion_tokens")
        old = self.integer(names[0], default)
        new = self.integer(names[1], old)
        if names[0] in self._given and old != new:
            raise Refused(
                f"`max_tokens` must equal `max_completion_tokens`; got {old} and {new}.",
                names[0],
            )
        return new

    def answers(self, prompts: int, most: int) -> int:
        """Takes the number of answers per prompt.

        Args:
            prompts: the number of prompts.
            most: the maximum number of answers to all prompts.
        """
        count = self.integer("n", 1)
        if count < 1:
            raise Refused(f"`n` must be at least 1; got {count}.", "n")
        if count * prompts > most:
            raise Refused(
                f"`n` times the number of prompts must be at most {most}, the length of the queue; "
                f"got {count * prompts}.",
                "n",
            )
        return count

    def top_k(self) -> int:
        """Takes the number of tokens to sample from; 0, or -1 as in vLLM, for no limit."""
        count = self.integer("top_k", 0)
        return 0 if count == -1 else count

    def seed(self) -> int:
        """Takes the seed; a random one if it is absent or, as in llama.cpp, -1."""
        seed = self.integer("seed", -1)
        return secrets.randbits(32) if seed == -1 else seed

    def switch(self, name: str, *, default: bool = False) -> bool:
        """Takes a boolean."""
        return self._take(name, (bool,), "true or false", default)

    def items(self, name: str) -> list[Any]:
        """Takes a list; empty if it is absent."""
        return self._take(name, (list,), "a list", [])

    def members(self, name: str) -> dict[str, Any]:
        """Takes an object, without its null members; empty if it is absent."""
        found = self._take(name, (dict,), "an object", {})
        return {key: value for key, value in found.items() if value is not None}

    def optional(self, name: str, default: Any) -> Any:
        """Takes a field of any type."""
        return self._left.pop(name, default)

    def integers(self, name: str) -> tuple[int, ...]:
        """Takes a list of integers, without duplicates."""
        values = self._take(name, (list,), "a list of whole numbers", [])
        for value in values:
            if not is_id(value):
                raise Refused(
                    f"`{name}` must be a list of whole numbers; it has {kind_of(value)}.",
                    name,
                )
        return tuple(dict.fromkeys(values))

    def stops(self) -> tuple[str, ...]:
        """Takes the stop strings."""
        kinds = (str, list)
        stops = self._take("stop", kinds, "a string or a list of strings", [])
        if isinstance(stops, str):
            # Some clients send an empty string for an empty form field.
            stops = [stops] if stops else []
        if not all(isinstance(stop, str) and stop for stop in stops):
            raise Refused("`stop` must only hold strings that are not empty.", "stop")
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
        """Takes how many alternatives to report per token; None if no scores are requested."""
        name = "top_logprobs" if is_chat else "logprobs"
        # In completions the field is a number, but some clients send false as in chats.
        asked = self._left.get("logprobs", False) is not False
        if is_chat or not asked:
            asked = self.switch("logprobs")
        count = self.integer(name, 0)
        if count and not asked:
            raise Refused("`top_logprobs` must come with `logprobs` true.", name)
        if not 0 <= count <= MOST_ALTERNATIVES:
            raise Refused(
                f"`{name}` must be between 0 and {MOST_ALTERNATIVES}; got {count}.",
                name,
            )
        return count if asked else None

    def includes_usage(self, *, stream: bool) -> bool:
        """Takes the options of a stream; returns whether it ends with the token counts."""
        options = self.members("stream_options")
        if options and not stream:
            raise Refused(
                "`stream_options` must come with `stream` true.",
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
        """Raises for the fields that were not taken, unless they change nothing."""
        for name, value in self._left.items():
            if name in _WITHOUT_EFFECT:
                continue
            if name not in _NOT_SERVED:
                raise Refused(f"`{name:.60}` is not a field of this API.", name[:60])
            # Compare the types as well: to Python, 0 equals False and 1 equals True.
            if not any(
                type(value) is type(neutral) and value == neutral
                for neutral in _NOT_SERVED[name]
            ):
                raise Refused(f"`{name}` is not supported; leave it out.", name)


def kind_of(value: Any) -> str:
    """Returns the JSON type of a value, for a message."""
    if value is None:
        return "null"
    kinds = {bool: "a boolean", str: "a string", list: "a list", dict: "an object"}
    return kinds.get(type(value), "a number")


def is_id(value: Any) -> bool:
    """Returns whether a value is an integer and not a boolean."""
    return isinstance(value, int) and not isinstance(value, bool)
