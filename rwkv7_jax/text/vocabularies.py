"""Names of vocabularies, the same for models, runs and files.

world            the World vocabulary
bytes            bytes with id = byte + 1 and 0 as the end of text
bytes256         raw bytes without an end of text
ids              ids written as numbers
FILE.json        a `tokenizer.json` (extra `tokenizers` unless it is greedy longest match)
any other file   a vocabulary file in World's format, of any size
"""

import os
from collections.abc import Mapping
from pathlib import Path

from rwkv7_jax.checks import check_count, prefix_errors
from rwkv7_jax.text.fast_tokenizer_reader import longest_entries
from rwkv7_jax.text.id_tokenizer import IdTokenizer
from rwkv7_jax.text.json_tokenizer import JsonTokenizer, end_token_beside
from rwkv7_jax.text.tokenizer import Tokenizer
from rwkv7_jax.text.vocabulary_entries import WORLD_ENTRIES, built_in_vocabulary
from rwkv7_jax.text.vocabulary_file import parse_vocabulary

_BUILT_IN = {
    "world": Tokenizer.world,
    "bytes": Tokenizer.bytes,
    "bytes256": Tokenizer.bytes256,
}

NAMES = (*_BUILT_IN, "ids")

# The kind of a vocabulary from a file in World's format.
FILE_KIND = "file"

# The smallest vocabulary size of a model for each built-in vocabulary.
_LEAST_IDS = {"bytes256": 256, "bytes": 257, "world": WORLD_ENTRIES + 1}


def load_vocabulary(
    name: str | os.PathLike[str],
    vocab_size: int | None = None,
    *,
    argument: str = "load_vocabulary: `name`",
) -> Tokenizer:
    """Returns the vocabulary with that name.

    Args:
        name: one of `NAMES`, or the path of a file.
        vocab_size: vocabulary size of the model; None if there is no model.
        argument: the argument that names the vocabulary, in backticks; messages begin with it.

    Raises:
        TypeError: the name or the size has the wrong type.
        ValueError: the vocabulary does not exist, is damaged, or has ids beyond the model's.
        ImportError: a `tokenizer.json` needs the extra `tokenizers`.
    """
    if not isinstance(name, str | os.PathLike):
        raise TypeError(
            f"{argument} must be a name or a path; got {type(name).__name__}."
        )
    if vocab_size is not None:
        with prefix_errors("load_vocabulary"):
            check_count(vocab_size, 1, "`vocab_size`")
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
    """Returns a vocabulary with at least as many ids as a model.

    Args:
        tokenizer: the vocabulary.
        vocab_size: vocabulary size of the model.
        argument: the argument that names the vocabulary, in backticks; messages begin with it.

    Raises:
        ValueError: the vocabulary has ids beyond the model's.
    """
    if tokenizer.largest_id >= vocab_size:
        raise ValueError(
            f"{argument} must have ids below the model's {vocab_size:,}; got {tokenizer.name}, "
            f"whose largest is {tokenizer.largest_id:,}."
        )
    # World counts a few ids without entries, so a model may have slightly fewer ids.
    if tokenizer.vocab_size >= vocab_size:
        return tokenizer
    return tokenizer.with_vocab_size(vocab_size)


def fitting(vocab_size: int) -> str:
    """Lists the vocabularies that fit a model of this vocabulary size, for a message."""
    names = [name for name, least in _LEAST_IDS.items() if least <= vocab_size]
    return ", ".join([*names, "ids, a vocabulary file or a tokenizer.json"])


def _read(path: Path, argument: str) -> Tokenizer:
    """Reads a vocabulary from a file."""
    if not path.is_file():
        raise ValueError(
            f"{argument} must be {', '.join(NAMES)} or an existing file; got {str(path)!r}."
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
    """Reads a `tokenizer.json`; a greedy longest-match one becomes a plain vocabulary.

    A vocabulary that was saved into a folder is thus restored unchanged.
    """
    content = path.read_bytes()
    end_of_text = end_token_beside(path)
    entries = longest_entries(content, end_of_text)
    if entries is not None:
        return vocabulary_of_entries(entries, str(path))
    return JsonTokenizer.from_text(content, name=str(path), end_of_text=end_of_text)


def vocabulary_of_entries(entries: Mapping[int, bytes], name: str) -> Tokenizer:
    """Returns the built-in vocabulary with these entries, or else builds one from them.

    Args:
        entries: the bytes of every id that has any; not empty.
        name: name for messages.
    """
    built_in = built_in_vocabulary(entries)
    if built_in is not None:
        return built_in
    size = max(entries) + 1
    return Tokenizer(dict(entries), vocab_size=size, name=name, kind=FILE_KIND)


def vocabulary_of_text(text: str, name: str) -> Tokenizer:
    """Builds a vocabulary from the text of a file in World's format.

    Args:
        text: text of the file.
        name: name for messages.

    Raises:
        ValueError: the file is damaged or has no entries.
    """
    try:
        entries = parse_vocabulary(text)
    except ValueError as error:
        raise ValueError(f"`{name}`: {error}") from None
    if not any(entries.values()):
        raise ValueError(f"`{name}` has no entries.")
    # World's own file becomes World, whatever its name, because caches and runs use that name.
    world = built_in_vocabulary(entries) if len(entries) == WORLD_ENTRIES else None
    if world is not None:
        return world
    return Tokenizer(entries, vocab_size=max(entries) + 1, name=name, kind=FILE_KIND)
