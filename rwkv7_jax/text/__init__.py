"""Tokenizers, detokenizers and chat templates."""

from rwkv7_jax.text.chat_template import THINK_MODES, Message, write_conversation
from rwkv7_jax.text.detokenizer import (
    StreamingDetokenizer,
    Vocabulary,
    check_stop_strings,
    spell,
    whole_tokens,
)
from rwkv7_jax.text.jinja_template import chat_template_jinja
from rwkv7_jax.text.tokenizer import END_OF_TEXT, Tokenizer
from rwkv7_jax.text.vocabularies import load_vocabulary
from rwkv7_jax.text.vocabulary_file import format_vocabulary, parse_vocabulary

__all__ = [
    "END_OF_TEXT",
    "THINK_MODES",
    "Message",
    "StreamingDetokenizer",
    "Tokenizer",
    "Vocabulary",
    "chat_template_jinja",
    "check_stop_strings",
    "format_vocabulary",
    "load_vocabulary",
    "parse_vocabulary",
    "spell",
    "whole_tokens",
    "write_conversation",
]
