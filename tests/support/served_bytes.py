"""A server of bytes that has no engine, for requests and answers that are only read."""

from rwkv7_jax.serving.protocol import Served
from rwkv7_jax.text.tokenizer import Tokenizer

BYTES = Tokenizer.bytes()

SERVED = Served(
    name="base",
    states=("poet", "a.b-c"),
    tokenizer=BYTES,
    most_bytes=1000,
    longest_answer=500,
    most_answers=6,
)
