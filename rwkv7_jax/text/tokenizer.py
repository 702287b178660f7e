"""Greedy longest-match tokenizers: the World vocabulary, byte vocabularies, and similar ones."""

import copy
import functools
import hashlib
import lzma
import operator
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from rwkv7_jax.text.rust_tokenizer import (
    TextEncoder,
    rust_encoder,
    text_before_cut,
)
from rwkv7_jax.text.vocabulary_file import format_vocabulary, parse_vocabulary

END_OF_TEXT = 0

_VOCABULARY_FILE = "rwkv_vocab_v20230424.txt"

_SHA256 = "e6dee3d4e31b4d5c40ac99508ac6c701ceef4bed681bf2167ce9a908552bca89"

# An entry is looked up by a prefix of the largest of these sizes that fits. A table of single first
# bytes would have thousands of entries that begin with a space.
_PREFIX_SIZES = (16, 8, 4, 1)

# The text size in bytes above which loading the Rust package, 0.4 seconds, pays off.
_LONG_TEXT = 2**18

# Bytes of text that World collects before encoding, because files come in chunks shorter than
# `_LONG_TEXT`.
_WORLD_BLOCK = 2**20

# Ids below this fit into the 16 bits of RWKV's own token files.
_SHORT_IDS = 2**16

# Far more than any model has; a damaged file must not cause tables of billions.
_MOST_IDS = 2**24

# For each prefix size, a map from prefixes to the lengths of the entries that begin with them.
PrefixTables = list[tuple[int, dict[bytes, tuple[int, ...]]]]


class Tokenizer:
    """A vocabulary that encodes by greedy longest match and decodes by joining entries.

    World and `bytes` have an entry for every byte (id = byte + 1), so any bytes survive a
    round-trip. Their token 0 is the end of text: it is never encoded and has no bytes.

    Attributes:
        name: name of a built-in vocabulary, or path of the file.
        kind: name of a built-in vocabulary; otherwise "file" or "tokenizer.json".
        vocab_size: number of ids; ids without an entry have no bytes.
        end_of_text: the end-of-text id; None if there is none.
    """

    def __init__(
        self,
        entries: dict[int, bytes],
        *,
        vocab_size: int,
        name: str,
        kind: str | None = None,
    ):
        """Builds a tokenizer from entries; `world` and `bytes` build the usual ones.

        Args:
            entries: the bytes of each id. If 0 is not an entry, it is the end of text.
            vocab_size: number of ids.
            name: name for messages.
            kind: kind of the vocabulary; None for a built-in one, whose kind is its name.

        Raises:
            TypeError: an entry is not bytes.
            ValueError: an id is outside the vocabulary, or larger than any model's.
        """
        largest = max(entries, default=0)
        if largest >= _MOST_IDS:
            raise ValueError(
                f"`{name}` must have ids below {_MOST_IDS:,}; got {largest:,}."
            )
        if largest >= vocab_size or min(entries, default=0) < 0:
            raise ValueError(
                f"`{name}` must have ids from 0 and below its size of {vocab_size:,}; got "
                f"{min(entries, default=0):,} to {largest:,}."
            )
        for number, entry in entries.items():
            if not isinstance(entry, bytes):
                raise TypeError(
                    f"`{name}` must have entries of bytes; got {type(entry).__name__} for "
                    f"{number:,}."
                )
        self.name = name
        self.kind = kind or name
        self._is_built_in = kind is None
        self.vocab_size = vocab_size
        # The digest covers these ids; `with_vocab_size` may add unused ones.
        self._described = vocab_size
        spelled = {number: entry for number, entry in entries.items() if entry}
        self.end_of_text = None if END_OF_TEXT in spelled else END_OF_TEXT
        self._entries = {**entries}
        if self.end_of_text is not None:
            self._entries[self.end_of_text] = b""
        self._ids = {entry: number for number, entry in spelled.items()}
        self._longest_entry = max(map(len, self._ids), default=1)
        # Byte vocabularies need no tables: an id is the byte plus the id of byte 0.
        self._first_byte = _id_of_first_byte(spelled)
        self._tables = _prefix_tables(self._ids) if self._first_byte is None else []

    def __repr__(self) -> str:
        """Returns the kind, the name and the number of ids."""
        return f"{type(self).__name__}({self.name!r}, vocab_size={self.vocab_size})"

    @classmethod
    @functools.cache
    def world(cls) -> "Tokenizer":
        """Loads the vocabulary of the World and G1 models: 65529 entries, ids below 65536."""
        folder = Path(__file__).with_name("vocabulary")
        raw = lzma.decompress((folder / f"{_VOCABULARY_FILE}.xz").read_bytes())
        if hashlib.sha256(raw).hexdigest() != _SHA256:
            raise ValueError(
                f"Tokenizer.world: `{_VOCABULARY_FILE}` is damaged; reinstall the package."
            )
        return cls(parse_vocabulary(raw.decode()), vocab_size=65536, name="world")

    @classmethod
    @functools.cache
    def bytes256(cls) -> "Tokenizer":
        """Builds the raw byte vocabulary: id = byte, 256 ids, no end of text."""
        entries = {byte: byte.to_bytes() for byte in range(256)}
        return cls(entries, vocab_size=256, name="bytes256")

    @classmethod
    def for_vocabulary(cls, vocab_size: int) -> "Tokenizer":
        """Returns the built-in tokenizer for a model's vocabulary size.

        Raises:
            TypeError: `vocab_size` is not an integer.
            ValueError: no built-in vocabulary has that size.
        """
        if not hasattr(vocab_size, "__index__"):
            raise TypeError(
                "Tokenizer.for_vocabulary: `vocab_size` must be an integer; "
                f"got {type(vocab_size).__name__}."
            )
        if vocab_size == 256:
            return cls.bytes256()
        if vocab_size == 257:
            return cls.bytes()
        if 65530 <= vocab_size <= 65536:
            return cls.world()
        raise ValueError(
            "Tokenizer.for_vocabulary: `vocab_size` must be 256 or 257 (bytes) or 65530 to 65536 "
            f"(World) unless a vocabulary is named (`load_vocabulary`); got {vocab_size}."
        )

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids that stop generation: `end_of_text`, if there is one."""
        return () if self.end_of_text is None else (self.end_of_text,)

    @property
    def dtype(self) -> type[np.integer]:
        """The smallest dtype of token files that holds all ids."""
        return np.uint16 if self.vocab_size <= _SHORT_IDS else np.int32

    @functools.cached_property
    def digest(self) -> str:
        """The digest of the entries; equal digests mean that all texts have equal ids."""
        entries = [self._entries.get(number, b"") for number in range(self._described)]
        # The checkpoints of older runs hold the digest of the printed list, so it must stay.
        return text_digest(repr(entries))

    @property
    def identity(self) -> str:
        """What cards and sidecars store: a built-in vocabulary's name, else kind and digest."""
        return self.kind if self._is_built_in else f"{self.kind} {self.digest}"

    @property
    def largest_id(self) -> int:
        """The largest id with an entry."""
        return max(self._entries, default=0)

    def with_vocab_size(self, vocab_size: int) -> "Tokenizer":
        """Returns the same vocabulary with another number of ids; the additional ids are unused.

        Raises:
            ValueError: an entry would be outside the vocabulary.
        """
        if vocab_size <= self.largest_id:
            raise ValueError(
                f"Tokenizer.with_vocab_size: `vocab_size` must be above the largest id, "
                f"{self.largest_id:,}; got {vocab_size:,}."
            )
        other = copy.copy(self)
        other.vocab_size = vocab_size
        return other

    def file_text(self) -> str:
        """Writes the vocabulary in the format of a vocabulary file."""
        spelled = {number: entry for number, entry in self._entries.items() if entry}
        return format_vocabulary(spelled)

    def encode(self, text: str | bytes) -> list[int]:
        """Encodes a text by greedy longest match.

        Raises:
            TypeError: `text` is neither str nor bytes.
            ValueError: `text` has a lone surrogate, which has no UTF-8, or bytes that no entry
                covers.
        """
        data = text_bytes(text)
        ids, _ = self._encode_until(data, len(data))
        return ids

    def _encode_until(
        self, data: bytes, limit: int, *, before: int = 0
    ) -> tuple[list[int], int]:
        """Encodes the tokens that begin before `limit`; returns them and where they end.

        Args:
            data: bytes of the text.
            limit: position in the bytes.
            before: size of the text before these bytes, for the error message.
        """
        if self._first_byte is not None:
            # Widened before the addition: byte 255 would wrap around to 0, the end of text.
            numbers = np.frombuffer(data[:limit], np.uint8).astype(np.int64)
            return (numbers + self._first_byte).tolist(), limit
        ids, position = self._encode_start(data, limit)
        # This loop dominates the cost of encoding, so attributes are looked up before it.
        id_of = self._ids.get
        tables = self._tables
        while position < limit:
            token = None
            # Longer prefixes come first, so the first match is the longest.
            for size, table in tables:
                for length in table.get(data[position : position + size], ()):
                    token = id_of(data[position : position + length])
                    if token is not None:
                        break
                else:
                    continue
                ids.append(token)
                position += length
                break
            if token is None:
                raise ValueError(
                    f"Tokenizer.encode: `text` must consist of entries of {self.name}; none "
                    f"begins at byte {before + position}, {data[position : position + 16]!r}."
                )
        return ids, position

    def _encode_start(self, data: bytes, limit: int) -> tuple[list[int], int]:
        """Encodes the start of a long text with the Rust package; returns the ids and their end."""
        if limit < _LONG_TEXT or self._text_encoder is None:
            return [], 0
        text = text_before_cut(data)
        ids = list(self._text_encoder(text))
        end = len(text.encode())
        # Near a cut, the bytes after it may give a longer match.
        if end < len(data):
            limit = min(limit, end - self._longest_entry + 1)
        while ids and end - len(self._entries[ids[-1]]) >= limit:
            end -= len(self._entries[ids.pop()])
        return ids, end

    @functools.cached_property
    def _text_encoder(self) -> TextEncoder | None:
        """The `encode` of the Rust package; None if it is not installed or this is not World."""
        return rust_encoder(self._ids) if self._is_world else None

    @property
    def _is_world(self) -> bool:
        return self._is_built_in and self.kind == "world"

    def encode_chunks(self, chunks: Iterable[bytes]) -> Iterator[np.ndarray]:
        """Encodes the joined chunks and yields the ids in pieces.

        Holds one chunk in memory, or for World about a megabyte (see `_text_encoder`). A token is
        certain once the bytes of the longest entry are known from its first byte on. The remaining
        bytes wait for the next chunk.

        Raises:
            TypeError: `chunks` is a single text.
            ValueError: no entry covers some bytes; see `encode`.
        """
        if isinstance(chunks, str | bytes):
            raise TypeError(
                "Tokenizer.encode_chunks: `chunks` must be pieces of a text; got "
                f"{type(chunks).__name__}."
            )
        pending = b""
        before = 0
        for chunk in joined_chunks(chunks, _WORLD_BLOCK if self._is_world else 0):
            pending += chunk
            certain = len(pending) - self._longest_entry + 1
            ids, end = self._encode_until(pending, max(certain, 0), before=before)
            if ids:
                yield np.asarray(ids, self.dtype)
            pending = pending[end:]
            before += end
        if pending:
            ids, _ = self._encode_until(pending, len(pending), before=before)
            yield np.asarray(ids, self.dtype)

    def token_bytes(self, token: int) -> bytes:
        """Returns the bytes of one id; empty if the id has no entry.

        Raises:
            TypeError: `token` is not an integer.
            ValueError: `token` is outside the vocabulary.
        """
        try:
            token = operator.index(token)
        except TypeError:
            raise TypeError(
                f"Tokenizer.token_bytes: `token` must be an integer; got {type(token).__name__}."
            ) from None
        if not 0 <= token < self.vocab_size:
            raise ValueError(
                f"Tokenizer.token_bytes: `token` must be at least 0 and below {self.vocab_size}; "
                f"got {token}."
            )
        return self._entries.get(token, b"")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Joins the bytes of ids.

        Raises:
            TypeError: `ids` is not a list of integers.
            ValueError: an id has no entry; the message gives its position.
        """
        numbers = as_integers(ids)
        try:
            return b"".join([self._entries[number] for number in numbers])
        except KeyError:
            unknown = [number not in self._entries for number in numbers]
            place = unknown.index(True)
            raise ValueError(
                f"Tokenizer.decode: `ids` must be entries of the {self.name} vocabulary; "
                f"got {numbers[place]} at position {place}."
            ) from None

    def decode(self, ids: Iterable[int]) -> str:
        """Decodes ids to text; bytes that are not UTF-8 become U+FFFD.

        Raises:
            TypeError: `ids` is not a list of integers.
            ValueError: an id has no entry; the message gives its position.
        """
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    # Defined last, so that `bytes` is the built-in type in all annotations above.
    @classmethod
    @functools.cache
    def bytes(cls) -> "Tokenizer":
        """Builds the byte vocabulary: id = byte + 1, 257 ids, the first 257 ids of World."""
        entries = {byte + 1: bytes([byte]) for byte in range(256)}
        return cls(entries, vocab_size=257, name="bytes")


def text_bytes(text: str | bytes) -> bytes:
    """Returns the UTF-8 of a str; returns bytes unchanged.

    Raises:
        TypeError: `text` is neither str nor bytes.
        ValueError: `text` has a lone surrogate, which has no UTF-8.
    """
    if isinstance(text, str):
        try:
            return text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                "Tokenizer.encode: `text` must be valid Unicode; got a lone surrogate at "
                f"character {error.start}."
            ) from None
    if not isinstance(text, (bytes, bytearray)):
        raise TypeError(
            f"Tokenizer.encode: `text` must be str or bytes; got {type(text).__name__}."
        )
    return bytes(text)


def joined_chunks(chunks: Iterable[bytes], size: int) -> Iterator[bytes]:
    """Joins chunks into chunks of at least `size` bytes; only the last one may be shorter."""
    parts = []
    length = 0
    for chunk in chunks:
        parts.append(chunk)
        length += len(chunk)
        if length >= size:
            yield b"".join(parts)
            parts = []
            length = 0
    if parts:
        yield b"".join(parts)


def text_digest(text: str) -> str:
    """Returns a digest of a text as 32 hexadecimal digits."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _id_of_first_byte(entries: dict[int, bytes]) -> int | None:
    """Returns the id of byte 0 if the entries are the 256 single bytes in order, else None."""
    first = min(entries, default=0)
    in_order = {first + byte: bytes([byte]) for byte in range(256)}
    return first if entries == in_order else None


def as_integers(ids: Iterable[int]) -> list[int]:
    """Converts ids to Python integers, as JAX arrays cannot be dict keys."""
    is_list = isinstance(ids, Iterable) and getattr(ids, "shape", None) != ()
    if isinstance(ids, str | bytearray) or not is_list:
        raise TypeError(
            f"Tokenizer.decode: `ids` must be a list of ids; got {type(ids).__name__}."
        )
    numbers = []
    for position, number in enumerate(ids):
        try:
            numbers.append(operator.index(number))
        except TypeError:
            raise TypeError(
                f"Tokenizer.decode: `ids` must hold integers; got {number!r} at position "
                f"{position}."
            ) from None
    return numbers


def _prefix_tables(entries: Iterable[bytes]) -> PrefixTables:
    """Groups the lengths of entries, longest first, by their lookup prefix."""
    lengths: dict[int, dict[bytes, set[int]]] = {size: {} for size in _PREFIX_SIZES}
    for entry in entries:
        size = next(size for size in _PREFIX_SIZES if len(entry) >= size)
        lengths[size].setdefault(entry[:size], set()).add(len(entry))
    tables = []
    for size, by_prefix in lengths.items():
        table = {}
        for prefix, sizes in by_prefix.items():
            table[prefix] = tuple(sorted(sizes, reverse=True))
        tables.append((size, table))
    return tables
