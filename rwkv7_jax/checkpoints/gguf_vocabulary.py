"""The vocabulary in a GGUF file, as llama.cpp's `rwkv` tokenizer has it: bytes as escaped ASCII.

Needs the package `gguf`, as `gguf_files` does.
Source: ggml-org/llama.cpp conversion/base.py, `_set_vocab_rwkv_world`; src/llama-vocab.cpp,
`llama_unescape_rwkv_token` (how it is read).
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

# As llama.cpp's converter says, a turn of a conversation ends at a blank line.
_END_OF_TURN = b"\n\n"

_ESCAPE = re.compile(rb"\\(x[0-9a-fA-F]{2}|.)", re.DOTALL)

_ESCAPED = {b"t": b"\t", b"n": b"\n", b"r": b"\r"}


def metadata(reader: gguf.GGUFReader, key: str) -> Any:
    """Returns the value of a key; None where the file does not have it."""
    field = reader.get_field(key)
    return None if field is None else field.contents()


def writable_entries(tokenizer: Tokenizer | None, vocab_size: int) -> dict[int, bytes]:
    """Returns the bytes of every id; llama.cpp takes the longest entry at a place, as we do.

    Raises:
        ValueError: no vocabulary is known, or one that is encoded otherwise.
    """
    vocabulary = fitting_vocabulary(tokenizer, vocab_size)
    if vocabulary is None:
        raise ValueError(
            f"`tokenizer` must be given for a .gguf file of {vocab_size} ids, as no "
            "built-in vocabulary has that size (`rwkv7 convert --vocabulary`)."
        )
    if isinstance(vocabulary, JsonTokenizer):
        raise ValueError(
            "`tokenizer` of a .gguf file must take the longest entry at a place, as "
            f"llama.cpp does for RWKV; got {vocabulary.name}."
        )
    return vocabulary_entries(vocabulary, vocab_size)


def add_vocabulary(
    writer: gguf.GGUFWriter, entries: Mapping[int, bytes], vocab_size: int
) -> None:
    """Adds the vocabulary as llama.cpp's `rwkv` tokenizer wants it: bytes as escaped ASCII."""
    tokens = []
    types = []
    for number in range(vocab_size):
        if number in entries:
            # Escaped as in a Python literal, without `b` and the quotes.
            tokens.append(repr(entries[number])[2:-1])
            types.append(gguf.TokenType.NORMAL)
        elif number == END_OF_TEXT:
            # Not the converter's "<s>": such text would become this id.
            tokens.append(END_OF_TEXT_NAME)
            types.append(gguf.TokenType.CONTROL)
        else:
            # The converter's "[PAD65530]" would be taken for the id in a text; no text has 0xff.
            tokens.append(f"\\xff[PAD{number}]")
            types.append(gguf.TokenType.UNUSED)
    writer.add_tokenizer_model(_KIND)
    # Without one llama.cpp would take that of other models.
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
    """Reads the vocabulary of an open file; None where it has none.

    Args:
        reader: of the file.
        path: of the file, for messages.
        vocab_size: of the model.

    Raises:
        ValueError: a vocabulary of another kind, a damaged list, or larger ids than the model has.
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
