"""The vocabulary of a model: the one stored with it, or else the built-in one of its size.

* Orbax folders: the card names a built-in vocabulary. Any other vocabulary is a file in the folder,
  and the card has its digest and, for a `tokenizer.json`, the end-of-text token.
* HF folders: a `tokenizer.json`. For a vocabulary of plain ids, which has no file, an entry in the
  metadata of the weights.
* GGUF files: a list of tokens.
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

# The card of an Orbax folder, and its entry for the vocabulary.
CARD_FILE = "rwkv7_jax.json"

ENTRY = "vocabulary"

# The vocabulary files of Orbax folders; HF folders use only the second.
TEXT_FILE = "vocabulary.txt"

JSON_FILE = "tokenizer.json"
# Vocabulary formats that cannot be read. (World's own is a `.txt` file of any name.)
_OTHER_FILES = ("vocab.json", "merges.txt", "tokenizer.model", "spiece.model")


def keep_vocabulary(folder: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """Writes the vocabulary's file, if it has one, into a folder and returns the card's entry."""
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
    """Reads the vocabulary stored with a model; returns None if there is none.

    Published folders whose tokenizer is a Python program count as having none; they use the
    built-in vocabulary of their size.

    Args:
        path: path of a checkpoint of any format.
        vocab_size: vocabulary size of the model.

    Raises:
        ValueError: the card's entry is unknown, or the vocabulary file was changed or cannot be
            read.
        ImportError: a `tokenizer.json` needs the extra `tokenizers`.
    """
    path = Path(path)
    # A damaged file may not be text; `name_file` also covers the errors of decoding it.
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
            f"{str(error).rstrip('.')}; name another with `--vocabulary` "
            "(`config.data.vocabulary`)."
        ) from None
    return None


def _vocabulary_of_hf(folder: Path, vocab_size: int) -> Tokenizer | None:
    """Reads the vocabulary of an HF folder; returns None if it has none."""
    file = folder / JSON_FILE
    if file.is_file():
        return load_vocabulary(file, vocab_size, argument=f"`{file}`")
    for name in _OTHER_FILES:
        # Otherwise the built-in vocabulary of the model's size would be used silently.
        if (folder / name).is_file():
            raise ValueError(
                f"`{folder / name}` holds a vocabulary in a format that cannot be read; it needs a "
                f"{JSON_FILE}, which transformers' save_pretrained writes for a fast tokenizer"
            )
    weights = folder / WEIGHTS_FILE
    kind = read_metadata(weights).get(VOCABULARY_KEY) if weights.is_file() else None
    if kind is None:
        return None
    if kind not in NAMES:
        raise ValueError(f"`{weights}` has an unknown {VOCABULARY_KEY}: {kind!r}")
    return load_vocabulary(kind, vocab_size, argument=f"`{weights}`: {VOCABULARY_KEY}")


def _vocabulary_of_card(folder: Path, vocab_size: int) -> Tokenizer | None:
    """Reads the vocabulary that an Orbax folder's card names; returns None if it names none."""
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
            f"`{file}` was changed after it was written (its digest differs); to use it as it is, "
            f"name it with `--vocabulary {file}` (`config.data.vocabulary`)."
        )
    return tokenizer.with_vocab_size(vocab_size)


def model_tokenizer(
    path: str | Path | None,
    vocab_size: int,
    vocabulary: str | None = None,
    *,
    argument: str,
) -> Tokenizer:
    """Returns the vocabulary of a model: the named, else the stored, else the one of its size.

    Args:
        path: path of the checkpoint; None for a new model.
        vocab_size: vocabulary size of the model.
        vocabulary: a name for `text.load_vocabulary`; None if the user named none.
        argument: the argument that names the vocabulary, in backticks, for error messages.

    Raises:
        ValueError: the vocabulary does not fit the model, or no built-in one has its size.
        ImportError: a `tokenizer.json` needs the extra `tokenizers`.
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
