"""The text of Debian packages, on a synthetic system."""

import gzip
import json
import struct
import sys
import zlib

import pytest

from benchmarks import debian_text
from rwkv7_jax.data.readers import documents

LONG = "A sentence that says something and goes on for a while. " * 8
COPYRIGHT = "Format: 1.0\n\nFiles: *\nLicense: GPL-2+\n\nLicense: GPL-2+\n text\n"
MANUAL = (
    '.\\" a comment\n.TH CAT 1\n.SH NAME\ncat \\- joins \\fBfiles\\fP\n.SH TEXT\n'
    f".BR cat (1)\n{LONG}\n.TP\n\\(bu an item\n"
)
PAGE = (
    f"<html><head><title>x</title></head><body><script>no()</script><h1>Cats</h1><p>{LONG}</p>"
    "<pre>a  b</pre><p>cats &amp; dogs</p></body></html>"
)


@pytest.fixture
def root(tmp_path):
    """A system with three packages, two of which are known."""
    system = tmp_path / "system"
    files = {
        "dict-wn": {
            "usr/share/dictd/wn.dict.dz": gzip.compress(
                "\n\n".join(f"word {n}\n  {LONG}" for n in range(200)).encode()
            ),
            "usr/share/dictd/wn.index": b"index",
            "usr/share/doc/dict-wn/copyright": COPYRIGHT.encode(),
        },
        "manpages": {
            "usr/share/man/man1/cat.1.gz": gzip.compress(MANUAL.encode()),
            "usr/share/man/man1/short.1": b".so man1/cat.1\n",
            "usr/share/doc/manpages/copyright": b"These pages are in the public domain.",
        },
        "anarchism": {
            "usr/share/doc/anarchism/html/a.html": PAGE.encode(),
            "usr/share/doc/anarchism/html/copy.html": PAGE.encode(),
            "usr/share/doc/anarchism/html/picture.html": b"\x89PNG\0\0" * 100,
            "usr/share/doc/anarchism/notes.txt": LONG.encode(),
        },
    }
    info = system / "var/lib/dpkg/info"
    info.mkdir(parents=True)
    status = ""
    for name, contents in files.items():
        for path, data in contents.items():
            (system / path).parent.mkdir(parents=True, exist_ok=True)
            (system / path).write_bytes(data)
        # Packages of one architecture have it in the names of their lists.
        suffix = ":amd64.list" if name == "manpages" else ".list"
        listed = "".join(
            f"/{path}\n" for path in ("", *reversed(list(contents)), "gone")
        )
        (info / f"{name}{suffix}").write_text(listed)
        status += (
            f"Package: {name}\nStatus: install ok installed\nVersion: 1.2-{name}\n\n"
        )
    (system / "var/lib/dpkg/status").write_text(status)
    return system


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["debian_text", *map(str, words)])
    debian_text.main()


def test_installed_packages_are_written_and_missing_ones_named(
    root, tmp_path, monkeypatch, capsys
):
    run(monkeypatch, tmp_path / "out.jsonl", "--root", root)
    said = capsys.readouterr().out
    missing = next(line for line in said.splitlines() if "not installed" in line)
    assert "apt-get install dict-gcide" in missing
    assert "dict-wn" not in missing and "manpages-de" in missing
    words = ("--root", root, "--without", "manpages-fr")
    run(monkeypatch, tmp_path / "out.jsonl", *words)
    said = capsys.readouterr().out
    assert "manpages-fr" not in said and "manpages-ja" in said
    table = (tmp_path / "out.licences.md").read_text()
    assert "| dict-wn | 1.2-dict-wn |" in table and "| GPL-2+ |" in table
    assert "public domain" in table
    assert "see /usr/share/doc/anarchism/copyright" in table


def test_training_reads_each_line_as_a_document(root, tmp_path, monkeypatch):
    run(monkeypatch, tmp_path / "out.jsonl", "--root", root)
    texts = [one.text().decode() for one in documents(tmp_path / "out.jsonl")]
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    assert texts == [json.loads(line)["text"] for line in lines]
    # All 200 words, in pieces of at most as many characters as a document may have.
    words = [text for text in texts if text.startswith("word ")]
    assert len(words) > 2 and max(map(len, words)) <= 32_768
    assert sum(text.count("word ") for text in words) == 200


def test_the_output_is_deterministic(root, tmp_path, monkeypatch):
    for name in ("a", "b"):
        run(monkeypatch, tmp_path / f"{name}.jsonl", "--root", root)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


def test_duplicates_pictures_and_non_prose_files_are_skipped(root):
    parts = debian_text.collect(root, ["anarchism"])
    (text,) = parts["anarchism"].documents
    assert text.startswith("Cats\n")
    assert "a  b" in text and "cats & dogs" in text
    assert "no()" not in text and "<" not in text and "title" not in text


def test_man_pages_become_plain_text_and_links_are_skipped(root):
    parts = debian_text.collect(root, ["manpages"])
    (text,) = parts["manpages"].documents
    assert "cat - joins files" in text and "cat(1)" in text and "* an item" in text
    assert "\\" not in text and "comment" not in text


def test_a_sword_module_is_decompressed_to_text(tmp_path):
    data = b"gap"
    index = struct.pack("<III", 0, 0, 0)
    for words in (f"<p>Of <i>cats</i></p>{LONG}", LONG):
        block = zlib.compress(words.encode())
        index += struct.pack("<III", len(data), len(block), len(words))
        data += block
    (tmp_path / "ot.bzz").write_bytes(data)
    (tmp_path / "ot.bzs").write_bytes(index)
    text = debian_text.read_text(tmp_path / "ot.bzz")
    assert text.startswith("Of cats\n") and text.count(LONG.strip()) == 2


def test_desktop_help_has_one_line_per_paragraph(tmp_path):
    path = tmp_path / "a.page"
    path.write_text("<page><title>Cats</title><p>One.</p><para>Two.</para></page>")
    assert debian_text.read_text(path).split() == ["Cats", "One.", "Two."]


def test_user_named_packages_give_their_text_files(root):
    (root / "var/lib/dpkg/info/mine.list").write_text(
        "/usr/share/doc/anarchism/notes.txt\n"
    )
    parts = debian_text.collect(root, ["mine"])
    assert parts["mine"].documents == (LONG.strip(),)


def test_an_overlong_line_is_not_split():
    text = "x" * 40_000 + "\n" + "y" * 10
    assert list(debian_text.cut(text)) == ["x" * 40_000, "y" * 10]


def test_few_invalid_bytes_are_replaced_and_many_are_not_text(tmp_path):
    few = tmp_path / "few.txt"
    few.write_bytes(LONG.encode() * 4 + b"caf\xe9")
    assert debian_text.read_text(few).endswith("caf\ufffd")
    many = tmp_path / "many.txt"
    many.write_bytes(b"caf\xe9" * 100)
    assert debian_text.read_text(many) is None


@pytest.mark.parametrize(
    ("target", "system", "packages", "sentence"),
    [
        ("out.txt", "system", ["manpages"], "the target must end in .jsonl"),
        ("out.jsonl", "nowhere", ["manpages"], "must be a system with dpkg"),
        ("out.jsonl", "system", ["nothing"], "no package has text"),
        ("out.jsonl", "system", ["manpages"] * 2, "`names` must differ"),
    ],
)
def test_invalid_arguments_end_in_one_sentence(
    root, tmp_path, monkeypatch, target, system, packages, sentence
):
    with pytest.raises(SystemExit, match=sentence):
        words = ["--root", tmp_path / system, "--packages", *packages]
        run(monkeypatch, tmp_path / target, *words)
    assert not (tmp_path / "out.jsonl").exists()
