"""What a data path names: texts, or a synthetic task.

A path is a string of a config or of the command line: `task:NAME`, or files, folders and built-in
corpora separated by commas.
"""

import dataclasses

from rwkv7_jax.local_paths import split_paths

TASK_PREFIX = "task:"


@dataclasses.dataclass(frozen=True)
class TaskSource:
    """A synthetic task, whose examples are made as they are needed.

    Attributes:
        name: of the task, without the prefix.
    """

    name: str

    def __str__(self) -> str:
        """Writes the path that names this task."""
        return f"{TASK_PREFIX}{self.name}"


@dataclasses.dataclass(frozen=True)
class TextSource:
    """Texts, read one after the other.

    Attributes:
        paths: files, folders, `.bin` caches or names of built-in corpora; none for an empty path.
    """

    paths: tuple[str, ...]

    def __str__(self) -> str:
        """Writes the path that names these texts."""
        return ",".join(self.paths)


Source = TextSource | TaskSource


def parse_source(path: str, argument: str = "`path`") -> Source:
    """Parses a path that names one task or some texts.

    Args:
        path: a task, or texts with commas between them.
        argument: the setting or option in backticks, for the message.

    Raises:
        ValueError: an empty name between commas.
    """
    if path.startswith(TASK_PREFIX):
        return TaskSource(path.removeprefix(TASK_PREFIX))
    return TextSource(split_paths(path, argument))


def parse_sources(
    path: str, argument: str = "`path`"
) -> tuple[list[TaskSource], TextSource]:
    """Parses a path that may name several tasks, and texts among them.

    Args:
        path: tasks and texts with commas between them.
        argument: the setting or option in backticks, for the message.

    Returns:
        The tasks in their order, and all texts together.

    Raises:
        ValueError: an empty name between commas.
    """
    tasks = []
    texts: list[str] = []
    for part in split_paths(path, argument):
        source = parse_source(part, argument)
        if isinstance(source, TaskSource):
            tasks.append(source)
        else:
            texts += source.paths
    return tasks, TextSource(tuple(texts))
