"""A cache of tokenized documents in memory-mapped files.

A cache `x` is a pair of files that RWKV's own trainer reads, with two or three more:

    x.bin, x.idx   ids and the positions of documents (see `binidx`); uint16, or int32 if the
                   vocabulary has more than 65536 ids. The end of text follows each document.
    x.card.json    the card: vocabulary, and numbers of documents, ids, bytes and skipped lines
    x.keys         the content hash of each document, 8 bytes (little-endian), for the held-out
                   split
    x.mask         one byte per id, 1 if it is in the loss, else 0; exists only if some ids are not

A pair without a card comes from another tool: every id is in the loss, and its end is held out.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from rwkv7_jax.checks import check_tokenizer, prefix_errors
from rwkv7_jax.data.binidx import (
    DIGEST_BLOCK,
    BinidxWriter,
    block_digest,
    read_binidx,
)
from rwkv7_jax.data.builtin_corpora import is_built_in
from rwkv7_jax.data.choices import Split
from rwkv7_jax.data.documents import Document, held_out_threshold
from rwkv7_jax.data.jsonl import ReadStats
from rwkv7_jax.data.readers import documents, size_of
from rwkv7_jax.data.token_streams import TokenArray, TokenStream
from rwkv7_jax.json_files import parse_json
from rwkv7_jax.local_paths import is_special, local_path, refuse_hub_name
from rwkv7_jax.text.tokenizer import Tokenizer

FORMAT = "rwkv7_jax tokens 1"

# The suffixes of a cache's files, all of which a new cache replaces or removes.
SUFFIXES = (".bin", ".idx", ".card.json", ".keys", ".mask")

# Number of blocks of a file that are checked when a cache is opened.
_CHECKED_BLOCKS = 128

# Number of ids that are checked against the vocabulary at once.
_CHUNK = 1 << 24


@dataclasses.dataclass(frozen=True)
class CacheMetadata:
    """The card of a cache, with the same field names as `x.card.json`.

    Attributes:
        vocabulary: the tokenizer's identity: the name of a built-in one, else kind and digest.
        documents: number of documents.
        tokens: number of ids, including the end of text after every document.
        learnt: number of ids in the loss.
        bytes: size of the documents' text.
        skipped: number of skipped lines.
        format: format of the files.
        blocks: digests of the files' 4 MiB blocks, by suffix; empty in older caches.
        digest: digest of all other entries; empty in older caches.
    """

    vocabulary: str
    documents: int
    tokens: int
    learnt: int
    bytes: int
    skipped: int
    format: str = FORMAT
    blocks: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    digest: str = ""

    def sealed(self) -> "CacheMetadata":
        """Returns the card with its digest."""
        entries = dataclasses.asdict(self)
        del entries["digest"]
        text = json.dumps(entries, sort_keys=True)
        return dataclasses.replace(self, digest=block_digest(text.encode()))


def cache_file(source: str | Path) -> Path | None:
    """Returns the `.bin` or `.idx` file of the cache that a source names; None if it names none.

    As in RWKV-LM, the suffix may be omitted if nothing else has that name.
    """
    if is_built_in(source):
        return None
    path = local_path(source, "cache_file: `source`")
    if path.suffix.lower() in (".bin", ".idx"):
        return path
    if path.exists():
        return None
    # `with_suffix` would cut the ".5" of a name such as "v1.5".
    ids = path.with_name(f"{path.name}.bin")
    index = path.with_name(f"{path.name}.idx")
    # If one of the two is missing, reading them will report which.
    return ids if ids.exists() or index.exists() else None


def write_cache(
    sources: Sequence[str | Path],
    path: str | Path,
    tokenizer: Tokenizer,
    *,
    on_bad: str = "error",
    as_bytes: bool = False,
    encoding: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[CacheMetadata, ReadStats]:
    """Writes all documents of the sources to a cache; memory use does not depend on their size.

    The cache stores documents, not the sources that they come from. Of a source with a single
    document, the end is held out; of a cache of several such sources, some of the documents are.

    Args:
        sources: sources for `readers.documents`, read in order.
        path: path of the `.bin` file; the suffix may be missing.
        tokenizer: encodes documents.
        on_bad: "error" or "skip", for bad lines of .jsonl files.
        as_bytes: read the bytes of files that are not text or not UTF-8.
        encoding: encoding of text files; None for UTF-8.
        progress: called with the number of bytes read and the total (0 if unknown).

    Returns:
        The card, and statistics of what was skipped and why.

    Raises:
        TypeError: an argument has the wrong type, or `sources` is a single path.
        ValueError: there is nothing to read, a line is bad, the folder does not exist, or the path
            has another suffix.
    """
    # Otherwise each character would be read as a path, and "/" is the entire disk.
    if isinstance(sources, str | Path):
        raise TypeError(
            f"write_cache: `sources` must be a list of paths; got {type(sources).__name__}."
        )
    if not sources:
        raise ValueError(
            "write_cache: `sources` must name something to read; got an empty list."
        )
    path = local_path(path, "write_cache: `path`", target=True)
    # The other files are named by replacing the suffix, and "v1.5" would become "v1.bin".
    if path.suffix not in ("", ".bin", ".idx"):
        raise ValueError(f"write_cache: `path` must end in .bin; got {str(path)!r}.")
    with prefix_errors("write_cache"):
        check_tokenizer(tokenizer, "encode_chunks", "identity", "dtype")
    stats = ReadStats()
    total = sum(size_of(source) for source in sources)

    def all_documents() -> Iterable[Document]:
        for source in sources:
            for document in documents(
                source,
                on_bad=on_bad,
                stats=stats,
                as_bytes=as_bytes,
                encoding=encoding,
            ):
                yield document
                progress(stats.bytes, total)

    with BinidxWriter(path, tokenizer.dtype) as writer:
        card = _write_documents(writer, all_documents(), tokenizer)
        if not card.documents:
            raise ValueError(
                f"write_cache: `{', '.join(map(str, sources))}` has no document."
            )
        blocks = writer.finish()
        # A mask of only ones is omitted; readers assume it.
        has_mask = card.learnt != card.tokens
        if not has_mask:
            del blocks[".mask"]
        card = dataclasses.replace(card, skipped=stats.skipped, blocks=blocks).sealed()
        # Files are replaced in reverse order, so the card comes first. After a crash in between,
        # the stale data files do not match the new card.
        text = json.dumps(dataclasses.asdict(card), indent=1)
        writer.sibling(".card.json").write(text.encode())
    if not has_mask:
        # Another process that writes the same cache may have removed it.
        path.with_suffix(".mask").unlink(missing_ok=True)
    return card, stats


def _write_documents(
    writer: BinidxWriter, selected: Iterable[Document], tokenizer: Tokenizer
) -> CacheMetadata:
    """Writes ids, masks and content hashes; returns the card."""
    hashes = writer.sibling(".keys")
    mask = writer.sibling(".mask")
    count = 0
    tokens = 0
    learnt = 0
    size = 0
    for document in selected:
        hashes.write(document.content_hash().to_bytes(8, "little"))
        for ids, in_loss in document.ids(tokenizer):
            writer.add(ids)
            mask.write(bytes([in_loss]) * len(ids))
            tokens += len(ids)
            learnt += len(ids) * in_loss
        writer.end()
        size += document.size()
        count += 1
    return CacheMetadata(tokenizer.identity, count, tokens, learnt, size, skipped=0)


def read_card(path: str | Path) -> CacheMetadata | None:
    """Reads the `x.card.json` next to the file; returns None if there is none.

    Raises:
        ValueError: the card has another format or is damaged.
    """
    file = local_path(path, "read_card: `path`").with_suffix(".card.json")
    if is_special(file):
        raise ValueError(f"read_card: `{file}` must be a file.")
    if not file.exists():
        return None
    try:
        fields = parse_json(file.read_bytes())
        if fields.get("format") != FORMAT:
            raise ValueError(f"its format is {fields.get('format')!r:.60}")
        card = CacheMetadata(**fields)
        _check_entries(card)
        if card.digest and card.digest != card.sealed().digest:
            raise ValueError("it was changed after it was written (its digest differs)")
        return card
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"read_card: `{file}` must be of {FORMAT!r}: {error}."
        ) from None


def _check_entries(card: CacheMetadata) -> None:
    """Raises unless the entries of a card have the right types; older cards have no digest.

    Raises:
        TypeError: an entry has the wrong type; the message is only the reason.
    """
    for name in ("documents", "tokens", "learnt"):
        if type(getattr(card, name)) is not int:
            raise TypeError(f"its {name} must be an integer")
    if not isinstance(card.vocabulary, str):
        raise TypeError("its vocabulary must be a string")
    is_table = isinstance(card.blocks, dict) and card.blocks.keys() <= set(SUFFIXES)
    if not is_table or not all(isinstance(one, list) for one in card.blocks.values()):
        raise TypeError("its blocks must be lists of digests by suffix")


def _check_blocks(path: Path, card: CacheMetadata) -> None:
    """Raises unless the files match the digests in the card.

    Of a file of more than 512 MiB, only 128 evenly spread blocks are checked.
    """
    for suffix, digests in card.blocks.items():
        file = path.with_suffix(suffix)
        blocks = -(-file.stat().st_size // DIGEST_BLOCK) if file.exists() else 0
        if blocks != len(digests):
            raise ValueError(
                f"open_cache: `{file}` is missing or does not have the size in its card; "
                "rebuild the cache."
            )
        _check_digests(file, digests)


def _check_digests(file: Path, digests: Sequence[str]) -> None:
    """Raises unless evenly spread blocks of a file match their digests."""
    blocks = len(digests)
    chosen = np.linspace(0, blocks - 1, min(blocks, _CHECKED_BLOCKS))
    with file.open("rb") as content:
        for number in chosen.astype(int).tolist():
            first = number * DIGEST_BLOCK
            content.seek(first)
            if block_digest(content.read(DIGEST_BLOCK)) != digests[number]:
                raise ValueError(
                    f"open_cache: `{file}` is damaged: the {DIGEST_BLOCK:,} bytes from "
                    f"{first:,} on are not those that were written; rebuild the cache."
                )


def _map_sibling(
    path: Path,
    suffix: str,
    dtype: str,
    size: int,
) -> np.ndarray:
    """Maps another file of the cache, which must have `size` entries."""
    file = path.with_suffix(suffix)
    wanted = size * np.dtype(dtype).itemsize
    actual = file.stat().st_size if file.exists() else 0
    if actual != wanted:
        raise ValueError(
            f"open_cache: `{file}` must have {wanted} bytes, says its index; it has {actual}."
        )
    return np.asarray(np.memmap(file, dtype, "r"))


def open_cache(
    path: str | Path,
    tokenizer: Tokenizer,
    *,
    split: Split = "all",
    held_out: float = 0.05,
) -> TokenStream:
    """Maps the ids of a `.bin` file, or of one split of it.

    Args:
        path: path of the `.bin` or `.idx` file.
        tokenizer: the model's tokenizer; a cache of another tokenizer is rejected.
        split: one of `SPLITS`. Documents are split as in the source, files without a card by
            position.
        held_out: the held-out share.

    Raises:
        ValueError: a file is damaged, the vocabulary differs, or an id is outside it; the message
            names the file and the position.
    """
    path = local_path(path, "open_cache: `path`")
    if not path.exists():
        refuse_hub_name(path, "open_cache: `path`", kind="dataset")
    card = read_card(path)
    ids, starts = read_binidx(path)
    if card is not None and card.vocabulary != tokenizer.identity:
        raise ValueError(
            f"open_cache: `{path}` must be of the model's vocabulary, {tokenizer.identity}; "
            f"it is of {card.vocabulary}."
        )
    with prefix_errors("token_stream"):
        check_vocabulary(ids, tokenizer.vocab_size, str(path))
    if card is None:
        return split_by_position(TokenArray(ids, starts=starts), split, held_out)
    count = len(starts) - 1
    if card.documents != count or card.tokens != len(ids):
        raise ValueError(
            f"open_cache: `{path.with_suffix('.card.json')}` must count {count} documents and "
            f"{len(ids)} tokens, as the index does; got {card.documents} and {card.tokens}."
        )
    mask = None
    if card.learnt != card.tokens:
        mask = _map_sibling(path, ".mask", "u1", len(ids))
    tokens = TokenArray(ids, mask, starts)
    hashes = None
    if split != "all":
        hashes = _map_sibling(path, ".keys", "<u8", count)
    _check_blocks(path, card)
    # A single document is split by position, as in other sources.
    if hashes is None or count == 1:
        return split_by_position(tokens, split, held_out)
    is_held_out = hashes < held_out_threshold(held_out)
    return TokenStream.of_documents(
        tokens, is_held_out if split == "held_out" else ~is_held_out
    )


def split_by_position(tokens: TokenArray, split: Split, held_out: float) -> TokenStream:
    """Returns one split of ids by position; the end is held out."""
    size = len(tokens.ids)
    border = size - int(size * held_out)
    if split == "train":
        return TokenStream.of_range(tokens, 0, border)
    if split == "held_out":
        return TokenStream.of_range(tokens, border, size)
    return TokenStream.of_range(tokens, 0, size)


def check_vocabulary(
    ids: np.ndarray,
    vocab_size: int,
    name: str,
) -> None:
    """Checks that all ids are inside the vocabulary.

    Raises:
        ValueError: an id is outside; the message has its position.
    """
    limits = np.iinfo(ids.dtype)
    # No search is needed if the dtype cannot hold an id outside the vocabulary.
    if limits.min >= 0 and limits.max < vocab_size:
        return
    for first in range(0, len(ids), _CHUNK):
        piece = ids[first : first + _CHUNK]
        if piece.max() < vocab_size and piece.min() >= 0:
            continue
        outside = np.flatnonzero((piece < 0) | (piece >= vocab_size))
        position = first + int(outside[0])
        raise ValueError(
            f"`{name}` must hold ids from 0 and below {vocab_size}; "
            f"got {int(ids[position])} at position {position}."
        )
