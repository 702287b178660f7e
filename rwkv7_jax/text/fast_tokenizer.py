"""Vocabularies as `tokenizer.json`, the format of the `tokenizers` package and of transformers.

The package has no efficient greedy longest-match model: WordPiece is one, but takes quadratic time,
because it scans the rest of the text for each token. Here a regular expression, the trie of all
entries, splits a text into entries, and a WordLevel model maps them to ids.
Source: huggingface/tokenizers docs/source-doc-builder (the parts of the file).
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rwkv7_jax.text.tokenizer import END_OF_TEXT
from rwkv7_jax.text.vocabulary_entries import END_OF_TEXT_NAME

# Special characters in a regular expression, and in a character class.
_SPECIAL = re.compile(r"[\\.^$|?*+(){}\[\]]")

_SPECIAL_IN_LIST = re.compile(r"[\\^\[\]&~-]")

# An unknown-token name that has no id, so that the model raises on unknown text.
_UNKNOWN = "<|no entry|>"

# A trie: characters to child nodes; the empty string marks the end of an entry.
_Tree = dict[str, Any]


def fast_tokenizer(entries: Mapping[int, bytes]) -> dict[str, Any]:
    """Returns the content of the `tokenizer.json` of a vocabulary.

    It encodes every text like `Tokenizer`, with one exception: the package `tokenizers` by itself
    encodes the name of the end-of-text token in a text as its id. `tokenizer_config` prevents this
    in transformers.

    Args:
        entries: the bytes of every id that has any.
    """
    characters = byte_characters()
    names = {}
    for number, entry in entries.items():
        names["".join([characters[byte] for byte in entry])] = number
    special = []
    vocabulary = dict(names)
    if END_OF_TEXT not in entries:
        special.append(_added_token(END_OF_TEXT, END_OF_TEXT_NAME))
        vocabulary[END_OF_TEXT_NAME] = END_OF_TEXT
    split = {
        "type": "Split",
        "pattern": {"Regex": longest_entry_pattern(names)},
        "behavior": "Isolated",
        "invert": False,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [_byte_level(add_prefix_space=False), split],
        },
        "post_processor": None,
        "decoder": _byte_level(add_prefix_space=True),
        "model": {
            "type": "WordLevel",
            "vocab": dict(sorted(vocabulary.items(), key=lambda item: item[1])),
            "unk_token": _UNKNOWN,
        },
    }


def tokenizer_config(end_of_text: str | None) -> dict[str, Any]:
    """Returns the content of the `tokenizer_config.json` next to a `tokenizer.json`.

    Args:
        end_of_text: name of the end-of-text token; None if there is none.
    """
    table: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        # The name of the end-of-text token in a text is plain text, as for `Tokenizer`.
        "split_special_tokens": True,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    if end_of_text is not None:
        for role in ("bos_token", "eos_token", "pad_token"):
            table[role] = end_of_text
    return table


def _added_token(number: int, name: str) -> dict[str, Any]:
    """Describes a special token."""
    return {
        "id": number,
        "content": name,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }


def _byte_level(*, add_prefix_space: bool) -> dict[str, Any]:
    """Describes the conversion between bytes and the characters that stand for them."""
    return {
        "type": "ByteLevel",
        "add_prefix_space": add_prefix_space,
        "trim_offsets": True,
        "use_regex": False,
    }


def byte_characters() -> dict[int, str]:
    """Returns the character that stands for each byte: the byte's own if it is visible.

    Source: openai/gpt-2 src/encoder.py, `bytes_to_unicode`.
    """
    characters = {}
    others = 0
    for byte in range(256):
        is_visible = 33 <= byte <= 126 or (161 <= byte <= 255 and byte != 173)
        characters[byte] = chr(byte) if is_visible else chr(256 + others)
        others += not is_visible
    return characters


def bytes_of_characters() -> dict[str, int]:
    """Returns the byte that each character of `byte_characters` stands for."""
    return {character: byte for byte, character in byte_characters().items()}


def longest_entry_pattern(entries: Iterable[str]) -> str:
    """Returns a regular expression that matches the longest entry at a position.

    Its size is that of the trie of the entries. At most one branch of each node matches, so the
    time of a match does not depend on the number of entries. Where the text leaves the trie, the
    match backtracks to the last node that ends an entry.
    """
    tree: _Tree = {}
    for entry in entries:
        node = tree
        for character in entry:
            node = node.setdefault(character, {})
        node[""] = {}
    return _pattern_below(tree)


def _pattern_below(node: _Tree) -> str:
    """Returns the pattern of the subtree below a node."""
    branches = list(_branches(node))
    if not branches:
        return ""
    if "" in node:
        # The rest is optional and matched greedily.
        return f"(?:{'|'.join(branches)})?"
    return branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})"


def _branches(node: _Tree) -> Iterator[str]:
    """Yields the patterns of a node's branches; its leaves share one character class."""
    leaves = []
    for character, following in node.items():
        if character == "":
            continue
        if following.keys() == {""}:
            leaves.append(character)
        else:
            yield _SPECIAL.sub(_escaped, character) + _pattern_below(following)
    if len(leaves) == 1:
        yield _SPECIAL.sub(_escaped, leaves[0])
    elif leaves:
        yield f"[{_SPECIAL_IN_LIST.sub(_escaped, ''.join(leaves))}]"


def _escaped(match: re.Match[str]) -> str:
    """Returns a character with a backslash before it."""
    return f"\\{match[0]}"
