"""Vocabularies as `tokenizer.json`, the file of the `tokenizers` package and of transformers.

The package has no model that takes the longest entry at every place: WordPiece does, but looks at
all of the rest of a text for each token, in a time that grows with the square of its length. Here
a regular expression, the tree of all entries, cuts a text into entries; the model gives their ids.
Source: huggingface/tokenizers docs/source-doc-builder (the file's parts).
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rwkv7_jax.text.tokenizer import END_OF_TEXT
from rwkv7_jax.text.vocabulary_entries import END_OF_TEXT_NAME

# Characters that mean something in a regular expression, and in a list of characters in it.
_SPECIAL = re.compile(r"[\\.^$|?*+(){}\[\]]")

_SPECIAL_IN_LIST = re.compile(r"[\\^\[\]&~-]")

# The name of a token that the model has no id for, so that it raises instead of taking another.
_UNKNOWN = "<|no entry|>"

# Characters to the nodes after them; the empty string marks the end of an entry.
_Tree = dict[str, Any]


def fast_tokenizer(entries: Mapping[int, bytes]) -> dict[str, Any]:
    """Returns the content of the `tokenizer.json` of a vocabulary.

    It encodes every text as `Tokenizer` does. In `tokenizers` alone the end of text's name in a
    text becomes its id; `tokenizer_config` tells transformers that it should not.

    Args:
        entries: the bytes of every id that has some.
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
        end_of_text: the name of the token that ends a text; None where there is none.
    """
    table: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        # The end of text's name in a text is text, as it is for `Tokenizer`.
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
    """Describes the step between bytes and the characters that stand for them."""
    return {
        "type": "ByteLevel",
        "add_prefix_space": add_prefix_space,
        "trim_offsets": True,
        "use_regex": False,
    }


def byte_characters() -> dict[int, str]:
    """Returns the character that stands for each byte: itself where it can be seen.

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
    """Returns a regular expression that matches the longest entry at a place.

    Its size is that of the tree of the entries. At most one branch of each node fits a text, so
    that matching takes a time that does not depend on the number of entries; where the text leaves
    the tree it goes back to the last node that ends an entry.
    """
    tree: _Tree = {}
    for entry in entries:
        node = tree
        for character in entry:
            node = node.setdefault(character, {})
        node[""] = {}
    return _pattern_below(tree)


def _pattern_below(node: _Tree) -> str:
    """Returns the pattern of what may follow a node."""
    branches = list(_branches(node))
    if not branches:
        return ""
    if "" in node:
        # What follows is optional, and taken where it can be.
        return f"(?:{'|'.join(branches)})?"
    return branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})"


def _branches(node: _Tree) -> Iterator[str]:
    """Yields the patterns of a node's branches; the characters that end there are one list."""
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
