"""What a data path names: texts, or a synthetic task.

A path is a string of a config or of the command line: `task:NAME`, or files, folders and built-in
corpora separated by commas.
"""

import dataclasses

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


def parse_source(path: str) -> Source:
    """Parses a path that names one task or some texts."""
    if path.startswith(TASK_PREFIX):
        return TaskSource(path.removeprefix(TASK_PREFIX))
    return TextSource(tuple(path.split(",")) if path else ())


def parse_sources(path: str) -> tuple[list[TaskSource], TextSource]:
    """Parses a path that may name several tasks, and texts among them.

    Returns:
        The tasks in their order, and all texts together.
    """
    tasks = []
    texts: list[str] = []
    for part in path.split(",") if path else ():
        source = parse_source(part)
        if isinstance(source, TaskSource):
            tasks.append(source)
        else:
            # A trailing comma names nothing.
            texts += source.paths
    return tasks, TextSource(tuple(texts))
