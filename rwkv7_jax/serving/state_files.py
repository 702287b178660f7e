"""Files of start states, and folders of them, that an engine serves as they are now."""

import logging
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rwkv7_jax.checks import escape_controls
from rwkv7_jax.model.state import RWKV7State
from rwkv7_jax.serving.engine import Engine

# Names of states are parts of a model's name, which clients write into settings and addresses.
NAME = re.compile(r"[\w.-]+")

_LOG = logging.getLogger(__name__)


class _Stamp(NamedTuple):
    """What changes with a file's contents.

    States of a model have one size, and a program that copies files may set the time at which they
    were modified, but not the time at which they were changed here.
    """

    path: Path
    modified: int
    changed: int
    size: int


class StateFiles:
    """States by name, each from a file; those of a folder come and go with its files."""

    def __init__(
        self,
        files: Mapping[str, Path],
        folders: Sequence[Path],
        *,
        suffixes: Sequence[str],
        load: Callable[[Path], RWKV7State],
    ):
        """Takes where the states are.

        Args:
            files: by the state's name.
            folders: with files whose names are those of the states, without the suffix.
            suffixes: of files of states.
            load: reads a file.
        """
        self._files = dict(files)
        self._folders = tuple(folders)
        self._suffixes = tuple(suffixes)
        self._load = load
        self._stamps: dict[str, _Stamp] = {}
        # Folders and files that could not be read at the last look.
        self._lost: set[Path] = set()
        self._lock = threading.Lock()

    def read(self) -> dict[str, RWKV7State]:
        """Reads all states, which an engine begins with.

        Raises:
            ValueError: a file is no state of the model.
            OSError: a file cannot be read.
        """
        self._stamps = self._look()
        # A file that is not there is an error here, which its reader names.
        paths = dict(self._files)
        for name, stamp in self._stamps.items():
            paths[name] = stamp.path
        return {name: self._load(path) for name, path in paths.items()}

    def refresh(self, engine: Engine) -> None:
        """Gives an engine the states that are new or have changed, and removes those that are gone.

        A file that cannot be served is named in the log, once, and what had its name stays. So do
        the states of a folder that is gone or cannot be read, as a disk that is away for a while.
        """
        with self._lock:
            now = self._look()
            for name in self._stamps.keys() - now.keys():
                # A file of its own is one that is being replaced.
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

    def _look(self) -> dict[str, _Stamp]:
        """Looks which files there are now; where that cannot be told, those that there were."""
        files = dict(self._files)
        stamps: dict[str, _Stamp] = {}
        lost: dict[Path, OSError] = {}
        for folder in self._folders:
            try:
                paths = sorted(folder.iterdir())
            except OSError as error:
                lost[folder] = error
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
                lost[path] = error
                if name in self._stamps:
                    stamps[name] = self._stamps[name]
        self._name_lost(lost)
        return stamps

    def _name_lost(self, lost: Mapping[Path, OSError]) -> None:
        """Names in the log what cannot be read since this look."""
        for path in lost.keys() - self._lost:
            _LOG.warning(
                "serve: `%s` cannot be read, and what was read there before stays: %s",
                path,
                lost[path],
            )
        self._lost = set(lost)


def _stamp(path: Path) -> _Stamp:
    status = path.stat()
    return _Stamp(path, status.st_mtime_ns, status.st_ctime_ns, status.st_size)
