"""Documents as ids in files that are mapped, not read: written once, trained on often.

A cache `x` is a pair of files that RWKV's own trainer reads, with two or three beside it:

    x.bin, x.idx   ids as uint16 and where documents lie (see `binidx`); token 0 ends each
    x.card.json    what made it: vocabulary, numbers of documents, ids, bytes and skipped lines
    x.keys         8 bytes a document (little-endian), by which it is held out or not
    x.mask         one byte an id, 1 where it is learnt and 0 where it is only read; there only
                   where something is only read

Without a card the pair is what another tool made: every id is learnt, and held out is its end.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from rwkv7_jax.data.binidx import BinidxWriter, read_binidx
from rwkv7_jax.data.documents import KEYS, Document, held_out_threshold
from rwkv7_jax.data.jsonl import ReadStats
from rwkv7_jax.data.readers import documents, size_of
from rwkv7_jax.data.token_streams import TokenArray, TokenStream
from rwkv7_jax.text.tokenizer import Tokenizer

FORMAT = "rwkv7_jax tokens 1"

SPLITS = ("all", "train", "held_out")


@dataclasses.dataclass(frozen=True)
class CacheMetadata:
    """What a cache holds.

    Attributes:
        vocabulary: the tokenizer's name.
        documents: of the source.
        tokens: ids, token 0 behind every document included.
        learnt: of them, those that count as targets.
        bytes: of the documents' text.
        skipped: lines that could not be read.
        format: what these files are.
    """

    vocabulary: str
    documents: int
    tokens: int
    learnt: int
    bytes: int
    skipped: int
    format: str = FORMAT


def write_cache(
    sources: Sequence[str | Path],
    path: str | Path,
    tokenizer: Tokenizer,
    *,
    on_bad: str = "error",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[CacheMetadata, ReadStats]:
    """The cache `path` holds all documents of the sources; nothing grows in memory with the text.

    Args:
        sources: what `sources.documents` reads, one behind the other.
        path: of the `.bin` file.
        tokenizer: makes ids of documents.
        on_bad: "error" or "skip", for bad lines of .jsonl files.
        progress: called with bytes read and bytes in all (0 where that is not known).

    Returns:
        The card, and what was skipped and why.

    Raises:
        ValueError: nothing to read, a bad line, or no folder to write to.
    """
    reading, path = ReadStats(), Path(path)
    total = sum(size_of(source) for source in sources)
    found = (d for s in sources for d in documents(s, on_bad=on_bad, reading=reading))
    with BinidxWriter(path) as writer:
        numbers = _write(writer, found, tokenizer, lambda: progress(reading.bytes, total))
        card = CacheMetadata(vocabulary=tokenizer.name, skipped=reading.skipped, **numbers)
        if not card.documents:
            raise ValueError(f"write_cache: `{', '.join(map(str, sources))}` has no document.")
        # Made last and so exchanged first: old files beside a new card are never believed.
        writer.beside(".card.json").write(json.dumps(dataclasses.asdict(card), indent=1).encode())
    if card.learnt == card.tokens:
        path.with_suffix(".mask").unlink()
    return card, reading


def _write(
    writer: BinidxWriter, found: Iterator[Document], tokenizer: Tokenizer, tell: Callable
) -> dict[str, int]:
    """All documents are in the files; how many, how long, and of how many bytes."""
    keys, mask = writer.beside(".keys"), writer.beside(".mask")
    numbers = {"documents": 0, "tokens": 0, "learnt": 0, "bytes": 0}
    for document in found:
        keys.write(document.key().to_bytes(8, "little"))
        for ids, learnt in document.ids(tokenizer):
            writer.add(ids)
            mask.write(bytes([learnt]) * len(ids))
            numbers["tokens"] += len(ids)
            numbers["learnt"] += len(ids) * learnt
        writer.end()
        numbers["bytes"] += document.size()
        numbers["documents"] += 1
        tell()
    return numbers


def read_card(path: str | Path) -> CacheMetadata | None:
    """What `x.card.json` beside the file says; None where there is none.

    Raises:
        ValueError: another format, or a damaged file.
    """
    file = Path(path).with_suffix(".card.json")
    if not file.exists():
        return None
    try:
        fields = json.loads(file.read_bytes())
        if fields.get("format") != FORMAT:
            raise ValueError(f"its format is {fields.get('format')!r}")
        return CacheMetadata(**fields)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"read_card: `{file}` must be of {FORMAT!r}: {error}.") from None


def _sibling(path: Path, suffix: str, dtype: str, size: int) -> np.ndarray:
    """A mapped file of the cache, which must have `size` entries."""
    file, width = path.with_suffix(suffix), np.dtype(dtype).itemsize
    held = file.stat().st_size if file.exists() else 0
    if held != size * width:
        raise ValueError(
            f"open_cache: `{file}` must have {size * width} bytes, says its index; it has {held}."
        )
    return np.asarray(np.memmap(file, dtype, "r"))


def open_cache(
    path: str | Path, tokenizer: Tokenizer, *, split: str = "all", held_out: float = 0.05
) -> TokenStream:
    """The ids of a `.bin` file or of one part of it, mapped.

    Args:
        path: of the `.bin` or `.idx` file.
        tokenizer: of the model; a cache that another one made is refused.
        split: one of `SPLITS`; documents are parted as those of the source are, files without a
            card by position.
        held_out: the share held out.

    Raises:
        ValueError: damaged files, another vocabulary, or an id outside of it; file and place are
            named.
    """
    path = Path(path)
    card = read_card(path)
    ids, starts = read_binidx(path)
    if card is not None and card.vocabulary != tokenizer.name:
        raise ValueError(
            f"open_cache: `{path}` must be of the model's vocabulary, {tokenizer.name}; "
            f"it is of {card.vocabulary}."
        )
    check_vocabulary(ids, tokenizer.vocab_size, str(path))
    if card is None:
        return split_by_position(TokenArray(ids, starts=starts), split, held_out)
    if (card.documents, card.tokens) != (counts := (len(starts) - 1, len(ids))):
        raise ValueError(
            f"open_cache: `{path.with_suffix('.card.json')}` must count {counts[0]} documents and "
            f"{counts[1]} tokens, as the index does; got {card.documents} and {card.tokens}."
        )
    learnt = None if card.learnt == card.tokens else _sibling(path, ".mask", "u1", len(ids))
    tokens = TokenArray(ids, learnt, starts)
    if split == "all":
        return TokenStream.whole(tokens)
    keys, below = _sibling(path, ".keys", "<u8", card.documents), held_out_threshold(held_out)
    if card.documents == 1:
        return split_by_position(tokens, split, held_out)
    held = keys < np.uint64(below) if below < KEYS else np.ones(len(keys), bool)
    return TokenStream.chosen(tokens, held if split == "held_out" else ~held)


def split_by_position(tokens: TokenArray, split: str, held_out: float) -> TokenStream:
    """One part of ids of which nothing else is known: the end is held out."""
    size = len(tokens.ids)
    border = size - int(size * held_out)
    ranges = {"all": (0, size), "train": (0, border), "held_out": (border, size)}
    return TokenStream.between(tokens, *ranges[split])


def check_vocabulary(ids: np.ndarray, vocab_size: int, name: str) -> None:
    """Return if all ids are inside the vocabulary.

    Raises:
        ValueError: one is not; the message has its position.
    """
    limits = np.iinfo(ids.dtype)
    if limits.min >= 0 and limits.max < vocab_size:
        return
    for first in range(0, len(ids), 1 << 24):
        piece = ids[first : first + (1 << 24)]
        if piece.max() < vocab_size and piece.min() >= 0:
            continue
        place = first + int(np.flatnonzero((piece < 0) | (piece >= vocab_size))[0])
        raise ValueError(
            f"token_stream: `{name}` must hold ids from 0 and below {vocab_size}; "
            f"got {int(ids[place])} at position {place}."
        )
