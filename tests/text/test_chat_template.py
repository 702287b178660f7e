"""World's chat template: the same text in training data and at the prompt."""

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
