"""Paths as people type them: lists with commas, `~`, and places that are no local file."""

import os
import re
from pathlib import Path

# "gs://bucket/x", "https://..." and "hf://..."; one letter would be a Windows drive.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/{1,2}[^/]?")


# "owner/model", as hubs name models; a path with a known suffix is a file that is missing.
_HUB_NAME = re.compile(
    r"[A-Za-z0-9][\w-]*/(?!.*\.(?:pth|safetensors|st|json|bin)$)[\w.-]+"
)


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


def local_path(path: str | os.PathLike[str], argument: str) -> Path:
    """Returns a path with `~` expanded to the home folder.

    Args:
        path: of something on this machine.
        argument: the argument, setting or option in backticks; the message begins with it.

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
    if _URL.match(text):
        raise ValueError(
            f"{argument} must be on this machine; got {text}: download it first, for example with "
            f"`{_download_command(text)}`."
        )
    try:
        return Path(text).expanduser()
    except RuntimeError:
        # "~nobody" of a user who does not exist is the name of a file.
        return Path(text)


def existing_path(path: str | os.PathLike[str], argument: str) -> Path:
    """Returns the path of something that is there, with `~` expanded.

    Args:
        path: of something on this machine.
        argument: the argument, setting or option in backticks; the message begins with it.

    Raises:
        ValueError: nothing is there, or the path is none of this machine; see `local_path`. The
            name of a model on a hub is told apart from a file that is missing.
        TypeError: something else than a path.
    """
    place = local_path(path, argument)
    if place.exists():
        return place
    text = os.fspath(path)
    if _HUB_NAME.fullmatch(text) and not place.parent.exists():
        raise ValueError(
            f"{argument} must be on this machine, and `{text}` does not exist; if it is the name "
            f"of a model on Hugging Face, download it first: `{_download_command('hf://' + text)}`."
        )
    raise ValueError(f"`{place}` does not exist.")


def _download_command(url: str) -> str:
    """Returns a command that downloads what a URL names to the current folder."""
    scheme, _, place = url.partition(":")
    scheme = scheme.lower()
    place = place.lstrip("/")
    if scheme == "hf" or place.startswith("huggingface.co/"):
        return _hub_command(place.removeprefix("huggingface.co/"))
    if scheme == "gs":
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
