"""Small bodies that could cost much: what their requests share, and what is rejected early."""

import dataclasses

import pytest
from served_bytes import SERVED

from rwkv7_jax.serving.fields import Refused
from rwkv7_jax.serving.protocol import read_call
from rwkv7_jax.serving.requests import Request
from rwkv7_jax.serving.slots import Drawn


def text_call(**fields):
    return read_call({"prompt": "hi"} | fields, SERVED, is_chat=False)


def test_answers_to_a_prompt_share_its_ids():
    call = text_call(prompt=[[1, 2, 3], [4]], n=3)
    prompts = [request.prompt for request in call.requests]
    assert prompts == [(1, 2, 3)] * 3 + [(4,)] * 3
    assert len({id(prompt) for prompt in prompts}) == 2
    assert len({request.seed for request in call.requests[:3]}) == 3


def test_too_many_prompts_are_rejected_before_one_is_encoded():
    with pytest.raises(Refused, match="`n` times the number of prompts"):
        text_call(prompt=["\ud800"] * 7)
    with pytest.raises(Refused, match="`n` times the number of prompts"):
        text_call(prompt="\ud800", n=7)


def test_too_many_answers_to_a_chat_are_rejected_before_it_is_encoded():
    served = dataclasses.replace(SERVED, most_bytes=0)
    messages = [{"role": "user", "content": "hi"}]
    with pytest.raises(Refused, match="`n` times the number of prompts"):
        read_call({"messages": messages, "n": 7}, served, is_chat=True)


def test_a_stop_string_has_a_maximum_length():
    assert text_call(stop=["a" * 1024]).requests[0].stop_strings == ("a" * 1024,)
    with pytest.raises(
        Refused,
        match="`stop` must hold strings of at most 1,024 characters; got one of 1,025",
    ):
        text_call(stop=["b", "a" * 1025])


def test_stop_ids_count_once():
    call = text_call(stop_token_ids=[5, 3, 5, 3] * 1000)
    assert call.requests[0].stop_ids == (5, 3)


class Compared(int):
    """A number that counts how often it is compared."""

    comparisons = 0

    def __eq__(self, other):
        Compared.comparisons += 1
        return int(self) == other

    def __hash__(self):
        return int(self)


def test_sampled_ids_are_not_compared_with_every_stop_id(engine):
    ids = tuple(Compared(number) for number in range(1, 250))
    ticket = engine.submit(
        Request((1,), stop_ids=ids),
        on_piece=lambda piece: None,
        on_end=lambda answer: None,
    )
    Compared.comparisons = 0
    drawn = Drawn([251, 252, 249, 250], stopped=False, broken=False, scores=[])
    assert ticket.append(drawn) == "stop_id"
    assert ticket.row.tokens == [251, 252]
    assert Compared.comparisons < 5


class Id(str):
    """An id that counts how often it is compared."""

    comparisons = 0

    def __eq__(self, other):
        Id.comparisons += 1
        return str.__eq__(self, other)

    __hash__ = str.__hash__


def test_outputs_of_functions_are_not_compared_with_every_call():
    calls = []
    outputs = []
    for number in range(200):
        function = {"name": "f", "arguments": "{}"}
        calls.append({"id": Id(number), "function": function})
        output = {"role": "tool", "content": "o", "tool_call_id": Id(199 - number)}
        outputs.append(output)
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "tool_calls": calls},
        *outputs,
    ]
    served = dataclasses.replace(SERVED, most_bytes=10**6)
    read_call({"messages": messages}, served, is_chat=True)
    assert Id.comparisons < 1000


@pytest.mark.parametrize("id", [["a"], {"a": 1}, 3, True])
def test_an_id_that_is_not_a_string_is_rejected_by_name(id):
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f"}}]},
        {"role": "tool", "content": "o", "tool_call_id": id},
    ]
    with pytest.raises(Refused, match='"tool_call_id" must be that of a call'):
        read_call({"messages": messages}, SERVED, is_chat=True)
