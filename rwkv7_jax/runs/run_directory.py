"""A run's folder: settings, metrics, checkpoints, and the lock that keeps others out."""

import dataclasses
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rwkv7_jax.atomic_write import atomic_write
from rwkv7_jax.reports.html_report import write_report
from rwkv7_jax.reports.metric_writers import JSONL, MetricFiles, json_lines
from rwkv7_jax.reports.system_info import system
from rwkv7_jax.runs.early_stopping import RunProgress
from rwkv7_jax.runs.exit_codes import DiskError, warn
from rwkv7_jax.runs.resume.checkpoint_record import Identity
from rwkv7_jax.runs.resume.checkpointer import Checkpoints
from rwkv7_jax.runs.resume.run_identity import flat_settings, require_same_run
from rwkv7_jax.runs.resume.step_directories import step_numbers
from rwkv7_jax.runs.run_lock import RunLock
from rwkv7_jax.runs.settings import Settings
from rwkv7_jax.training.train_step import TrainState

_BAD, _SAMPLES, _EVENTS = "bad_batches.jsonl", "samples.jsonl", "events.jsonl"


class RunFolder:
    """Everything that a run leaves behind, under one path, for one process at a time.

    `settings.json`, `system.json`, `metrics.jsonl` and `metrics.csv` (all numbers),
    `samples.jsonl`, `events.jsonl`, `bad_batches.jsonl` (what updates were left out for),
    `checkpoints/`, and when the run has ended, `report.html`.

    Attributes:
        path: of the folder.
        checkpoints: the steps in it.
    """

    def __init__(self, path: str | Path, settings: Settings):
        """The folder is there and ours; nothing slow has happened yet.

        Raises:
            ValueError: it belongs to a run with other settings, or another process works in it, or
                an unknown tracker.
            ImportError: a tracker that is not installed.
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
            require_same_run(self.path, was, flat_settings(settings))
        text = json.dumps(dataclasses.asdict(settings), indent=1)
        with atomic_write(old) as file:
            file.write(f"{text}\n".encode())
        self._metrics = MetricFiles(self.path, also=settings.trackers)
        self.checkpoints = Checkpoints(places, settings)

    def __enter__(self) -> "RunFolder":
        """Itself."""
        return self

    def __exit__(self, *error) -> None:
        """No save is under way, the report is written, and others may come."""
        self.checkpoints.wait()
        self._metrics.close()
        if self._metrics.rows():
            try:
                write_report(self.path)
            except OSError as error:
                warn(f"the report of {self.path} cannot be written: {error}")
        self._lock.release()

    def restore(self, train: TrainState, identity: Identity) -> tuple[TrainState, RunProgress]:
        """What `Checkpoints.restore` finds; metrics of steps behind it are gone from the files."""
        train, course = self.checkpoints.restore(train, identity)
        self.restored(int(train.step))
        return train, course

    def restored(self, step: int) -> None:
        """The run goes on at a step: what was said of later ones is gone, and it is noted."""
        self.note_event(step, "resume" if step else "start")
        # What step 0 said is said again by a run that has no checkpoint.
        step = step or -1
        self._metrics.truncate_after(step)
        for name in (_BAD, _SAMPLES):
            self._cut(name, step)
        self._began -= max((row.get("seconds", 0.0) for row in self.rows()), default=0.0)
        with atomic_write(self.path / "system.json") as file:
            file.write(json.dumps(system(), indent=1).encode())

    def _cut(self, name: str, last_step: int) -> None:
        """Lines of steps behind `last_step` are gone, and a last one that broke off."""
        path = self.path / name
        rows = [row for row in json_lines(path) if row.get("step", 0) <= last_step]
        if path.exists():
            with atomic_write(path) as file:
                file.write("".join(json.dumps(row) + "\n" for row in rows).encode())

    def log(self, step: int, numbers: Mapping[str, Any]) -> None:
        """The numbers of a step are in the metrics files."""
        row = {"seconds": round(time.monotonic() - self._began, 3), **numbers}
        self._tried(JSONL, self._metrics.write, step, row)

    def note_event(self, step: int, event: str, detail: str = "") -> None:
        """What happened at a step is kept: start, resume, skipped, stopped, finished."""
        self._append(_EVENTS, {"step": step, "event": event, "detail": detail})

    def note_sample(self, step: int, prompt: str, text: str) -> None:
        """What the model wrote behind a prompt is kept."""
        self._append(_SAMPLES, {"step": step, "prompt": prompt, "text": text})

    def log_bad(self, step: int, numbers: Mapping[str, float], tokens: np.ndarray) -> None:
        """Append what an update was left out for, with the ids of its batch."""
        said = {name: str(value) for name, value in numbers.items()}
        self._append(_BAD, {"step": step, **said, "tokens": np.asarray(tokens).tolist()})
        self.note_event(step, "skipped", ", ".join(f"{k} {v}" for k, v in said.items()))

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        self._tried(name, _add_line, self.path / name, json.dumps(row) + "\n")

    def _tried(self, name: str, write: Callable, *arguments: Any) -> None:
        """A line of a log is not worth a run: a full disk is said once."""
        try:
            write(*arguments)
        except OSError as error:
            if not self._silent:
                warn(f"{self.path / name} cannot be written: {error}; training goes on")
            self._silent = True

    def rows(self) -> list[dict]:
        """All metrics so far, one row a step, from resumed runs as well."""
        return self._metrics.rows()


class NullRunDirectory:
    """What stands for the folder where another process has it; what is said here is kept there.

    Attributes:
        path: a folder to work in, for as long as the run lasts.
        checkpoints: itself.
    """

    def __init__(self, path: Path):
        """Nothing is kept."""
        self.path, self.checkpoints = path, self

    def _nothing(self, *said: Any) -> None:
        """The first process does it."""

    log = log_bad = note_event = note_sample = save = poll = close = _nothing


Folder = RunFolder | NullRunDirectory


def _add_line(path: Path, line: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(line)
