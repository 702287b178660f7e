"""Streams whose text is held back."""

import asyncio

import pytest
from served_bytes import BYTES, SERVED

from rwkv7_jax.serving.answer_bodies import AnswerBodies
from rwkv7_jax.serving.protocol import read_call
from rwkv7_jax.serving.requests import Answer, Piece

pytest.importorskip("starlette", reason="the extra server is not installed")

from rwkv7_jax.serving import app as serving_app


def test_a_stream_sends_keep_alives_while_a_call_is_written(monkeypatch):
    monkeypatch.setattr(serving_app, "_QUIET_SECONDS", 0.05)
    messages = [{"role": "user", "content": "hi"}]
    body = {"messages": messages, "tools": [{"name": "f"}], "stream": True}
    call = read_call(body, SERVED, is_chat=True)
    text = '```json\n{"name":"f"}'

    async def lines():
        events = asyncio.Queue()

        async def speak():
            for character in text:
                await asyncio.sleep(0.02)
                events.put_nowait((0, Piece(character)))
            events.put_nowait((0, Answer(text, (1,), "stop_id", prompt_tokens=1)))

        speaker = asyncio.create_task(speak())
        stream = serving_app._stream(call, AnswerBodies(call, BYTES), events)
        found = [line async for line in stream]
        await speaker
        return found

    first, *middle, called, end, done = asyncio.run(lines())
    assert "assistant" in first and done == "data: [DONE]\n\n"
    assert len(middle) > 2 and set(middle) == {": waiting\n\n"}
    assert '"tool_calls": [{"index": 0' in called and "tool_calls" in end
