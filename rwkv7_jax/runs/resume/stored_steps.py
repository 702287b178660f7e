"""Checkpoints as folders in an object store.

A store cannot rename, so a step is written under its final number. It counts as a step only while
it has a manifest, which is written after all other files and deleted before them.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rwkv7_jax.runs.resume.noted_digests import collect, names_of, note_name
from rwkv7_jax.runs.resume.object_store import ObjectStore
from rwkv7_jax.runs.resume.steps import (
    MANIFEST,
    Steps,
    is_step_name,
    manifest_text,
    read_manifest,
)

# The name of the manifest of a damaged step.
_BAD_MANIFEST = "bad.json"

# In a store that is a local folder, Orbax adds a suffix to an incomplete step.
_FOLDER = re.compile(r"(\d+)(\.orbax-checkpoint-tmp[^/]*)?/")


class StoredSteps(Steps):
    """The steps below a folder of a store.

    Attributes:
        place: the URL of the folder.
    """

    place: str

    def __init__(
        self, store: ObjectStore, folder: str, check: Callable[[], None] = lambda: None
    ):
        """Stores the arguments.

        Args:
            store: the store of the steps.
            folder: the name of the folder.
            check: raises if this process may no longer write to the store.
        """
        self.place = f"{store.url.rstrip('/')}/{folder}"
        self._store = store
        self._prefix = f"{folder}/"
        self._check = check

    def numbers(self) -> list[int]:
        """Returns the steps that have a manifest; others do not count."""
        return self.complete()

    def complete(self) -> list[int]:
        """Returns the steps that have a manifest."""
        return sorted(map(int, self._with(MANIFEST)), reverse=True)

    def _with(self, file: str) -> set[str]:
        """Returns the names of the step folders that contain a file."""
        folders = set()
        for name in self._names():
            folder, _, inner = name.partition("/")
            if inner == file and is_step_name(folder):
                folders.add(folder)
        return folders

    def _names(self) -> list[str]:
        keys = self._store.list()
        return [
            key.removeprefix(self._prefix)
            for key in keys
            if key.startswith(self._prefix)
        ]

    def path(self, number: int) -> Any:
        """Returns the folder of a step."""
        return self._store.folder() / self._prefix / str(number)

    def key(self, number: int, name: str = "") -> str:
        """Returns the key of a file of a step."""
        return f"{self._prefix}{number}/{name}"

    def files(self, number: int) -> dict[str, str]:
        """Returns the keys of a step's files, except its manifest, by name."""
        prefix = self.key(number)
        files = {}
        for key in self._store.list():
            if key.startswith(prefix):
                files[key.removeprefix(prefix)] = key
        files.pop(MANIFEST, None)
        return files

    def clean(self) -> None:
        """Deletes the folders without a manifest, except those of damaged steps."""
        self._check()
        whole = self._with(MANIFEST) | self._with(_BAD_MANIFEST)
        folders = {match[0] for name in self._names() if (match := _FOLDER.match(name))}
        for folder in folders:
            if folder.rstrip("/") not in whole:
                self._store.delete_folder(self._prefix + folder)

    def begin(self, number: int) -> None:
        """Deletes the content of the folder."""
        self.discard(number)
        folder = self.path(number)
        # A store on a local disk keeps empty folders.
        if folder.exists():
            folder.rmtree()

    def note_digests(self, number: int, process: int) -> None:
        """Writes a note with digests computed from the content of the store."""
        files = self.files(number)
        own = {name: files[name] for name in names_of(process, files)}
        note = manifest_text(self._store.digests(own))
        self._store.put(self.key(number, note_name(process)), note)

    def commit(
        self, number: int, *, others: Sequence[int] = (), seconds: float = 0
    ) -> None:
        """Writes the manifest, with digests computed from the content of the store."""

        def read(name: str) -> bytes:
            return self._store.read(self.key(number, name))[0]

        noted = collect(read, others, seconds)
        self._check()
        # Before the manifest, which must not list the notes.
        for process in others:
            self._store.put(self.key(number, note_name(process)), None)
        files = self.files(number)
        digests = {name: noted[name] for name in files if name in noted}
        left = {name: key for name, key in files.items() if name not in noted}
        digests |= self._store.digests(left)
        self._store.put(self.key(number, MANIFEST), manifest_text(digests))

    def keep_only(self, numbers: Iterable[int]) -> None:
        """Deletes the other steps that have a manifest."""
        for number in set(self.complete()) - set(numbers):
            self.discard(number)

    def discard(self, number: int) -> None:
        """Deletes a step, its manifest first."""
        # The steps of a displaced process belong to another process now.
        self._check()
        self._store.put(self.key(number, MANIFEST), None)
        self._store.delete_folder(self.key(number))

    def give_up(self) -> None:
        """Deletes the folders without a manifest, as `clean` does."""
        self.clean()

    def broken_files(self, number: int, share: slice = slice(None)) -> list[str]:
        """Compares the files of a step with its manifest."""
        manifest, _ = self._store.read(self.key(number, MANIFEST))
        expected = read_manifest(manifest)
        if expected is None:
            return [MANIFEST]
        files = self.files(number)
        names = list(dict.fromkeys([*expected, *sorted(files)]))[share]
        found = self._store.digests(
            {name: files[name] for name in names if name in files}
        )
        return [name for name in names if expected.get(name) != found.get(name)]

    def set_aside(self, number: int) -> str:
        """Renames the manifest, so that the step no longer counts."""
        self._check()
        key = self.key(number, MANIFEST)
        manifest, _ = self._store.read(key)
        self._store.put(self.key(number, _BAD_MANIFEST), manifest)
        self._store.put(key, None)
        return f"{self.place}/{number}"

    def damaged(self) -> str:
        """Returns the URL of the folder if it has a damaged step; empty otherwise."""
        return self.place if self._with(_BAD_MANIFEST) else ""
