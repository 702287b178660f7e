"""Token files of the Megatron kind: `x.bin` holds ids, `x.idx` where documents lie. Level 1.

Source: BlinkDL/RWKV-LM@524481d RWKV-v7/train_temp/src/binidx.py (the format).
"""

import struct
from pathlib import Path

import numpy as np

_MAGIC = b"MMIDIDX\x00\x00"
_HEAD = struct.Struct("<QBQQ")
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}


def read_binidx(path: str | Path) -> np.ndarray:
    """All ids of the file, memory-mapped; RWKV's own files end each document with token 0.

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
    head = index.read_bytes()
    if not head.startswith(_MAGIC):
        raise ValueError(f"read_binidx: `{index}` at byte 0: no MMIDIDX magic.")
    if len(head) < len(_MAGIC) + _HEAD.size:
        raise ValueError(f"read_binidx: `{index}` at byte {len(head)}: the header is cut off.")
    version, code, sequences, documents = _HEAD.unpack_from(head, len(_MAGIC))
    if version != 1:
        raise ValueError(f"read_binidx: `{index}` at byte 9: version must be 1; got {version}.")
    if code not in _DTYPES:
        raise ValueError(f"read_binidx: `{index}` at byte 17: no integer dtype has code {code}.")
    body = len(_MAGIC) + _HEAD.size
    wanted = body + 4 * sequences + 8 * sequences + 8 * documents
    if len(head) != wanted:
        raise ValueError(f"read_binidx: `{index}` must have {wanted} bytes; it has {len(head)}.")
    sizes = np.frombuffer(head, "<i4", sequences, body).astype(np.int64)
    starts = np.frombuffer(head, "<i8", sequences, body + 4 * sequences)
    dtype = np.dtype(_DTYPES[code]).newbyteorder("<")
    wrong = np.flatnonzero(starts != (np.cumsum(sizes) - sizes) * dtype.itemsize)
    if len(wrong):
        place = body + 4 * sequences + 8 * int(wrong[0])
        raise ValueError(
            f"read_binidx: `{index}` at byte {place}: a sequence does not follow the last."
        )
    held = data.stat().st_size
    if held != sizes.sum() * dtype.itemsize:
        raise ValueError(
            f"read_binidx: `{data}` must have {sizes.sum() * dtype.itemsize} bytes, "
            f"says its index; it has {held}."
        )
    return np.memmap(data, dtype, "r") if held else np.zeros(0, dtype)
