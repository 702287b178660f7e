"""Requests and their answers as data: no device, no network."""

import dataclasses
from typing import Literal, NamedTuple

Ending = Literal["stop_id", "stop_string", "length", "cancelled", "failed"]


# The maximum number of alternatives that a request may ask for per token.
MOST_ALTERNATIVES = 20


class TokenScore(NamedTuple):
    """The model's score of a token, before penalties, top-p, top-k and temperature.

    Attributes:
        id: the token id.
        logp: its log-probability.
        alternatives: the most probable ids with their log-probabilities, most probable first.
    """

    id: int
    logp: float
    alternatives: tuple[tuple[int, float], ...]


class Piece(NamedTuple):
    """The next part of an answer.

    Attributes:
        text: text that no stop string can cut any more.
        scores: the scores of tokens that no stop string can cut, if the request asks for scores.
            They may be ahead of the text, because a character may consist of several tokens.
    """

    text: str
    scores: tuple[TokenScore, ...] = ()


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt to continue.

    The tokens of the answer do not depend on concurrent requests.

    Attributes:
        prompt: the prompt tokens, at least one.
        state: the name of the start state; None for a model that has read nothing.
        tokens: the maximum number of new tokens, at least 1.
        seed: the seed of sampling.
        temperature: 0 for greedy decoding.
        top_p: the probability mass to keep.
        top_k: the number of tokens to keep; 0 for no limit.
        presence_penalty: subtracted from the logits of ids that were generated.
        frequency_penalty: subtracted once more for each time that an id was generated.
        penalty_decay: factor on the counts of generated ids at every token.
        stop_ids: ids that end the answer besides the vocabulary's end-of-text id.
        stop_strings: strings that end the answer and are not part of it.
        alternatives: the number of most probable ids to report per token; None for no scores.
        is_message: whether the answer is a chat message, which clients send back without the blanks
            at its end.
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
    alternatives: int | None = None
    is_message: bool = False


@dataclasses.dataclass(frozen=True)
class Answer:
    """The result of a request.

    Attributes:
        text: the answer; the part so far if the request was cancelled or failed.
        tokens: the ids of the answer.
        ended: how the answer ended.
        prompt_tokens: the number of prompt tokens.
        cached_tokens: how many prompt tokens were not read, because the cache held the state after
            them.
        scores: the scores of the tokens, without those that a stop string cut; empty unless the
            request asks for them.
        error: why the request failed, as one sentence; None unless it failed.
    """

    text: str
    tokens: tuple[int, ...]
    ended: Ending
    prompt_tokens: int
    cached_tokens: int = 0
    scores: tuple[TokenScore, ...] = ()
    error: str | None = None


class UnknownState(ValueError):
    """No start state has the name that a request gives."""


class TooLong(ValueError):
    """A prompt has too many tokens."""


class TooBusy(Exception):
    """The queue is full."""


class Closed(Exception):
    """The engine accepts no more requests."""
