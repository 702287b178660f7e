"""The check that the outputs of a program will not replace what it reads."""

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rwkv7_jax.runs.resume.run_identity import places_of
from rwkv7_jax.runs.settings import Settings

# Settings of paths that are not fields for a path: each may be a mapping of names to paths.
_OTHER_PATHS = ("tuning.states", "task_data")


def refuse_replaced_inputs(
    outputs: Iterable[Path], settings: Settings, argument: str
) -> None:
    """Checks that no output replaces an input.

    Args:
        outputs: the files or folders that the program will write.
        settings: of the program.
        argument: names the folder of the outputs, in backticks.

    Raises:
        ValueError: a setting names an output, or something inside it.
    """
    results = [Path(os.path.realpath(output)) for output in outputs]
    for name, text in _input_paths(settings):
        for place in filter(None, places_of(text)):
            source = Path(os.path.realpath(place))
            if not {source, *source.parents}.isdisjoint(results):
                raise ValueError(
                    f"`config.{name}` must not be `{place}`, which the result would replace; "
                    f"{argument} must be another folder."
                )


def _input_paths(settings: Any, group: str = "") -> Iterator[tuple[str, str]]:
    """Yields the dotted names and the texts of all settings that name what is read."""
    for field in dataclasses.fields(settings):
        name = f"{group}{field.name}"
        value = getattr(settings, field.name)
        is_input = field.metadata.get("place") and not field.metadata["target"]
        if dataclasses.is_dataclass(value):
            yield from _input_paths(value, f"{name}.")
        elif name in _OTHER_PATHS and isinstance(value, Mapping):
            for key, path in value.items():
                # Other values are rejected where they are read.
                yield f"{name}.{key}", path if isinstance(path, str) else ""
        elif (is_input or name in _OTHER_PATHS) and value:
            yield name, value
