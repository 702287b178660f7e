"""A run's folder: settings, metrics, checkpoints, and the lock that keeps others out. Level 8."""

import csv
import dataclasses
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .atomic import replacing
from .course import Course
from .run_checkpoints import Checkpoints
from .run_ends import DiskError, warn
from .run_identity import flat_settings, refuse_other_run
from .run_lock import RunLock
from .run_record import Identity
from .settings import Settings
from .step_folders import step_numbers
from .training import TrainState

_COLUMNS = (
    "step",
    "seconds",
    "loss_nats",
    "learning_rate",
    "grad_norm",
    "tokens_per_second",
    "held_out_bits_per_byte",
)
_METRICS, _TABLE, _BAD = "metrics.jsonl", "metrics.csv", "bad_batches.jsonl"


class RunFolder:
    """Everything that a run leaves behind, under one path, for one process at a time.

    `settings.json`, `metrics.jsonl` (all numbers), `metrics.csv` (the main ones),
    `bad_batches.jsonl` (what updates were left out for), `checkpoints/`.

    Attributes:
        path: of the folder.
        checkpoints: the steps in it.
    """

    def __init__(self, path: str | Path, settings: Settings):
        """The folder is there and ours; nothing slow has happened yet.

        Raises:
            ValueError: it belongs to a run with other settings, or another process works in it.
            DiskError: it cannot be written.
        """
        self.path = Path(path).absolute()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
            self._lock = RunLock(self.path / "run.lock")
        except OSError as error:
            raise DiskError(f"`--workdir` {self.path} cannot be written: {error}.") from None
        if self._lock.stale:
            warn(f"{self._lock.stale} ended without releasing {self.path}; its lock is taken over")
        try:
            self._take(settings)
        except BaseException:
            self._lock.release()
            raise
        self._began, self._silent = time.monotonic(), False

    def _take(self, settings: Settings) -> None:
        """The folder's settings are these."""
        old, places = self.path / "settings.json", self.path / "checkpoints"
        if old.exists() and step_numbers(places):
            try:
                was = flat_settings(json.loads(old.read_text()))
            except (ValueError, AttributeError):
                warn(f"{old} cannot be read; what the checkpoints say counts")
                was = {}
            refuse_other_run(self.path, was, flat_settings(settings))
        text = json.dumps(dataclasses.asdict(settings), indent=1)
        with replacing(old) as file:
            file.write(f"{text}\n".encode())
        self.checkpoints = Checkpoints(places, settings)

    def __enter__(self) -> "RunFolder":
        """Itself."""
        return self

    def __exit__(self, *error) -> None:
        """No save is under way, and others may come."""
        self.checkpoints.wait()
        self._lock.release()

    def restore(self, train: TrainState, identity: Identity) -> tuple[TrainState, Course]:
        """What `Checkpoints.restore` finds; metrics of steps behind it are gone from the files."""
        train, course = self.checkpoints.restore(train, identity)
        rows = self._cut(_METRICS, int(train.step))
        self._cut(_BAD, int(train.step))
        self._began -= max((row.get("seconds", 0.0) for row in rows), default=0.0)
        if rows or (self.path / _TABLE).exists():
            with replacing(self.path / _TABLE) as file:
                file.write(_table(rows).encode())
        return train, course

    def _cut(self, name: str, last_step: int) -> list[dict]:
        """Lines of steps behind `last_step` are gone, and a last one that broke off; gives rows."""
        path = self.path / name
        if not path.exists():
            return []
        rows = [row for row in _rows(path) if row["step"] <= last_step]
        with replacing(path) as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
        return rows

    def log(self, step: int, numbers: Mapping[str, Any]) -> None:
        """Append one line to the metrics files."""
        row = {"step": step, "seconds": round(time.monotonic() - self._began, 3), **numbers}
        new = not (self.path / _TABLE).exists()
        self._append(_METRICS, json.dumps(row) + "\n")
        self._append(_TABLE, _table([row], head=new))

    def log_bad(self, step: int, numbers: Mapping[str, float], tokens: np.ndarray) -> None:
        """Append what an update was left out for, with the ids of its batch."""
        said = {name: str(value) for name, value in numbers.items()}
        row = {"step": step, **said, "tokens": np.asarray(tokens).tolist()}
        self._append(_BAD, json.dumps(row) + "\n")

    def _append(self, name: str, text: str) -> None:
        """A line of a log is not worth a run: a full disk is said once."""
        try:
            with (self.path / name).open("a", newline="") as file:
                file.write(text)
        except OSError as error:
            if not self._silent:
                warn(f"{self.path / name} cannot be written: {error}; training goes on")
            self._silent = True

    def rows(self) -> list[dict]:
        """All metrics so far, from resumed runs as well."""
        path = self.path / _METRICS
        return _rows(path) if path.exists() else []


def _rows(path: Path) -> list[dict]:
    """The lines of a log; one that broke off is left out."""
    found = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "step" in row:
            found.append(row)
    return found


class _Lines(list):
    """What `csv` writes to."""

    write = list.append


def _table(rows: list[dict], *, head: bool = True) -> str:
    lines = _Lines()
    writer = csv.DictWriter(lines, _COLUMNS, extrasaction="ignore")
    if head:
        writer.writeheader()
    writer.writerows(rows)
    return "".join(lines)
