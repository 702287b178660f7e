"""Fields of settings with their defaults and allowed values."""

import dataclasses
import math
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

from rwkv7_jax.local_paths import (
    is_remote,
    local_path,
    refuse_two_spellings,
    split_paths,
)

# Counters are 32-bit integers.
MOST_COUNT = 2**31 - 1

# Larger numbers soon overflow in float32.
MOST_RATE = 1e6
MOST_WEIGHT = 1e9

# A folder in an object store: a whole bucket would mix a run with other files.
_STORE = re.compile(r"(gs|s3)://[\w.-]+/[^?#\s]+|file:///[^?#\s]+")

_SHOWN_CHARACTERS = 100


class Range(NamedTuple):
    """A range of finite numbers that a setting may have.

    Attributes:
        low: smallest number.
        high: largest number.
        above: whether to reject `low` itself.
        below: whether to reject `high` itself.
        note: end of the message, for values with a special meaning.
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
            where: dotted name of the setting.

        Raises:
            ValueError: the number is out of range or not finite.
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
    """Makes a field that is None by default, which config files spell ""."""
    return dataclasses.field(default=None, metadata={"absent": ""})


def number(
    default: Any,
    low: float | int,
    high: float | int,
    *,
    above: bool = False,
    below: bool = False,
    note: str = "",
    absent: Any = None,
) -> Any:
    """Makes a field for a number, or a tuple of numbers, in a range.

    Args:
        default: default of the field.
        low: smallest number.
        high: largest number.
        above: whether to reject `low` itself.
        below: whether to reject `high` itself.
        note: end of the message, for values with a special meaning.
        absent: another spelling of None in config files, if there is one.
    """
    limits = Range(low, high, above, below, note)
    metadata = {"range": limits, "absent": absent}
    return dataclasses.field(default=default, metadata=metadata)


def choice(default: Any, choices: Collection[str], *, absent: Any = None) -> Any:
    """Makes a field for one of several names, which another subpackage defines.

    Args:
        default: default of the field.
        choices: the names; a dict to which programs may add names.
        absent: another spelling of None in config files, if there is one.
    """
    metadata = {"choices": choices, "absent": absent}
    return dataclasses.field(default=default, metadata=metadata)


def place(default: str | None, *, several: bool = False, target: bool = False) -> Any:
    """Makes a field for a local path.

    Args:
        default: default of the field; with None the path is optional, and "" spells None.
        several: whether the field takes several comma-separated paths.
        target: whether the program writes to the path.
    """
    absent = "" if default is None else None
    metadata = {"place": True, "several": several, "target": target, "absent": absent}
    return dataclasses.field(default=default, metadata=metadata)


def store() -> Any:
    """Makes a field for a folder in an object store; None by default, spelled ""."""
    return dataclasses.field(default=None, metadata={"store": True, "absent": ""})


def check_field(where: str, value: Any, metadata: Mapping[str, Any]) -> Any:
    """Checks a value against the range, the choices or the path rules of its field.

    Args:
        where: dotted name of the setting.
        value: value of the right type, or None.
        metadata: metadata of the field.

    Returns:
        The value, with `~` expanded in paths.

    Raises:
        ValueError: the value is not allowed.
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
    """Rejects unpaired surrogates, which stand for bytes of a command line that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"`{where}` must be valid Unicode; character {error.start} of {shown(text)} is not."
        ) from None


def choose(where: str, choices: Iterable[str], value: Any) -> str:
    """Returns the value if it is one of the choices.

    Raises:
        ValueError: the value is not one of the choices.
    """
    names = list(choices)
    # `value in names` fails for an array.
    if isinstance(value, str) and value in names:
        return value
    listed = f"{', '.join(names[:-1])} or {names[-1]}"
    raise ValueError(f"`{where}` must be {listed}; got {shown(value)}.")


def shown(value: Any) -> str:
    """Formats a value for a message, truncated to one line."""
    try:
        text = repr(value)
    # Python does not print integers with thousands of digits.
    except ValueError:
        return "a number with thousands of digits"
    if len(text) <= _SHOWN_CHARACTERS:
        return text
    return f"{text[:_SHOWN_CHARACTERS]}..."


def _check_place(where: str, value: str, metadata: Mapping[str, Any]) -> str:
    """Returns the path or paths with "~" expanded; rejects remote ones."""
    if metadata["target"]:
        refuse_remote_target(where, value)
    if metadata["several"]:
        entries = split_paths(value, f"`{where}`")
        # With a space after a comma, too.
        refuse_two_spellings([one.strip() for one in entries], f"`{where}`")
        return ",".join(str(local_path(one, f"`{where}`")) for one in entries)
    # The reader of the file decides about a blank path.
    return str(local_path(value, f"`{where}`")) if value.strip() else value


def refuse_remote_target(argument: str, path: str) -> None:
    """Rejects a remote target, such as gs://bucket/run.

    Raises:
        ValueError: the path is remote.
    """
    if is_remote(path):
        raise ValueError(
            f"`{argument}` must be a folder on this machine; got {path}. Write to a local folder: "
            "train.py copies a run to the object store in `config.backup`."
        )
