"""Paths as people type them: lists with commas, `~`, and places that are no local file."""

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

# Any scheme with a slash; one letter would be a Windows drive. Schemes of stores and hubs need no
# slash, and hosts that models are copied from need no scheme.
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

# "owner/model", as hubs name models; a path with a known suffix is a file that is missing.
_HUB_NAME = re.compile(
    r"[A-Za-z0-9][\w-]*/(?!.*\.(?:pth|safetensors|st|state|json|bin|gguf)$)[\w.-]+"
)

_HUB_HOSTS = ("huggingface.co/", "hf.co/", "hf-mirror.com/")


def split_list(text: str, argument: str) -> tuple[str, ...]:
    """Splits a list that is typed in one string, with commas between its entries.

    Args:
        text: the list; an empty string has no entries.
        argument: the setting or option in backticks; the message begins with it.

    Raises:
        ValueError: an entry is empty or blank, as after a trailing comma. As a path it would mean
            the current folder.
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
    """Splits a list of paths; see `split_list`.

    A path that is written twice in the same way is meant twice, as a text that counts double. Where
    a file has the full text as its name, it is that file.

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
        entries: paths as they were written.
        argument: the argument in backticks; the message begins with it.

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
                f"{argument} must name a file once; {before!r} and {entry!r} are the same one."
            )


def is_same(one: str | os.PathLike[str], two: str | os.PathLike[str]) -> bool:
    """Tells whether two paths are spellings of one existing file or folder."""
    place = _identity(one)
    return place is not None and place == _identity(two)


def _identity(path: str | os.PathLike[str]) -> tuple[int, int] | None:
    """Returns what tells a file from all others; None where there is none."""
    try:
        status = os.stat(os.path.expanduser(path))
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


def is_remote(text: str) -> bool:
    """Tells whether a text is an address and not the path of something on this machine.

    Where a file or a folder has that name, it is a path.
    """
    return _URL.match(text) is not None and not os.path.exists(text)


def local_path(
    path: str | os.PathLike[str], argument: str, *, target: bool = False
) -> Path:
    """Returns a path with `~` expanded to the home folder.

    Args:
        path: of something on this machine.
        argument: the argument, setting or option in backticks; the message begins with it.
        target: whether something will be written there.

    Raises:
        ValueError: the path is empty, is a URL, or holds a zero byte.
        TypeError: something else than a path.
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
        raise ValueError(f"{argument} must be a path without zero bytes; got {text!r}.")
    # `Path` folds "//", so a `Path` of a URL has a single slash.
    if is_remote(text):
        advice = f"download it first, for example with `{_download_command(text)}`"
        if target:
            advice = "write to a local place and copy it there afterwards"
        raise ValueError(f"{argument} must be on this machine; got {text}: {advice}.")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        # "~nobody" of a user who does not exist is the name of a file.
        return Path(text)


def is_special(path: Path) -> bool:
    """Tells whether a device, a pipe or a socket is at a path: neither a file nor a folder.

    Opening a pipe may wait for ever, and a device may have no end.
    """
    return path.exists() and not path.is_file() and not path.is_dir()


@contextlib.contextmanager
def name_in_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Puts a path into errors of the operating system that name none, as those of a read.

    Raises:
        OSError: the block raises one; it names the path, or the file that it named before.
    """
    try:
        yield
    except OSError as error:
        # Libraries' own errors have no number, and say what they are about.
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from None


def existing_path(path: str | os.PathLike[str], argument: str) -> Path:
    """Returns the path of something that is there, with `~` expanded.

    Args:
        path: of something on this machine.
        argument: the argument, setting or option in backticks; the message begins with it.

    Raises:
        ValueError: nothing is there, a device or a pipe is, or the path is none of this machine;
            see `local_path`. The name of a model on a hub is told apart from a file that is
            missing.
        TypeError: something else than a path.
    """
    place = local_path(path, argument)
    if is_special(place):
        raise ValueError(
            f"{argument} must name a file or a folder; `{place}` is a device or a pipe."
        )
    if place.exists():
        return place
    refuse_hub_name(path, argument)
    raise ValueError(f"`{place}` does not exist.")


def check_target(path: Path, argument: str) -> None:
    """Checks that a file or a folder can be made at a path.

    Args:
        path: of what will be written; folders that are missing will be made.
        argument: the argument, setting or option in backticks; the message begins with it.

    Raises:
        ValueError: a file lies where a folder of the path must be, the folder is read-only, or a
            device or a pipe is at the path.
    """
    if path.is_symlink():
        # What the link leads to is replaced, and not the link. Not `Path.resolve`, which before
        # Python 3.13 raises RuntimeError where links lead back to themselves.
        path = Path(os.path.realpath(path))
    if is_special(path):
        raise ValueError(
            f"{argument} must name a file or a folder; `{path}` is a device or a pipe."
        )
    # Also of a folder that is there: it is made anew next to it, and then replaced.
    folder = next((parent for parent in path.parents if parent.exists()), Path())
    if not folder.is_dir():
        raise ValueError(f"{argument} must be in a folder; `{folder}` is a file.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(
            f"{argument} must be where you may write; `{folder}` is not such a folder."
        )


def require_unicode(path: Path, argument: str) -> None:
    """Refuses a place that Orbax cannot open: its library in C++ takes UTF-8 alone.

    Python keeps what it could not decode in a path as lone surrogates.

    Args:
        path: of a folder, whose parents count as well.
        argument: the argument, setting or option in backticks; the message begins with it.

    Raises:
        ValueError: a part of the path is not UTF-8, or the locale's encoding is not.
    """
    place = str(path.absolute())
    try:
        place.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{argument} must have a path in UTF-8; got {place!r}: rename the folder, or set "
            "`PYTHONUTF8=1` where it is the locale that has another encoding."
        ) from None


def refuse_hub_name(
    path: str | os.PathLike[str], argument: str, *, kind: str = "model"
) -> None:
    """Refuses the name of something on a hub, such as "owner/model", in place of a file.

    Args:
        path: of nothing that exists.
        argument: the argument, setting or option in backticks; the message begins with it.
        kind: "model" or "dataset".

    Raises:
        ValueError: it is such a name.
    """
    text = os.fspath(path)
    if not _HUB_NAME.fullmatch(text) or Path(text).parent.exists():
        return
    command = _hub_command(text)
    if kind != "model":
        command = command.replace("hf download", f"hf download --repo-type {kind}")
    raise ValueError(
        f"{argument} must name what is there; `{text}` does not exist, so make it or, if it is the "
        f"name of a {kind} on Hugging Face, download it first: `{command}`."
    )


def _download_command(url: str) -> str:
    """Returns a command that downloads what an address names to the current folder."""
    scheme, colon, place = url.strip().replace("\\", "/").partition(":")
    if not colon or "/" in scheme or "@" in scheme:
        # A host alone, such as "huggingface.co/owner/model".
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
    """Returns the command that downloads a model, or one file of it, from Hugging Face."""
    owner, _, rest = name.partition("/")
    repository, *inside = rest.split("/")
    # Addresses of single files have the revision in them: "resolve/main/model.pth".
    if inside[:1] in (["resolve"], ["blob"], ["tree"]):
        inside = inside[2:]
    parts = ["hf download", f"{owner}/{repository}"]
    if inside:
        parts.append("/".join(inside))
    parts.append(f"--local-dir {repository or owner}")
    return " ".join(parts)
