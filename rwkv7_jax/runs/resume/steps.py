"""A place of numbered steps: which there are, whether they are intact, which to keep.

Each step has a manifest: its files with their digests. It is written last, so that a step with a
manifest is complete, and one with other files than the manifest says was damaged after it had been
saved.
"""

import abc
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rwkv7_jax.json_files import parse_json
from rwkv7_jax.text.tokenizer import text_digest

MANIFEST = "files.json"

# Digits of the largest step; the counter has 32 bits.
_MOST_DIGITS = 10


class Steps(abc.ABC):
    """The steps of one run, wherever they lie.

    Attributes:
        place: where they lie, for messages.
    """

    place: Any

    @abc.abstractmethod
    def numbers(self) -> list[int]:
        """Returns the steps, intact or not, the newest first."""

    @abc.abstractmethod
    def complete(self) -> list[int]:
        """Returns the steps that were saved whole, which have a manifest, the newest first."""

    @abc.abstractmethod
    def path(self, number: int) -> Any:
        """Returns the folder that Orbax reads a step from."""

    @abc.abstractmethod
    def clean(self) -> None:
        """Deletes what an ended process left half written, and warns of it."""

    @abc.abstractmethod
    def unfinished(self, number: int) -> Any:
        """Returns the folder that Orbax writes a step to."""

    @abc.abstractmethod
    def begin(self, number: int) -> None:
        """Makes way for the folder that a step is written to."""

    @abc.abstractmethod
    def note_digests(self, number: int, process: int) -> None:
        """Notes the digests of what a process wrote of a step, for the one that commits it.

        Args:
            number: of the step.
            process: its number; it is not the first one.
        """

    @abc.abstractmethod
    def commit(
        self, number: int, *, others: Sequence[int] = (), seconds: float = 0
    ) -> None:
        """Lets a step count that was begun and is written.

        Args:
            number: of the step.
            others: processes that note the digests of their files.
            seconds: to wait for them at most.

        Raises:
            TimeoutError: one of them did not note any.
        """

    @abc.abstractmethod
    def keep_only(self, numbers: Iterable[int]) -> None:
        """Deletes the complete steps that are not named."""

    @abc.abstractmethod
    def give_up(self) -> None:
        """Deletes what a save that failed has left."""

    @abc.abstractmethod
    def free_bytes(self) -> int | None:
        """Returns how much can still be written; None where that has no bound."""

    @abc.abstractmethod
    def broken_files(self, number: int, share: slice = slice(None)) -> list[str]:
        """Returns the files of a step that differ from its manifest, are missing or are new.

        Args:
            number: of the step.
            share: of the list of files, where several processes compare the files of a step.
        """

    @abc.abstractmethod
    def drop_if_empty(self, number: int) -> bool:
        """Deletes a step without any file; tells whether it was one."""

    @abc.abstractmethod
    def set_aside(self, number: int) -> str:
        """Lets a damaged step count no longer; returns where it lies now."""

    @abc.abstractmethod
    def damaged(self) -> str:
        """Returns where steps lie that were set aside; empty if there are none."""


def is_step_name(name: str) -> bool:
    """Tells whether a name is the number of a step as we write it.

    Names such as "007" are somebody else's. `isdecimal` alone would take other scripts' digits
    too, and Python refuses to read numbers of thousands of digits.
    """
    plain = name.isascii() and name.isdecimal() and len(name) <= _MOST_DIGITS
    return plain and str(int(name)) == name


def new_hash(content: bytes = b"") -> hashlib.blake2b:
    """Makes the hash of which manifests have the hex digits."""
    return hashlib.blake2b(content, digest_size=16)


def manifest_text(digests: Mapping[str, str]) -> str:
    """Returns the text of a manifest, from the digests by file name."""
    text = _canonical(digests)
    # The first line is the digest of the rest: the manifest itself may be damaged, too.
    return f"{text_digest(text)}\n{text}\n"


def read_manifest(content: bytes) -> dict[str, str] | None:
    """Returns the digests by file name; None of a manifest that is damaged."""
    try:
        first_line, _, text = content.decode("utf-8").partition("\n")
        digests = parse_json(text)
        canonical = _canonical(digests)
    except (ValueError, TypeError):
        return None
    if not isinstance(digests, dict):
        return None
    # Only the exact text counts: JSON forgives changed white space, a damaged file must not.
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
        newest: how many of the last ones are kept, at least 1.
        every: multiples of this are kept for good; None for none.
        best: steps that are kept because of their evaluation.
    """
    ordered = sorted(numbers)
    # `newest` is at least 1: a slice from -0 would keep everything.
    keep = set(ordered[-newest:])
    keep |= set(best) & set(ordered)
    if every:
        keep |= {number for number in ordered if number % every == 0}
    return keep
