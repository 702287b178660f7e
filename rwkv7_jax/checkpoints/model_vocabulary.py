"""The vocabulary of a model: what its folder or file keeps, and which one it is where none does.

The card of an Orbax folder names a built-in vocabulary. Of another one the folder holds the file
itself, and the card its digest and, for a `tokenizer.json`, the token that ends texts. HF folders
hold a `tokenizer.json`, GGUF files a list. Ids that are no text have no file: the weights' metadata
of an HF folder say so.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rwkv7_jax.checkpoints.huggingface import WEIGHTS_FILE
from rwkv7_jax.checkpoints.integrity.named_errors import name_file
from rwkv7_jax.checkpoints.model_folder import read_json
from rwkv7_jax.checkpoints.tensor_files import (
    VOCABULARY_KEY,
    container_of,
    gguf_files,
    read_metadata,
)
from rwkv7_jax.checks import prefix_errors
from rwkv7_jax.text.json_tokenizer import KIND as JSON_KIND
from rwkv7_jax.text.json_tokenizer import JsonTokenizer
from rwkv7_jax.text.tokenizer import Tokenizer
from rwkv7_jax.text.vocabularies import (
    FILE_KIND,
    NAMES,
    fitting,
    load_vocabulary,
    vocabulary_of_text,
)

# Of an Orbax folder; its entry with the vocabulary.
CARD_FILE = "rwkv7_jax.json"

ENTRY = "vocabulary"

# Files that an Orbax folder may hold the vocabulary in, and an HF folder has it in.
TEXT_FILE = "vocabulary.txt"

JSON_FILE = "tokenizer.json"
# Vocabularies in forms that are not read here. (World's own is a `.txt` file of any name.)
_OTHER_FILES = ("vocab.json", "merges.txt", "tokenizer.model", "spiece.model")


def keep_vocabulary(folder: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """Writes a vocabulary's file into a folder, if it has one, and returns the card's entry."""
    entry: dict[str, Any] = {"kind": tokenizer.kind, "digest": tokenizer.digest}
    if tokenizer.kind in NAMES:
        return entry
    file = folder / TEXT_FILE
    if isinstance(tokenizer, JsonTokenizer):
        file = folder / JSON_FILE
        entry["end_of_text"] = tokenizer.end_token()
    file.write_text(tokenizer.file_text(), encoding="utf-8", newline="\n")
    return entry


@prefix_errors("kept_vocabulary")
def kept_vocabulary(path: str | Path, vocab_size: int) -> Tokenizer | None:
    """Reads the vocabulary that a folder or a GGUF file holds; None where it holds none.

    The published folders whose tokenizer is a program hold none: theirs is that of the size.

    Args:
        path: of a checkpoint of any kind.
        vocab_size: of the model.

    Raises:
        ValueError: an unknown entry, a file that is not the one that was kept, or one that cannot
            be read.
        ImportError: a `tokenizer.json` without the extra `tokenizers`.
    """
    path = Path(path)
    # Text in a file may be none: what reads it raises errors of other kinds, too.
    if (path / CARD_FILE).is_file():
        with name_file(path, "kept_vocabulary"):
            return _vocabulary_of_card(path, vocab_size)
    try:
        with name_file(path, "kept_vocabulary"):
            if path.is_dir():
                return _vocabulary_of_hf(path, vocab_size)
            if path.is_file() and container_of(path) == "gguf":
                return gguf_files().read_gguf_vocabulary(path, vocab_size)
    except (ValueError, ImportError) as error:
        kind = ImportError if isinstance(error, ImportError) else ValueError
        raise kind(
            f"{str(error).rstrip('.')}; `--vocabulary` (`config.data.vocabulary`) names another."
        ) from None
    return None


def _vocabulary_of_hf(folder: Path, vocab_size: int) -> Tokenizer | None:
    """Reads the vocabulary of an HF folder; None where it holds none."""
    file = folder / JSON_FILE
    if file.is_file():
        return load_vocabulary(file, vocab_size, argument=f"`{file}`")
    for name in _OTHER_FILES:
        # Without this, the vocabulary of the model's size would be taken for its own.
        if (folder / name).is_file():
            raise ValueError(
                f"`{folder / name}` holds a vocabulary that is read from a {JSON_FILE} "
                "alone, which transformers' save_pretrained writes of a fast tokenizer"
            )
    weights = folder / WEIGHTS_FILE
    kind = read_metadata(weights).get(VOCABULARY_KEY) if weights.is_file() else None
    if kind is None:
        return None
    if kind not in NAMES:
        raise ValueError(f"`{weights}` has an unknown {VOCABULARY_KEY}: {kind!r}")
    return load_vocabulary(kind, vocab_size, argument=f"`{weights}`: {VOCABULARY_KEY}")


def _vocabulary_of_card(folder: Path, vocab_size: int) -> Tokenizer | None:
    """Reads the vocabulary that an Orbax folder's card names; None where it names none."""
    card = folder / CARD_FILE
    entry = read_json(card).get(ENTRY)
    if entry is None:
        return None
    kind = entry.get("kind") if isinstance(entry, Mapping) else None
    if kind in NAMES:
        return load_vocabulary(kind, vocab_size, argument=f"`{card}`: {ENTRY}")
    if kind not in (FILE_KIND, JSON_KIND):
        raise ValueError(f"`{card}` has an unknown {ENTRY}: {entry!r}.")
    file = folder / (JSON_FILE if kind == JSON_KIND else TEXT_FILE)
    if not file.is_file():
        raise ValueError(
            f"`{folder}` is damaged or incomplete: {file.name} is missing; "
            "copy it again."
        )
    content = file.read_bytes()
    if kind == JSON_KIND:
        end_of_text = entry.get("end_of_text")
        if not isinstance(end_of_text, str | None):
            raise ValueError(f"`{card}` has an unknown {ENTRY}: {entry!r:.100}.")
        tokenizer = JsonTokenizer.from_text(
            content, name=str(file), end_of_text=end_of_text
        )
    else:
        tokenizer = vocabulary_of_text(content.decode(), str(file))
    if tokenizer.digest != entry.get("digest"):
        raise ValueError(
            f"`{file}` was changed after it was written (its digest differs); "
            f"`--vocabulary {file}` (`config.data.vocabulary`) takes it as it is."
        )
    return tokenizer.with_vocab_size(vocab_size)


def model_tokenizer(
    path: str | Path | None,
    vocab_size: int,
    vocabulary: str | None = None,
    *,
    argument: str,
) -> Tokenizer:
    """Returns the vocabulary of a model: the named one, else the kept one, else by its size.

    Args:
        path: of the checkpoint; None for a new model.
        vocab_size: of the model.
        vocabulary: see `text.load_vocabulary`; None where none was named.
        argument: what names it, in backticks, for messages.

    Raises:
        ValueError: a vocabulary that does not fit the model, or none that is known to.
        ImportError: a `tokenizer.json` without the extra `tokenizers`.
    """
    if vocabulary is not None:
        return load_vocabulary(vocabulary, vocab_size, argument=argument)
    kept = None if path is None else kept_vocabulary(path, vocab_size)
    if kept is not None:
        return kept
    try:
        return Tokenizer.for_vocabulary(vocab_size)
    except ValueError:
        raise ValueError(
            f"{argument} must name the vocabulary of a model of {vocab_size:,} ids: "
            f"{fitting(vocab_size)} fit."
        ) from None
