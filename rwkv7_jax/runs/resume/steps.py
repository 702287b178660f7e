"""The storage of numbered steps: which steps exist, which are intact, which to keep.

Each step has a manifest that lists its files with their digests. The manifest is written last, so a
step with a manifest is complete. If its files differ from the manifest, it was damaged after the
save.
"""

import abc
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rwkv7_jax.json_files import parse_json
from rwkv7_jax.text.tokenizer import text_digest

MANIFEST = "files.json"

# The number of digits of the largest step: the counter has 32 bits.
_MOST_DIGITS = 10


class Steps(abc.ABC):
    """The steps of one run, on a disk or in an object store.

    Attributes:
        place: the path or URL of the steps, for messages.
    """

    place: Any

    @abc.abstractmethod
    def numbers(self) -> list[int]:
        """Returns the steps, intact or not, newest first."""

    @abc.abstractmethod
    def complete(self) -> list[int]:
        """Returns the complete steps, which have a manifest, newest first."""

    @abc.abstractmethod
    def path(self, number: int) -> Any:
        """Returns the folder that Orbax reads a step from."""

    @abc.abstractmethod
    def clean(self) -> None:
        """Deletes the incomplete steps of an earlier process."""

    def unfinished(self, number: int) -> Any:
        """Returns the folder that Orbax writes a step to; by default the one that it reads."""
        return self.path(number)

    @abc.abstractmethod
    def begin(self, number: int) -> None:
        """Prepares the location of the folder that Orbax writes a step to."""

    @abc.abstractmethod
    def note_digests(self, number: int, process: int) -> None:
        """Writes a note with the digests of the files that a process wrote; `commit` reads it.

        Args:
            number: the step.
            process: the index of the process; not that of process 0.
        """

    @abc.abstractmethod
    def commit(
        self, number: int, *, others: Sequence[int] = (), seconds: float = 0
    ) -> None:
        """Makes a written step complete.

        Args:
            number: the step.
            others: the processes that note the digests of their files.
            seconds: the timeout for their notes.

        Raises:
            TimeoutError: a note is missing after the timeout.
        """

    @abc.abstractmethod
    def keep_only(self, numbers: Iterable[int]) -> None:
        """Deletes all complete steps except the given ones."""

    @abc.abstractmethod
    def give_up(self) -> None:
        """Deletes what a failed save left."""

    def free_bytes(self) -> int | None:
        """Returns the free bytes; None, the default, if the storage has no limit."""
        return None

    @abc.abstractmethod
    def broken_files(self, number: int, share: slice = slice(None)) -> list[str]:
        """Returns the files of a step that differ from its manifest, are missing or are not in it.

        Args:
            number: the step.
            share: the part of the list of files to compare; several processes split the list.
        """

    def drop_if_empty(self, number: int) -> bool:
        """Deletes a step if it has no file; returns whether it did, which by default it cannot."""
        del number
        return False

    @abc.abstractmethod
    def set_aside(self, number: int) -> str:
        """Removes a damaged step from the steps; returns its new path or URL."""

    @abc.abstractmethod
    def damaged(self) -> str:
        """Returns the path or URL of the steps that were set aside; empty if there are none."""


def is_step_name(name: str) -> bool:
    """Returns whether a name is exactly the number of a step.

    A name such as "007" is not. `isdecimal` alone would accept digits of other scripts, and Python
    raises ValueError for thousands of digits.
    """
    plain = name.isascii() and name.isdecimal() and len(name) <= _MOST_DIGITS
    return plain and str(int(name)) == name


def new_hash(content: bytes = b"") -> hashlib.blake2b:
    """Returns the hash whose hex digits are the digests of a manifest."""
    return hashlib.blake2b(content, digest_size=16)


def manifest_text(digests: Mapping[str, str]) -> str:
    """Returns the text of a manifest.

    Args:
        digests: by file name.
    """
    text = _canonical(digests)
    # The first line is the digest of the rest, because the manifest itself may be damaged.
    return f"{text_digest(text)}\n{text}\n"


def read_manifest(content: bytes) -> dict[str, str] | None:
    """Returns the digests by file name; None if the manifest is damaged."""
    try:
        first_line, _, text = content.decode("utf-8").partition("\n")
        digests = parse_json(text)
        canonical = _canonical(digests)
    except (ValueError, TypeError):
        return None
    if not isinstance(digests, dict):
        return None
    # Compare the exact text: JSON ignores changed white space, which is damage here.
    if text != canonical + "\n" or first_line != text_digest(canonical):
        return None
    return digests


def _canonical(digests: Mapping[str, str]) -> str:
    return json.dumps(digests, sort_keys=True, indent=1)


def steps_to_keep(
    numbers: Iterable[int],
    *,
    newest: int,
    every: int | None = None,
    best: Iterable[int] = (),
) -> set[int]:
    """Returns the steps that retention keeps.

    Args:
        numbers: all steps.
        newest: how many of the newest steps to keep, at least 1.
        every: keeps all multiples of this step; None for none.
        best: steps to keep because of their evaluation.
    """
    ordered = sorted(numbers)
    # `newest` is at least 1: a slice from -0 would keep everything.
    keep = set(ordered[-newest:])
    keep |= set(best) & set(ordered)
    if every:
        keep |= {number for number in ordered if number % every == 0}
    return keep
