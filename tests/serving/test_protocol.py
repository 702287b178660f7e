"""Bodies of OpenAI's interface: what is read, and what is rejected by name."""

import dataclasses

import pytest
from served_bytes import BYTES, SERVED

from rwkv7_jax.serving.fields import Refused
from rwkv7_jax.serving.protocol import read_call
from rwkv7_jax.text.chat_template import CHAT_STOP
from rwkv7_jax.text.tokenizer import Tokenizer

HI = [{"role": "user", "content": "hi"}]


def text_call(**fields):
    return read_call({"prompt": "hi"} | fields, SERVED, is_chat=False)


def chat_call(**fields):
    return read_call({"messages": HI} | fields, SERVED, is_chat=True)


def prompt_of(call):
    return BYTES.decode(list(call.requests[0].prompt))


def test_every_field_reaches_the_request():
    call = text_call(
        max_tokens=7,
        temperature=0,
        top_p=0.5,
        top_k=3,
        presence_penalty=1,
        frequency_penalty=0.25,
        penalty_decay=0.9,
        seed=5,
        stop=["a", "b"],
        stop_token_ids=[3, 4],
        state="poet",
        stream=True,
        stream_options={"include_usage": True},
        user="somebody",
        n=1,
        logprobs=None,
    )
    request = call.requests[0]
    assert (request.tokens, request.temperature, request.top_p) == (7, 0.0, 0.5)
    assert (request.top_k, request.presence_penalty) == (3, 1.0)
    assert (request.frequency_penalty, request.penalty_decay) == (0.25, 0.9)
    assert (request.seed, request.stop_strings) == (5, ("a", "b"))
    assert (request.stop_ids, request.state) == ((3, 4), "poet")
    assert call.stream and call.include_usage and call.chat is None


def test_a_request_without_fields_has_a_new_seed_each_time():
    calls = [text_call() for _ in range(8)]
    assert len({call.requests[0].seed for call in calls}) > 1
    assert len({call.id for call in calls}) == 8
    request = calls[0].requests[0]
    assert (request.temperature, request.top_p, request.tokens) == (1.0, 1.0, 256)
    assert request.state is None and not calls[0].stream
    # A message ends by itself.
    assert chat_call().requests[0].tokens == 500
    short = dataclasses.replace(SERVED, longest_answer=9)
    assert read_call({"prompt": "hi"}, short, is_chat=False).requests[0].tokens == 9


@pytest.mark.parametrize(
    ("model", "state", "found"),
    [
        ("base", None, None),
        ("rwkv", "poet", "poet"),
        ("base:poet", None, "poet"),
        ("rwkv:a.b-c", None, "a.b-c"),
        ("base:poet", "poet", "poet"),
    ],
)
def test_a_state_is_named_alone_or_after_the_model(model, state, found):
    assert text_call(model=model, state=state).requests[0].state == found
    assert chat_call(model=model, state=state).model == model


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"model": "gpt-4"}, "model", "model_not_found"),
        ({"model": "poet"}, "model", "model_not_found"),
        ({"model": "base:"}, "model", "state_not_found"),
        ({"model": "base:nobody"}, "model", "state_not_found"),
        ({"state": "nobody"}, "state", "state_not_found"),
        ({"state": ""}, "state", "state_not_found"),
        ({"state": "/etc/passwd"}, "state", "state_not_found"),
        ({"state": "../poet.pth"}, "state", "state_not_found"),
    ],
)
def test_an_unknown_model_name_is_not_found(fields, param, code):
    for call in (text_call, chat_call):
        with pytest.raises(Refused) as refused:
            call(**fields)
        error = refused.value
        assert (error.status, error.param, error.code) == (404, param, code)
        assert "poet" in error.message


def test_a_conversation_is_written_as_in_tuning():
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c\n\nd"},
    ]
    call = chat_call(messages=messages, stop="x", max_completion_tokens=9)
    assert prompt_of(call) == (
        "System: Be brief.\n\nUser: a\n\nAssistant: b\n\nUser: c\nd\n\nAssistant:"
    )
    assert call.requests[0].stop_strings == ("x", CHAT_STOP)
    assert call.requests[0].tokens == 9
    # In World "." and what follows may be one token: a part has its own ids.
    world = dataclasses.replace(SERVED, tokenizer=Tokenizer.world())
    ids = [
        read_call({"messages": turns}, world, is_chat=True).requests[0].prompt
        for turns in (messages[:2], messages)
    ]
    assert ids[1][: len(ids[0])] == ids[0]
    silent = [{"role": "system", "content": ""}, *HI]
    assert prompt_of(chat_call(messages=silent)) == prompt_of(chat_call())
    thinking = chat_call(think="medium")
    assert prompt_of(thinking) == "User: hi (think)\n\nAssistant: <think"
    assert thinking.chat.opening == " <think"


def test_a_prompt_is_text_or_ids_and_an_empty_one_starts_a_document():
    assert text_call(prompt=[5, 6]).requests[0].prompt == (5, 6)
    assert text_call(prompt=[[5, 6]]).requests[0].prompt == (5, 6)
    assert prompt_of(text_call(prompt=["ab"])) == "ab"
    assert text_call(prompt="").requests[0].prompt == tuple(BYTES.stop_ids)
    assert prompt_of(text_call(prompt="\u00e4\U0001f600")) == "\u00e4\U0001f600"


def test_each_prompt_has_n_answers_with_consecutive_seeds():
    call = text_call(prompt=["a", [5, 6]], n=3, seed=7)
    found = [(request.prompt, request.seed) for request in call.requests]
    seeds = (7, 8, 9)
    expected = [(BYTES.encode(b"a"), seed) for seed in seeds]
    assert found == [(tuple(ids), seed) for ids, seed in expected] + [
        ((5, 6), seed) for seed in seeds
    ]
    assert call.per_prompt == 3
    one = text_call(n=1, seed=7)
    assert len(one.requests) == 1 and one.requests[0].seed == 7
    assert len(chat_call(n=2).requests) == 2


def test_fields_with_null_like_values_change_nothing():
    nothing = {
        "max_tokens": 20,
        "max_completion_tokens": 20,
        "seed": -1,
        "top_k": -1,
        "stop": "",
        "stream": True,
        "stream_options": {"include_usage": None},
        "tools": [],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "modalities": ["text"],
        "min_p": 0,
        "repetition_penalty": 1.0,
        "prompt_cache_key": "x",
        "n": None,
    }
    plain = text_call(max_tokens=20, seed=0).requests[0]
    call = text_call(**nothing)
    assert dataclasses.replace(call.requests[0], seed=0) == plain
    assert not call.include_usage
    seeds = {text_call(seed=-1).requests[0].seed for _ in range(8)}
    assert len(seeds) > 1


@pytest.mark.parametrize(
    ("is_chat", "fields", "alternatives"),
    [
        (False, {}, None),
        (False, {"logprobs": None}, None),
        (False, {"logprobs": False}, None),
        (False, {"logprobs": 0}, 0),
        (False, {"logprobs": 5}, 5),
        (True, {}, None),
        (True, {"logprobs": False, "top_logprobs": 0}, None),
        (True, {"logprobs": True}, 0),
        (True, {"logprobs": True, "top_logprobs": 20}, 20),
    ],
)
def test_scores_are_requested_by_the_fields_of_the_interface(
    is_chat, fields, alternatives
):
    call = (chat_call if is_chat else text_call)(**fields)
    assert call.requests[0].alternatives == alternatives


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"prompt": ["a", 1]}, "`prompt` must be a text, a list of ids, or a list"),
        ({"prompt": [["a"]]}, "`prompt` must be a text, a list of ids, or a list"),
        ({"prompt": [None]}, "`prompt` must be a text, a list of ids, or a list"),
        ({"prompt": 3}, "`prompt` must be a text"),
        ({"prompt": [True]}, "`prompt` must be a text"),
        ({"prompt": None}, "`prompt` must be given."),
        ({"prompt": "\ud800"}, "`prompt` has a lone surrogate"),
        ({"model": 3}, "`model` must be a string; got a number."),
        ({"state": ["poet"]}, "`state` must be a string; got a list."),
        ({"temperature": "1"}, "`temperature` must be a number; got a string."),
        ({"temperature": True}, "`temperature` must be a number; got a boolean."),
        ({"max_tokens": 1.5}, "`max_tokens` must be a whole number; got a number."),
        ({"seed": {}}, "`seed` must be a whole number; got an object."),
        ({"stream": 1}, "`stream` must be true or false; got a number."),
        ({"stop": [""]}, "`stop` must only hold strings"),
        ({"stop": [3]}, "`stop` must only hold strings"),
        ({"stop": ["a"] * 9}, "`stop` must hold at most 8 strings; got 9."),
        ({"stop_token_ids": [1.0]}, "`stop_token_ids` must be a list of whole numbers"),
        ({"stream_options": []}, "`stream_options` must be an object; got a list."),
        (
            {"stream": True, "stream_options": {"x": True}},
            "`stream_options.x` must be one of",
        ),
        (
            {"stream": True, "stream_options": {"include_usage": 1}},
            "`stream_options.include_usage`",
        ),
        ({"n": 0}, "`n` must be at least 1; got 0."),
        ({"n": True}, "`n` must be a whole number"),
        ({"n": 7}, "`n` times the number of prompts must be at most 6"),
        ({"n": 3, "prompt": ["a", "b", "c"]}, "must be at most 6"),
        ({"logprobs": True}, "`logprobs` must be a whole number; got a boolean."),
        ({"logprobs": 21}, "`logprobs` must be between 0 and 20; got 21."),
        ({"logprobs": -1}, "`logprobs` must be between 0 and 20; got -1."),
        ({"top_logprobs": 2}, "`top_logprobs` is not a field of this API."),
        ({"temperature": 10**400}, "`temperature` must be a number below"),
        ({"stream_options": {"include_usage": True}}, "must come with `stream` true"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "got 3 and 4."),
        ({"prompt": "a" * 1001}, "at most 1,000 bytes"),
        ({"tool_choice": "required"}, "`tool_choice` is not supported"),
        ({"min_p": 0.1}, "`min_p` is not supported"),
        ({"ignore_eos": 0}, "`ignore_eos` is not supported"),
        ({"logit_bias": {"5": 1}}, "`logit_bias` is not supported"),
        ({"echo": True}, "`echo` is not supported"),
        ({"tools": [{}]}, "`tools` is not supported"),
        ({"temprature": 1}, "`temprature` is not a field of this API."),
        ({"messages": HI}, "`messages` is not a field"),
        (
            {"model": "base:poet", "state": "a.b-c"},
            "`state` must be the state in `model`",
        ),
    ],
)
def test_an_invalid_field_is_rejected_by_name(fields, sentence):
    with pytest.raises(Refused) as refused:
        text_call(**fields)
    error = refused.value
    assert sentence in error.message
    assert error.param in (*fields, "prompt") and error.status == 400
    assert error.body()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"messages": []}, "`messages` must be a list of messages."),
        ({"messages": "hi"}, "`messages` must be a list of messages."),
        ({"messages": None}, "`messages` must be given."),
        ({"messages": ["hi"]}, "`messages`: message 1: must be an object"),
        ({"messages": [{"role": "poet", "content": ""}]}, "message 1: role must be"),
        ({"messages": [{"role": "user", "content": 3}]}, "message 1:"),
        (
            {"messages": [*HI, {"role": "assistant", "content": "a"}]},
            "`messages` must end with a message for the assistant to answer.",
        ),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "lone surrogate"),
        ({"messages": [{"role": "x" * 9999, "content": ""}]}, "message 1: role must"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"name": "\ud800"}]}]},
            "`messages`",
        ),
        ({"logprobs": 5}, "`logprobs` must be true or false; got a number."),
        ({"logprobs": True, "top_logprobs": 21}, "`top_logprobs` must be between 0"),
        ({"top_logprobs": 1}, "`top_logprobs` must come with `logprobs` true."),
        ({"think": "deep"}, "`think` must be one of off, fast"),
        ({"prompt": "hi"}, "`prompt` is not a field"),
    ],
)
def test_an_invalid_conversation_is_rejected(fields, sentence):
    with pytest.raises(Refused, match=r".") as refused:
        chat_call(**fields)
    assert sentence in refused.value.message
    assert len(refused.value.message) < 300
