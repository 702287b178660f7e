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

from rwkv7_jax.serving.chats import Chat, read_chat
from rwkv7_jax.serving.fields import TOO_LONG, Fields, Refused, is_id, kind_of
from rwkv7_jax.serving.requests import Request
from rwkv7_jax.text.chat_template import CHAT_STOP
from rwkv7_jax.text.tokenizer import Tokenizer

# What every model may be called, besides its name.
ANY_MODEL = "rwkv"

# Tokens that continue a text, where the client does not say.
_LENGTH = 256


@dataclasses.dataclass(frozen=True)
class Served:
    """What a server offers.

    Attributes:
        name: of the model.
        states: names of the start states.
        tokenizer: of the model.
        most_bytes: of a prompt; a longer one cannot be as few ids as a prompt may have.
        longest_answer: new ids of an answer at most.
        most_answers: of one call.
        started: seconds since 1970.
    """

    name: str
    states: Sequence[str]
    tokenizer: Tokenizer
    most_bytes: int
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
        chat: that is to go on; None where a text is.
        stream: whether it is sent as it is made.
        include_usage: whether a stream ends with the numbers of tokens.
        model: as the client named it.
        id: of the answer.
        created: seconds since 1970.
    """

    requests: tuple[Request, ...]
    per_prompt: int
    chat: Chat | None
    stream: bool
    include_usage: bool
    model: str
    id: str
    created: int


def read_call(body: Any, served: Served, *, is_chat: bool) -> Call:
    """Reads the body of a call.

    Raises:
        Refused: a field that is unknown, is not served, or has a value of another kind. Ranges are
            the engine's to check.
    """
    if not isinstance(body, dict):
        raise Refused(f"the body must be an object; got {kind_of(body)}.")
    fields = Fields(body)
    model = fields.text("model", served.name)
    state = named_state(fields.text("state", None), model, served)
    chat = None
    stops = fields.stops()
    if is_chat:
        chat = read_chat(fields)
        per_prompt = fields.answers(1, served.most_answers)
        prompts = [_encode(chat.parts, served, "messages")]
        stops = (*stops, CHAT_STOP)
    else:
        texts = _listed(fields.take("prompt"))
        # Before they are encoded: a body has room for millions of short ones.
        per_prompt = fields.answers(len(texts), served.most_answers)
        prompts = [_text_prompt(text, served) for text in texts]
    # A message ends by itself; a text may go on for ever.
    usual = min(_LENGTH, served.longest_answer)
    first = Request(
        prompt=(),
        state=state,
        tokens=fields.length(served.longest_answer if is_chat else usual),
        seed=fields.seed(),
        temperature=fields.number("temperature", 1.0),
        top_p=fields.number("top_p", 1.0),
        top_k=fields.top_k(),
        presence_penalty=fields.number("presence_penalty", 0.0),
        frequency_penalty=fields.number("frequency_penalty", 0.0),
        penalty_decay=fields.number("penalty_decay", 0.996),
        stop_ids=fields.integers("stop_token_ids"),
        stop_strings=stops,
        alternatives=fields.alternatives(is_chat=is_chat),
        is_message=is_chat,
    )
    requests = []
    for prompt in prompts:
        # One for all answers: a copy for each would be thousands of long ones.
        shared = dataclasses.replace(first, prompt=tuple(prompt))
        for answer in range(per_prompt):
            requests.append(dataclasses.replace(shared, seed=first.seed + answer))
    stream = fields.switch("stream")
    call = Call(
        requests=tuple(requests),
        per_prompt=per_prompt,
        chat=chat,
        stream=stream,
        include_usage=fields.includes_usage(stream=stream),
        model=model or served.name,
        id=("chatcmpl-" if is_chat else "cmpl-") + secrets.token_hex(12),
        created=int(time.time()),
    )
    fields.refuse_others()
    return call


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


def _listed(prompt: Any) -> list[Any]:
    """Returns prompts as a list: there may be one, which may be a list of ids itself."""
    is_list = isinstance(prompt, list) and prompt and not is_id(prompt[0])
    return prompt if is_list else [prompt]


def _text_prompt(prompt: Any, served: Served) -> Sequence[int]:
    """Reads a text or a list of ids; an empty text becomes the id that ends documents."""
    if isinstance(prompt, str):
        return _encode([prompt], served, "prompt") or served.tokenizer.stop_ids
    if not isinstance(prompt, list) or not all(map(is_id, prompt)):
        raise Refused(
            "`prompt` must be a text, a list of ids, or a list of such prompts.",
            "prompt",
        )
    return prompt


def _encode(parts: Sequence[str], served: Served, field: str) -> list[int]:
    """Encodes the parts of a prompt, each by itself.

    Raises:
        Refused: they are no text, or so long that encoding them would be in vain.
    """
    try:
        texts = [part.encode() for part in parts]
    except UnicodeEncodeError:
        raise Refused(f"`{field}` has a lone surrogate.", field) from None
    size = sum(map(len, texts))
    if size > served.most_bytes:
        raise Refused(
            f"`{field}` must have at most {served.most_bytes:,} bytes, and fewer where its tokens "
            f"are short; got {size:,}.",
            field,
            code=TOO_LONG,
        )
    return [id for text in texts for id in served.tokenizer.encode(text)]
