"""The dotted names of settings, their types, and suggestions for misspelt names."""

import dataclasses
import difflib
import typing
from collections.abc import Collection, Mapping
from typing import Any, Literal

from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.runs.settings.other_trainers import EQUIVALENTS

# Least similarity of a name and its misspelling.
_ALIKE = 0.7

# Bonus for a name in the same group, because a misspelt name is rarely in the wrong group.
_SAME_GROUP = 0.2


def setting_types(cls: type, where: str = "config") -> dict[str, Any]:
    """Returns the type of each setting and group in a dataclass of settings, by dotted name."""
    types: dict[str, Any] = {}
    for field, kind in typing.get_type_hints(cls).items():
        name = f"{where}.{field}"
        types[name] = kind
        if field == "model":
            # The field is a mapping, which for a loaded model holds only the changes.
            types[name] = RWKV7Config
            for size, of_size in size_types(name).items():
                types[f"{name}.{size}"] = of_size
        elif dataclasses.is_dataclass(kind):
            types |= setting_types(typing.cast(type, kind), name)
    return types


def size_types(where: str) -> dict[str, Any]:
    """Returns the type of each size of a model by its name.

    Args:
        where: dotted name of the group; the model of "config.model" may be loaded, so its group
            also has `weights`.
    """
    types = typing.get_type_hints(RWKV7Config)
    if where == "config.model":
        types["weights"] = Literal["int8"]
    return types


def check_names(values: Any, types: Mapping[str, Any], where: str = "config") -> None:
    """Checks that all keys of nested mappings name settings.

    A group that is not a mapping has no keys; `conversion` rejects it.

    Raises:
        ValueError: a key is not the name of a setting.
    """
    if not isinstance(values, Mapping):
        return
    for key, value in values.items():
        name = f"{where}.{key}"
        if name not in types:
            nearest = nearest_name(name, types)
            hint = f"the nearest is `{nearest}`" if nearest else "--help lists them"
            raise ValueError(f"`{name}` is not a setting; {hint}.")
        if dataclasses.is_dataclass(types[name]):
            check_names(value, types, name)


def nearest_name(name: str, names: Collection[str]) -> str | None:
    """Returns the dotted name that replaces a name of another trainer, or the most similar one.

    Args:
        name: dotted name, whose last part is compared.
        names: the dotted names to choose from.

    Returns:
        None if no name is similar.
    """
    group, _, last = name.rpartition(".")
    if EQUIVALENTS.get(last) in names:
        return EQUIVALENTS[last]
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
