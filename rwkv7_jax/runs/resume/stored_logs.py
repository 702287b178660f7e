"""Logs of a run in an object store, in parts.

A store cannot append to a value, so uploading a whole log after every checkpoint would cost more
each time. Each part is uploaded only once, under its digest. An index lists the parts of each log
and is written last.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from rwkv7_jax.atomic_write import atomic_write
from rwkv7_jax.runs.exit_codes import warn
from rwkv7_jax.runs.resume.object_store import ObjectStore, is_inside
from rwkv7_jax.runs.resume.steps import manifest_text, new_hash, read_manifest

# The folder of the parts in a store.
PARTS = "log_parts"

# Bytes of a part. Shorter logs are copied like other files.
PART_BYTES = 8 << 20

# Suffixes of the files to which a run appends lines.
_LOGS = (".jsonl", ".csv")

_INDEX = f"{PARTS}/index.json"


def is_long_log(path: Path) -> bool:
    """Returns whether a file is copied in parts."""
    return path.suffix in _LOGS and path.stat().st_size > PART_BYTES


class StoredLogs:
    """The long logs of one run in a store."""

    def __init__(self, store: ObjectStore, check: Callable[[], None]):
        """Stores the arguments; the store is read on first use.

        Args:
            store: the store of the logs.
            check: raises if this process may no longer write to the store.
        """
        self._store = store
        self._check = check
        # Digests of parts by name, such as "metrics.jsonl/000000".
        self._index: dict[str, str] = {}
        # Digests of the parts in the store; None before they are listed.
        self._stored: set[str] | None = None
        # The inode of each log at its last upload: a replaced file may begin with other lines.
        self._inodes: dict[str, int] = {}

    def upload(self, logs: Mapping[str, Path]) -> None:
        """Uploads the parts that the store lacks, and deletes those that no log uses any more.

        Args:
            logs: all long logs of the run, by key.

        Raises:
            DiskError: the store cannot be written, or a log cannot be read.
        """
        if self._stored is None:
            self._index = self._read_index()
            self._stored = self._list()
        index: dict[str, str] = {}
        with self._store.named_errors():
            for key, path in logs.items():
                index |= self._upload(key, path, self._stored)
        self._check()
        if index != self._index:
            self._store.put(_INDEX, manifest_text(index))
            for key in _logs_of(index) - _logs_of(self._index):
                # The store still has the whole file from when the log was short.
                self._store.put(key, None)
            self._index = index
        # Last: until the new index is written, the old one is in use.
        for digest in self._stored - set(index.values()):
            self._store.put(f"{PARTS}/{digest}", None)
            self._stored.discard(digest)

    def download(self, folder: Path) -> None:
        """Joins the parts of all logs to files in a folder; warns of damaged parts and skips them.

        Raises:
            DiskError: the store cannot be read, or the folder cannot be written.
        """
        index = self._read_index()
        with self._store.named_errors():
            for key in sorted(_logs_of(index)):
                self._download(key, folder / key, index)

    def _download(self, key: str, path: Path, index: Mapping[str, str]) -> None:
        names = sorted(name for name in index if _log_of(name) == key)
        damaged = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            for name in names:
                content, _ = self._store.read(f"{PARTS}/{index[name]}")
                if new_hash(content).hexdigest() == index[name]:
                    file.write(content)
                else:
                    damaged += 1
        if damaged:
            warn(
                f"{damaged} of {len(names)} parts of {key} in {self._store.url} are damaged or "
                "missing; their lines are skipped"
            )

    def _read_index(self) -> dict[str, str]:
        """Returns the index; empty if it is missing or, after a warning, if it is damaged."""
        content, _ = self._store.read(_INDEX)
        index = read_manifest(content) if content else {}
        if index is None:
            warn(f"{_INDEX} in {self._store.url} is damaged; long logs are skipped")
            return {}
        return {name: digest for name, digest in index.items() if is_inside(name)}

    def _list(self) -> set[str]:
        """Returns the digests of all parts in the store, including those not in the index."""
        names = [PurePosixPath(key) for key in self._store.list()]
        return {
            path.name for path in names if path.parts[0] == PARTS and not path.suffix
        }

    def _upload(self, key: str, path: Path, stored: set[str]) -> dict[str, str]:
        """Uploads the new parts of a log; returns the digests of all its parts by name."""
        parts: dict[str, str] = {}
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            # Appending to a file does not change its full parts.
            if self._inodes.get(key) == status.st_ino:
                parts = self._unchanged(key, file, status.st_size)
            file.seek(len(parts) * PART_BYTES)
            for content in _read_parts(file, status.st_size):
                digest = new_hash(content).hexdigest()
                if digest not in stored:
                    self._store.put(f"{PARTS}/{digest}", content)
                    stored.add(digest)
                parts[f"{key}/{len(parts):06d}"] = digest
        self._inodes[key] = status.st_ino
        return parts

    def _unchanged(self, key: str, file: BinaryIO, size: int) -> dict[str, str]:
        """Returns the parts, except the last, that a log had at its last upload.

        The newest of these is compared with the file, because another file may have the same inode.
        """
        whole = sorted(name for name in self._index if _log_of(name) == key)[:-1]
        if not whole or size < len(whole) * PART_BYTES:
            return {}
        file.seek((len(whole) - 1) * PART_BYTES)
        if new_hash(file.read(PART_BYTES)).hexdigest() != self._index[whole[-1]]:
            return {}
        return {name: self._index[name] for name in whole}


def _read_parts(file: BinaryIO, end: int) -> Iterator[bytes]:
    """Yields the parts of a file from its current position to `end`; later appends are ignored."""
    while left := end - file.tell():
        content = file.read(min(PART_BYTES, left))
        if not content:
            return
        yield content


def _log_of(name: str) -> str:
    """Returns the key of the log that a part belongs to."""
    return str(PurePosixPath(name).parent)


def _logs_of(index: Mapping[str, str]) -> set[str]:
    """Returns the keys of all logs in an index."""
    return set(map(_log_of, index))
