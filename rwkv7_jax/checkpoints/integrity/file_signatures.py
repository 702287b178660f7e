"""Detection of file types by their first bytes, and messages about files that are not checkpoints.

Only a file's bytes determine what it is, not its name. Each `describe_*` function returns the rest
of a sentence that starts with the file's path: what the file is, and what to do.
"""

import json
from pathlib import Path
from typing import Literal

# Tensor file formats, detected by their first bytes, as PyTorch files have many suffixes.
Container = Literal["pth", "safetensors", "rwkv.cpp", "gguf"]

# The number of bytes examined: web pages may begin with blank lines and comments.
_HEAD = 1024

_LOCAL_HEADER = 30

_PAGES = (b"<!doctype", b"<html", b"<head", b"<body", b"<?xml", b"<!--")

_POINTERS = (
    b"version https://git-lfs.github.com/",
    b"/annex/objects/",
    b"../.git/annex/",
)

# The magic number of rwkv.cpp: "ggmf" in little-endian byte order.
_RWKV_CPP = b"fmgg"

_GGUF = b"GGUF"

# Ai00 writes models and states as CBOR maps, which begin with the name of the first entry.
# Source: cryscan/web-rwkv@3c7d546 src/runtime/v7.rs; Ai00-X/ai00_server@fe06a9a crates/ai00-core.
_PREFAB = "a prefab of Ai00: use the .st or .state file that it was made from"

# Other file formats, by their first bytes.
_MAGIC = (
    (b"\x1f\x8b", "compressed with gzip: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd: unpack it first"),
    (b"\xfd7zXZ", "compressed with xz: unpack it first"),
    (b"BZh", "compressed with bzip2: unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive: unpack it first"),
    (b"Rar!", "a RAR archive: unpack it first"),
    (_GGUF, "a GGUF file of llama.cpp, not of this format"),
    (_RWKV_CPP, "a file of rwkv.cpp, not of this format"),
    (b"\xa5gcontext", _PREFAB),
    (b"\xa4dname", _PREFAB),
    (b"%PDF", "a PDF document, not a checkpoint"),
    (b"\x89PNG", "a picture, not a checkpoint"),
    (b"\xff\xd8\xff", "a picture, not a checkpoint"),
    (b"GIF8", "a picture, not a checkpoint"),
    (b"\x89HDF", "an HDF5 file, not a checkpoint of RWKV"),
    (b"\x93NUMPY", "an array of NumPy, not a checkpoint"),
    (b"PAR1", "a Parquet file, not a checkpoint"),
    (b"SQLite format 3", "a database, not a checkpoint"),
)

# PyTorch's format before zip files: a pickled magic number.
_LEGACY_TORCH = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."


def _is_zip(head: bytes) -> bool:
    """Returns whether a file begins like a zip archive."""
    # The file may be truncated within the four bytes.
    return head[:4] in (b"PK\x03\x04", b"PK\x05\x06") or head in (b"PK", b"PK\x03")


def _is_safetensors(head: bytes, size: int) -> bool:
    """Returns whether a file begins like a .safetensors file: a length, then a JSON object."""
    if len(head) < 9 or head[8:9] != b"{":
        return False
    # The format allows headers of up to 100 MB, even if the file itself is truncated.
    return int.from_bytes(head[:8], "little") <= max(size, 100_000_000)


def container_of(path: Path) -> Container | None:
    """Detects the format of a tensor file from its first bytes; None if it is none of them."""
    head = _read_head(path)
    if _is_zip(head):
        return "pth"
    if head.startswith(_RWKV_CPP):
        return "rwkv.cpp"
    if head.startswith(_GGUF):
        return "gguf"
    if _is_safetensors(head, path.stat().st_size):
        return "safetensors"
    return None


def _read_head(path: Path) -> bytes:
    """Reads the first bytes of a file."""
    with path.open("rb") as file:
        return file.read(_HEAD)


def describe_other_file(path: Path, *, also_text: bool = True) -> str | None:
    """Describes a file that cannot be a checkpoint; returns None if it may be one.

    Args:
        path: path of the file.
        also_text: also describe plain text; useful only if the file's name promises a checkpoint.
    """
    head = _read_head(path)
    if not head:
        return "is empty (0 bytes): the download did not begin; download it again"
    if not head.strip(b"\0") and len(head) == min(_HEAD, path.stat().st_size):
        return "begins with zeros only: the download did not finish; download it again"
    if _is_zip(head):
        return None
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head.startswith(_POINTERS):
        return (
            "is a Git LFS pointer to the file: "
            "fetch the file itself (git lfs pull, or download it by hand)"
        )
    if text.startswith(_PAGES):
        return (
            "is a web page: download the file itself "
            "(at Hugging Face the address has /resolve/, not /blob/)"
        )
    for magic, sentence in _MAGIC:
        if head.startswith(magic):
            return f"is {sentence}"
    if head.startswith(_LEGACY_TORCH):
        return (
            "is in PyTorch's format before version 1.6: load it with PyTorch and save it again "
            "with torch.save"
        )
    if also_text and _is_text(head):
        first = head.split(b"\n", 1)[0][:60].decode("utf-8", "replace").strip()
        return f"is a text file that begins with {first!r}: download the file itself"
    return None


def _is_text(head: bytes) -> bool:
    """Returns whether bytes are text: UTF-8, perhaps cut at the end, without control codes."""
    if any(byte < 9 or 13 < byte < 32 for byte in head):
        return False
    try:
        # The last character may be cut.
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start > len(head) - 4 and len(head) == _HEAD
    return True


def describe_cut_zip(path: Path) -> str:
    """Describes in which entry a zip archive without a central directory is truncated."""
    size = path.stat().st_size
    last = ""
    with path.open("rb") as file:
        position = 0
        while position + _LOCAL_HEADER <= size:
            file.seek(position)
            header = file.read(_LOCAL_HEADER)
            if header[:4] != b"PK\x03\x04":
                break
            name_length = int.from_bytes(header[26:28], "little")
            extra_length = int.from_bytes(header[28:30], "little")
            last = file.read(name_length).decode("utf-8", "replace")
            content = int.from_bytes(header[18:22], "little")
            # If the size follows the data, the next entry cannot be found.
            if header[6] & 8 or content == 0xFFFFFFFF:
                break
            position += _LOCAL_HEADER + name_length + extra_length + content
    place = f"inside its entry {last!r}" if last and last.isprintable() else "too early"
    return f"is an incomplete download: the file ends {place} ({size:,} bytes); download it again"


def describe_cut_safetensors(path: Path) -> str | None:
    """Describes in which tensor a .safetensors file is truncated; None if it is not."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size - 8:
            # No real file has a header of this length.
            if length > 100_000_000:
                return None
            return (
                f"is an incomplete download: the file ends inside its header ({size:,} bytes); "
                "download it again"
            )
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError):
            return None
    ends = _tensor_ends(header)
    available = size - 8 - length
    for name, end in sorted(ends.items(), key=lambda item: item[1]):
        if end > available:
            return (
                f"is an incomplete download: the file ends inside {name!r} ({size:,} bytes of "
                f"{8 + length + max(ends.values()):,}); download it again"
            )
    return None


def _tensor_ends(header: object) -> dict[str, int]:
    """Returns the end offsets of the tensors in a .safetensors header; skips invalid entries."""
    ends = {}
    for name, entry in header.items() if isinstance(header, dict) else ():
        offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
        if (
            isinstance(offsets, list)
            and len(offsets) == 2
            and isinstance(offsets[1], int)
        ):
            ends[name] = offsets[1]
    return ends
