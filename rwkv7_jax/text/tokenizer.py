"""Text as ids and back: the World vocabulary, and single bytes for small models."""

import ast
import functools
import hashlib
import lzma
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

END_OF_TEXT = 0

# Named outside the class, where `bytes` is one of its constructors.
Text = str | bytes

Bytes = bytes

_FILE = "rwkv_vocab_v20230424.txt"

_SHA256 = "e6dee3d4e31b4d5c40ac99508ac6c701ceef4bed681bf2167ce9a908552bca89"

# Entries of at least this many bytes are found by their first so many bytes, longest prefix first.
_PREFIXES = (16, 8, 4, 1)


def parse_vocabulary(text: str) -> dict[int, bytes]:
    """The entries of a vocabulary file: each line an id, a Python literal and a byte count.

    Source: BlinkDL/RWKV-LM@524481d RWKV-v7/rwkv_vocab_v20230424.txt (the format).

    Raises:
        ValueError: a line is no entry, or its literal has another length than it says.
    """
    lines = [line for line in text.splitlines() if line]
    numbers, literals, sizes = [], [], []
    for row, line in enumerate(lines, 1):
        number, _, rest = line.partition(" ")
        literal, _, size = rest.rpartition(" ")
        if not (number.isdecimal() and size.isdecimal()):
            raise ValueError(f"parse_vocabulary: line {row} is no entry: {line[:60]!r}.")
        numbers.append(int(number))
        literals.append(literal)
        sizes.append(int(size))
    # One literal for the whole list: a parser call for each of 65529 lines would take seconds.
    entries = ast.literal_eval("[" + ",".join(literals) + "]")
    entries = [e.encode() if isinstance(e, str) else e for e in entries]
    for row, (entry, size) in enumerate(zip(entries, sizes, strict=True), 1):
        if len(entry) != size:
            raise ValueError(f"parse_vocabulary: line {row} says {size} bytes; got {len(entry)}.")
    return dict(zip(numbers, entries, strict=True))


class Tokenizer:
    """A vocabulary: `encode` takes the longest entry at every place, `decode` joins entries.

    Token 0 is the end of text: it is never encoded, and stands for no bytes. Every single byte is
    an entry (id = byte + 1), so that any bytes at all survive the way there and back.
    """

    def __init__(self, entries: dict[int, Bytes], *, vocab_size: int, name: str):
        """A tokenizer of these entries; `world` and `bytes` make the usual ones."""
        self.name = name
        self.vocab_size = vocab_size
        self._entries = {END_OF_TEXT: b"", **entries}
        self._ids = {entry: number for number, entry in entries.items()}
        self._longest_entry = max(map(len, entries.values()))
        self._lengths = _lengths_by_prefix(entries.values()) if name != "bytes" else []

    @classmethod
    @functools.cache
    def world(cls) -> "Tokenizer":
        """The vocabulary of the published World and G1 models: 65529 entries, ids below 65536."""
        folder = Path(__file__).with_name("vocabulary")
        raw = lzma.decompress((folder / f"{_FILE}.xz").read_bytes())
        if hashlib.sha256(raw).hexdigest() != _SHA256:
            raise ValueError(f"Tokenizer.world: `{_FILE}` is damaged; reinstall the package.")
        return cls(parse_vocabulary(raw.decode()), vocab_size=65536, name="world")

    @classmethod
    @functools.cache
    def bytes(cls) -> "Tokenizer":
        """Single bytes: id = byte + 1, 257 ids; the first 257 ids of the World vocabulary."""
        return cls({i + 1: bytes([i]) for i in range(256)}, vocab_size=257, name="bytes")

    @classmethod
    def for_vocabulary(cls, vocab_size: int) -> "Tokenizer":
        """The tokenizer of a model with so many ids.

        Raises:
            ValueError: neither vocabulary has that size.
        """
        if vocab_size == 257:
            return cls.bytes()
        if 65530 <= vocab_size <= 65536:
            return cls.world()
        raise ValueError(
            "Tokenizer.for_vocabulary: `vocab_size` must be 257 (bytes) or 65530 to 65536 (World); "
            f"got {vocab_size}."
        )

    def encode(self, text: Text) -> list[int]:
        """The ids of `text`, the longest entry at every place.

        Raises:
            TypeError: neither str nor bytes.
            ValueError: a str with half a surrogate pair, which has no UTF-8.
        """
        if isinstance(text, str):
            try:
                text = text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(
                    "Tokenizer.encode: `text` must be valid Unicode; got a lone surrogate at "
                    f"character {error.start}."
                ) from None
        if not isinstance(text, (bytes, bytearray)):
            raise TypeError(
                f"Tokenizer.encode: `text` must be str or bytes; got {type(text).__name__}."
            )
        if not self._lengths:
            return (np.frombuffer(text, np.uint8).astype(np.int64) + 1).tolist()
        return self._longest(bytes(text))

    def _longest(self, text: Bytes) -> list[int]:
        find, tables, out, place = self._ids.get, self._lengths, [], 0
        while place < len(text):
            for size, table in tables:
                for length in table.get(text[place : place + size], ()):
                    token = find(text[place : place + length])
                    if token is not None:
                        break
                else:
                    continue
                out.append(token)
                place += length
                break
        return out

    def encode_chunks(self, chunks: Iterable[Bytes]) -> Iterator[np.ndarray]:
        """The ids of all chunks joined, as uint16 arrays; one chunk is held at a time.

        A token is certain when as many bytes as the longest entry has are known from its first on.
        """
        held = b""
        for chunk in chunks:
            # Of `held` more follows: its last tokens may become others.
            ids, place = self.encode(held), len(held)
            certain, count = max(place - self._longest_entry, 0), len(ids)
            while place > certain:
                count -= 1
                place -= len(self._entries[ids[count]])
            if count:
                yield np.asarray(ids[:count], np.uint16)
            held = held[place:] + chunk
        if held:
            yield np.asarray(self.encode(held), np.uint16)

    def token_bytes(self, token: int) -> Bytes:
        """What one id stands for; nothing, for ids of the vocabulary that have no entry.

        Raises:
            ValueError: outside the vocabulary.
        """
        if not 0 <= token < self.vocab_size:
            raise ValueError(
                f"Tokenizer.token_bytes: `token` must be at least 0 and below {self.vocab_size}; "
                f"got {token}."
            )
        return self._entries.get(token, b"")

    def decode_bytes(self, ids: Iterable[int]) -> Bytes:
        """The bytes of `ids`.

        Raises:
            ValueError: an id without an entry; the message has its position.
        """
        ids = list(ids)
        try:
            return b"".join([self._entries[i] for i in ids])
        except KeyError:
            place = next(n for n, i in enumerate(ids) if i not in self._entries)
            raise ValueError(
                f"Tokenizer.decode: `ids` must be entries of the {self.name} vocabulary; "
                f"got {ids[place]} at position {place}."
            ) from None

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD.

        Raises:
            ValueError: an id without an entry; the message has its position.
        """
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


def _lengths_by_prefix(entries: Iterable[bytes]) -> list[tuple[int, dict[bytes, tuple[int, ...]]]]:
    """For each prefix size, the lengths (longest first) of the entries that begin with a prefix."""
    tables: dict[int, dict[bytes, set[int]]] = {size: {} for size in _PREFIXES}
    for entry in entries:
        size = next(size for size in _PREFIXES if len(entry) >= size)
        tables[size].setdefault(entry[:size], set()).add(len(entry))
    return [
        (size, {prefix: tuple(sorted(found, reverse=True)) for prefix, found in table.items()})
        for size, table in tables.items()
    ]
