"""Compressed files of data: which compression it is, and what is inside, as far as a text goes."""

import bz2
import contextlib
import gzip
import importlib
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rwkv7_jax.local_paths import name_in_errors

# Bytes of a Zstandard file that are decompressed at once: four of them can stand for 128 KiB.
_PIECE = 1 << 10

# A compressed file that unfolds to more than so many bytes, and so many times its own, is a bomb:
# texts become a tenth, and logs of one template a hundredth.
_UNFOLDED_BYTES = 1 << 28
_UNFOLDED_TIMES = 250

_GZIP = b"\x1f\x8b"

# How the first block of a bzip2 file begins, and the end of an empty one.
_BZIP2_BLOCKS = (b"1AY&SY", b"\x17rE8P\x90")
_XZ = b"\xfd7zXZ\x00"
_ZSTD = b"\x28\xb5\x2f\xfd"
_ZSTD_SKIPPABLE = b"\x2a\x4d\x18"

# What opens a file by its compression, but for Zstandard, which is optional.
_OPENERS: dict[str, Callable[..., Any]] = {
    "gzip": gzip.open,
    "bzip2": bz2.open,
    "xz": lzma.open,
}

# What the decompressors raise for damaged or truncated files; Zstandard's errors are of the module.
_DAMAGE = (EOFError, OSError, zlib.error, lzma.LZMAError)


def compression_of(head: bytes) -> str | None:
    """Names the compression of a file from its first bytes."""
    for magic, name in ((_GZIP, "gzip"), (_XZ, "xz"), (_ZSTD, "zstd")):
        if head.startswith(magic):
            return name
    # Programs with several threads begin with a frame that says how long the next one is.
    if head[1:4] == _ZSTD_SKIPPABLE and head[0] >> 4 == 5:
        return "zstd"
    # "BZh" alone could be a text.
    if head.startswith(b"BZh") and head[4:10] in _BZIP2_BLOCKS:
        return "bzip2"
    return None


def unfolded(path: Path, compression: str, size: int) -> Iterator[bytes]:
    """Reads what is inside a compressed file.

    Args:
        path: of the file.
        compression: from `compression_of`.
        size: bytes that are read at once.

    Raises:
        ValueError: the file is damaged or ends early, or unfolds to more than a text does.
    """
    most = max(_UNFOLDED_BYTES, _UNFOLDED_TIMES * path.stat().st_size)
    done = 0
    try:
        for chunk in _chunks(path, compression, size):
            done += len(chunk)
            if done > most:
                break
            yield chunk
    except Exception as error:
        # Zstandard's own class depends on which module reads it.
        if not isinstance(error, _DAMAGE) and "Zstd" not in type(error).__name__:
            raise
        raise _damaged(path, compression, error) from None
    if done > most:
        raise ValueError(
            f"documents: `{path}` unfolds to more than {_UNFOLDED_TIMES} times its size, as no "
            "text does; decompress it first if it is one."
        )


def _chunks(path: Path, compression: str, size: int) -> Iterator[bytes]:
    """Reads what is inside a compressed file, without a limit."""
    if compression == "zstd":
        # The last bytes of a frame may give nothing.
        yield from filter(None, _zstd_chunks(path, size))
        return
    with name_in_errors(path), _OPENERS[compression](path, "rb") as file:
        while chunk := file.read(size):
            yield chunk


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
    """Makes a decompressor of one Zstandard frame.

    Raises:
        ValueError: this Python has none.
    """
    # Both are optional: the first one comes with Python 3.14, the second with the extra `zstd`.
    with contextlib.suppress(ImportError):
        return importlib.import_module("compression.zstd").ZstdDecompressor()
    with contextlib.suppress(ImportError):
        return importlib.import_module("zstandard").ZstdDecompressor().decompressobj()
    raise ValueError(
        f"documents: `{path}` is compressed with Zstandard, which this Python cannot read: install "
        "the extra `zstd` or the zstandard package, or run `unzstd` first."
    )


def _zstd_chunks(path: Path, size: int) -> Iterator[bytes]:
    """Reads what is inside a Zstandard file of one frame or several.

    Not `zstandard.open` (0.25), which takes a file that was cut for a shorter one.

    Raises:
        EOFError: the file ends inside a frame.
    """
    with name_in_errors(path), path.open("rb") as file:
        decompressor = _zstd_decompressor(path)
        while chunk := file.read(min(size, _PIECE)):
            while chunk:
                if decompressor.eof:
                    decompressor = _zstd_decompressor(path)
                yield decompressor.decompress(chunk)
                chunk = decompressor.unused_data
        if not decompressor.eof:
            raise EOFError
