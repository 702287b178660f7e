"""Files and folders of start states; an engine follows their changes."""

import logging
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rwkv7_jax.checks import escape_controls
from rwkv7_jax.model.state import RWKV7State
from rwkv7_jax.serving.engine import Engine

# A state's name is part of a model name, which clients write into settings and URLs.
NAME = re.compile(r"[\w.-]+")

_LOG = logging.getLogger(__name__)


class _Stamp(NamedTuple):
    """The metadata that shows whether a file has changed.

    The size does not suffice, because all states of a model have the same size. Nor does the
    modification time, which a program that copies files may set; it cannot set the change time.
    """

    path: Path
    modified: int
    changed: int
    size: int


class StateFiles:
    """States by name, each from a file. States of a folder appear and disappear with its files."""

    def __init__(
        self,
        files: Mapping[str, Path],
        folders: Sequence[Path],
        *,
        suffixes: Sequence[str],
        load: Callable[[Path], RWKV7State],
    ):
        """Stores the locations of the states.

        Args:
            files: files by the name of their state.
            folders: folders of files; a state is named after its file, without the suffix.
            suffixes: the suffixes of state files.
            load: reads a file.
        """
        self._files = dict(files)
        self._folders = tuple(folders)
        self._suffixes = tuple(suffixes)
        self._load = load
        self._stamps: dict[str, _Stamp] = {}
        # Folders and files that could not be read at the last scan.
        self._unreadable: set[Path] = set()
        self._lock = threading.Lock()

    def read(self) -> dict[str, RWKV7State]:
        """Reads the initial states of an engine.

        Raises:
            ValueError: a file is not a state of the model.
            OSError: a file cannot be read.
        """
        self._stamps = self._scan()
        # Include missing files, so that `load` raises an error that names them.
        paths = dict(self._files)
        for name, stamp in self._stamps.items():
            paths[name] = stamp.path
        return {name: self._load(path) for name, path in paths.items()}

    def refresh(self, engine: Engine) -> None:
        """Updates an engine: adds new and changed states, and removes those whose file is deleted.

        If a file cannot be served, the log names it once, and an earlier state of that name is
        still served. If a folder is missing or cannot be read, such as on a disk that is away for a
        while, its states are still served.
        """
        with self._lock:
            now = self._scan()
            for name in self._stamps.keys() - now.keys():
                # A missing file that the user named is probably being replaced: keep its state.
                if name not in self._files and name in engine.state_names:
                    engine.remove_state(name)
            for name, stamp in now.items():
                if stamp != self._stamps.get(name):
                    self._put(engine, name, stamp.path)
            self._stamps = now

    def _put(self, engine: Engine, name: str, path: Path) -> None:
        try:
            engine.put_state(name, self._load(path))
        except (OSError, TypeError, ValueError) as error:
            text = escape_controls(f"serve: `{path}` is not served: {error}")
            _LOG.warning("%s", text)

    def _scan(self) -> dict[str, _Stamp]:
        """Returns the stamps of all files; where they cannot be read, those of the last scan."""
        files = dict(self._files)
        stamps: dict[str, _Stamp] = {}
        unreadable: dict[Path, OSError] = {}
        for folder in self._folders:
            try:
                paths = sorted(folder.iterdir())
            except OSError as error:
                unreadable[folder] = error
                for name, stamp in self._stamps.items():
                    if stamp.path.parent == folder:
                        stamps[name] = stamp
                continue
            for path in paths:
                if path.suffix in self._suffixes and NAME.fullmatch(path.stem):
                    files.setdefault(path.stem, path)
        for name, path in files.items():
            try:
                stamps[name] = _stamp(path)
            except FileNotFoundError:
                continue
            except OSError as error:
                unreadable[path] = error
                if name in self._stamps:
                    stamps[name] = self._stamps[name]
        self._warn_of_unreadable(unreadable)
        return stamps

    def _warn_of_unreadable(self, unreadable: Mapping[Path, OSError]) -> None:
        """Logs the paths that this scan could not read but the last one could."""
        for path in unreadable.keys() - self._unreadable:
            _LOG.warning(
                "serve: `%s` cannot be read; its earlier states are still served: %s",
                path,
                unreadable[path],
            )
        self._unreadable = set(unreadable)


def _stamp(path: Path) -> _Stamp:
    status = path.stat()
    return _Stamp(path, status.st_mtime_ns, status.st_ctime_ns, status.st_size)
