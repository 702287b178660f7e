"""Request bodies of OpenAI's API, parsed to requests for the engine; no network.

Fields that change nothing here are ignored. Other unknown or unsupported fields are rejected,
because a client could not see from the answer that its field was ignored.

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

# A name that every model has besides its own.
ANY_MODEL = "rwkv"

# The default limit on new tokens of a completion.
_LENGTH = 256


@dataclasses.dataclass(frozen=True)
class Served:
    """What a server offers.

    Attributes:
        name: the name of the model.
        states: the names of the start states.
        tokenizer: the tokenizer of the model.
        most_bytes: the maximum size of a prompt; a larger one has too many tokens in any case.
        longest_answer: the maximum number of new tokens.
        most_answers: the maximum number of answers to one call.
        started: the start time in seconds since 1970.
    """

    name: str
    states: Sequence[str]
    tokenizer: Tokenizer
    most_bytes: int
    longest_answer: int
    most_answers: int
    started: int = 0

    def models(self) -> list[str]:
        """Returns the model names that a call may give: the base, and the base with each state."""
        return [self.name, *(f"{self.name}:{state}" for state in self.states)]


@dataclasses.dataclass(frozen=True)
class Call:
    """A parsed body.

    Attributes:
        requests: the requests for the engine, one per answer, grouped by prompt.
        per_prompt: the number of answers per prompt.
        chat: the conversation to continue; None for a completion.
        stream: whether to stream the answers.
        include_usage: whether a stream ends with the token counts.
        model: the model name that the client gave.
        id: the id of the response.
        created: the time of the call in seconds since 1970.
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
    """Parses the body of a call.

    Raises:
        Refused: a field is unknown or unsupported, or its value has the wrong type. The engine
            checks the ranges of values.
    """
    if not isinstance(body, dict):
        raise Refused(f"the body must be an object; got {kind_of(body)}.")
    fields = Fields(body)
    model = fields.text("model", served.name)
    state = named_state(fields.text("state", None), model, served)
    stops = fields.stops()
    chat = read_chat(fields) if is_chat else None
    if chat:
        per_prompt = fields.answers(1, served.most_answers)
        prompts = [_encode(chat.parts, served, "messages")]
        stops = (*stops, CHAT_STOP)
    else:
        texts = _listed(fields.take("prompt"))
        # Check the number before encoding: a body may hold millions of short prompts.
        per_prompt = fields.answers(len(texts), served.most_answers)
        prompts = [_text_prompt(text, served) for text in texts]
    # A message ends by itself; a completion may never end.
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
        # All answers share one tuple: thousands of copies of a long prompt would fill the memory.
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
        model=model,
        id=("chatcmpl-" if is_chat else "cmpl-") + secrets.token_hex(12),
        created=int(time.time()),
    )
    fields.refuse_others()
    return call


def named_state(state: str | None, model: str, served: Served) -> str | None:
    """Returns the state that a call names, in `state` or after a colon in `model`.

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
            f"`state` must be the state in `model`, {after!r}, or left out; got {state!r:.60}.",
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
    """Returns the prompts as a list; a single prompt may be a text or a list of ids."""
    is_list = isinstance(prompt, list) and prompt and not is_id(prompt[0])
    return prompt if is_list else [prompt]


def _text_prompt(prompt: Any, served: Served) -> Sequence[int]:
    """Encodes a text or returns a list of ids; an empty text becomes the end-of-document id."""
    if isinstance(prompt, str):
        return _encode([prompt], served, "prompt") or served.tokenizer.stop_ids
    if not isinstance(prompt, list) or not all(map(is_id, prompt)):
        raise Refused(
            "`prompt` must be a text, a list of ids, or a list of such prompts.",
            "prompt",
        )
    return prompt


def _encode(parts: Sequence[str], served: Served, field: str) -> list[int]:
    """Encodes the parts of a prompt, each separately.

    Raises:
        Refused: a part is not valid Unicode, or the prompt is certainly too long.
    """
    try:
        texts = [part.encode() for part in parts]
    except UnicodeEncodeError:
        raise Refused(f"`{field}` has a lone surrogate.", field) from None
    size = sum(map(len, texts))
    if size > served.most_bytes:
        raise Refused(
            f"`{field}` must have at most {served.most_bytes:,} bytes, and fewer if its tokens "
            f"are short; got {size:,}.",
            field,
            code=TOO_LONG,
        )
    return [id for text in texts for id in served.tokenizer.encode(text)]
