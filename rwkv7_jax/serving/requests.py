"""Requests and their answers as data: no device, no network."""

import dataclasses
from typing import Literal, NamedTuple

Ending = Literal["stop_id", "stop_string", "length", "cancelled", "failed"]


# Most probable ids that a request may ask for beside each token.
MOST_ALTERNATIVES = 20


class TokenScore(NamedTuple):
    """What the model says of a token: before penalties, cutoffs and temperature.

    Attributes:
        id: of the token.
        logp: its log-probability.
        alternatives: the most probable ids and their log-probabilities, best first.
    """

    id: int
    logp: float
    alternatives: tuple[tuple[int, float], ...]


class Piece(NamedTuple):
    """The next part of an answer.

    Attributes:
        text: that no stop string can cut any more.
        scores: of tokens that are certain, if the request asks for them. They may be ahead of the
            text: a character can be several tokens.
    """

    text: str
    scores: tuple[TokenScore, ...] = ()


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
        alternatives: most probable ids to report beside each token; None reports no token's score.
        is_message: whether the answer is one of a chat, which comes back without blanks at its end.
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
        text: the whole answer; of one that was cancelled or failed, what there was of it.
        tokens: its ids.
        ended: how it ended.
        prompt_tokens: ids of the prompt.
        cached_tokens: how many of them were not read again, since a cache held the state after
            them.
        scores: of the tokens, if the request asks for them; none of a token that a stop string cut.
        error: what went wrong, one sentence; None unless it failed.
    """

    text: str
    tokens: tuple[int, ...]
    ended: Ending
    prompt_tokens: int
    cached_tokens: int = 0
    scores: tuple[TokenScore, ...] = ()
    error: str | None = None


class UnknownState(ValueError):
    """No start state has the name that a request gave."""


class TooLong(ValueError):
    """A prompt has more ids than one may have."""


class TooBusy(Exception):
    """More requests wait than may."""


class Closed(Exception):
    """The engine takes no more requests."""
