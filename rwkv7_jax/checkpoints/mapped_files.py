"""Files that are mapped into memory: their bytes are read when they are looked at."""

import mmap
from pathlib import Path
from typing import Any


def map_file(path: Path) -> mmap.mmap:
    """Maps a file that is only read; arrays made of the map keep it alive.

    Raises:
        OSError: it cannot be read.
        ValueError: it is empty.
    """
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def release_pages(view: Any) -> None:
    """Gives back the pages that reading brought in.

    Otherwise they would count as this process's memory besides the copy that was made of them.

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
