"""Token files of the Megatron kind: `x.bin` holds ids, `x.idx` where documents are.

Source: BlinkDL/RWKV-LM@524481d RWKV-v7/train_temp/src/binidx.py (the format).
"""

import array
import contextlib
import hashlib
import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np

from rwkv7_jax.atomic_write import atomic_write

# What every `.idx` file begins with.
_MAGIC = b"MMIDIDX\x00\x00"

# Version, code of the dtype, number of sequences, number of documents.
_HEADER = struct.Struct("<QBQQ")

# Offset of what follows the header: sizes (int32) and offsets (int64) of sequences, in bytes, then
# the documents as numbers of sequences (int64).
_BODY = len(_MAGIC) + _HEADER.size

# Codes 6 and 7 are floats, which hold no ids.
_DTYPES = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}

_CODES = {np.dtype(dtype): code for code, dtype in _DTYPES.items()}


# Bytes of a file that one digest covers.
DIGEST_BLOCK = 1 << 22


def block_digest(block: bytes | bytearray) -> str:
    """Computes the digest of one block of a file."""
    return hashlib.blake2b(block, digest_size=8).hexdigest()


class DigestedFile:
    """A file to write to that computes the digest of each of its blocks on the way."""

    def __init__(self, file: BinaryIO):
        """Takes an empty file."""
        self._file = file
        self._block = bytearray()
        self._digests: list[str] = []

    def write(self, data: bytes) -> None:
        """Appends bytes."""
        self._file.write(data)
        self._block += data
        while len(self._block) >= DIGEST_BLOCK:
            self._digests.append(block_digest(self._block[:DIGEST_BLOCK]))
            del self._block[:DIGEST_BLOCK]

    def digests(self) -> list[str]:
        """Returns the digests of all blocks so far; the last one may be shorter."""
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
    """Maps all ids, and reads where each sequence begins and last where the ids end.

    RWKV's tools write a document as one sequence with token 0 at its end. What the index says of
    documents of several sequences is ignored, as RWKV's trainer ignores it.

    Args:
        path: the `.bin` file; its `.idx` is next to it.

    Raises:
        ValueError: the index is no index, or does not fit the data; the message has file and
            offset.
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
    # An empty file cannot be mapped.
    ids = np.zeros(0, dtype)
    if actual:
        # A plain view: slices of np.memmap itself cost several times as much.
        ids = np.asarray(np.memmap(data, dtype, "r"))
    return ids, np.concatenate([[0], np.cumsum(sizes)])


class BinidxWriter:
    """A context manager that writes the two files, complete when the block ends without an error.

    It holds four bytes a sequence in memory, nothing else. While the files are exchanged there is
    no index, so that an old and a new file are never read together.

    Attributes:
        dtype: of the ids in the file.
    """

    def __init__(
        self,
        path: str | Path,
        dtype: type = np.uint16,
    ):
        """Prepares the writer; nothing is opened before it is entered.

        Args:
            path: the `.bin` file; the `.idx` is written next to it.
            dtype: of the ids, one that the format has; RWKV's own files have uint16.

        Raises:
            ValueError: the format has no code for the dtype.
        """
        if np.dtype(dtype) not in _CODES:
            raise ValueError(
                f"BinidxWriter: `dtype` must be an integer's; got {dtype!r}."
            )
        native: np.dtype = np.dtype(dtype)
        # The format is little-endian on every machine.
        self.dtype = native.newbyteorder("<")
        self._code = _CODES[native]
        self._path = Path(path)
        self._stack = contextlib.ExitStack()
        self._files: dict[str, DigestedFile] = {}
        self._is_finished = False
        self._sizes = array.array("i")
        # Ids of the sequence that is being written.
        self._size = 0

    def __enter__(self) -> "BinidxWriter":
        """Opens the files under temporary names."""
        # The stack closes the last file first: the index is replaced after the data.
        self._index = self.sibling(".idx")
        self._data = self.sibling(".bin")
        return self

    def __exit__(self, *error) -> None:
        """Replaces the files, or after an error leaves those that were there before."""
        if error[0] is None:
            self.finish()
            # A reader that comes between the two replacements finds no index, not a wrong one.
            self._path.with_suffix(".idx").unlink(missing_ok=True)
        self._stack.__exit__(*error)

    def sibling(self, suffix: str) -> DigestedFile:
        """Opens a further file of the same name, which is replaced together with the others."""
        file = self._stack.enter_context(atomic_write(self._path.with_suffix(suffix)))
        self._files[suffix] = DigestedFile(file)
        return self._files[suffix]

    def finish(self) -> dict[str, list[str]]:
        """Writes the index, after the last sequence.

        Returns:
            The digests of the blocks of each file that is open, by the file's suffix.
        """
        if not self._is_finished:
            self._write_index(self._index)
            self._is_finished = True
        return {suffix: file.digests() for suffix, file in self._files.items()}

    def add(self, ids: np.ndarray) -> None:
        """Appends some ids to the sequence that is being written.

        Raises:
            ValueError: an id that the dtype cannot hold.
        """
        limits = np.iinfo(self.dtype)
        if len(ids) == 0:
            return
        least = ids.min()
        largest = ids.max()
        # A cast would wrap around without a word.
        if least < limits.min or largest > limits.max:
            raise ValueError(
                f"BinidxWriter: `ids` must fit {self.dtype.name}; got {least} to {largest}."
            )
        self._data.write(ids.astype(self.dtype).tobytes())
        self._size += len(ids)

    def end(self) -> None:
        """Ends the sequence."""
        self._sizes.append(self._size)
        self._size = 0

    def _write_index(self, file: DigestedFile) -> None:
        sizes = np.frombuffer(self._sizes, np.int32)
        count = len(sizes)
        file.write(_MAGIC + _HEADER.pack(1, self._code, count, count + 1))
        file.write(sizes.astype("<i4").tobytes())
        # In int64: the sum of many int32 sizes exceeds int32.
        ends = np.cumsum(sizes, dtype=np.int64)
        offsets = (ends - sizes) * self.dtype.itemsize
        file.write(offsets.astype("<i8").tobytes())
        # Every sequence is a document of its own.
        file.write(np.arange(count + 1, dtype="<i8").tobytes())
