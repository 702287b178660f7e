"""Token files of the Megatron kind: read and written exactly."""

import struct

import numpy as np
import pytest

from rwkv7_jax.binidx import BinidxWriter, read_binidx

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
        ids, starts = read_binidx(name)
        assert ids.tolist() == [1, 2, 0, 7, 0] and starts.tolist() == [0, 3, 3, 5]


def test_an_empty_file_holds_no_ids(tmp_path):
    ids, starts = read_binidx(write(tmp_path, []))
    assert len(ids) == 0 and starts.tolist() == [0]


@pytest.mark.parametrize(("dtype", "code"), [(np.uint16, 8), (np.int32, 4), (np.uint8, 1)])
def test_files_are_written_byte_for_byte_as_the_formats_own_tool_writes_them(tmp_path, dtype, code):
    expected = write(tmp_path, [[1, 2, 0], [], [7, 0]], dtype=dtype, code=code)
    with BinidxWriter(tmp_path / "y.bin", dtype) as writer:
        for pieces in ([[1], [2, 0]], [], [[7, 0]]):
            for piece in pieces:
                writer.add(np.array(piece))
            writer.end()
    for suffix in (".bin", ".idx"):
        got = (tmp_path / "y").with_suffix(suffix).read_bytes()
        assert got == expected.with_suffix(suffix).read_bytes()


def test_a_writer_that_fails_leaves_what_was_there(tmp_path):
    path = write(tmp_path, [[1, 2, 0]])
    with pytest.raises(RuntimeError, match="stop"), BinidxWriter(path) as writer:
        writer.add(np.array([5, 0]))
        raise RuntimeError("stop")
    assert read_binidx(path)[0].tolist() == [1, 2, 0]
    assert len(list(tmp_path.iterdir())) == 2


def test_an_id_that_the_files_cannot_hold_is_refused(tmp_path):
    with (
        pytest.raises(ValueError, match="`ids` must fit uint16; got 1 to 65536"),
        BinidxWriter(tmp_path / "x.bin") as writer,
    ):
        writer.add(np.array([1, 65536]))
    with pytest.raises(ValueError, match="`dtype` must be an integer's"):
        BinidxWriter(tmp_path / "x.bin", np.float32)
