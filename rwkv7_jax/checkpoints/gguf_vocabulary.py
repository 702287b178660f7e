"""The vocabulary of a GGUF file, as llama.cpp's `rwkv` tokenizer stores it: escaped ASCII.

Needs the package `gguf`, as `gguf_files` does.
Source: ggml-org/llama.cpp conversion/base.py, `_set_vocab_rwkv_world` (writing);
src/llama-vocab.cpp, `llama_unescape_rwkv_token` (reading).
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf

from rwkv7_jax.text.id_tokenizer import IdTokenizer
from rwkv7_jax.text.jinja_template import chat_template_jinja
from rwkv7_jax.text.json_tokenizer import JsonTokenizer
from rwkv7_jax.text.tokenizer import END_OF_TEXT, Tokenizer
from rwkv7_jax.text.vocabularies import for_model, vocabulary_of_entries
from rwkv7_jax.text.vocabulary_entries import (
    END_OF_TEXT_NAME,
    fitting_vocabulary,
    vocabulary_entries,
)

_KIND = "rwkv"

# In llama.cpp's converter a blank line ends a turn of a conversation.
_END_OF_TURN = b"\n\n"

_ESCAPE = re.compile(rb"\\(x[0-9a-fA-F]{2}|.)", re.DOTALL)

_ESCAPED = {b"t": b"\t", b"n": b"\n", b"r": b"\r"}


def metadata(reader: gguf.GGUFReader, key: str) -> Any:
    """Returns the value of a metadata key, or None if the file lacks it."""
    field = reader.get_field(key)
    return None if field is None else field.contents()


def writable_entries(tokenizer: Tokenizer | None, vocab_size: int) -> dict[int, bytes]:
    """Returns the bytes of every id; llama.cpp uses greedy longest match, as this package does.

    Raises:
        ValueError: no vocabulary of this size is known, or the vocabulary does not use greedy
            longest match.
    """
    vocabulary = fitting_vocabulary(tokenizer, vocab_size)
    if vocabulary is None:
        raise ValueError(
            f"`tokenizer` must be given for a .gguf file of {vocab_size} ids, because no "
            "built-in vocabulary has that size (`rwkv7 convert --vocabulary`)."
        )
    if isinstance(vocabulary, JsonTokenizer):
        raise ValueError(
            "`tokenizer` of a .gguf file must use greedy longest match, as "
            f"llama.cpp does for RWKV; got {vocabulary.name}."
        )
    return vocabulary_entries(vocabulary, vocab_size)


def add_vocabulary(
    writer: gguf.GGUFWriter, entries: Mapping[int, bytes], vocab_size: int
) -> None:
    """Adds the vocabulary in the form of llama.cpp's `rwkv` tokenizer: bytes as escaped ASCII."""
    tokens = []
    types = []
    for number in range(vocab_size):
        if number in entries:
            # Escaped as in a Python literal, without `b` and the quotes.
            tokens.append(repr(entries[number])[2:-1])
            types.append(gguf.TokenType.NORMAL)
        elif number == END_OF_TEXT:
            # Not the converter's "<s>": that text in a prompt would be encoded as this id.
            tokens.append(END_OF_TEXT_NAME)
            types.append(gguf.TokenType.CONTROL)
        else:
            # The converter's "[PAD65530]" would match in a prompt; no UTF-8 text contains 0xff.
            tokens.append(f"\\xff[PAD{number}]")
            types.append(gguf.TokenType.UNUSED)
    writer.add_tokenizer_model(_KIND)
    # Without a template llama.cpp would use another model's.
    writer.add_chat_template(chat_template_jinja())
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if END_OF_TEXT not in entries:
        writer.add_bos_token_id(END_OF_TEXT)
        writer.add_eos_token_id(END_OF_TEXT)
    for number, token in entries.items():
        if token == _END_OF_TURN:
            writer.add_eot_token_id(number)


def read_vocabulary(
    reader: gguf.GGUFReader, path: Path, vocab_size: int
) -> Tokenizer | None:
    """Reads the vocabulary of an open file; returns None if it has none.

    Args:
        reader: reader of the file.
        path: path of the file, for error messages.
        vocab_size: vocabulary size of the model.

    Raises:
        ValueError: the vocabulary is of another kind, its lists are damaged, or its ids exceed the
            model's.
    """
    kind = metadata(reader, gguf.Keys.Tokenizer.MODEL)
    if kind is None:
        return None
    if kind != _KIND:
        raise ValueError(
            f"`{path}` must have a vocabulary of the kind {_KIND}; got {kind!r}."
        )
    tokens = metadata(reader, gguf.Keys.Tokenizer.LIST) or []
    types = metadata(reader, gguf.Keys.Tokenizer.TOKEN_TYPE) or []
    are_texts = all(isinstance(token, str) for token in tokens)
    if len(tokens) != len(types) or not are_texts:
        raise ValueError(
            f"`{path}` must have a text and a type for each token of its vocabulary; "
            f"got {len(tokens):,} and {len(types):,}."
        )
    entries = {}
    for number, (token, kind_of_token) in enumerate(zip(tokens, types, strict=True)):
        if kind_of_token == gguf.TokenType.NORMAL and token:
            entries[number] = _ESCAPE.sub(_unescaped, token.encode())
    if not entries:
        return None
    numbers = IdTokenizer(vocab_size)
    if entries == vocabulary_entries(numbers, vocab_size):
        return numbers
    return for_model(vocabulary_of_entries(entries, str(path)), vocab_size, f"`{path}`")


def _unescaped(match: re.Match[bytes]) -> bytes:
    """Returns the byte that an escape stands for."""
    escape = match[1]
    if escape[:1] == b"x" and len(escape) == 3:
        return bytes.fromhex(escape[1:].decode())
    return _ESCAPED.get(escape, escape)
