"""The dotted names of settings: their types, and the nearest one to a name that does not exist."""

import dataclasses
import difflib
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from rwkv7_jax.model.config import RWKV7Config

# Names less alike than this are no misspelling of one another.
_ALIKE = 0.7

# What a name in the group that was meant gains: a misspelt name is in the wrong group less often.
_SAME_GROUP = 0.2


def setting_types(cls: type, where: str = "config") -> dict[str, Any]:
    """Returns the type of each setting and group below a dataclass of settings, by dotted name."""
    types: dict[str, Any] = {}
    for field, kind in typing.get_type_hints(cls).items():
        name = f"{where}.{field}"
        # A mapping, since only what it names is changed in a model that is loaded.
        if field == "model":
            kind = RWKV7Config
        types[name] = kind
        if dataclasses.is_dataclass(kind):
            types |= setting_types(typing.cast(type, kind), name)
    if f"{where}.model" in types:
        types[f"{where}.model.weights"] = Literal["int8"]
    return types


def check_names(values: Any, types: Mapping[str, Any], where: str = "config") -> None:
    """Checks that all keys of nested mappings name settings; a group that is none has no keys.

    Raises:
        ValueError: one does not.
    """
    if not isinstance(values, Mapping):
        return
    for key, value in values.items():
        name = f"{where}.{key}"
        if name not in types:
            raise ValueError(unknown_setting(name, types))
        if dataclasses.is_dataclass(types[name]):
            check_names(value, types, name)


def unknown_setting(name: str, names: Iterable[str]) -> str:
    """Says that a name is no setting, and which one is most like it, if any is."""
    nearest = nearest_name(name, names)
    hint = f"the nearest is `{nearest}`" if nearest else "--help lists them"
    return f"`{name}` is no setting; {hint}."


def nearest_name(name: str, names: Iterable[str]) -> str | None:
    """Finds the dotted name whose last part is most like that of another; None where none is."""
    group, _, last = name.rpartition(".")
    best = None
    most = 0.0
    for other in names:
        other_group, _, other_last = other.rpartition(".")
        alike = difflib.SequenceMatcher(None, last, other_last).ratio()
        score = alike + _SAME_GROUP * (group == other_group)
        if alike >= _ALIKE and score > most:
            best = other
            most = score
    return best
