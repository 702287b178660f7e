"""Digests of a checkpoint's files, computed by the processes that wrote them.

Otherwise process 0 would have to read a whole checkpoint back to write its manifest. Each other
process writes the digests of its own files to a note next to them, and process 0 collects the
notes. A collective cannot replace the notes, because a save runs in the background of training.
"""

import re
import time
from collections.abc import Callable, Iterable, Sequence

from rwkv7_jax.runs.resume.steps import read_manifest

# Seconds between two attempts to read a note.
_PAUSE = 0.2

# Orbax writes the shards of each process to a folder of this name.
_FOLDER = re.compile(r"(?:^|/)ocdbt\.process_(\d+)/")


def note_name(process: int) -> str:
    """Returns the name of the file in which a process notes its digests."""
    return f"digests.{process}.json"


def names_of(process: int, names: Iterable[str]) -> list[str]:
    """Returns those of a step's file names that a process wrote."""
    own = []
    for name in names:
        match = _FOLDER.search(name)
        if match and int(match[1]) == process:
            own.append(name)
    return own


def collect(
    read: Callable[[str], bytes], processes: Sequence[int], seconds: float
) -> dict[str, str]:
    """Waits for the notes of processes; returns their digests by file name.

    Args:
        read: returns the content of a file of the step; empty while the file does not exist.
        processes: the processes whose notes to wait for.
        seconds: the timeout for all notes together.

    Raises:
        TimeoutError: a note is missing after the timeout.
    """
    end = time.monotonic() + seconds
    digests: dict[str, str] = {}
    for process in processes:
        while (noted := read_manifest(read(note_name(process)))) is None:
            if time.monotonic() > end:
                raise TimeoutError(
                    f"process {process} did not note its digests within {seconds:.0f} s"
                )
            time.sleep(_PAUSE)
        digests |= noted
    return digests
