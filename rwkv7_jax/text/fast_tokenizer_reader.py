"""Reader of the entries of a greedy longest-match vocabulary from a `tokenizer.json`.

Such a file can be used without the package `tokenizers`. Two kinds are recognised: ours (see
`fast_tokenizer`), and that of the RWKV project's own folders, WordPiece without a subword prefix.
Source: aabbdev/rwkv-publisher@67f4b55 src/rwkv_publisher/encoding.py (contents of those folders).
"""

from collections.abc import Mapping
from typing import Any

from rwkv7_jax.json_files import parse_json
from rwkv7_jax.text.fast_tokenizer import (
    byte_characters,
    bytes_of_characters,
    longest_entry_pattern,
)
from rwkv7_jax.text.tokenizer import END_OF_TEXT
from rwkv7_jax.text.vocabulary_entries import built_in_vocabulary

# The required word length limit of WordPiece, which maps longer words to the unknown token.
_LONGEST_TEXT = 2**31 - 1


def longest_entries(
    content: bytes, end_of_text: str | None = None
) -> dict[int, bytes] | None:
    """Returns the bytes of every id that has any, for `Tokenizer`.

    Args:
        content: content of the file.
        end_of_text: the end-of-text token; None if it is not named.

    Returns:
        None if the file is of another kind or damaged.
    """
    try:
        table = parse_json(content)
    except ValueError:
        return None
    table = _as_dict(table)
    names = dict(_as_dict(_as_dict(table.get("model")).get("vocab")))
    are_ids = all(type(number) is int and number >= 0 for number in names.values())
    if table.get("normalizer") is not None or not are_ids:
        return None
    special = _special_tokens(table.get("added_tokens") or [])
    # `Tokenizer` has one special token, 0, exactly if 0 is not an entry.
    if special is None or end_of_text not in (None, *special):
        return None
    for name in special:
        names.pop(name, None)
    entries = _spelled(names)
    if not entries or (END_OF_TEXT in entries) == bool(special):
        return None
    return entries if _is_longest_match(table, entries) else None


def _as_dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _special_tokens(added: Any) -> list[str] | None:
    """Returns the name of the special token 0, if there is one; None if there are other tokens."""
    names = []
    for token in map(_as_dict, added if isinstance(added, list) else [None]):
        if token.get("id") != END_OF_TEXT or token.get("special") is not True:
            return None
        names.append(str(token.get("content")))
    return names


def _spelled(names: Mapping[str, int]) -> dict[int, bytes]:
    """Returns the bytes of names by ascending id; drops names of other characters as unused ids."""
    bytes_of = bytes_of_characters()
    entries = {}
    for name, number in sorted(names.items(), key=lambda item: item[1]):
        if all(character in bytes_of for character in name):
            entries[number] = bytes([bytes_of[character] for character in name])
    return entries


def _is_longest_match(table: Mapping[str, Any], entries: Mapping[int, bytes]) -> bool:
    """Returns whether a file encodes by greedy longest match."""
    model = table["model"]
    before = table.get("pre_tokenizer")
    if model.get("type") == "WordPiece":
        longest = model.get("max_input_chars_per_word")
        is_plain = model.get("continuing_subword_prefix") == ""
        return is_plain and longest == _LONGEST_TEXT and _is_byte_level(before)
    steps = _as_dict(before).get("pretokenizers")
    if model.get("type") != "WordLevel" or not isinstance(steps, list):
        return False
    if len(steps) != 2 or not _is_byte_level(steps[0]):
        return False
    split = _as_dict(steps[1])
    pattern = _as_dict(split.get("pattern")).get("Regex")
    if split.get("behavior") != "Isolated" or split.get("invert") is not False:
        return False
    return _is_pattern_of(pattern, entries)


def _is_byte_level(step: Any) -> bool:
    """Returns whether a step only writes a text's bytes as characters."""
    step = _as_dict(step)
    is_plain = step.get("add_prefix_space") is False and step.get("use_regex") is False
    return is_plain and step.get("type") == "ByteLevel"


def _is_pattern_of(pattern: Any, entries: Mapping[int, bytes]) -> bool:
    """Returns whether a regular expression is the one of `longest_entry_pattern`."""
    # Not compared for built-in vocabularies: building World's expression takes a second.
    if built_in_vocabulary(entries) is not None:
        return isinstance(pattern, str)
    characters = byte_characters()
    names = []
    for entry in entries.values():
        names.append("".join([characters[byte] for byte in entry]))
    return pattern == longest_entry_pattern(names)
