"""Which vocabulary a model, a run or a file has: the one way in which it is named.

world, bytes, bytes256, ids   built in: World's; bytes with id = byte + 1 and 0 as the end of
                              text; raw bytes without one; ids written as numbers
FILE.json                     a `tokenizer.json` (extra `tokenizers`)
any other file                a vocabulary file in World's format, of any size
"""

import os
from pathlib import Path

from rwkv7_jax.text.id_tokenizer import IdTokenizer
from rwkv7_jax.text.json_tokenizer import JsonTokenizer
from rwkv7_jax.text.tokenizer import Tokenizer
from rwkv7_jax.text.vocabulary_file import format_vocabulary, parse_vocabulary

NAMES = ("world", "bytes", "bytes256", "ids")

# The kind of a vocabulary that was read from a file in World's format.
FILE_KIND = "file"

_WORLD_ENTRIES = 65529

# The least ids of a model with a built-in vocabulary.
_LEAST_IDS = {"bytes256": 256, "bytes": 257, "world": _WORLD_ENTRIES + 1}


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
    if text == "world":
        tokenizer = Tokenizer.world()
    elif text == "bytes":
        tokenizer = Tokenizer.bytes()
    elif text == "bytes256":
        tokenizer = Tokenizer.bytes256()
    else:
        tokenizer = _read(Path(text).expanduser(), argument)
    if vocab_size is None:
        return tokenizer
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
            return JsonTokenizer.from_file(path)
        return vocabulary_of_text(path.read_bytes().decode("utf-8-sig"), str(path))
    except ImportError as error:
        raise ImportError(f"{argument}: {error}") from None
    except UnicodeDecodeError:
        reason = f"`{path}` must be UTF-8."
    except ValueError as error:
        reason = str(error)
    raise ValueError(f"{argument} must be a vocabulary: {reason}")


def vocabulary_of_text(text: str, name: str) -> Tokenizer:
    """Makes the vocabulary of a file in World's format.

    Args:
        text: of the file.
        name: for people and messages.

    Raises:
        ValueError: a damaged file, or one without entries.
    """
    entries = parse_vocabulary(text)
    if not any(entries.values()):
        raise ValueError(f"`{name}` has no entry.")
    # World's own file is World, whatever it is called: caches and runs know it by that name.
    if len(entries) == _WORLD_ENTRIES:
        world = Tokenizer.world()
        if format_vocabulary(entries) == world.file_text():
            return world
    return Tokenizer(entries, vocab_size=max(entries) + 1, name=name, kind=FILE_KIND)
