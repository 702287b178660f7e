"""Digests of a step's files, computed by the processes that wrote them.

The first process of several would otherwise read a whole step back for its manifest. Each of the
others notes the digests of its own files in a file next to them, and the first one collects the
notes. No collective does it: a save goes on in the background, next to the steps of the run.
"""

import re
import time
from collections.abc import Callable, Iterable, Sequence

from rwkv7_jax.runs.resume.steps import read_manifest

# Seconds between two looks for a note.
_PAUSE = 0.2

# Orbax gives each process a folder for the shards that it writes.
_FOLDER = re.compile(r"(?:^|/)ocdbt\.process_(\d+)/")


def note_name(process: int) -> str:
    """Names the file in which a process notes its digests."""
    return f"digests.{process}.json"


def names_of(process: int, names: Iterable[str]) -> list[str]:
    """Returns the files of a step that a process wrote, of the names of all."""
    own = []
    for name in names:
        match = _FOLDER.search(name)
        if match and int(match[1]) == process:
            own.append(name)
    return own


def collect(
    read: Callable[[str], bytes], processes: Sequence[int], seconds: float
) -> dict[str, str]:
    """Waits for the notes of processes; returns the digests in all of them by file name.

    Args:
        read: returns the content of a file of the step, empty while there is none.
        processes: that note digests.
        seconds: to wait at most.

    Raises:
        TimeoutError: a note has not come.
    """
    end = time.monotonic() + seconds
    digests: dict[str, str] = {}
    for process in processes:
        while (noted := read_manifest(read(note_name(process)))) is None:
            if time.monotonic() > end:
                raise TimeoutError(
                    f"process {process} did not say within {seconds:.0f} s what it wrote"
                )
            time.sleep(_PAUSE)
        digests |= noted
    return digests
