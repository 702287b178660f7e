"""World's chat template: the same text in training data and at the prompt."""

import pytest

from rwkv7_jax.data.jsonl import conversation
from rwkv7_jax.text.chat_template import CHAT_STOP, chat_prompt


def test_a_prompt_is_what_stands_before_an_answer_in_training_data():
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
    ]
    document = conversation(messages)
    prompt, answer = (segment.text for segment in document.segments)
    assert chat_prompt(b" Hi\n") == prompt == b"User: Hi\n\nAssistant:"
    assert answer == b" Hello."


def test_generation_stops_where_training_data_has_the_next_question():
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "I."},
    ]
    document = conversation(messages)
    following = document.segments[2].text
    assert following.startswith(CHAT_STOP.encode())


def test_a_prompt_may_hold_any_bytes():
    assert chat_prompt(b"\xff\xfe") == b"User: \xff\xfe\n\nAssistant:"


@pytest.mark.parametrize(
    "message",
    [
        "a\n\nb",
        "a\r\n\r\nb\r\n",
        "a \n \t\n\n b",
        "\n\na\n",
        "a\nb",
        "\u3000a\u2003\n\u00a0\nb\u3000",
        "1.\n\n2.\n\n\n\n3.",
        "",
    ],
)
def test_a_message_is_cleaned_as_tuning_data_are(message):
    turns = [
        {"role": "user", "content": message},
        {"role": "assistant", "content": "x"},
    ]
    prompt, _ = (segment.text for segment in conversation(turns).segments)
    assert chat_prompt(message.encode()) == prompt
