"""Lookup and checks of a record's fields."""

from collections.abc import Mapping, Sequence
from typing import Any

# Most keys of a record in an error message.
_SHOWN_KEYS = 8


def check_object(record: Any) -> dict[str, Any]:
    """Returns a record if it is an object; raises ValueError otherwise."""
    if not isinstance(record, dict):
        raise ValueError(f"must be an object; got {type(record).__name__}")
    return record


def without_nulls(record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a record without its nulls, which count as missing keys."""
    return {key: value for key, value in record.items() if value is not None}


def text_field(record: Mapping[str, Any], name: str) -> bytes:
    """Returns the string called `name` as UTF-8."""
    if name not in record:
        raise ValueError(f'no "{name}"; {keys_of(record)}')
    value = record[name]
    if not isinstance(value, str):
        raise ValueError(f'"{name}" must be a string; got {type(value).__name__}')
    try:
        return value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f'"{name}" has a lone surrogate at character {error.start}'
        ) from None


def only_name(record: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """Returns the only one of `names` that a record has; None if it has none.

    Raises:
        ValueError: the record has two of them.
    """
    present = [name for name in names if name in record]
    if len(present) > 1:
        raise ValueError(f'"{present[0]}" and "{present[1]}" in one object')
    return present[0] if present else None


def optional_name(record: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """Returns the only one of `names` with a non-empty value; see `only_name`."""
    return only_name({key: value for key, value in record.items() if value}, names)


def keys_of(record: Mapping[str, Any]) -> str:
    """Lists the keys of a record, for an error message."""
    if not record:
        return "it has no keys"
    shown = []
    for key in list(record)[:_SHOWN_KEYS]:
        null = " (null)" if record[key] is None else ""
        shown.append(f'"{key[:40]}"{null}')
    if len(record) > _SHOWN_KEYS:
        shown.append("...")
    return f"its keys are {', '.join(shown)}"
