"""A large text from the documentation and dictionaries of installed Debian packages.

    python -m benchmarks.debian_text runs/debian.jsonl

Reads the texts of the known packages that are installed, and names the missing ones with the
command that installs them. Writes lines of {"text": ...} that train.py reads as
`--config.data.path`, and next to them a table of licences (runs/debian.licences.md). The same
packages give the same bytes. Compressed files are decompressed; HTML and manual pages become plain
text; long texts are split into documents at blank lines; duplicate documents are dropped. Read the
licences before you share the text or a model trained on it: the table lists them as the packages
do.
"""

import argparse
import dataclasses
import fnmatch
import gzip
import hashlib
import html.parser
import json
import re
import struct
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from rwkv7_jax.atomic_write import atomic_write

_MANUAL = ("usr/share/man/*",)
_DICTIONARY = ("usr/share/dictd/*.dict.dz",)
_SOURCES = "_sources/*.txt"
_HTML = ("usr/share/doc/*.html",)
# Of desktops, in English; and what the SWORD project's readers read.
_HELP = (
    "usr/share/help/C/*.page",
    "usr/share/help/C/*.xml",
    "usr/share/help/C/*.docbook",
)
_SWORD = ("usr/share/sword/modules/*.[bc]zz",)

# Which files of a package are prose. Of documents in two forms, the one that is nearer to text; of
# translated ones, the English one.
PACKAGES: dict[str, tuple[str, ...]] = {
    "dict-gcide": _DICTIONARY,
    "dict-wn": _DICTIONARY,
    "dict-foldoc": _DICTIONARY,
    "dict-jargon": _DICTIONARY,
    "dict-devil": _DICTIONARY,
    "sword-text-kjv": _SWORD,
    "sword-text-web": _SWORD,
    "sword-comm-mhcc": _SWORD,
    "sword-comm-tdavid": _SWORD,
    "anarchism": ("usr/share/doc/anarchism/html/*.html",),
    "fortunes": ("usr/share/games/fortunes/*",),
    "fortunes-min": ("usr/share/games/fortunes/*",),
    "doc-debian": ("usr/share/doc/debian/*.txt", "usr/share/doc/debian/*.txt.gz"),
    "debian-faq": _HTML,
    "debian-handbook": ("usr/share/doc/debian-handbook/html/en-US/*.html",),
    "debian-kernel-handbook": _HTML,
    "debian-policy": ("usr/share/doc/debian-policy/*.txt.gz",),
    "debian-reference-en": ("usr/share/debian-reference/*.en.html",),
    "debmake-doc": ("usr/share/doc/debmake-doc/*.en.txt.gz",),
    "developers-reference": (f"usr/share/developers-reference/{_SOURCES}",),
    "freedombox-doc-en": ("usr/share/freedombox/manual/en/*.html",),
    "installation-guide-amd64": ("usr/share/doc/installation-guide-amd64/en/*.html",),
    "maint-guide": ("usr/share/doc/maint-guide/html/*.en.html",),
    "gimp-help-en": ("usr/share/gimp/2.0/help/en/*.html",),
    "gnome-user-docs": _HELP,
    "gnucash-docs": ("usr/share/doc/gnucash-docs/gnucash-*-en/*.html",),
    "kicad-doc-en": ("usr/share/doc/kicad/help/en/*.html",),
    "libreoffice-help-en-us": ("usr/share/libreoffice/help/en-US/text/*.html",),
    "mate-user-guide": _HELP,
    "abs-guide": _HTML,
    "mh-book": _HTML,
    "png-definitive-guide": _HTML,
    "apache2-doc": ("usr/share/doc/apache2-doc/manual/en/*.html",),
    "bash-doc": _HTML,
    "bind9-doc": _HTML,
    "csound-doc": _HTML,
    "exim4-doc-html": _HTML,
    "git-doc": ("usr/share/doc/git-doc/*.txt",),
    "lilypond-doc-html": tuple(
        f"usr/share/doc/lilypond/html/Documentation/{part}/*.html"
        for part in ("learning", "music-glossary", "notation", "usage", "web")
    ),
    "linux-doc-6.1": (f"usr/share/doc/linux-doc-6.1/html/{_SOURCES}",),
    "maxima-doc": ("usr/share/doc/maxima-doc/html/*.html",),
    "octave-doc": ("usr/share/doc/octave/octave.html/*.html",),
    "perl-doc": ("usr/share/perl/*.pod",),
    "postfix-doc": _HTML,
    "postgresql-doc-15": _HTML,
    "python3.11-doc": (f"usr/share/doc/python3.11/html/{_SOURCES}",),
    "r-doc-html": ("usr/share/R/doc/*.html",),
    "racket-doc": ("usr/share/doc/racket/*.html",),
    "rust-web-doc": tuple(
        f"usr/share/doc/rust-web-doc/html/{book}/*.html"
        for book in ("book", "reference", "nomicon", "rust-by-example", "cargo")
    ),
    "sqlite3-doc": _HTML,
    "vim-runtime": ("usr/share/vim/*/doc/*.txt",),
    "zsh-doc": _HTML,
    "python-django-doc": _HTML,
    "python-sqlalchemy-doc": ("usr/share/doc/python-sqlalchemy-doc/rst/*.rst",),
    "manpages": _MANUAL,
    "manpages-dev": _MANUAL,
    "manpages-de": _MANUAL,
    "manpages-fr": _MANUAL,
    "manpages-ja": _MANUAL,
}

# Of packages that the user names: text files of their documentation, and the manual.
_OTHERS = ("usr/share/doc/*.txt", "usr/share/doc/*.txt.gz", *_MANUAL)

# Indices of fortunes, which lie next to their texts.
_NO_PROSE = (".dat", ".u8")

# Characters of a document: longer texts are cut, and shorter files say too little.
_LONGEST = 32_768
_SHORTEST = 200

# One in so many characters of a text may be no UTF-8.
_WRONG_CHARACTERS = 500

_BLOCKS = frozenset(
    "address article blockquote br dd div dl dt h1 h2 h3 h4 h5 h6 hr item li ol p para pre screen "
    "section table td th title tr ul".split()
)
_MARKUP = (".html", ".htm", ".page", ".xml", ".docbook", ".bzz", ".czz")
_HIDDEN = frozenset("aside head nav noscript script style".split())

# Requests of the manual's language whose arguments are words of the text.
_SPOKEN = frozenset("B BI BR I IB IP IR RB RI SB SH SM SS TH TP UR".split())
_GLYPHS = {
    "em": "-",
    "en": "-",
    "bu": "*",
    "lq": '"',
    "rq": '"',
    "aq": "'",
    "co": "(c)",
}
_ESCAPE = re.compile(
    r"\\(?:f(?:\[\w*\]|\(..|.)|s[-+]?\d+|\*(?:\(..|\[\w+\]|.)|\((..)|\[(\w+)\]|(.))"
)


@dataclasses.dataclass(frozen=True)
class Package:
    """A package that is installed.

    Attributes:
        name: without an architecture.
        version: as dpkg knows it; "" where it does not.
        files: paths without the leading slash, in order.
        licences: names in its copyright file.
    """

    name: str
    version: str
    files: tuple[str, ...]
    licences: tuple[str, ...]


def read_package(root: Path, name: str) -> Package | None:
    """Reads what dpkg knows of a package; None where it is not installed."""
    folder = root / "var/lib/dpkg/info"
    lists = [folder / f"{name}.list", *sorted(folder.glob(f"{name}:*.list"))]
    found = [path for path in lists if path.is_file()]
    if not found:
        return None
    lines = found[0].read_text(encoding="utf-8").splitlines()
    files = sorted(line.strip().lstrip("/") for line in lines)
    copyright_file = root / "usr/share/doc" / name / "copyright"
    licences: tuple[str, ...] = ()
    if copyright_file.is_file():
        licences = licences_of(copyright_file.read_text("utf-8", errors="replace"))
    return Package(name, _version(root, name), tuple(files), licences)


def _version(root: Path, name: str) -> str:
    """Looks a package's version up in dpkg's status file."""
    status = root / "var/lib/dpkg/status"
    if not status.is_file():
        return ""
    for paragraph in status.read_text("utf-8", errors="replace").split("\n\n"):
        fields = dict(re.findall(r"^([\w-]+): (.*)$", paragraph, re.MULTILINE))
        if fields.get("Package") == name:
            return fields.get("Version", "")
    return ""


def licences_of(text: str) -> tuple[str, ...]:
    """Finds the names of licences in a copyright file, each once.

    Machine-readable files have fields for them. In others well-known names are looked for.
    """
    names = re.findall(r"^License:[ \t]*(\S.*)$", text, re.MULTILINE)
    if not names:
        known = {
            "public domain": r"public\s+domain",
            "GPL": r"General\s+Public\s+License|\bGPL\b",
            "GFDL": r"Free\s+Documentation\s+License|\bGFDL\b",
            "BSD": r"\bBSD\b|Redistribution and use in source and binary",
            "MIT": r"Permission is hereby granted, free of charge",
        }
        for name, pattern in known.items():
            if re.search(pattern, text, re.IGNORECASE):
                names.append(name)
    return tuple(dict.fromkeys(name.strip() for name in names))


def read_text(path: Path) -> str | None:
    """Reads a file as plain text; None if it is not text."""
    data = path.read_bytes()
    if path.suffix in (".bzz", ".czz"):
        data = _sword_module(path, data)
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error):
            return None
    if b"\0" in data:
        return None
    # Old dictionaries have a few bytes of other encodings; a file with many is no text.
    text = data.decode("utf-8", errors="replace")
    if text.count("\ufffd") > len(text) / _WRONG_CHARACTERS:
        return None
    name = path.name.removesuffix(".gz")
    if name.endswith(_MARKUP):
        text = from_html(text)
    elif "/man/" in path.as_posix():
        text = from_manual(text)
    return text.replace("\r\n", "\n")


def _sword_module(path: Path, data: bytes) -> bytes:
    """Decompresses the blocks of a module; the index next to it has their positions and sizes."""
    index = path.with_suffix(f"{path.suffix[:-1]}s").read_bytes()
    blocks = []
    for start, size, _ in struct.iter_unpack("<III", index):
        if size:
            blocks.append(zlib.decompress(data[start : start + size]))
    return b"\n".join(blocks)


class _PlainText(html.parser.HTMLParser):
    """A reader of HTML that keeps the words, with line breaks where blocks begin and end."""

    def __init__(self):
        super().__init__()
        self.pieces: list[str] = []
        self._hidden = 0
        self._kept = 0

    def handle_starttag(self, tag, attrs):
        """Begins a block, or a part that is not shown."""
        self._hidden += tag in _HIDDEN
        self._kept += tag == "pre"
        if tag in _BLOCKS:
            self.pieces.append("\n")

    def handle_endtag(self, tag):
        """Ends a block, or a part that is not shown."""
        # Pages have end tags without a beginning.
        self._hidden = max(self._hidden - (tag in _HIDDEN), 0)
        self._kept = max(self._kept - (tag == "pre"), 0)
        if tag in _BLOCKS:
            self.pieces.append("\n")

    def handle_data(self, data):
        """Keeps words; whitespace is significant only in listings."""
        if not self._hidden:
            self.pieces.append(data if self._kept else re.sub(r"\s+", " ", data))


def from_html(text: str) -> str:
    """Writes a page of HTML as plain text."""
    reader = _PlainText()
    reader.feed(text)
    reader.close()
    lines = [line.rstrip() for line in "".join(reader.pieces).split("\n")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def from_manual(text: str) -> str:
    """Writes a page of the manual (man macros) as plain text; a page of links is empty."""
    lines = []
    for line in text.splitlines():
        if line[:1] not in (".", "'"):
            lines.append(_without_escapes(line))
            continue
        request, _, rest = line[1:].strip().partition(" ")
        if request in ("PP", "P", "LP", "sp", "SH", "SS", "TP", "IP"):
            lines.append("")
        if request in _SPOKEN and rest:
            words = re.findall(r'"((?:[^"]|"")*)"|(\S+)', rest)
            # Of macros that alternate fonts the arguments are one word.
            glue = "" if len(request) == 2 and set(request) <= set("BIR") else " "
            spoken = glue.join(first or second for first, second in words)
            lines.append(_without_escapes(spoken))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _without_escapes(line: str) -> str:
    """Replaces the escapes of the manual's language by what they stand for."""

    def replace(match: re.Match[str]) -> str:
        named = match[1] or match[2]
        if named:
            return _GLYPHS.get(named, "")
        if match[3] is None:
            return ""
        return {"-": "-", "e": "\\", " ": " ", "~": " ", "\\": "\\"}.get(match[3], "")

    # A comment ends its line.
    return _ESCAPE.sub(replace, re.sub(r'\\["#].*', "", line))


def cut(text: str) -> Iterator[str]:
    """Cuts a text into pieces that are no longer than a document may be.

    At blank lines, and inside of paragraphs that are too long between lines; a line is never cut.
    """
    yield from _joined(_paragraphs(text))


def _paragraphs(text: str) -> Iterator[str]:
    """Yields paragraphs, each with its end; of those that are too long line by line."""
    for paragraph in re.split(r"(?<=\n)\s*\n", text):
        if len(paragraph) <= _LONGEST:
            yield f"{paragraph.rstrip()}\n\n"
        else:
            yield from paragraph.splitlines(keepends=True)


def _joined(parts: Iterator[str]) -> Iterator[str]:
    """Joins parts as long as they fit into a document."""
    piece = ""
    for part in parts:
        if piece and len(piece) + len(part) > _LONGEST:
            yield piece.strip("\n")
            piece = ""
        piece += part
    if piece.strip():
        yield piece.strip("\n")


def documents_of(root: Path, package: Package, seen: set[bytes]) -> list[str]:
    """Reads the documents of a package that no package before it has had.

    Args:
        root: of the system.
        package: one that is installed.
        seen: hashes of documents; those of this package are added.
    """
    patterns = PACKAGES.get(package.name, _OTHERS)
    documents = []
    for name in package.files:
        path = root / name
        is_prose = any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
        # Links lead to files that are read under their own names.
        if not is_prose or name.endswith(_NO_PROSE) or not path.is_file():
            continue
        if path.is_symlink():
            continue
        text = read_text(path)
        if text is None or len(text) < _SHORTEST:
            continue
        for piece in cut(text):
            digest = hashlib.blake2b(piece.encode(), digest_size=16).digest()
            if digest not in seen:
                seen.add(digest)
                documents.append(piece)
    return documents


@dataclasses.dataclass(frozen=True)
class Part:
    """What a package gives.

    Attributes:
        package: the package; None where it is not installed.
        documents: its texts.
    """

    package: Package | None
    documents: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Bytes of the texts."""
        return sum(len(text.encode()) for text in self.documents)


def collect(root: Path, names: Sequence[str]) -> dict[str, Part]:
    """Reads the documents of packages, by their names.

    Raises:
        ValueError: the root is no system of Debian, or a name comes twice.
    """
    if not (root / "var/lib/dpkg/info").is_dir():
        raise ValueError(
            f"collect: `root` must be a system with dpkg; {root} has no var/lib/dpkg/info."
        )
    if len(set(names)) != len(names):
        raise ValueError(f"collect: `names` must differ; got {', '.join(names)}.")
    parts = {}
    seen: set[bytes] = set()
    for name in names:
        package = read_package(root, name)
        if package is None:
            parts[name] = Part(None)
        else:
            parts[name] = Part(package, tuple(documents_of(root, package, seen)))
    return parts


def licence_table(parts: dict[str, Part]) -> str:
    """Formats the packages with their licences as a table in Markdown."""
    lines = [
        "| package | version | documents | bytes | licences |",
        "|---|---|---|---|---|",
    ]
    for name, part in parts.items():
        if part.package is None or not part.documents:
            continue
        licences = ", ".join(part.package.licences)
        licences = licences or f"see /usr/share/doc/{name}/copyright"
        lines.append(
            f"| {name} | {part.package.version} | {len(part.documents):,} | {part.size:,} | "
            f"{licences} |"
        )
    return "\n".join(lines) + "\n"


def write(target: Path, parts: dict[str, Part]) -> Path:
    """Writes the texts and the table of licences; returns the path of the table."""
    table = target.with_suffix(".licences.md")
    with atomic_write(table) as file:
        file.write(licence_table(parts).encode())
    with atomic_write(target) as file:
        for part in parts.values():
            for text in part.documents:
                file.write(
                    json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n"
                )
    return table


def main() -> None:
    """Writes the text, and prints its sources and the packages that are missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("target", type=Path, help="OUT.jsonl")
    parser.add_argument(
        "--root", type=Path, default=Path("/"), help="root of the system"
    )
    parser.add_argument(
        "--packages",
        nargs="+",
        default=list(PACKAGES),
        help="packages other than the known ones",
    )
    parser.add_argument(
        "--without",
        nargs="+",
        default=[],
        help="packages to exclude, such as other languages",
    )
    options = parser.parse_args()
    try:
        if options.target.suffix != ".jsonl":
            raise ValueError(f"the target must end in .jsonl; got {options.target}.")
        names = [name for name in options.packages if name not in options.without]
        parts = collect(options.root, names)
        missing = [name for name, part in parts.items() if part.package is None]
        empty = [
            name for name, part in parts.items() if part.package and not part.documents
        ]
        print(licence_table(parts), end="")
        if empty:
            print(f"no readable text: {', '.join(empty)}")
        if missing:
            print(f"not installed: apt-get install {' '.join(missing)}")
        if not any(part.documents for part in parts.values()):
            raise ValueError("no package has text; nothing is written.")
        options.target.parent.mkdir(parents=True, exist_ok=True)
        table = write(options.target, parts)
    except (ValueError, OSError) as error:
        sys.exit(f"debian_text: {error}")
    total = sum(part.size for part in parts.values())
    print(f"wrote {options.target} ({total:,} bytes) and {table}")


if __name__ == "__main__":
    main()
