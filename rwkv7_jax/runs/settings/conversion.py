"""Converts nested mappings, such as config files, to groups of settings and back.

Libraries for this do not suggest the nearest setting for `config.optimizer.learnig_rate`;
`names.check_names` does, before this module reads a mapping.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.runs.settings.fields import (
    MOST_COUNT,
    Range,
    check_field,
    choose,
    shown,
)
from rwkv7_jax.runs.settings.names import size_types


def as_config(settings: Any) -> dict[str, Any]:
    """Returns the settings as the nested mapping of a config file, which `read_settings` reads."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            value = as_config(value)
        elif value is None:
            # Run directories hold this spelling, and resumed runs compare their settings with it.
            value = field.metadata.get("absent")
        values[field.name] = value
    return values


def check_model_sizes(where: str, sizes: Mapping[str, Any]) -> None:
    """Checks each size of a model; `RWKV7Config` checks how they fit together.

    Args:
        where: dotted name of the group.
        sizes: the group.

    Raises:
        ValueError: a size has the wrong type or is out of range.
    """
    kinds = size_types(where)
    defaults = {field.name: field.default for field in dataclasses.fields(RWKV7Config)}
    for key, value in sizes.items():
        name = f"{where}.{key}"
        _convert(name, kinds[key], value)
        if kinds[key] is int:
            # A default of 0 stands for a rule that computes the size.
            Range(0 if defaults[key] == 0 else 1, MOST_COUNT).check(value, name)
        elif kinds[key] is float:
            Range(0, 1, above=True, below=True).check(value, name)


def from_mapping(cls, values: Any, where: str):
    """Reads a group of settings; missing keys take their defaults.

    Args:
        cls: dataclass of the group.
        values: nested mapping whose keys are fields of the group.
        where: dotted name of the group, for messages.

    Raises:
        ValueError: a value has the wrong type or is not allowed.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"`{where}` must be a group of settings; got {shown(values)}.")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    arguments = {}
    for key, value in values.items():
        metadata = fields[key].metadata
        absent = metadata.get("absent")
        if absent is not None and _is_spelling(value, absent):
            arguments[key] = None
        else:
            value = _convert(f"{where}.{key}", hints[key], value)
            arguments[key] = check_field(f"{where}.{key}", value, metadata)
    return cls(**arguments)


def _is_spelling(value: Any, absent: Any) -> bool:
    """Tells whether a value in a config is the spelling of None; `False` is not 0."""
    if isinstance(value, list):
        value = tuple(value)
    return type(value) is type(absent) and value == absent


def _convert(where: str, kind: Any, value: Any) -> Any:
    """Converts a value to the field's type, or raises an error that names the field."""
    if dataclasses.is_dataclass(kind):
        return from_mapping(kind, value, where)
    if typing.get_origin(kind) is Literal:
        return choose(where, typing.get_args(kind), value)
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    for option in options:
        origin = typing.get_origin(option) or option
        if value is None and option is type(None):
            return None
        # bool is a subclass of int, but in a config `True` is not a number.
        if isinstance(value, bool) and origin in (int, float):
            continue
        if origin is float and isinstance(value, int):
            return _to_float(where, value)
        if origin is tuple and isinstance(value, list | tuple):
            element = typing.get_args(option)[0]
            return tuple(_convert(where, element, item) for item in value)
        if origin is not type(None) and isinstance(value, origin):
            return value
    wanted = " or ".join(map(_name_of, options))
    raise ValueError(f"`{where}` must be {wanted}; got {shown(value)}.")


def _name_of(kind: Any) -> str:
    """Returns the name of a type as config files spell its values."""
    return "None" if kind is type(None) else getattr(kind, "__name__", str(kind))


def _to_float(where: str, value: int) -> float:
    try:
        return float(value)
    except OverflowError:
        raise ValueError(
            f"`{where}` must be a finite number; got {shown(value)}."
        ) from None
