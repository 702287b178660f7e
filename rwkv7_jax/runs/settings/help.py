"""The list of settings that `--help` prints."""

import dataclasses
import inspect
import re
import textwrap
import typing
from collections.abc import Iterator
from typing import Any, Literal

from rwkv7_jax.runs.settings import Settings
from rwkv7_jax.runs.settings.fields import MOST_RATE, Range

# An entry under "Attributes:", such as "b1, b2: text", with its indented further lines.
_ENTRY = re.compile(r"^    (\w+(?:, \w+)*): (.*(?:\n(?: {8}.*)?)*)", re.MULTILINE)

_INDENT = 8 * " "


def describe_settings() -> Iterator[str]:
    """Yields lines: each setting's flag with its default and limits, then its description."""
    defaults = Settings()
    groups = []
    descriptions = attribute_descriptions(Settings)
    for field in dataclasses.fields(Settings):
        value = getattr(defaults, field.name)
        if dataclasses.is_dataclass(value):
            groups.append((field.name, value))
        else:
            yield _flag(f"config.{field.name}", field, defaults)
            yield from _wrapped(descriptions[field.name])
    for name, group in groups:
        yield f"config.{name}:"
        descriptions = attribute_descriptions(type(group))
        for field in dataclasses.fields(group):
            yield _flag(f"config.{name}.{field.name}", field, group)
            yield from _wrapped(descriptions[field.name])


def attribute_descriptions(group: type) -> dict[str, str]:
    """Returns the descriptions of a class's attributes by name, from its docstring.

    Without docstrings (`python -OO`) they are empty.
    """
    descriptions = {field.name: "" for field in dataclasses.fields(group)}
    _, _, attributes = (inspect.getdoc(group) or "").partition("Attributes:\n")
    for names, text in _ENTRY.findall(attributes):
        for name in names.split(", "):
            descriptions[name] = text.strip()
    return descriptions


def _flag(where: str, field: dataclasses.Field, group: Any) -> str:
    """Returns the flag of a setting with its default, and its range or choices."""
    default = getattr(group, field.name)
    if default is None:
        default = field.metadata.get("absent")
    limits = ""
    hint = typing.get_type_hints(type(group))[field.name]
    if "range" in field.metadata:
        limits = _describe_range(field.metadata["range"])
    elif "choices" in field.metadata:
        limits = ", ".join(field.metadata["choices"])
    elif typing.get_origin(hint) is Literal:
        limits = ", ".join(typing.get_args(hint))
    return f"  --{where}={default!r:<{46 - len(where)}} {limits}".rstrip()


def _describe_range(limits: Range) -> str:
    """Returns the limits that matter to people; others only keep numbers from overflowing."""
    low = "above" if limits.above else "at least"
    high = "below" if limits.below else "at most"
    parts = []
    if limits.low > -MOST_RATE:
        parts.append(f"{low} {limits.low:g}")
    if limits.high < MOST_RATE:
        parts.append(f"{high} {limits.high:g}")
    return ", ".join(parts)


def _wrapped(text: str) -> list[str]:
    """Wraps a description below its flag; a list in it keeps a line for each item."""
    lines = []
    for paragraph in re.split(r"\n\s*(?=\* |\n)", text):
        words = " ".join(paragraph.split())
        lines += textwrap.wrap(
            words, width=100, initial_indent=_INDENT, subsequent_indent=_INDENT
        )
    return lines
