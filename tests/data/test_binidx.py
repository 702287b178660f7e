"""Megatron token files (binidx) are read and written exactly."""

import numpy as np
import pytest
from binidx_files import write

from rwkv7_jax.data import binidx
from rwkv7_jax.data.binidx import BinidxWriter, read_binidx


@pytest.mark.parametrize(
    ("dtype", "code"), [(np.uint16, 8), (np.int32, 4), (np.uint8, 1)]
)
def test_ids_are_read_in_order(tmp_path, dtype, code):
    path = write(tmp_path, [[1, 2, 0], [], [7, 0]], dtype=dtype, code=code)
    for name in (path, path.with_suffix(".idx"), str(path)):
        ids, starts = read_binidx(name)
        assert ids.tolist() == [1, 2, 0, 7, 0] and starts.tolist() == [0, 3, 3, 5]


def test_an_empty_file_holds_no_ids(tmp_path):
    ids, starts = read_binidx(write(tmp_path, []))
    assert len(ids) == 0 and starts.tolist() == [0]


@pytest.mark.parametrize(
    ("dtype", "code"), [(np.uint16, 8), (np.int32, 4), (np.uint8, 1)]
)
def test_files_are_byte_identical_to_those_of_the_reference_tool(tmp_path, dtype, code):
    expected = write(tmp_path, [[1, 2, 0], [], [7, 0]], dtype=dtype, code=code)
    with BinidxWriter(tmp_path / "y.bin", dtype) as writer:
        for pieces in ([[1], [2, 0]], [], [[7, 0]]):
            for piece in pieces:
                writer.add(np.array(piece))
            writer.end()
    for suffix in (".bin", ".idx"):
        got = (tmp_path / "y").with_suffix(suffix).read_bytes()
        assert got == expected.with_suffix(suffix).read_bytes()


def test_a_failed_write_keeps_the_old_files(tmp_path):
    path = write(tmp_path, [[1, 2, 0]])
    with pytest.raises(RuntimeError, match="stop"), BinidxWriter(path) as writer:
        writer.add(np.array([5, 0]))
        raise RuntimeError("stop")
    assert read_binidx(path)[0].tolist() == [1, 2, 0]
    assert len(list(tmp_path.iterdir())) == 2


def test_an_id_out_of_range_is_rejected(tmp_path):
    with (
        pytest.raises(ValueError, match="`ids` must fit uint16; got 1 to 65536"),
        BinidxWriter(tmp_path / "x.bin") as writer,
    ):
        writer.add(np.array([1, 65536]))


def test_a_document_that_the_index_cannot_count_is_rejected(tmp_path, monkeypatch):
    monkeypatch.setattr(binidx, "_LONGEST_SEQUENCE", 5)
    with BinidxWriter(tmp_path / "x.bin") as writer:
        for _ in range(2):
            writer.add(np.arange(3))
            writer.add(np.arange(2))
            writer.end()
    assert read_binidx(tmp_path / "x.bin")[1].tolist() == [0, 5, 10]
    with (
        pytest.raises(ValueError, match="`ids` must be of documents of at most 5 ids"),
        BinidxWriter(tmp_path / "x.bin") as writer,
    ):
        writer.add(np.arange(3))
        writer.add(np.arange(3))
    assert len(read_binidx(tmp_path / "x.bin")[0]) == 10
