"""Parsing of data paths, which name texts or a synthetic task.

A path is a string in a config or on the command line: `task:NAME`, or files, folders and built-in
corpora separated by commas.
"""

import dataclasses

from rwkv7_jax.checks import check_instance
from rwkv7_jax.local_paths import split_paths

TASK_PREFIX = "task:"


@dataclasses.dataclass(frozen=True)
class TaskSource:
    """A synthetic task, whose examples are generated on demand.

    Attributes:
        name: name of the task, without the prefix.
    """

    name: str

    def __str__(self) -> str:
        """Writes the path that names this task."""
        return f"{TASK_PREFIX}{self.name}"


@dataclasses.dataclass(frozen=True)
class TextSource:
    """Texts that are read one after the other.

    Attributes:
        paths: files, folders, `.bin` caches or names of built-in corpora; empty for an empty path.
    """

    paths: tuple[str, ...]

    def __str__(self) -> str:
        """Writes the path that names these texts."""
        return ",".join(self.paths)


Source = TextSource | TaskSource


def parse_source(path: str, argument: str = "`path`") -> Source:
    """Parses a path that names one task or some texts.

    Args:
        path: a task, or comma-separated texts.
        argument: the setting or option in backticks, for error messages.

    Raises:
        TypeError: `path` is not a string.
        ValueError: a name between commas is empty.
    """
    check_instance(path, str, argument)
    if path.startswith(TASK_PREFIX):
        return TaskSource(path.removeprefix(TASK_PREFIX))
    return TextSource(split_paths(path, argument))


def parse_sources(
    path: str, argument: str = "`path`"
) -> tuple[list[TaskSource], TextSource]:
    """Parses a path that may name both tasks and texts.

    Args:
        path: comma-separated tasks and texts.
        argument: the setting or option in backticks, for error messages.

    Returns:
        The tasks in order, and all texts as one source.

    Raises:
        TypeError: `path` is not a string.
        ValueError: a name between commas is empty.
    """
    check_instance(path, str, argument)
    tasks = []
    texts: list[str] = []
    for part in split_paths(path, argument):
        source = parse_source(part, argument)
        if isinstance(source, TaskSource):
            tasks.append(source)
        else:
            texts += source.paths
    return tasks, TextSource(tuple(texts))
