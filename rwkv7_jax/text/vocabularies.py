"""Which vocabulary a model, a run or a file has: the one way in which it is named.

world, bytes, bytes256, ids   built in: World's; bytes with id = byte + 1 and 0 as the end of
                              text; raw bytes without one; ids written as numbers
FILE.json                     a `tokenizer.json` (extra `tokenizers` unless it takes the longest
                              entry at every place)
any other file                a vocabulary file in World's format, of any size
"""

import os
from collections.abc import Mapping
from pathlib import Path

from rwkv7_jax.text.fast_tokenizer_reader import longest_entries
from rwkv7_jax.text.id_tokenizer import IdTokenizer
from rwkv7_jax.text.json_tokenizer import JsonTokenizer, end_token_beside
from rwkv7_jax.text.tokenizer import Tokenizer
from rwkv7_jax.text.vocabulary_entries import WORLD_ENTRIES, built_in_vocabulary
from rwkv7_jax.text.vocabulary_file import format_vocabulary, parse_vocabulary

_BUILT_IN = {
    "world": Tokenizer.world,
    "bytes": Tokenizer.bytes,
    "bytes256": Tokenizer.bytes256,
}

NAMES = (*_BUILT_IN, "ids")

# The kind of a vocabulary that was read from a file in World's format.
FILE_KIND = "file"

# The least ids of a model with a built-in vocabulary.
_LEAST_IDS = {"bytes256": 256, "bytes": 257, "world": WORLD_ENTRIES + 1}


def load_vocabulary(
    name: str | os.PathLike[str],
    vocab_size: int | None = None,
    *,
    argument: str = "load_vocabulary: `name`",
) -> Tokenizer:
    """Returns the vocabulary of that name.

    Args:
        name: one of `NAMES`, or the path of a file.
        vocab_size: ids of the model; None where there is no model.
        argument: what named it, in backticks; messages begin with it.

    Raises:
        ValueError: no such vocabulary, a damaged file, or one with larger ids than the model has.
        ImportError: a `tokenizer.json` without the extra `tokenizers`.
    """
    text = os.fspath(name)
    if text == "ids":
        return IdTokenizer() if vocab_size is None else IdTokenizer(vocab_size)
    if text in _BUILT_IN:
        tokenizer = _BUILT_IN[text]()
    else:
        tokenizer = _read(Path(text).expanduser(), argument)
    if vocab_size is None:
        return tokenizer
    return for_model(tokenizer, vocab_size, argument)


def for_model(tokenizer: Tokenizer, vocab_size: int, argument: str) -> Tokenizer:
    """Returns a vocabulary for the table of a model.

    Args:
        tokenizer: the vocabulary.
        vocab_size: ids of the model.
        argument: what named it, in backticks; messages begin with it.

    Raises:
        ValueError: larger ids than the model has.
    """
    if tokenizer.largest_id >= vocab_size:
        raise ValueError(
            f"{argument} must have ids below the model's {vocab_size:,}; got {tokenizer.name}, "
            f"whose largest is {tokenizer.largest_id:,}."
        )
    # World's table is a little larger than its entries; a model's may be a little smaller.
    if tokenizer.vocab_size >= vocab_size:
        return tokenizer
    return tokenizer.with_vocab_size(vocab_size)


def fitting(vocab_size: int) -> str:
    """Lists the vocabularies that fit a model of this many ids, for a message."""
    names = [name for name, least in _LEAST_IDS.items() if least <= vocab_size]
    return ", ".join([*names, "ids, a vocabulary file or a tokenizer.json"])


def _read(path: Path, argument: str) -> Tokenizer:
    """Reads a vocabulary from a file."""
    if not path.is_file():
        raise ValueError(
            f"{argument} must be {', '.join(NAMES)} or a file; got {str(path)!r}, which is none."
        )
    try:
        if path.suffix == ".json":
            return _read_json(path)
        return vocabulary_of_text(path.read_bytes().decode("utf-8-sig"), str(path))
    except ImportError as error:
        raise ImportError(f"{argument}: {error}") from None
    except UnicodeDecodeError:
        reason = f"`{path}` must be UTF-8."
    except ValueError as error:
        reason = str(error)
    raise ValueError(f"{argument} must be a vocabulary: {reason}")


def _read_json(path: Path) -> Tokenizer:
    """Reads a `tokenizer.json`; one that takes the longest entry at a place is a plain vocabulary.

    So a vocabulary that went into a folder comes out as it was.
    """
    content = path.read_bytes()
    end_of_text = end_token_beside(path)
    entries = longest_entries(content, end_of_text)
    if entries is not None:
        return vocabulary_of_entries(entries, str(path))
    return JsonTokenizer.from_text(content, name=str(path), end_of_text=end_of_text)


def vocabulary_of_entries(entries: Mapping[int, bytes], name: str) -> Tokenizer:
    """Returns the built-in vocabulary that has these entries, or else makes one of them.

    Args:
        entries: the bytes of every id that has some; not empty.
        name: for people and messages.
    """
    built_in = built_in_vocabulary(entries)
    if built_in is not None:
        return built_in
    size = max(entries) + 1
    return Tokenizer(dict(entries), vocab_size=size, name=name, kind=FILE_KIND)


def vocabulary_of_text(text: str, name: str) -> Tokenizer:
    """Makes the vocabulary of a file in World's format.

    Args:
        text: of the file.
        name: for people and messages.

    Raises:
        ValueError: a damaged file, or one without entries.
    """
    try:
        entries = parse_vocabulary(text)
    except ValueError as error:
        raise ValueError(f"`{name}`: {error}") from None
    if not any(entries.values()):
        raise ValueError(f"`{name}` has no entry.")
    # World's own file is World, whatever it is called: caches and runs know it by that name.
    if len(entries) == WORLD_ENTRIES:
        world = Tokenizer.world()
        if format_vocabulary(entries) == world.file_text():
            return world
    return Tokenizer(entries, vocab_size=max(entries) + 1, name=name, kind=FILE_KIND)
