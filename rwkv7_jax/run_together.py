"""A run's folder among several processes: the first one has it, the others follow. Level 9."""

import contextlib
import dataclasses
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .course import Course
from .processes import by_first, of_first
from .run_folder import Folder, Follower, RunFolder
from .run_record import Identity
from .settings import Settings
from .training import TrainState


@contextlib.contextmanager
def opened(workdir: str | Path, settings: Settings) -> Iterator[Folder]:
    """The run's folder; the first process alone writes, and alone is heard on stdout.

    Raises:
        ValueError, ImportError, DiskError: as `RunFolder`, in the first process.
        EndedElsewhere: in the others, then.
    """
    with contextlib.ExitStack() as stack:
        taken: list[Folder] = []

        def take() -> str:
            taken.append(stack.enter_context(RunFolder(workdir, settings)))
            return ""

        by_first(take)
        if not taken:
            taken.append(Follower(Path(stack.enter_context(tempfile.TemporaryDirectory()))))
            silence = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(silence))
        yield taken[0]


def restored(folder: Folder, fresh: TrainState, identity: Identity) -> tuple[TrainState, Course]:
    """What `RunFolder.restore` finds in the first process, in all of them.

    Raises:
        NoValidCheckpoint, ValueError: as it, in the first process.
        EndedElsewhere: in the others, then.
    """
    state, course = fresh, Course()

    def read() -> str:
        nonlocal state, course
        state, course = folder.restore(fresh, identity)
        return json.dumps(dataclasses.asdict(course))

    course = Course.from_json(json.loads(by_first(read)))
    return of_first(state), course
