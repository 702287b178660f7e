"""Token files of the Megatron kind: `x.bin` holds ids, `x.idx` where documents lie.

Source: BlinkDL/RWKV-LM@524481d RWKV-v7/train_temp/src/binidx.py (the format).
"""

import array
import contextlib
import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np

from rwkv7_jax.atomic_write import atomic_write

_MAGIC = b"MMIDIDX\x00\x00"

_HEAD = struct.Struct("<QBQQ")

_BODY = len(_MAGIC) + _HEAD.size

_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}

_CODES = {np.dtype(dtype): code for code, dtype in _DTYPES.items()}


def _index(path: Path) -> tuple[np.dtype, np.ndarray]:
    """The dtype of the ids and the sizes of the sequences, from the `.idx` file."""
    head = path.read_bytes()
    if not head.startswith(_MAGIC):
        raise ValueError(f"read_binidx: `{path}` at byte 0: no MMIDIDX magic.")
    if len(head) < _BODY:
        raise ValueError(f"read_binidx: `{path}` at byte {len(head)}: the header is cut off.")
    version, code, sequences, documents = _HEAD.unpack_from(head, len(_MAGIC))
    if version != 1:
        raise ValueError(f"read_binidx: `{path}` at byte 9: version must be 1; got {version}.")
    if code not in _DTYPES:
        raise ValueError(f"read_binidx: `{path}` at byte 17: no integer dtype has code {code}.")
    wanted = _BODY + 4 * sequences + 8 * sequences + 8 * documents
    if len(head) != wanted:
        raise ValueError(f"read_binidx: `{path}` must have {wanted} bytes; it has {len(head)}.")
    sizes = np.frombuffer(head, "<i4", sequences, _BODY).astype(np.int64)
    starts = np.frombuffer(head, "<i8", sequences, _BODY + 4 * sequences)
    dtype = np.dtype(_DTYPES[code]).newbyteorder("<")
    if len(wrong := np.flatnonzero(sizes < 0)):
        place = _BODY + 4 * int(wrong[0])
        raise ValueError(f"read_binidx: `{path}` at byte {place}: a sequence of negative size.")
    wrong = np.flatnonzero(starts != (np.cumsum(sizes) - sizes) * dtype.itemsize)
    if len(wrong):
        place = _BODY + 4 * sequences + 8 * int(wrong[0])
        raise ValueError(
            f"read_binidx: `{path}` at byte {place}: a sequence does not follow the last."
        )
    return dtype, sizes


def read_binidx(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """All ids, memory-mapped, and where each sequence begins and last the ids end.

    RWKV's tools write a document as one sequence with token 0 at its end. What the index says of
    documents of several sequences is not used, as RWKV's trainer does not use it.

    Args:
        path: the `.bin` file; its `.idx` lies beside it.

    Raises:
        ValueError: the index is no index, or does not fit the data; the message has file and
            offset.
    """
    data, index = Path(path).with_suffix(".bin"), Path(path).with_suffix(".idx")
    for file in (data, index):
        if not file.exists():
            raise ValueError(f"read_binidx: `{file}` does not exist.")
    dtype, sizes = _index(index)
    held, wanted = data.stat().st_size, int(sizes.sum()) * dtype.itemsize
    if held != wanted:
        raise ValueError(
            f"read_binidx: `{data}` must have {wanted} bytes, says its index; it has {held}."
        )
    # A plain view: slices of np.memmap itself cost several times as much.
    ids = np.asarray(np.memmap(data, dtype, "r")) if held else np.zeros(0, dtype)
    return ids, np.concatenate([[0], np.cumsum(sizes)])


class BinidxWriter:
    """The two files, written as sequences come: they are there whole when the block ends well.

    Four bytes a sequence are held in memory, nothing else. While the files are exchanged there is
    no index, so that old and new ones are never read together.
    """

    def __init__(self, path: str | Path, dtype: type = np.uint16):
        """Ready to be entered.

        Args:
            path: the `.bin` file; the `.idx` goes beside it.
            dtype: of the ids, one that the format has; RWKV's own files have uint16.

        Raises:
            ValueError: the format has no code for the dtype.
        """
        if np.dtype(dtype) not in _CODES:
            raise ValueError(f"BinidxWriter: `dtype` must be an integer's; got {dtype!r}.")
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self._code = _CODES[np.dtype(dtype)]
        self._path, self._stack = Path(path), contextlib.ExitStack()
        self._sizes, self._size = array.array("i"), 0

    def __enter__(self) -> "BinidxWriter":
        """The files are begun under other names."""
        self._index = self._stack.enter_context(atomic_write(self._path.with_suffix(".idx")))
        self._data = self._stack.enter_context(atomic_write(self._path.with_suffix(".bin")))
        return self

    def __exit__(self, *error) -> None:
        """The files are there, or, after an error, what was there before."""
        if error[0] is None:
            self._write_index(self._index)
            self._path.with_suffix(".idx").unlink(missing_ok=True)
        self._stack.__exit__(*error)

    def beside(self, suffix: str) -> BinaryIO:
        """A further file of the same name, which is there when the others are."""
        return self._stack.enter_context(atomic_write(self._path.with_suffix(suffix)))

    def add(self, ids: np.ndarray) -> None:
        """Some ids of the sequence that is being written.

        Raises:
            ValueError: an id that the dtype cannot hold.
        """
        limits = np.iinfo(self.dtype)
        if len(ids) and not (limits.min <= ids.min() and ids.max() <= limits.max):
            raise ValueError(
                f"BinidxWriter: `ids` must fit {self.dtype.name}; got {ids.min()} to {ids.max()}."
            )
        self._data.write(np.ascontiguousarray(ids, self.dtype))
        self._size += len(ids)

    def end(self) -> None:
        """The sequence ends."""
        self._sizes.append(self._size)
        self._size = 0

    def _write_index(self, file: BinaryIO) -> None:
        sizes = np.frombuffer(self._sizes, np.int32)
        count, width = len(sizes), self.dtype.itemsize
        file.write(_MAGIC + _HEAD.pack(1, self._code, count, count + 1))
        file.write(sizes.astype("<i4"))
        ends = np.cumsum(sizes, dtype=np.int64)
        file.write(((ends - sizes) * width).astype("<i8"))
        file.write(np.arange(count + 1, dtype="<i8"))
