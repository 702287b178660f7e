"""Token files of the Megatron kind: read exactly, and refused with file and offset."""

import struct

import numpy as np
import pytest

from rwkv7_jax.binidx import read_binidx

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


@pytest.mark.parametrize(("dtype", "code"), [(np.uint16, 8), (np.int32, 4), (np.uint8, 1)])
def test_ids_are_read_in_order(tmp_path, dtype, code):
    path = write(tmp_path, [[1, 2, 0], [], [7, 0]], dtype=dtype, code=code)
    for name in (path, path.with_suffix(".idx"), str(path)):
        assert read_binidx(name).tolist() == [1, 2, 0, 7, 0]


def test_an_empty_file_holds_no_ids(tmp_path):
    assert len(read_binidx(write(tmp_path, []))) == 0


def test_either_file_missing_is_named(tmp_path):
    path = write(tmp_path, [[1]])
    path.with_suffix(".idx").unlink()
    with pytest.raises(ValueError, match=r"x\.idx` does not exist"):
        read_binidx(path)
    with pytest.raises(ValueError, match=r"y\.bin` does not exist"):
        read_binidx(tmp_path / "y.bin")


def edit(path, place: int, data: bytes):
    whole = bytearray(path.read_bytes())
    whole[place : place + len(data)] = data
    path.write_bytes(whole)


@pytest.mark.parametrize(
    ("file", "place", "data", "reason"),
    [
        ("x.idx", 0, b"JUNK", r"x\.idx` at byte 0: no MMIDIDX magic"),
        ("x.idx", 9, b"\x02", r"x\.idx` at byte 9: version must be 1; got 2"),
        ("x.idx", 17, b"\x06", r"x\.idx` at byte 17: no integer dtype has code 6"),
        ("x.idx", 17, b"\x04", r"x\.idx` at byte 50: a sequence does not follow the last"),
        ("x.idx", 18, b"\xff", r"x\.idx` must have \d+ bytes; it has"),
        ("x.idx", 34, b"\x09", r"at byte \d+: a sequence does not follow the last"),
        ("x.idx", 38, b"\x03", r"x\.bin` must have 12 bytes, says its index; it has 10"),
    ],
)
def test_a_wrong_field_is_named_by_file_and_offset(tmp_path, file, place, data, reason):
    path = write(tmp_path, [[1, 2, 0], [7, 0]])
    edit(tmp_path / file, place, data)
    with pytest.raises(ValueError, match=reason):
        read_binidx(path)


def test_truncated_files_are_refused_wherever_they_end(tmp_path):
    path = write(tmp_path, [[1, 2, 0], [7, 0]])
    for file in (path, path.with_suffix(".idx")):
        whole = file.read_bytes()
        for size in range(len(whole)):
            file.write_bytes(whole[:size])
            with pytest.raises(ValueError, match=r"read_binidx: `.*x\.(bin|idx)`"):
                read_binidx(path)
        file.write_bytes(whole)
    assert len(read_binidx(path)) == 5
