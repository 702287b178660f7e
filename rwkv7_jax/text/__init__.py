"""Strings and bytes to token ids and back, at once or as a stream. Imports nothing of ours."""

from rwkv7_jax.text.detokenizer import (
    StreamingDetokenizer,
    Vocabulary,
    check_stop_strings,
    whole_tokens,
)
from rwkv7_jax.text.tokenizer import END_OF_TEXT, Tokenizer, parse_vocabulary

__all__ = [
    "END_OF_TEXT",
    "StreamingDetokenizer",
    "Tokenizer",
    "Vocabulary",
    "check_stop_strings",
    "parse_vocabulary",
    "whole_tokens",
]
