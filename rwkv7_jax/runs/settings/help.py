"""The list of settings that `--help` prints."""

import dataclasses
import typing
from collections.abc import Iterator
from typing import Any, Literal

from rwkv7_jax.runs.settings import Settings


def describe_settings() -> Iterator[str]:
    """Yields one line per setting: its flag with the default, and its range or choices."""
    defaults = Settings()
    groups = []
    for field in dataclasses.fields(Settings):
        value = getattr(defaults, field.name)
        if dataclasses.is_dataclass(value):
            groups.append((field.name, value))
        else:
            yield _describe(f"config.{field.name}", field, defaults)
    for name, group in groups:
        yield f"config.{name}:"
        for field in dataclasses.fields(group):
            yield _describe(f"config.{name}.{field.name}", field, group)


def _describe(where: str, field: dataclasses.Field, group: Any) -> str:
    default = getattr(group, field.name)
    if default is None:
        default = field.metadata.get("absent")
    line = f"  --{where}={default!r}"
    limits = field.metadata.get("range")
    if limits is not None:
        return f"{line:<50} {limits.low:g} to {limits.high:g}"
    hint = typing.get_type_hints(type(group))[field.name]
    choices = field.metadata.get("choices", ())
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
    return f"{line:<50} {', '.join(choices)}".rstrip()
