"""Requests and their answers as data: no device, no network."""

import dataclasses
from typing import Literal

Ending = Literal["stop_id", "stop_string", "length", "cancelled", "failed"]


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt to continue.

    The same request gives the same tokens, whatever else is served meanwhile.

    Attributes:
        prompt: ids that are read first, at least one.
        state: name of the start state; None is a model that has read nothing.
        tokens: new ids at most, at least 1.
        seed: of the draws.
        temperature: 0 takes the most probable token.
        top_p: probability mass to keep.
        top_k: tokens to keep; 0 for no limit.
        presence_penalty: subtracted from the logit of ids that were generated.
        frequency_penalty: subtracted once more for every time they were generated.
        penalty_decay: factor on those counts at every token.
        stop_ids: ids that end the answer besides the vocabulary's end of text.
        stop_strings: strings that end the answer; not part of it.
    """

    prompt: tuple[int, ...]
    state: str | None = None
    tokens: int = 256
    seed: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_decay: float = 0.996
    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Answer:
    """The result of a request.

    Attributes:
        text: the whole answer; of one that was cancelled or failed, what there was of it.
        tokens: its ids.
        ended: how it ended.
        prompt_tokens: ids of the prompt.
        cached_tokens: how many of them were not read again, since a cache held the state after
            them.
        error: what went wrong, one sentence; None unless it failed.
    """

    text: str
    tokens: tuple[int, ...]
    ended: Ending
    prompt_tokens: int
    cached_tokens: int = 0
    error: str | None = None


class UnknownState(ValueError):
    """No start state has the name that a request gave."""


class TooBusy(Exception):
    """More requests wait than may."""
