"""Paths as people type them: lists with commas, `~`, and places that are no local file."""

import os
import re
from pathlib import Path

# "gs://bucket/x", "https://..." and "hf://..."; one letter would be a Windows drive.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/{1,2}[^/]?")


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
            "`curl -LO`, `hf download` or `gsutil cp`."
        )
    try:
        return Path(text).expanduser()
    except RuntimeError:
        # "~nobody" of a user who does not exist is the name of a file.
        return Path(text)
