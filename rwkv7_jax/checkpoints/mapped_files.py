"""Memory-mapped files, whose bytes are read on access."""

import mmap
from pathlib import Path
from typing import Any


def map_file(path: Path) -> mmap.mmap:
    """Maps a file for reading; arrays that view the map keep it alive.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is empty.
    """
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def release_pages(view: Any) -> None:
    """Releases the resident pages of a memory map.

    Otherwise they would count towards the process's memory in addition to the copy made of them.

    Args:
        view: a mapped file, or an array that may be a view of one.
    """
    owner = view
    while owner is not None and not isinstance(owner, mmap.mmap):
        # A memoryview calls its parent `obj`, an array calls it `base`.
        if isinstance(owner, memoryview):
            owner = owner.obj
        else:
            owner = getattr(owner, "base", None)
    # Windows has no madvise.
    if owner is not None and hasattr(mmap, "MADV_DONTNEED"):
        owner.madvise(mmap.MADV_DONTNEED)
