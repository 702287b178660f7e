"""Compressed data files: detection of the compression, and decompression with a size limit."""

import bz2
import contextlib
import gzip
import importlib
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rwkv7_jax.local_paths import name_in_errors

# Bytes of a file that are decompressed at once; four of a Zstandard file can expand to 128 KiB.
_PIECE = 1 << 10

# Logarithm of the largest window of a Zstandard frame, which `zstd --long=31` uses for large texts.
# By default both modules reject more than 27. Memory grows with the content, not with the window.
_ZSTD_WINDOW_LOG = 31

# A compressed file that expands beyond both this size and this ratio is a decompression bomb. Text
# compresses about 10 times, repetitive logs 100 times.
_MAX_EXPANDED_BYTES = 1 << 28
_MAX_EXPANSION = 250

_GZIP = b"\x1f\x8b"

# The first bytes of a bzip2 block, and those after the header of an empty file.
_BZIP2_BLOCKS = (b"1AY&SY", b"\x17rE8P\x90")
_XZ = b"\xfd7zXZ\x00"
_ZSTD = b"\x28\xb5\x2f\xfd"
_ZSTD_SKIPPABLE = b"\x2a\x4d\x18"

# The errors for damaged or truncated files; Zstandard's modules define their own.
_DAMAGE = (EOFError, OSError, zlib.error, lzma.LZMAError)


def compression_of(head: bytes) -> str | None:
    """Returns the compression of a file by its first bytes; None if it is not compressed."""
    for magic, name in ((_GZIP, "gzip"), (_XZ, "xz"), (_ZSTD, "zstd")):
        if head.startswith(magic):
            return name
    # Multithreaded compressors begin with a skippable frame that has the size of the next one.
    if head[1:4] == _ZSTD_SKIPPABLE and head[0] >> 4 == 5:
        return "zstd"
    # "BZh" by itself could begin a text.
    if head.startswith(b"BZh") and head[4:10] in _BZIP2_BLOCKS:
        return "bzip2"
    return None


def unfolded(path: Path, compression: str, size: int) -> Iterator[bytes]:
    """Reads the content of a compressed file.

    Args:
        path: path of the file.
        compression: from `compression_of`.
        size: number of bytes read at once.

    Raises:
        ValueError: the file is damaged or truncated, or expands more than any text.
    """
    most = max(_MAX_EXPANDED_BYTES, _MAX_EXPANSION * path.stat().st_size)
    done = 0
    try:
        for chunk in _chunks(path, compression, size):
            done += len(chunk)
            if done > most:
                break
            yield chunk
    except Exception as error:
        # The error class of Zstandard depends on the module in use.
        if not isinstance(error, _DAMAGE) and "Zstd" not in type(error).__name__:
            raise
        raise _damaged(path, compression, error) from None
    if done > most:
        raise ValueError(
            f"documents: `{path}` expands to more than {_MAX_EXPANSION} times its size, as no "
            "text does; if it is text, decompress it first."
        )


def _chunks(path: Path, compression: str, size: int) -> Iterator[bytes]:
    """Reads the content of a compressed file without a limit."""
    if compression != "gzip":
        # The last bytes of a stream may decompress to nothing.
        yield from filter(None, _stream_chunks(path, compression, size))
        return
    with name_in_errors(path), gzip.open(path, "rb") as file:
        while chunk := file.read(size):
            yield chunk


def _stream_chunks(path: Path, compression: str, size: int) -> Iterator[bytes]:
    """Reads the content of a file of one or more streams; those of Zstandard are called frames.

    The modules' own `open` is avoided. In `bz2` and `lzma` it ends without an error at a damaged
    stream after the first, and in `zstandard` (0.25) it takes a truncated file for a shorter one.

    Raises:
        EOFError: the file ends inside a stream.
    """
    with name_in_errors(path), path.open("rb") as file:
        decompressor = _decompressor(path, compression)
        while chunk := file.read(min(size, _PIECE)):
            while chunk:
                if decompressor.eof:
                    # Streams may be padded with zeros.
                    chunk = chunk.lstrip(b"\0")
                    if not chunk:
                        break
                    decompressor = _decompressor(path, compression)
                yield from _decompressed(decompressor, chunk, size)
                chunk = decompressor.unused_data
        if not decompressor.eof:
            raise EOFError


def _decompressed(decompressor: Any, chunk: bytes, size: int) -> Iterator[bytes]:
    """Yields what a chunk decompresses to, `size` bytes at once if the module has a limit."""
    if not hasattr(decompressor, "needs_input"):
        # The package zstandard has none.
        yield decompressor.decompress(chunk)
        return
    yield decompressor.decompress(chunk, size)
    while not (decompressor.eof or decompressor.needs_input):
        yield decompressor.decompress(b"", size)


def _decompressor(path: Path, compression: str) -> Any:
    """Builds a decompressor for one stream."""
    if compression == "bzip2":
        return bz2.BZ2Decompressor()
    if compression == "xz":
        return lzma.LZMADecompressor(lzma.FORMAT_XZ)
    return _zstd_decompressor(path)


def _damaged(path: Path, compression: str, error: Exception) -> ValueError:
    if isinstance(error, EOFError):
        return ValueError(
            f"documents: `{path}` is an incomplete download: the file ends inside its "
            f"{compression} data; fetch it again."
        )
    return ValueError(
        f"documents: `{path}` is damaged: its {compression} data cannot be read "
        f"({error}); fetch it again."
    )


def _zstd_decompressor(path: Path) -> Any:
    """Builds a decompressor for one Zstandard frame.

    Raises:
        ValueError: no module for Zstandard is installed.
    """
    # Both are optional: the first comes with Python 3.14, the second with the extra `zstd`.
    with contextlib.suppress(ImportError):
        module = importlib.import_module("compression.zstd")
        limit = module.DecompressionParameter.window_log_max
        return module.ZstdDecompressor(options={limit: _ZSTD_WINDOW_LOG})
    with contextlib.suppress(ImportError):
        module = importlib.import_module("zstandard")
        decompressor = module.ZstdDecompressor(max_window_size=1 << _ZSTD_WINDOW_LOG)
        return decompressor.decompressobj()
    raise ValueError(
        f"documents: `{path}` is compressed with Zstandard, which this Python cannot read: install "
        "the extra `zstd` or the zstandard package, or run `unzstd` first."
    )
