"""A data file's content decides whether and how it is read."""

import bz2
import codecs
import gzip
import importlib
import json
import lzma
import re
import sys
import warnings

import pytest

from rwkv7_jax.data import text_files
from rwkv7_jax.data.jsonl import ReadStats
from rwkv7_jax.data.loading import token_stream
from rwkv7_jax.data.readers import documents
from rwkv7_jax.data.sources import parse_source
from rwkv7_jax.data.text_files import TextFile
from rwkv7_jax.data.token_cache import write_cache
from rwkv7_jax.text.tokenizer import Tokenizer

BYTES = Tokenizer.bytes()
LINES = b'{"text": "one"}\n{"text": "two"}\n'

# Name and content of files that are no text, and a word of the sentence that refuses them.
FOREIGN = {
    "parquet": ("x.parquet", b"PAR1\x15\x04\x15" + bytes(40), "Parquet"),
    "parquet named jsonl": ("x.jsonl", b"PAR1\x15\x04\x15" + bytes(40), "Parquet"),
    "parquet without magic": ("x.parquet", b"abc", "Parquet"),
    "parquet in capitals": ("x.PARQUET", b"abc", "Parquet"),
    "arrow": ("x.arrow", b"ARROW1\x00\x00" + bytes(40), "Arrow"),
    "feather": ("x.feather", b"FEA1", "Arrow"),
    "csv": ("x.csv", b"a,b\n1,2\n", 'its keys are "a", "b"'),
    "csv in capitals": ("x.CSV", b"a,b\n1,2\n", 'its keys are "a", "b"'),
    "csv compressed": ("x.csv.gz", gzip.compress(b"a,b\n1,2"), 'keys are "a", "b"'),
    "tsv": ("x.tsv", b"a\tb\n1\t2\n", 'its keys are "a", "b"'),
    "rtf": ("x.txt", b"{\\rtf1 a}", "RTF"),
    "a mark alone": ("x.txt", codecs.BOM_UTF8, "is an empty file"),
    "nothing compressed": ("x.txt.gz", gzip.compress(b""), "is an empty file"),
    "blank lines": ("x.jsonl", b"\n\n", "holds no document"),
    "xlsx": ("x.xlsx", b"PK\x03\x04" + bytes(30), "zip archive"),
    "zip": ("x.zip", b"PK\x03\x04" + bytes(30), "zip archive"),
    "zip named txt": ("x.txt", b"PK\x03\x04" + bytes(30), "zip archive"),
    "zip named jsonl": ("x.jsonl", b"PK\x03\x04" + bytes(30), "zip archive"),
    "empty zip": ("x.txt", b"PK\x05\x06" + bytes(18), "zip archive"),
    "7z": ("x.txt", b"7z\xbc\xaf\x27\x1c\x00", "7z"),
    "rar": ("x.txt", b"Rar!\x1a\x07\x00", "RAR"),
    "tar": ("x.tar", b"a", "archive"),
    "tar compressed": (
        "x.txt.gz",
        gzip.compress(bytes(257) + b"ustar\x00" + bytes(200)),
        "tar",
    ),
    "png": ("x.png", b"\x89PNG\r\n\x1a\n" + bytes(30), "picture"),
    "jpeg named txt": ("x.txt", b"\xff\xd8\xff\xe0" + bytes(30), "picture"),
    "gif": ("x.txt", b"GIF89a" + bytes(30), "picture"),
    "pdf": ("x.pdf", b"%PDF-1.4\n%\xe2\xe3", "PDF"),
    "program": ("x.txt", b"\x7fELF\x02\x01" + bytes(30), "program"),
    "numpy": ("x.npy", b"\x93NUMPY\x01\x00", "NumPy"),
    "pickle": ("x.pkl", b"\x80\x04\x95" + bytes(30), "pickle"),
    "sqlite": ("x.db", b"SQLite format 3\x00" + bytes(30), "SQLite"),
    "hdf5": ("x.h5", b"\x89HDF\r\n\x1a\n", "HDF5"),
    "sound": ("x.txt", b"RIFF\x24\x00\x00\x00WAVE", "sound"),
    "checkpoint": ("x.safetensors", b"abc", "checkpoint"),
    "index of tokens": ("x.txt", b"MMIDIDX\x00\x00" + bytes(30), "index of tokens"),
    "utf-16": ("x.txt", "some text".encode("utf-16"), "encoding=utf-16"),
    "utf-16 without mark": (
        "x.txt",
        "some text".encode("utf-16-le"),
        "encoding=utf-16-le",
    ),
    "utf-16 big endian": (
        "x.txt",
        "some text".encode("utf-16-be"),
        "encoding=utf-16-be",
    ),
    "utf-32": ("x.txt", "some text".encode("utf-32"), "encoding=utf-32"),
    "zero bytes": ("x.txt", b"some text" + bytes(100), "zero byte at 9"),
    "zero bytes far in": ("x.txt", b"a" * 100_000 + b"\0", "zero byte at 100,000"),
    "LFS pointer": (
        "x.txt",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
        "Git LFS pointer",
    ),
    "LFS pointer named jsonl": (
        "x.jsonl",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
        "Git LFS pointer",
    ),
    "web page": ("x.txt", b"\n<!DOCTYPE html><html>", "web page"),
    "web page named jsonl": ("x.jsonl", b"<html><head>", "web page"),
    "empty": ("x.txt", b"", "is an empty file"),
    "empty jsonl": ("x.jsonl", b"", "is an empty file"),
    "unfinished": ("x.txt.part", b"some text", "unfinished download"),
    "cut gzip": (
        "x.txt.gz",
        gzip.compress(b"some text" * 99)[:-12],
        "incomplete download",
    ),
    "cut gzip of lines": (
        "x.jsonl.gz",
        gzip.compress(LINES * 9)[:-9],
        "incomplete download",
    ),
    "damaged gzip": ("x.txt.gz", b"\x1f\x8b\x08" + bytes(40), "damaged"),
    "cut bzip2": (
        "x.txt.bz2",
        bz2.compress(b"some text" * 99)[:-12],
        "incomplete download",
    ),
    "cut xz": (
        "x.txt.xz",
        lzma.compress(b"some text" * 99)[:-12],
        "incomplete download",
    ),
    "cut last line": ("x.jsonl", LINES + b'{"text": "th', "ends inside this line"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_files_that_are_not_text_are_rejected_with_a_remedy(tmp_path, kind):
    name, content, word = FOREIGN[kind]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as caught:
        token_stream(tmp_path / name, BYTES)
    said = str(caught.value)
    assert name in said and word in said and "\n" not in said and len(said) < 400


@pytest.mark.parametrize(
    "kind",
    [kind for kind in FOREIGN if FOREIGN[kind][0].endswith((".txt", ".csv", ".png"))],
)
def test_as_bytes_reads_files_that_are_not_text(tmp_path, kind):
    name, content, _ = FOREIGN[kind]
    if not content:
        pytest.skip("nothing to read")
    (tmp_path / name).write_bytes(content)
    (document,) = documents(tmp_path / name, as_bytes=True)
    assert document.text() == content


@pytest.mark.parametrize(
    "text",
    [
        b"ID3 tags are old.",
        b"RIFFRAFF",
        b"BZh is a sound.",
        b"OggS",
        b"PKzip",
        b"%PD",
        b"II*",
    ],
)
def test_a_text_that_starts_like_a_binary_format_is_read(tmp_path, text):
    (tmp_path / "x.txt").write_bytes(text)
    assert [document.text() for document in documents(tmp_path / "x.txt")] == [text]


@pytest.mark.parametrize("suffix", [".jsonl", ".JSONL", ".JsonL", ".ndjson"])
def test_suffixes_are_case_insensitive(tmp_path, suffix):
    (tmp_path / f"x{suffix}").write_bytes(LINES)
    found = list(documents(tmp_path / f"x{suffix}"))
    assert [document.text() for document in found] == [b"one", b"two"]


def zstd_compress(data: bytes) -> bytes:
    """Compress with an available package into two frames and a skippable one."""
    if sys.version_info >= (3, 14):
        compress = importlib.import_module("compression.zstd").compress
    else:
        reason = "the zstd extra is not installed"
        compress = pytest.importorskip("zstandard", reason=reason).compress
    half = len(data) // 2
    skipped = b"\x52\x2a\x4d\x18\x03\x00\x00\x00abc"
    return skipped + compress(data[:half]) + skipped + compress(data[half:])


COMPRESSORS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd_compress,
}


@pytest.mark.parametrize("suffix", COMPRESSORS)
@pytest.mark.parametrize("name", ["x.jsonl", "x.JSONL", "x.py", "x.json"])
def test_compressed_files_are_read_by_their_content(tmp_path, name, suffix):
    plain = tmp_path / name
    packed = tmp_path / f"{name}{suffix}"
    plain.write_bytes(LINES)
    packed.write_bytes(COMPRESSORS[suffix](LINES))
    one = [document.text() for document in documents(plain)]
    assert [document.text() for document in documents(packed)] == one
    cards = [
        write_cache([path], tmp_path / "c.bin", BYTES)[0] for path in (plain, packed)
    ]
    assert cards[0] == cards[1]


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_compression_is_detected_by_content(tmp_path, suffix):
    (tmp_path / "x.jsonl").write_bytes(COMPRESSORS[suffix](LINES))
    assert len(list(documents(tmp_path / "x.jsonl"))) == 2


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_a_damaged_compressed_file_is_rejected(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr("rwkv7_jax.data.text_files.CHUNK", 50)
    lines = b"".join(b'{"text": "%d"}\n' % (number**9) for number in range(99))
    packed = COMPRESSORS[suffix](lines)
    path = tmp_path / f"x.jsonl{suffix}"
    path.write_bytes(packed)
    assert len(list(documents(path))) == 99
    # Several compressed files are one file; zeros may fill the last block of a tape.
    for padding in (b"", bytes(8)):
        path.write_bytes(packed + padding + packed + padding)
        assert len(list(documents(path))) == 198
    for junk in (b"junk", b"\xff" + packed[1:]):
        path.write_bytes(packed + junk)
        with pytest.raises(
            ValueError, match=r"x\.jsonl\..*` is (damaged|an incomplete)"
        ):
            list(documents(path))
    for end in range(12, len(packed), 31):
        path.write_bytes(packed[:end])
        with pytest.raises(
            ValueError, match=r"x\.jsonl\..*` is an incomplete download"
        ):
            list(documents(path))
    path.write_bytes(packed[: len(packed) // 2] + bytes(60) + packed[-20:])
    with pytest.raises(ValueError, match=r"x\.jsonl\."):
        list(documents(path))


def test_zstandard_is_read_or_the_missing_package_is_named(tmp_path, monkeypatch):
    (tmp_path / "x.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(20))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    monkeypatch.setitem(sys.modules, "compression.zstd", None)
    with pytest.raises(
        ValueError, match=r"compressed with Zstandard, .* zstandard package"
    ):
        list(documents(tmp_path / "x.jsonl.zst"))


@pytest.mark.parametrize(
    "encoding", ["utf-16", "utf-16-le", "gbk", "gb18030", "utf-32"]
)
def test_a_named_encoding_is_decoded(tmp_path, encoding):
    text = "海 is the sea\n" * 9_000
    (tmp_path / "x.txt").write_bytes(text.encode(encoding))
    (tmp_path / "x.jsonl").write_bytes(
        "".join(
            json.dumps({"text": line}, ensure_ascii=False) + "\n" for line in "一二三"
        ).encode(encoding)
    )
    (document,) = documents(tmp_path / "x.txt", encoding=encoding)
    assert document.text() == text.encode()
    found = list(documents(tmp_path / "x.jsonl", encoding=encoding))
    assert [document.text().decode() for document in found] == list("一二三")


MARK = codecs.BOM_UTF8


@pytest.mark.parametrize("encoding", [None, "utf-8", "UTF8"])
@pytest.mark.parametrize("compress", [bytes, gzip.compress])
@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("x.txt", "Grüße\n".encode(), "Grüße\n".encode()),
        ("x.txt", b"a", b"a"),
        ("x.jsonl", b'{"text": "a"}\n', b"a"),
        ("x.json", b'[{"text": "a"}]', b"a"),
        # Only the first mark is none of the text.
        ("x.txt", MARK + b"a", MARK + b"a"),
    ],
)
def test_a_leading_byte_order_mark_is_removed(
    tmp_path, name, content, text, compress, encoding
):
    path = tmp_path / name
    path.write_bytes(compress(MARK + content))
    (document,) = documents(path, encoding=encoding)
    assert document.text() == text
    if name == "x.txt":
        assert TextFile(path, encoding).size() == len(text)
        (document,) = documents(path, as_bytes=True)
        assert document.text() == path.read_bytes()


@pytest.mark.parametrize(
    "encoding",
    "utf-16 utf-16-le UTF_16BE utf-32 utf-32-le utf-32-be utf-8-sig utf-8 gb18030 utf-7".split(),
)
@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_only_the_first_byte_order_mark_of_any_encoding_is_removed(
    tmp_path, encoding, compress, monkeypatch
):
    plain = {"utf-16": "utf-16-le", "utf-32": "utf-32-le", "utf-8-sig": "utf-8"}
    name = plain.get(encoding, encoding)
    for size in (1, 3, 1 << 16):
        monkeypatch.setattr(text_files, "CHUNK", size)
        for text in ("a\u6d77", "\ufeffa", ""):
            path = tmp_path / "x.txt"
            path.write_bytes(compress(f"\ufeff{text}".encode(name)))
            file = TextFile(path, encoding)
            assert b"".join(file.chunks()) == text.encode()
            assert file.size() == len(text.encode())
    path = tmp_path / "x.jsonl"
    path.write_bytes(compress('\ufeff{"text": "a"}'.encode(name)))
    assert [document.text() for document in documents(path, encoding=encoding)] == [
        b"a"
    ]


@pytest.mark.parametrize(
    ("encoding", "other"), [("utf-16-le", "utf-16-be"), ("utf-16-be", "utf-16-le")]
)
def test_a_bom_of_the_other_byte_order_is_rejected(tmp_path, encoding, other):
    path = tmp_path / "x.txt"
    path.write_bytes("\ufeffabc".encode(other))
    reason = f"x.txt` is not {encoding}: its byte order mark is of the other byte order"
    with pytest.raises(ValueError, match=reason):
        token_stream(path, BYTES, encoding=encoding)
    (document,) = documents(path, encoding="utf-16")
    assert document.text() == b"abc"


def test_a_bom_is_found_at_any_chunk_size(tmp_path, monkeypatch):
    path = tmp_path / "x.txt"
    path.write_bytes(MARK + b"abcdef")
    for size in (1, 2, 3, 4):
        monkeypatch.setattr(text_files, "CHUNK", size)
        assert b"".join(TextFile(path).chunks()) == b"abcdef"


CURES = (
    "--config.data.encoding=gbk",
    "--encoding gbk",
    "data.as_bytes=True",
    "--as-bytes",
)


@pytest.mark.parametrize("name", ["x.txt", "x.py", "x", "x.json"])
@pytest.mark.parametrize("compress", [bytes, gzip.compress])
@pytest.mark.parametrize(
    ("content", "place"),
    [
        ("\u6d77\u7684\u58f0\u97f3".encode("gbk"), "0"),
        ("sea: \u6d77".encode("gbk"), "5"),
        (b"caf\xe9", "3"),
        (MARK + b"caf\xe9", "6"),
        ("\u6d77".encode() * 400 + b"\xff and more", "1,200"),
        (b"so \xed\xa0\x80", "3"),
        (b"a\xe2\x82", "1"),
    ],
)
def test_invalid_utf8_is_reported_with_the_offset_and_both_remedies(
    tmp_path, name, compress, content, place, monkeypatch
):
    path = tmp_path / name
    path.write_bytes(compress(content))
    (tmp_path / "a.txt").write_bytes(b"good")
    for size in (1, 3, 1 << 16):
        monkeypatch.setattr(text_files, "CHUNK", size)
        for source in (path, tmp_path):
            with pytest.raises(
                ValueError, match=f"{name}` is not UTF-8 at byte {place}:"
            ) as said:
                list(documents(source, on_bad="skip"))
            assert all(cure in str(said.value) for cure in CURES)
    (document,) = documents(path, as_bytes=True)
    assert document.text() == path.read_bytes()
    (document,) = documents(path, encoding="latin-1")
    assert document.text() == content.decode("latin-1").encode()


def test_invalid_encodings_are_named(tmp_path):
    (tmp_path / "x.txt").write_bytes("\u6d77".encode("gbk"))
    with pytest.raises(ValueError, match=r"x.txt` is not ascii at about byte 0"):
        token_stream(tmp_path / "x.txt", BYTES, encoding="ascii")
    for wrong in ("klingon", "rot13", "zip", "", "base64"):
        with pytest.raises(ValueError, match="`encoding` must be a text encoding"):
            token_stream(tmp_path / "x.txt", BYTES, encoding=wrong)


def test_a_folder_skips_clutter_with_one_warning(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"text")
    clutter = [
        ".DS_Store",
        ".git/HEAD",
        ".cache/x",
        "cover.PNG",
        "a.txt~",
        "#a.txt#",
        "Thumbs.db",
    ]
    clutter += [
        "a.txt.swp",
        "__pycache__/a.pyc",
        "._a.txt",
        "__MACOSX/._a",
        ".gitattributes",
    ]
    for name in clutter:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"\x00\x01")
    with pytest.warns(
        UserWarning, match=f"{len(clutter)} files below .* were ignored"
    ) as said:
        stream = token_stream(tmp_path, BYTES)
    assert len(said) == 1 and len(stream) == 5


def test_the_card_of_a_data_set_is_not_data(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# A data set\n")
    (tmp_path / "dataset_infos.json").write_text('{"default": {"features": {}}}')
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "README.md").write_text("# Code")
    stats = ReadStats()
    found = [document.text() for document in documents(tmp_path, stats=stats)]
    assert found == [b"# Code", b"a"]
    assert stats.passed_over == 2
    # A file that is named itself is read.
    card = list(documents(tmp_path / "README.md"))
    assert len(card) == 1


def test_linked_folders_are_read_once_and_broken_links_counted(
    tmp_path,
):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "a.txt").write_text("a")
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "b.txt").write_text("b")
    (folder / "first").symlink_to(tmp_path / "store")
    (folder / "again").symlink_to(tmp_path / "store")
    (folder / "above").symlink_to(folder)
    (folder / "gone.txt").symlink_to("nowhere")
    (folder / "loop").symlink_to("loop")
    stats = ReadStats()
    found = [document.text() for document in documents(folder, stats=stats)]
    assert found == [b"a", b"b"]
    assert stats.passed_over == 2


def test_glob_patterns_are_not_expanded(tmp_path):
    with pytest.raises(ValueError, match=r"patterns are not expanded: name the folder"):
        token_stream(str(tmp_path / "*.txt"), BYTES)
    for name in ("a[1].txt", "*.txt", "a,b.txt"):
        (tmp_path / name).write_text("a")
        assert len(token_stream(parse_source(str(tmp_path / name)).paths, BYTES)) == 2


def test_an_empty_file_in_a_folder_is_a_document(tmp_path):
    (tmp_path / "__init__.py").write_bytes(b"")
    (tmp_path / "a.py").write_bytes(b"pass")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [document.text() for document in documents(tmp_path)] == [b"", b"pass"]


@pytest.mark.parametrize("empty", ["", " ", "\t"])
def test_an_empty_name_is_not_the_current_folder(empty):
    for source in (empty, ["stdlib", empty]):
        with pytest.raises(ValueError, match="`source` must name a file or a folder"):
            token_stream(source, BYTES)


@pytest.mark.parametrize(
    "url",
    ["gs://b/x.jsonl", "https://x.org/a.jsonl", "hf://d/x", "s3://b/x", "file:///x"],
)
def test_a_remote_url_is_rejected(url):
    with pytest.raises(ValueError, match=rf"got {re.escape(url)}: download it first"):
        token_stream(url, BYTES)


def test_the_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.jsonl").write_bytes(LINES)
    assert len(token_stream("~/x.jsonl", BYTES)) == 8
    write_cache(["~/x.jsonl"], tmp_path / "x.bin", BYTES)
    assert len(token_stream("~/x.bin", BYTES)) == 8


def test_lines_do_not_depend_on_the_chunk_size(tmp_path, monkeypatch):
    data = b"a\r\n\n\xe2\x80\xa8b\nlast"
    (tmp_path / "x").write_bytes(data)
    for size in (1, 2, 3, 100):
        monkeypatch.setattr("rwkv7_jax.data.text_files.CHUNK", size)
        lines = list(TextFile(tmp_path / "x").lines())
        assert lines == [b"a\r\n", b"\n", b"\xe2\x80\xa8b\n", b"last"]
