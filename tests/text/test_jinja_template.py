"""The chat template in Jinja writes what training data have."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv7_jax.data.jsonl import conversation
from rwkv7_jax.text.jinja_template import chat_template_jinja


@pytest.fixture(scope="module")
def rendered():
    """`rendered(messages, ...)` is what a program that renders Jinja makes of a conversation."""
    jinja2 = pytest.importorskip("jinja2", reason="the package jinja2 is not installed")
    # As transformers sets it up.
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)

    def refuse(sentence):
        raise ValueError(sentence)

    environment.globals["raise_exception"] = refuse
    return environment.from_string(chat_template_jinja()).render


@settings(max_examples=200, deadline=None)
@given(
    questions=st.lists(
        st.text(alphabet="ab \t\n\r\u00a0\u2003", min_size=1), min_size=1, max_size=3
    )
)
def test_the_jinja_template_writes_training_data(rendered, questions):
    messages = [{"role": "system", "content": "s"}]
    for question in questions:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": "x"})
    texts = [segment.text for segment in conversation(messages).segments]
    assert rendered(messages=messages).encode() == b"".join(texts)
    prompt = rendered(messages=messages[:-1], add_generation_prompt=True)
    assert prompt.encode() == b"".join(texts[:-1])


def test_the_jinja_template_refuses_a_role_that_training_data_do_not_have(rendered):
    with pytest.raises(ValueError, match=r"a role must be one of .*; got tool"):
        rendered(messages=[{"role": "tool", "content": "1"}])
