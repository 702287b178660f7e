"""Text files on disk, which may be compressed, in another encoding, or not text at all.

The content decides, not the name: a download can be truncated, a web page can be saved under the
name of a data file, and binary data would be tokenized byte by byte without notice.
"""

import codecs
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rwkv7_jax.data.compression import compression_of, unfolded
from rwkv7_jax.local_paths import is_special, name_in_errors

# Number of bytes of a file in memory at once.
CHUNK = 1 << 16

# Number of bytes at the start of a file from which its format is detected.
_HEAD = 512

AS_BYTES = (
    "`--config.data.as_bytes=True` (`as_bytes`, or `--as-bytes` of `rwkv7 data`) reads its bytes "
    "anyway"
)

_CONVERT = "convert it to lines of JSON first"

# The pandas call that writes them; `lines` requires `orient`.
_TO_LINES = 'to_json("x.jsonl", orient="records", lines=True)'

_CONVERT_ARROW = f"{_CONVERT}: pandas.read_feather(...).{_TO_LINES}"

# First bytes of formats that are not text, their names, and what to do about them.
_FOREIGN: tuple[tuple[bytes, str, str], ...] = (
    (
        b"PAR1",
        "a Parquet table",
        "rename it to .parquet, which the extra `parquet` reads",
    ),
    (
        b"ARROW1",
        "an Arrow table",
        _CONVERT_ARROW,
    ),
    (
        b"\xff\xff\xff\xff",
        "an Arrow stream",
        f'{_CONVERT}: datasets.load_from_disk(FOLDER).to_json("x.jsonl")',
    ),
    (b"PK\x03\x04", "a zip archive", "unpack it first"),
    (b"PK\x05\x06", "an empty zip archive", "unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it first"),
    (b"Rar!\x1a\x07", "a RAR archive", "unpack it first"),
    (b"{\\rtf", "an RTF document", "save it as text first"),
    (b"%PDF-", "a PDF", "extract its text first"),
    (b"\x89PNG", "a picture (PNG)", "leave it out"),
    (b"\xff\xd8\xff", "a picture (JPEG)", "leave it out"),
    (b"GIF87a", "a picture (GIF)", "leave it out"),
    (b"GIF89a", "a picture (GIF)", "leave it out"),
    (b"II*\x00", "a picture (TIFF)", "leave it out"),
    (b"MM\x00*", "a picture (TIFF)", "leave it out"),
    (b"\x7fELF", "a program", "leave it out"),
    (
        b"MMIDIDX\x00",
        "the index of tokens",
        "name its .bin file itself, not its folder",
    ),
    (b"\x89HDF", "an HDF5 file", _CONVERT),
    (b"\x93NUMPY", "a NumPy array", "load it, and pass the array of ids"),
    (b"\x80\x02", "a Python pickle", _CONVERT),
    (b"\x80\x04\x95", "a Python pickle", _CONVERT),
    (b"\x80\x05\x95", "a Python pickle", _CONVERT),
    (b"SQLite format 3\x00", "an SQLite database", _CONVERT),
    (b"OggS", "sound", "leave it out"),
    (b"fLaC", "sound", "leave it out"),
    (b"ID3", "sound", "leave it out"),
    (b"RIFF", "sound, video or a picture", "leave it out"),
    (b"\x1aE\xdf\xa3", "video", "leave it out"),
    (b"wOFF", "a font", "leave it out"),
    (b"wOF2", "a font", "leave it out"),
    (b"\xd0\xcf\x11\xe0", "an Office document", "save it as text first"),
    (b"Obj\x01", "an Avro file", _CONVERT),
    (b"\xca\xfe\xba\xbe", "a program", "leave it out"),
    (b"\xcf\xfa\xed\xfe", "a program", "leave it out"),
)

# Suffixes of files that are not text although their first bytes do not show it.
_FOREIGN_SUFFIXES = (
    ((".arrow", ".feather"), "an Arrow table", _CONVERT_ARROW),
    (
        (".xlsx", ".xls"),
        "a spreadsheet",
        f"{_CONVERT}: pandas.read_excel(...).{_TO_LINES}",
    ),
    ((".pth", ".pt", ".safetensors", ".gguf"), "a checkpoint", "name text"),
    ((".tar", ".tgz"), "an archive", "unpack it first"),
    (
        (".part", ".crdownload", ".aria2", ".incomplete"),
        "an unfinished download",
        "fetch it again",
    ),
)

# A text may begin with these letters too, but these formats have control characters soon after.
_ASCII_MAGIC = (b"OggS", b"fLaC", b"ID3", b"RIFF", b"wOFF", b"wOF2", b"Obj\x01")

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"

_WEB_PAGE_STARTS = (b"<!doctype html", b"<html")

_WEB_PAGE_SUFFIXES = (".html", ".htm", ".xhtml", ".xml", ".php", ".vue", ".svelte")

_COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")

# Byte order marks and their encodings, the longer first: UTF-32's begins with UTF-16's.
_UTF_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)

# The byte order mark as a character, and byte-swapped in UTF-16, which is not a valid character.
_TEXT_MARK = "\ufeff"
_SWAPPED_MARK = "\ufffe"

# Encodings whose decoders remove a byte order mark.
_MARKED_ENCODINGS = ("utf-8-sig", "utf-16", "utf-32")


def check_encoding(encoding: str | None, argument: str) -> None:
    """Checks that Python supports a text encoding.

    Args:
        encoding: name of the encoding; None for UTF-8.
        argument: the argument in backticks; the message begins with it.

    Raises:
        ValueError: the encoding is unknown or does not encode text.
    """
    if encoding is None:
        return
    try:
        # Some of Python's codecs do not encode text, such as "zip" or "rot13".
        "a".encode(encoding)
        codecs.getincrementaldecoder(encoding)()
    except (LookupError, TypeError, ValueError):
        raise ValueError(
            f"{argument} must be a text encoding such as utf-16, gbk or latin-1; got {encoding!r}."
        ) from None


def head_of(path: Path) -> bytes:
    """Reads the first bytes of a file as stored on disk."""
    with name_in_errors(path), path.open("rb") as file:
        return file.read(_HEAD)


def is_compressed(path: Path) -> bool:
    """Returns whether a file is compressed in a format that `TextFile` reads."""
    return compression_of(head_of(path)) is not None


def inner_suffix(path: Path) -> str:
    """Returns a file's suffix in lower case, ignoring the suffix of a compression."""
    suffix = path.suffix.lower()
    if suffix in _COMPRESSED_SUFFIXES:
        return Path(path.stem).suffix.lower()
    return suffix


def _without_mark(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Removes a UTF-8 byte order mark, which Windows programs write."""
    head = b""
    for chunk in chunks:
        head += chunk
        if len(head) >= len(codecs.BOM_UTF8):
            break
    if text := head.removeprefix(codecs.BOM_UTF8):
        yield text
    yield from chunks


@dataclasses.dataclass(frozen=True)
class TextFile:
    """A text file, read decompressed, as UTF-8 and without a byte order mark.

    Attributes:
        path: path of the file.
        encoding: encoding of its text; None leaves the bytes unchanged.
    """

    path: Path
    encoding: str | None = None

    def chunks(self) -> Iterator[bytes]:
        """Reads the text in chunks of bytes.

        Raises:
            ValueError: the file is damaged or truncated, or does not have its encoding.
        """
        if self.encoding is not None:
            decoder = codecs.getincrementaldecoder(self.encoding)()
            yield from self._without_text_mark(self._decoded(decoder))
        else:
            yield from _without_mark(self.stored_chunks())

    def _decoded(self, decoder: Any) -> Iterator[str]:
        done = 0
        for chunk in self.stored_chunks():
            yield self._decode(decoder, chunk, done, final=False)
            done += len(chunk)
        yield self._decode(decoder, b"", done, final=True)

    def _without_text_mark(self, texts: Iterator[str]) -> Iterator[bytes]:
        """Removes a byte order mark from the beginning of a text and encodes the text.

        Raises:
            ValueError: the mark is of the other byte order.
        """
        # Decoders of marked encodings have already removed the mark; a second one is text.
        name = codecs.lookup(str(self.encoding)).name
        is_removed = name in _MARKED_ENCODINGS
        for text in texts:
            if text and not is_removed:
                is_removed = True
                if name.startswith("utf-16") and text.startswith(_SWAPPED_MARK):
                    raise ValueError(
                        f"documents: `{self.path}` is not {self.encoding}: its byte order mark is "
                        "of the other byte order; set `encoding` to utf-16."
                    )
                text = text.removeprefix(_TEXT_MARK)
            yield text.encode("utf-8", "surrogatepass")

    def _decode(self, decoder: Any, chunk: bytes, done: int, *, final: bool) -> str:
        try:
            return decoder.decode(chunk, final)
        except UnicodeError as error:
            place = done + max(getattr(error, "start", 0), 0)
            raise ValueError(
                f"documents: `{self.path}` is not {self.encoding} at about byte {place:,}: "
                "set another `encoding`."
            ) from None

    def stored_chunks(self) -> Iterator[bytes]:
        """Reads the stored bytes, decompressed but otherwise unchanged.

        Raises:
            ValueError: the file is damaged, truncated or a decompression bomb, or is a device or a
                pipe.
        """
        if is_special(self.path):
            raise ValueError(
                f"documents: `{self.path}` must be a file; it is a device or a pipe."
            )
        compression = compression_of(head_of(self.path))
        if compression is not None:
            yield from unfolded(self.path, compression, CHUNK)
            return
        with name_in_errors(self.path), self.path.open("rb") as file:
            while chunk := file.read(CHUNK):
                yield chunk

    def lines(self) -> Iterator[bytes]:
        """Reads the lines with their line feeds, which alone end a line."""
        rest: list[bytes] = []
        for chunk in self.chunks():
            first, *others = chunk.split(b"\n")
            rest.append(first)
            for part in others:
                yield b"".join(rest) + b"\n"
                rest = [part]
        last = b"".join(rest)
        if last:
            yield last

    def size(self) -> int:
        """Counts the bytes of the text."""
        head = head_of(self.path)
        if self.encoding is None and compression_of(head) is None:
            mark = len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0
            return self.path.stat().st_size - mark
        return sum(map(len, self.chunks()))


def check_is_text(path: Path, *, encoding: str | None) -> int | None:
    """Checks that a file holds text, and finds its first byte that is not UTF-8.

    Args:
        path: path of the file.
        encoding: encoding of its text; None for UTF-8, or bytes close to it.

    Returns:
        The position of that byte in the decompressed content; None if everything is UTF-8 or an
        encoding is named.

    Raises:
        ValueError: the content is not text, or the name is that of a table or an archive; the
            message says what it is and what to do.
    """
    check_content(path)
    for suffixes, name, advice in _FOREIGN_SUFFIXES:
        if inner_suffix(path) in suffixes:
            raise _foreign_error(path, name, advice)
    if encoding is not None:
        return None
    decoder = codecs.getincrementaldecoder("utf-8")()
    wrong = None
    done = 0
    for chunk in TextFile(path).stored_chunks():
        if done == 0:
            _check_head(path, chunk)
        place = chunk.find(b"\0")
        if place >= 0:
            raise ValueError(
                f"documents: `{path}` has a zero byte at {done + place:,}, so it is not text or is "
                f"an incomplete download; {AS_BYTES}."
            )
        if wrong is None:
            wrong = _wrong_byte(decoder, chunk, done)
        done += len(chunk)
    if wrong is None:
        # The last character may be incomplete.
        wrong = _wrong_byte(decoder, b"", done, final=True)
    return wrong


def _wrong_byte(
    decoder: codecs.IncrementalDecoder, chunk: bytes, done: int, *, final: bool = False
) -> int | None:
    """Decodes a chunk; returns the position in the file of the first invalid byte."""
    # The decoder holds the bytes of a character that began in the previous chunk.
    begun, _ = decoder.getstate()
    try:
        decoder.decode(chunk, final)
    except UnicodeDecodeError as error:
        return done - len(begun) + error.start
    return None


def check_content(path: Path) -> None:
    """Checks that a file is not something else in place of data.

    Raises:
        ValueError: the file is a Git LFS pointer, a web page, or a known format that is not text.
    """
    head = head_of(path)
    if head.startswith(_LFS_POINTER):
        raise ValueError(
            f"documents: `{path}` is a Git LFS pointer, not the data: fetch the file itself with "
            "`git lfs pull`."
        )
    for magic, name, advice in _FOREIGN:
        certain = magic not in _ASCII_MAGIC or any(byte < 9 for byte in head)
        if head.startswith(magic) and certain:
            raise _foreign_error(path, name, advice)
    is_page = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(_WEB_PAGE_STARTS)
    if is_page and path.suffix.lower() not in _WEB_PAGE_SUFFIXES:
        raise ValueError(
            f"documents: `{path}` is a web page, not the data that its name promises: download "
            f"the file itself; {AS_BYTES}."
        )


def _check_head(path: Path, head: bytes) -> None:
    """Checks the first bytes of a file's decompressed content."""
    # A tar archive has its magic number after the first file's name.
    if head[257:262] == b"ustar":
        raise _foreign_error(path, "a tar archive", "unpack it first")
    for mark, name in _UTF_MARKS:
        if head.startswith(mark):
            raise _encoding_error(path, name)
    # Without a mark, Western text in UTF-16 has a zero in every second byte.
    pairs = head[: len(head) // 2 * 2]
    if len(pairs) >= 4:
        for zeros, others, name in ((1, 0, "utf-16-le"), (0, 1, "utf-16-be")):
            zero_share = pairs[zeros::2].count(0) / (len(pairs) / 2)
            if zero_share > 0.7 and not pairs[others::2].count(0):
                raise _encoding_error(path, name)


def _encoding_error(path: Path, name: str) -> ValueError:
    return ValueError(
        f"documents: `{path}` is {name.upper()} text: read it with "
        f"`--config.data.encoding={name}` (`encoding`, or `--encoding {name}` of `rwkv7 data`)."
    )


def _foreign_error(path: Path, name: str, advice: str) -> ValueError:
    return ValueError(f"documents: `{path}` is {name}, not text: {advice}; {AS_BYTES}.")
