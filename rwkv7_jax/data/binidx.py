"""Megatron-style token files: `x.bin` holds ids, `x.idx` the positions of documents.

Source: BlinkDL/RWKV-LM@524481d RWKV-v7/train_temp/src/binidx.py (the format).
"""

import array
import contextlib
import hashlib
import os
import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np

from rwkv7_jax.atomic_write import atomic_write
from rwkv7_jax.local_paths import name_in_errors

# The first bytes of every `.idx` file.
_MAGIC = b"MMIDIDX\x00\x00"

# Version, dtype code, number of sequences, number of documents.
_HEADER = struct.Struct("<QBQQ")

# Offset of the body: the sizes (int32, in ids) and offsets (int64, in bytes) of the sequences, then
# the documents as sequence indices (int64).
_BODY = len(_MAGIC) + _HEADER.size

# Codes 6 and 7 are floats, which cannot be ids.
_DTYPES = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}

_CODES = {np.dtype(dtype): code for code, dtype in _DTYPES.items()}


# The size of a sequence is an int32.
_LONGEST_SEQUENCE = 2**31 - 1

# Bytes of a file that one digest covers.
DIGEST_BLOCK = 1 << 22


def block_digest(block: bytes | bytearray) -> str:
    """Computes the digest of one block of a file."""
    return hashlib.blake2b(block, digest_size=8).hexdigest()


class DigestedFile:
    """A file for writing that computes the digest of each block as it is written."""

    def __init__(self, file: BinaryIO, path: Path):
        """Wraps an empty file.

        Args:
            file: the file.
            path: the name of the file in error messages.
        """
        self._file = file
        self._path = path
        self._block = bytearray()
        self._digests: list[str] = []

    def write(self, data: bytes) -> None:
        """Appends bytes."""
        with name_in_errors(self._path):
            self._file.write(data)
        self._block += data
        while len(self._block) >= DIGEST_BLOCK:
            self._digests.append(block_digest(self._block[:DIGEST_BLOCK]))
            del self._block[:DIGEST_BLOCK]

    def flush(self) -> None:
        """Flushes the buffer to the file."""
        with name_in_errors(self._path):
            self._file.flush()

    def digests(self) -> list[str]:
        """Returns the digests of all blocks so far; the last block may be shorter."""
        rest = [block_digest(self._block)] if self._block else []
        return self._digests + rest


def _parse_header(
    index: bytes,
    path: Path,
) -> tuple[np.dtype, int]:
    """Parses the dtype of the ids and the number of sequences, and checks the file's size."""
    if not index.startswith(_MAGIC):
        raise ValueError(f"read_binidx: `{path}` at byte 0: no MMIDIDX magic.")
    if len(index) < _BODY:
        raise ValueError(
            f"read_binidx: `{path}` at byte {len(index)}: the header is cut off."
        )
    version, code, sequences, documents = _HEADER.unpack_from(index, len(_MAGIC))
    if version != 1:
        raise ValueError(
            f"read_binidx: `{path}` at byte 9: version must be 1; got {version}."
        )
    if code not in _DTYPES:
        raise ValueError(
            f"read_binidx: `{path}` at byte 17: no integer dtype has code {code}."
        )
    wanted = _BODY + 4 * sequences + 8 * sequences + 8 * documents
    if len(index) != wanted:
        raise ValueError(
            f"read_binidx: `{path}` must have {wanted} bytes; it has {len(index)}."
        )
    return np.dtype(_DTYPES[code]).newbyteorder("<"), sequences


def _read_index(path: Path) -> tuple[np.dtype, np.ndarray]:
    """Reads the dtype of the ids and the sizes of the sequences from the `.idx` file."""
    index = path.read_bytes()
    dtype, sequences = _parse_header(index, path)
    sizes = np.frombuffer(index, "<i4", sequences, _BODY).astype(np.int64)
    offsets = np.frombuffer(index, "<i8", sequences, _BODY + 4 * sequences)
    negative = np.flatnonzero(sizes < 0)
    if len(negative):
        offset = _BODY + 4 * int(negative[0])
        raise ValueError(
            f"read_binidx: `{path}` at byte {offset}: a sequence of negative size."
        )
    starts = np.cumsum(sizes) - sizes
    gaps = np.flatnonzero(offsets != starts * dtype.itemsize)
    if len(gaps):
        offset = _BODY + 4 * sequences + 8 * int(gaps[0])
        raise ValueError(
            f"read_binidx: `{path}` at byte {offset}: a sequence does not follow the last."
        )
    return dtype, sizes


def read_binidx(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Maps all ids and returns them with the start of each sequence, followed by the end.

    RWKV's tools write each document as one sequence that ends with token 0. The index's own list of
    documents is ignored, as in RWKV's trainer.

    Args:
        path: path of the `.bin` file; its `.idx` is next to it.

    Raises:
        ValueError: the index is invalid or does not match the data; the message has the file and
            the offset.
    """
    data = Path(path).with_suffix(".bin")
    index = Path(path).with_suffix(".idx")
    for file in (data, index):
        if not file.exists():
            raise ValueError(f"read_binidx: `{file}` does not exist.")
        if not file.is_file():
            raise ValueError(f"read_binidx: `{file}` must be a file.")
    dtype, sizes = _read_index(index)
    actual = data.stat().st_size
    wanted = int(sizes.sum()) * dtype.itemsize
    if actual != wanted:
        raise ValueError(
            f"read_binidx: `{data}` must have {wanted} bytes, says its index; it has {actual}."
        )
    # An empty file cannot be memory-mapped.
    ids = np.zeros(0, dtype)
    if actual:
        # A plain array, because slicing an np.memmap costs several times as much.
        ids = np.asarray(np.memmap(data, dtype, "r"))
    return ids, np.concatenate([[0], np.cumsum(sizes)])


class BinidxWriter:
    """A context manager that writes the two files, complete if the block ends without an error.

    It holds only four bytes per sequence in memory. The index does not exist while the files are
    replaced, so that an old file is never read with a new one.

    Attributes:
        dtype: dtype of the ids in the file.
    """

    def __init__(
        self,
        path: str | Path,
        dtype: type[np.integer] = np.uint16,
    ):
        """Prepares the writer; files are opened only when it is entered.

        Args:
            path: path of the `.bin` file; the `.idx` is written next to it.
            dtype: dtype of the ids, as of `Tokenizer.dtype`; RWKV's own files use uint16.
        """
        # The format is little-endian on every machine.
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self._code = _CODES[np.dtype(dtype)]
        self._path = Path(path)
        self._stack = contextlib.ExitStack()
        self._files: dict[str, DigestedFile] = {}
        self._is_finished = False
        self._sizes = array.array("i")
        # The size of the current sequence so far.
        self._size = 0

    def __enter__(self) -> "BinidxWriter":
        """Opens the files under temporary names."""
        # The stack closes the last file first: the index is replaced after the data.
        self._index = self.sibling(".idx")
        self._data = self.sibling(".bin")
        return self

    def __exit__(self, *error) -> None:
        """Replaces the files, or after an error leaves the previous ones in place."""
        if error[0] is None:
            # Runs before the files are replaced, and an error in it removes them.
            self._stack.callback(self._complete)
        self._stack.__exit__(*error)

    def _complete(self) -> None:
        """Writes everything to the temporary files, and removes the old index."""
        self.finish()
        # A disk that is full must be noticed before the first file is replaced.
        for file in self._files.values():
            file.flush()
        # A reader between the two replacements finds no index instead of a wrong one. Of a link,
        # the target is removed, which is what `atomic_write` replaces.
        index = os.path.realpath(self._path.with_suffix(".idx"))
        Path(index).unlink(missing_ok=True)

    def sibling(self, suffix: str) -> DigestedFile:
        """Opens another file with the same stem, which is replaced together with the others."""
        path = self._path.with_suffix(suffix)
        file = self._stack.enter_context(atomic_write(path))
        self._files[suffix] = DigestedFile(file, path)
        return self._files[suffix]

    def finish(self) -> dict[str, list[str]]:
        """Writes the index after the last sequence.

        Returns:
            The block digests of each open file, by suffix.
        """
        if not self._is_finished:
            self._write_index(self._index)
            self._is_finished = True
        return {suffix: file.digests() for suffix, file in self._files.items()}

    def add(self, ids: np.ndarray) -> None:
        """Appends ids to the current sequence.

        Raises:
            ValueError: the dtype cannot hold an id, or the sequence is too long for the format.
        """
        limits = np.iinfo(self.dtype)
        if len(ids) == 0:
            return
        least = ids.min()
        largest = ids.max()
        # A cast would wrap around silently.
        if least < limits.min or largest > limits.max:
            raise ValueError(
                f"BinidxWriter: `ids` must fit {self.dtype.name}; got {least} to {largest}."
            )
        self._size += len(ids)
        if self._size > _LONGEST_SEQUENCE:
            raise ValueError(
                f"BinidxWriter: `ids` must be of documents of at most {_LONGEST_SEQUENCE:,} ids, "
                "the most that the format can count; split the longest document."
            )
        self._data.write(ids.astype(self.dtype).tobytes())

    def end(self) -> None:
        """Ends the current sequence."""
        self._sizes.append(self._size)
        self._size = 0

    def _write_index(self, file: DigestedFile) -> None:
        sizes = np.frombuffer(self._sizes, np.int32)
        count = len(sizes)
        file.write(_MAGIC + _HEADER.pack(1, self._code, count, count + 1))
        file.write(sizes.astype("<i4").tobytes())
        # In int64, because the sum of many sizes exceeds int32.
        ends = np.cumsum(sizes, dtype=np.int64)
        offsets = (ends - sizes) * self.dtype.itemsize
        file.write(offsets.astype("<i8").tobytes())
        # Every sequence is its own document.
        file.write(np.arange(count + 1, dtype="<i8").tobytes())
