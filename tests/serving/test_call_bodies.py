"""Bodies of requests: long ones, slow ones, and many at once."""

import asyncio

import pytest

pytest.importorskip("starlette", reason="the extra server is not installed")

from rwkv7_jax.serving import call_bodies
from rwkv7_jax.serving.fields import Refused


class Sent:
    """A request whose body arrives in parts; with `stays` the body never ends."""

    def __init__(self, *parts, stays=False):
        self.parts = parts
        self.stays = stays

    async def stream(self):
        for part in self.parts:
            yield part
        if self.stays:
            await asyncio.Event().wait()


async def read(bodies, *parts, stays=False):
    async with bodies.read(Sent(*parts, stays=stays)) as body:
        return body


def test_a_body_is_read_completely():
    bodies = call_bodies.CallBodies(lambda: True)
    assert asyncio.run(read(bodies, b"a", b"", b"bc")) == b"abc"
    assert asyncio.run(read(bodies)) == b""


def test_a_body_has_a_maximum_of_bytes(monkeypatch):
    monkeypatch.setattr(call_bodies, "MOST_BYTES", 4)
    bodies = call_bodies.CallBodies(lambda: True)
    assert asyncio.run(read(bodies, b"ab", b"cd")) == b"abcd"
    with pytest.raises(Refused, match="the body must have at most 4 bytes") as refused:
        asyncio.run(read(bodies, b"ab", b"cde", stays=True))
    assert refused.value.status == 413


def test_a_body_that_does_not_end_is_rejected(monkeypatch):
    monkeypatch.setattr(call_bodies, "_SECONDS", 0.05)
    bodies = call_bodies.CallBodies(lambda: True)
    with pytest.raises(Refused, match="must be complete within") as slow:
        asyncio.run(read(bodies, b"a", stays=True))
    assert slow.value.status == 408


def test_parsing_a_complete_body_has_no_time_limit(monkeypatch):
    monkeypatch.setattr(call_bodies, "_SECONDS", 0.05)

    async def parse():
        async with call_bodies.CallBodies(lambda: True).read(Sent(b"a")) as body:
            await asyncio.sleep(0.2)
            return body

    assert asyncio.run(parse()) == b"a"


def test_long_bodies_are_rejected_while_many_others_are_held(monkeypatch):
    monkeypatch.setattr(call_bodies, "_MOST_HELD", 100)
    monkeypatch.setattr(call_bodies, "_FEW_BYTES", 10)

    async def ask():
        bodies = call_bodies.CallBodies(lambda: True)
        others = [
            asyncio.create_task(read(bodies, b"a" * 50, stays=True)) for _ in range(2)
        ]
        await asyncio.sleep(0.01)
        with pytest.raises(Refused, match="too many long bodies") as busy:
            await read(bodies, b"b" * 20)
        assert busy.value.status == 429
        # Those who ask for little are answered.
        assert await read(bodies, b"b" * 5) == b"b" * 5
        for other in others:
            other.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        # What was refused, or whose client has left, is no longer there.
        assert await read(bodies, b"b" * 90) == b"b" * 90

    asyncio.run(ask())


def test_few_bodies_are_parsed_at_once(monkeypatch):
    monkeypatch.setattr(call_bodies, "_MOST_PARSED", 2)
    parsing = []
    most = []

    async def parse(bodies):
        async with bodies.read(Sent(b"a")):
            parsing.append(1)
            most.append(len(parsing))
            await asyncio.sleep(0.01)
            parsing.pop()

    async def ask():
        bodies = call_bodies.CallBodies(lambda: True)
        await asyncio.gather(*[parse(bodies) for _ in range(9)])

    asyncio.run(ask())
    assert max(most) == 2
