"""Text to token ids and back: the World vocabulary, and single bytes for small models."""

import ast
import functools
import hashlib
import lzma
import operator
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

END_OF_TEXT = 0

_VOCABULARY_FILE = "rwkv_vocab_v20230424.txt"

_SHA256 = "e6dee3d4e31b4d5c40ac99508ac6c701ceef4bed681bf2167ce9a908552bca89"

# An entry is found by its first bytes: by the longest of these prefix sizes that it has. One table
# of single first bytes would hold thousands of entries that begin with a space.
_PREFIX_SIZES = (16, 8, 4, 1)

# For each prefix size, from a prefix to the lengths of the entries that begin with it.
PrefixTables = list[tuple[int, dict[bytes, tuple[int, ...]]]]


def parse_vocabulary(text: str) -> dict[int, bytes]:
    """Parses a vocabulary file: each line is an id, a Python literal and a byte count.

    Source: BlinkDL/RWKV-LM@524481d RWKV-v7/rwkv_vocab_v20230424.txt (the format).

    Raises:
        ValueError: a line is not an entry, or its literal has another length than it says.
    """
    numbers = []
    literals = []
    sizes = []
    # `splitlines` is safe here: literals write line breaks as escapes.
    lines = [line for line in text.splitlines() if line]
    for row, line in enumerate(lines, 1):
        number, _, rest = line.partition(" ")
        literal, _, size = rest.rpartition(" ")
        if not (number.isdecimal() and size.isdecimal()):
            raise ValueError(
                f"parse_vocabulary: line {row} is no entry: {line[:60]!r}."
            )
        numbers.append(int(number))
        literals.append(literal)
        sizes.append(int(size))

    # One literal for the entire list: a parser call for each of 65529 lines would take seconds.
    values = ast.literal_eval("[" + ",".join(literals) + "]")
    entries = {}
    rows = zip(numbers, values, sizes, strict=True)
    for row, (number, value, size) in enumerate(rows, 1):
        entry = value.encode() if isinstance(value, str) else value
        if len(entry) != size:
            raise ValueError(
                f"parse_vocabulary: line {row} says {size} bytes; got {len(entry)}."
            )
        entries[number] = entry
    return entries


class Tokenizer:
    """A vocabulary: `encode` takes the longest entry at every place, `decode` joins entries.

    Token 0 is the end of text: it is never encoded, and stands for no bytes. Every single byte is
    an entry (id = byte + 1), so any bytes survive encoding and decoding.
    """

    def __init__(
        self,
        entries: dict[int, bytes],
        *,
        vocab_size: int,
        name: str,
    ):
        """Makes a tokenizer of these entries; `world` and `bytes` make the usual ones."""
        self.name = name
        self.vocab_size = vocab_size
        self._entries = {END_OF_TEXT: b"", **entries}
        self._ids = {entry: number for number, entry in entries.items()}
        self._longest_entry = max(map(len, entries.values()))
        # Without tables every byte is an entry of its own.
        self._tables = _prefix_tables(entries.values()) if name != "bytes" else []

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
    def for_vocabulary(cls, vocab_size: int) -> "Tokenizer":
        """Returns the tokenizer of a model with this many ids.

        Raises:
            TypeError: the size is no integer.
            ValueError: neither vocabulary has that size.
        """
        if not hasattr(vocab_size, "__index__"):
            raise TypeError(
                "Tokenizer.for_vocabulary: `vocab_size` must be an integer; "
                f"got {type(vocab_size).__name__}."
            )
        if vocab_size == 257:
            return cls.bytes()
        if 65530 <= vocab_size <= 65536:
            return cls.world()
        raise ValueError(
            "Tokenizer.for_vocabulary: `vocab_size` must be 257 (bytes) or 65530 to 65536 (World); "
            f"got {vocab_size}."
        )

    def encode(self, text: str | bytes) -> list[int]:
        """Encodes a text, taking the longest entry at every place.

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
        if not self._tables:
            # Widened before 1 is added: byte 255 would wrap around to 0, the end of text.
            return (np.frombuffer(text, np.uint8).astype(np.int64) + 1).tolist()
        return self._encode_longest(bytes(text))

    def _encode_longest(self, text: bytes) -> list[int]:
        # This loop is all that encoding costs: names are looked up outside of it.
        id_of = self._ids.get
        tables = self._tables
        ids = []
        place = 0
        while place < len(text):
            token = None
            # Longer prefixes come first, so the first entry that fits is the longest one.
            for size, table in tables:
                for length in table.get(text[place : place + size], ()):
                    token = id_of(text[place : place + length])
                    if token is not None:
                        break
                else:
                    continue
                ids.append(token)
                place += length
                break
        return ids

    def encode_chunks(self, chunks: Iterable[bytes]) -> Iterator[np.ndarray]:
        """Encodes all chunks joined, as uint16 arrays; one chunk at a time is in memory.

        A token is certain once as many bytes as the longest entry has are known from its first
        byte on; the others wait for the next chunk, with which they may become other tokens.
        """
        pending = b""
        for chunk in chunks:
            ids = self.encode(pending)
            end = len(pending)
            count = len(ids)
            # Tokens that begin later could become parts of longer entries with the bytes to come.
            certain = max(end - self._longest_entry, 0)
            while end > certain:
                count -= 1
                end -= len(self._entries[ids[count]])
            if count:
                yield np.asarray(ids[:count], np.uint16)
            pending = pending[end:] + chunk
        if pending:
            yield np.asarray(self.encode(pending), np.uint16)

    def token_bytes(self, token: int) -> bytes:
        """Returns the bytes of one id; none for ids of the vocabulary that have no entry.

        Raises:
            TypeError: the id is no integer.
            ValueError: outside the vocabulary.
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
            TypeError: no list of integers.
            ValueError: an id without an entry; the message gives its position.
        """
        numbers = _integers(ids)
        try:
            return b"".join([self._entries[number] for number in numbers])
        except KeyError:
            place = next(
                n for n, number in enumerate(numbers) if number not in self._entries
            )
            raise ValueError(
                f"Tokenizer.decode: `ids` must be entries of the {self.name} vocabulary; "
                f"got {numbers[place]} at position {place}."
            ) from None

    def decode(self, ids: Iterable[int]) -> str:
        """Decodes ids to text; bytes that are not UTF-8 become U+FFFD.

        Raises:
            TypeError: no list of integers.
            ValueError: an id without an entry; the message gives its position.
        """
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    # The last name in the class: in all annotations above, `bytes` still is the built-in type.
    @classmethod
    @functools.cache
    def bytes(cls) -> "Tokenizer":
        """Makes the byte vocabulary: id = byte + 1, 257 ids; the first 257 ids of World."""
        entries = {byte + 1: bytes([byte]) for byte in range(256)}
        return cls(entries, vocab_size=257, name="bytes")


def _integers(ids: Iterable[int]) -> list[int]:
    """Returns ids as Python's integers: arrays of JAX, for one, are no keys of a dict."""
    is_list = isinstance(ids, Iterable) and getattr(ids, "shape", None) != ()
    if isinstance(ids, str | bytearray) or not is_list:
        raise TypeError(
            f"Tokenizer.decode: `ids` must be a list of ids; got {type(ids).__name__}."
        )
    numbers = []
    for place, number in enumerate(ids):
        try:
            numbers.append(operator.index(number))
        except TypeError:
            raise TypeError(
                f"Tokenizer.decode: `ids` must hold integers; got {number!r} at position {place}."
            ) from None
    return numbers


def _prefix_tables(entries: Iterable[bytes]) -> PrefixTables:
    """Sorts the lengths of entries, longest first, by the prefix by which they are found."""
    lengths: dict[int, dict[bytes, set[int]]] = {size: {} for size in _PREFIX_SIZES}
    for entry in entries:
        size = next(size for size in _PREFIX_SIZES if len(entry) >= size)
        lengths[size].setdefault(entry[:size], set()).add(len(entry))
    tables = []
    for size, by_prefix in lengths.items():
        table = {}
        for prefix, found in by_prefix.items():
            # Longest first, so that the first entry found is the one to take.
            table[prefix] = tuple(sorted(found, reverse=True))
        tables.append((size, table))
    return tables
