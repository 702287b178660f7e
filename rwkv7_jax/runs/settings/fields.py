"""Fields of settings that say, next to their default, which values are allowed."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rwkv7_jax.local_paths import is_remote, local_path, refuse_two_spellings

# Counters are 32-bit integers.
MOST_COUNT = 2**31 - 1

# Above these, numbers in float32 overflow before long.
MOST_RATE = 1e6
MOST_WEIGHT = 1e9

# A folder in a store: a bucket alone would mix a run with whatever else is there.
_STORE = re.compile(r"(gs|s3)://[\w.-]+/[^?#\s]+|file:///[^?#\s]+")

# The first and the last step of a profile. Python reads no number of thousands of digits.
_STEPS = re.compile(r"([0-9]{1,10}):([0-9]{1,10})")

_SHOWN_CHARACTERS = 100

_REQUIRED: Any = object()


class Range(NamedTuple):
    """The numbers that a setting may have; each must be finite.

    Attributes:
        low: the smallest number.
        high: the largest number.
        above: whether `low` itself is refused.
        below: whether `high` itself is refused.
        note: the end of the message, for numbers with a meaning of their own.
    """

    low: float | int
    high: float | int
    above: bool = False
    below: bool = False
    note: str = ""

    def check(self, value: float | int, where: str) -> None:
        """Checks a number.

        Args:
            value: the number.
            where: the dotted name of the setting.

        Raises:
            ValueError: it is outside the range, or not finite.
        """
        limit = self._broken_limit(value)
        if limit is not None:
            raise ValueError(
                f"`{where}` must be {limit}{self.note}; got {shown(value)}."
            )

    def _broken_limit(self, value: float | int) -> str | None:
        # An integer may be too large for a float.
        if isinstance(value, float) and not math.isfinite(value):
            return "a finite number"
        if value < self.low or (self.above and value == self.low):
            return f"above {self.low}" if self.above else f"at least {self.low}"
        if value > self.high or (self.below and value == self.high):
            return f"below {self.high}" if self.below else f"at most {self.high}"
        return None


def optional() -> Any:
    """Makes a field that is absent by default, which config files spell ""."""
    return dataclasses.field(default=None, metadata={"absent": ""})


def number(
    default: Any,
    low: float | int,
    high: float | int,
    *,
    above: bool = False,
    below: bool = False,
    note: str = "",
    absent: Any = _REQUIRED,
) -> Any:
    """Makes a field of a number, or of a tuple of numbers, with the range that they may have.

    Args:
        default: of the field.
        low: the smallest number.
        high: the largest number.
        above: whether `low` itself is refused.
        below: whether `high` itself is refused.
        note: the end of the message, for numbers with a meaning of their own.
        absent: spelling of None in config files; left out where None has no other spelling.
    """
    metadata: dict[str, Any] = {"range": Range(low, high, above, below, note)}
    if absent is not _REQUIRED:
        metadata["absent"] = absent
    return dataclasses.field(default=default, metadata=metadata)


def choice(default: Any, choices: Sequence[str], *, absent: Any = _REQUIRED) -> Any:
    """Makes a field whose value is one of some names, which another room defines.

    Args:
        default: of the field.
        choices: the names.
        absent: spelling of None in config files; left out where the field is never None.
    """
    metadata: dict[str, Any] = {"choices": tuple(choices)}
    if absent is not _REQUIRED:
        metadata["absent"] = absent
    return dataclasses.field(default=default, metadata=metadata)


def place(default: str | None, *, several: bool = False, target: bool = False) -> Any:
    """Makes a field that names a place on this machine.

    Args:
        default: of the field; None where the place may be absent, which is spelled "".
        several: whether commas separate several places.
        target: whether the program writes there.
    """
    metadata: dict[str, Any] = {"place": True, "several": several, "target": target}
    if default is None:
        metadata["absent"] = ""
    return dataclasses.field(default=default, metadata=metadata)


def store() -> Any:
    """Makes a field that names a folder in an object store; absent by default, spelled ""."""
    return dataclasses.field(default=None, metadata={"store": True, "absent": ""})


def check_field(where: str, value: Any, metadata: Mapping[str, Any]) -> Any:
    """Returns the value of a field once it fits the field's range, choices or kind of place.

    Args:
        where: the dotted name of the setting.
        value: of the right type, or None.
        metadata: of the field.

    Raises:
        ValueError: it does not fit.
    """
    if value is None:
        return None
    if "choices" in metadata:
        return choose(where, metadata["choices"], value)
    if "place" in metadata:
        return _check_place(where, value, metadata)
    if "store" in metadata and not _STORE.fullmatch(value):
        raise ValueError(
            f"`{where}` must be gs://bucket/folder, s3://bucket/folder or file:///folder; got "
            f"{shown(value)}."
        )
    for one in value if isinstance(value, tuple) else (value,):
        if isinstance(one, str):
            _check_unicode(where, one)
        if "range" in metadata:
            metadata["range"].check(one, where)
    return value


def _check_unicode(where: str, text: str) -> None:
    """Refuses halves of surrogate pairs, as bytes of a command line that are no UTF-8 become."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"`{where}` must be valid Unicode; character {error.start} of {shown(text)} is not."
        ) from None


def choose(where: str, choices: Sequence[str], value: Any) -> str:
    """Returns the value if it is one of the choices.

    Raises:
        ValueError: it is none of them.
    """
    # Not `value in choices` alone: comparing an array gives an array.
    if isinstance(value, str) and value in choices:
        return value
    listed = f"{', '.join(choices[:-1])} or {choices[-1]}"
    raise ValueError(f"`{where}` must be {listed}; got {shown(value)}.")


def shown(value: Any) -> str:
    """Returns a value as a message shows it: on one line, and not longer than that line."""
    try:
        text = repr(value)
    # Python does not print integers of thousands of digits.
    except ValueError:
        return "a number of thousands of digits"
    if len(text) <= _SHOWN_CHARACTERS:
        return text
    return f"{text[:_SHOWN_CHARACTERS]}..."


def _check_place(where: str, value: str, metadata: Mapping[str, Any]) -> str:
    """Returns the place or places with "~" expanded; refuses those that are not on this machine."""
    places = []
    entries = value.split(",") if metadata["several"] else [value]
    # As they were written: below, "./x" becomes "x".
    refuse_two_spellings([one.strip() for one in entries], f"`{where}`")
    for one in entries:
        if metadata["target"]:
            refuse_remote_target(where, one)
        # Whether a list may have an empty name is up to what reads it.
        if one.strip():
            one = str(local_path(one, f"`{where}`"))
        places.append(one)
    return ",".join(places)


def refuse_remote_target(argument: str, path: str) -> None:
    """Refuses a place to write to that is not on this machine, such as gs://bucket/run.

    Raises:
        ValueError: it is such a place.
    """
    if is_remote(path):
        raise ValueError(
            f"`{argument}` must be a folder on this machine; got {path}. Write to a local folder; "
            "train.py copies a run to the store that `config.backup` names."
        )


def profiled(steps: str | None) -> tuple[int, int] | None:
    """Parses `config.profile_steps` into the first and the last step; None where it is absent.

    Raises:
        ValueError: it is not "first:last".
    """
    if steps is None:
        return None
    match = _STEPS.fullmatch(steps)
    if match and 1 <= int(match[1]) <= int(match[2]):
        return int(match[1]), int(match[2])
    raise ValueError(
        f'`config.profile_steps` must be "first:last", steps from 1 on; got {shown(steps)}.'
    )
