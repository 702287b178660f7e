"""Decompression bombs among data files."""

import bz2
import gzip
import lzma

import pytest

from rwkv7_jax.data import compression
from rwkv7_jax.data.loading import token_stream
from rwkv7_jax.data.text_files import CHUNK, TextFile
from rwkv7_jax.text.tokenizer import Tokenizer

# A text of one line that compresses as no text does.
LINE = b"a" * 3_000_000

COMPRESSORS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}


@pytest.fixture(params=[*COMPRESSORS, "zst"])
def bomb(request, tmp_path):
    """Write a compressed file that repeats the line."""
    if request.param == "zst":
        zstandard = pytest.importorskip("zstandard", reason="the extra zstd")
        content = zstandard.compress(LINE)
    else:
        content = COMPRESSORS[request.param](LINE)
    path = tmp_path / f"x.txt.{request.param}"
    path.write_bytes(content)
    return path


def test_a_decompression_bomb_is_rejected(bomb, monkeypatch):
    assert b"".join(TextFile(bomb).chunks()) == LINE
    monkeypatch.setattr(compression, "_MAX_EXPANDED_BYTES", 10_000)
    with pytest.raises(ValueError, match=r"x\.txt\..*` expands to more than 250 times"):
        token_stream(bomb, Tokenizer.bytes())


def test_a_highly_compressible_text_is_read(bomb, monkeypatch):
    monkeypatch.setattr(compression, "_MAX_EXPANDED_BYTES", 10_000)
    monkeypatch.setattr(compression, "_MAX_EXPANSION", 10**6)
    assert b"".join(TextFile(bomb).chunks()) == LINE


def test_an_uncompressed_file_has_no_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(compression, "_MAX_EXPANDED_BYTES", 0)
    monkeypatch.setattr(compression, "_MAX_EXPANSION", 0)
    (tmp_path / "x.txt").write_bytes(LINE)
    assert b"".join(TextFile(tmp_path / "x.txt").chunks()) == LINE


def test_zstandard_is_decompressed_in_bounded_chunks(tmp_path):
    zstandard = pytest.importorskip("zstandard", reason="the extra zstd")
    path = tmp_path / "x.txt.zst"
    path.write_bytes(zstandard.compress(b"a" * 150_000_000))
    assert path.stat().st_size < CHUNK
    chunks = list(map(len, TextFile(path).stored_chunks()))
    assert sum(chunks) == 150_000_000
    assert max(chunks) <= 2**25


@pytest.mark.parametrize("window_log", [27, 31])
def test_zstandard_is_read_with_windows_of_any_size(tmp_path, window_log):
    """`zstd --long=31` writes such frames; this one holds a block without compression."""
    pytest.importorskip("zstandard", reason="the extra zstd")
    window = bytes([(window_log - 10) << 3])
    block = (len(b"abc") << 3 | 1).to_bytes(3, "little")
    (tmp_path / "x.txt.zst").write_bytes(
        b"\x28\xb5\x2f\xfd\x00" + window + block + b"abc"
    )
    assert b"".join(TextFile(tmp_path / "x.txt.zst").chunks()) == b"abc"
