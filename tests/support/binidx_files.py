"""Binidx files as the format's own tool writes them."""

import struct

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"


def write(folder, sequences, *, dtype=np.uint16, code=8, version=1):
    """The pair of files as the format's own tool writes them."""
    arrays = [np.asarray(s, dtype) for s in sequences]
    (folder / "x.bin").write_bytes(b"".join(a.tobytes() for a in arrays))
    sizes = np.array([len(a) for a in arrays], np.int32)
    starts = (np.cumsum(sizes) - sizes).astype(np.int64) * np.dtype(dtype).itemsize
    documents = np.arange(len(arrays) + 1, dtype=np.int64)
    head = MAGIC + struct.pack("<QBQQ", version, code, len(sizes), len(documents))
    index = head + sizes.tobytes() + starts.tobytes() + documents.tobytes()
    (folder / "x.idx").write_bytes(index)
    return folder / "x.bin"
