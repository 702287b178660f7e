"""Paths as users type them: lists with commas, `~`, and addresses that are not local files."""

import contextlib
import errno
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

# Any scheme with a slash (a single letter would be a Windows drive), schemes of stores and hubs
# without one, and hosts of models without a scheme.
_URL = re.compile(
    r"""\s*(?:
        [a-z][a-z0-9+.-]+:[/\\]
        | (?:hf|gs|s3|gcs|r2|az|abfss?|oss|hdfs|https?|ftp|sftp|scp|ssh|git|file):
        | git@
        | www\.[\w.-]+\.[a-z]+/
        | (?:huggingface\.co|hf\.co|hf-mirror\.com|modelscope\.cn|github\.com)/
    )""",
    re.IGNORECASE | re.VERBOSE,
)

# "owner/model", as hubs name models. A path with a known suffix is a missing file instead.
_HUB_NAME = re.compile(
    r"[A-Za-z0-9][\w-]*/(?!.*\.(?:pth|safetensors|st|state|json|bin|gguf)$)[\w.-]+"
)

# The suffixes of models and states.
_SUFFIXES = (".pth", ".safetensors", ".st", ".state", ".gguf", ".bin")

_HUB_HOSTS = ("huggingface.co/", "hf.co/", "hf-mirror.com/")


def split_list(text: str, argument: str) -> tuple[str, ...]:
    """Splits a comma-separated list.

    Args:
        text: the list; an empty string has no entries.
        argument: the setting or option in backticks; messages begin with it.

    Raises:
        ValueError: an entry is empty or blank, for instance after a trailing comma. As a path it
            would mean the current folder.
    """
    if not text:
        return ()
    entries = tuple(text.split(","))
    for number, entry in enumerate(entries, 1):
        if not entry.strip():
            raise ValueError(
                f"{argument} must have a name between commas; entry {number} of {text!r} is empty."
            )
    return entries


def split_paths(text: str, argument: str) -> tuple[str, ...]:
    """Splits a comma-separated list of paths; see `split_list`.

    A path that is repeated verbatim counts twice, for a text with double weight. If the whole text
    is the name of an existing file, the result is that file.

    Raises:
        ValueError: an entry is empty, or two entries are spellings of one file or folder.
    """
    if "," in text and os.path.exists(os.path.expanduser(text)):
        return (text,)
    entries = split_list(text, argument)
    refuse_two_spellings(entries, argument)
    return entries


def refuse_two_spellings(entries: Iterable[str], argument: str) -> None:
    """Raises if two entries of a list are different spellings of one file or folder.

    Args:
        entries: paths as typed.
        argument: the argument in backticks; messages begin with it.

    Raises:
        ValueError: there are two such entries.
    """
    spellings: dict[tuple[int, int], str] = {}
    for entry in entries:
        place = _identity(entry)
        if place is None:
            continue
        before = spellings.setdefault(place, entry)
        if before != entry:
            raise ValueError(
                f"{argument} must name each file once; {before!r} and {entry!r} are the same file."
            )


def is_same(one: str | os.PathLike[str], two: str | os.PathLike[str]) -> bool:
    """Tells whether two paths are spellings of one existing file or folder."""
    place = _identity(one)
    return place is not None and place == _identity(two)


def _identity(path: str | os.PathLike[str]) -> tuple[int, int] | None:
    """Returns device and inode of a file; None if it does not exist."""
    try:
        status = os.stat(os.path.expanduser(path))
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


def is_remote(text: str) -> bool:
    """Tells whether a text is a remote address.

    A text that names an existing file or folder is a path.
    """
    return _URL.match(text) is not None and not os.path.exists(text)


def local_path(
    path: str | os.PathLike[str], argument: str, *, target: bool = False
) -> Path:
    """Returns a path with `~` expanded to the home folder.

    Args:
        path: path on this machine.
        argument: the argument, setting or option in backticks; messages begin with it.
        target: whether the path will be written to.

    Raises:
        ValueError: the path is empty, is a URL, has a null byte, or is too long for a file.
        TypeError: the argument is not a path.
    """
    try:
        text = os.fspath(path)
    except TypeError:
        raise TypeError(
            f"{argument} must be a path; got {type(path).__name__}."
        ) from None
    if isinstance(text, bytes):
        raise TypeError(f"{argument} must be a path; got bytes.")
    if not text.strip():
        raise ValueError(f"{argument} must name a file or a folder; got {text!r}.")
    if "\0" in text:
        raise ValueError(f"{argument} must be a path without null bytes; got {text!r}.")
    # `Path` folds "//", so `_URL` accepts a single slash.
    if is_remote(text):
        advice = f"download it first, for example with `{_download_command(text)}`"
        if target:
            advice = "write to a local path and copy it there afterwards"
        raise ValueError(f"{argument} must be on this machine; got {text}: {advice}.")
    # "~name" without such a user is the name of a file.
    place = Path(os.path.expanduser(text))
    try:
        place.lstat()
    except OSError as error:
        # Such as a prompt in place of the file that holds it.
        if error.errno == errno.ENAMETOOLONG:
            raise ValueError(
                f"{argument} must be a path; got {len(text):,} characters, more than a file's "
                f"name can have: {text[:40]!r}..."
            ) from None
    return place


def is_special(path: Path) -> bool:
    """Tells whether a path is a device, a pipe or a socket.

    Opening a pipe may block forever, and reading a device may never end.
    """
    return path.exists() and not path.is_file() and not path.is_dir()


@contextlib.contextmanager
def name_in_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Adds a path to operating system errors without one, such as those of a read.

    Raises:
        OSError: the block raised it; it names `path` unless it names another file.
    """
    try:
        yield
    except OSError as error:
        # Errors that libraries make themselves have no number.
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from None


def existing_path(path: str | os.PathLike[str], argument: str) -> Path:
    """Returns the path of an existing file or folder, with `~` expanded.

    Args:
        path: path on this machine.
        argument: the argument, setting or option in backticks; messages begin with it.

    Raises:
        ValueError: the path does not exist, is a device or a pipe, or is not local; see
            `local_path`. The message distinguishes a model on a hub from a missing file.
        TypeError: the argument is not a path.
    """
    place = local_path(path, argument)
    if is_special(place):
        raise ValueError(
            f"{argument} must name a file or a folder; `{place}` is a device or a pipe."
        )
    if place.exists():
        return place
    for suffix in _SUFFIXES:
        # Other programs append the suffix themselves.
        if os.path.isfile(f"{place}{suffix}"):
            raise ValueError(f"`{place}` does not exist; `{place}{suffix}` does.")
    refuse_hub_name(path, argument)
    raise ValueError(f"`{place}` does not exist.")


def check_target(path: Path, argument: str) -> None:
    """Checks that a file or a folder can be created at a path.

    Args:
        path: path of the output; missing folders will be created.
        argument: the argument, setting or option in backticks; messages begin with it.

    Raises:
        ValueError: a parent of the path is a file, the folder is read-only, or the path is a device
            or a pipe.
    """
    if path.is_symlink():
        # The target of the link is replaced, not the link. `Path.resolve` raises RuntimeError for
        # circular links before Python 3.13.
        path = Path(os.path.realpath(path))
    if is_special(path):
        raise ValueError(
            f"{argument} must name a file or a folder; `{path}` is a device or a pipe."
        )
    # The parent of an existing folder too: its replacement is written next to it.
    folder = next((parent for parent in path.parents if parent.exists()), Path())
    if not folder.is_dir():
        raise ValueError(f"{argument} must be in a folder; `{folder}` is a file.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(
            f"{argument} must be in a writable folder; `{folder}` is read-only."
        )


def require_unicode(path: Path, argument: str) -> None:
    """Rejects a path that Orbax cannot open because it is not UTF-8.

    Python represents undecodable bytes of a path as unpaired surrogates.

    Args:
        path: path of a folder; its parents are checked too.
        argument: the argument, setting or option in backticks; messages begin with it.

    Raises:
        ValueError: a part of the path, or the encoding of the locale, is not UTF-8.
    """
    place = str(path.absolute())
    try:
        place.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{argument} must have a path in UTF-8; got {place!r}: rename the folder, or set "
            "`PYTHONUTF8=1` if the locale has another encoding."
        ) from None


def refuse_hub_name(
    path: str | os.PathLike[str], argument: str, *, kind: str = "model"
) -> None:
    """Rejects a name on a hub, such as "owner/model", in place of a file.

    Args:
        path: path that does not exist.
        argument: the argument, setting or option in backticks; messages begin with it.
        kind: "model" or "dataset".

    Raises:
        ValueError: `path` is such a name.
    """
    text = os.fspath(path)
    if not _HUB_NAME.fullmatch(text) or Path(text).parent.exists():
        return
    command = _hub_command(text)
    if kind != "model":
        command = command.replace("hf download", f"hf download --repo-type {kind}")
    raise ValueError(
        f"{argument} must name an existing file or folder; `{text}` does not exist. If it is a "
        f"{kind} on Hugging Face, download it first: `{command}`."
    )


def _download_command(url: str) -> str:
    """Returns a command that downloads an address to the current folder."""
    scheme, colon, place = url.strip().replace("\\", "/").partition(":")
    if not colon or "/" in scheme or "@" in scheme:
        # A host without a scheme, such as "huggingface.co/owner/model".
        scheme = "https"
        place = url.strip().removeprefix("git@").replace("github.com:", "github.com/")
    scheme = scheme.lower()
    place = place.lstrip("/")
    for host in _HUB_HOSTS:
        if place.lower().startswith(host):
            scheme = "hf"
            place = place[len(host) :]
    if scheme == "hf":
        return _hub_command(place)
    if scheme in ("gs", "gcs"):
        return f"gcloud storage cp -r gs://{place} ."
    if scheme == "s3":
        return f"aws s3 cp --recursive s3://{place} ."
    return f"curl -LO {scheme}://{place}"


def _hub_command(name: str) -> str:
    """Returns a command that downloads a model, or one of its files, from Hugging Face."""
    owner, _, rest = name.partition("/")
    repository, *inside = rest.split("/")
    # Addresses of single files contain the revision: "resolve/main/model.pth".
    if inside[:1] in (["resolve"], ["blob"], ["tree"]):
        inside = inside[2:]
    parts = ["hf download", f"{owner}/{repository}"]
    if inside:
        parts.append("/".join(inside))
    parts.append(f"--local-dir {repository or owner}")
    return " ".join(parts)
