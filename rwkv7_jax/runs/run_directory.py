"""The run directory: settings, metrics, checkpoints, and the lock against other processes."""

import contextlib
import json
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rwkv7_jax.atomic_write import append_line, atomic_write
from rwkv7_jax.json_files import number_of, read_json, read_object, write_json
from rwkv7_jax.reports.html_report import write_report
from rwkv7_jax.reports.metric_writers import JSONL, MetricFiles, iterate_steps
from rwkv7_jax.reports.system_info import system
from rwkv7_jax.runs.early_stopping import Progress
from rwkv7_jax.runs.exit_codes import DiskError, InUse, warn
from rwkv7_jax.runs.process_group import AllProcesses, ProcessGroup
from rwkv7_jax.runs.resume.backup import STEPS, Backup
from rwkv7_jax.runs.resume.checkpoint_store import CheckpointStore
from rwkv7_jax.runs.resume.checkpointer import Checkpointer
from rwkv7_jax.runs.resume.object_store import ObjectStore
from rwkv7_jax.runs.resume.run_identity import (
    Identity,
    flat_settings,
    require_same_run,
    without_paths,
)
from rwkv7_jax.runs.resume.step_directories import StepDirectories
from rwkv7_jax.runs.resume.stored_steps import StoredSteps
from rwkv7_jax.runs.run_folder import BAD_BATCHES, SAMPLES, SETTINGS, lock_folder
from rwkv7_jax.runs.run_lock import LOCK
from rwkv7_jax.runs.settings import Settings, as_config
from rwkv7_jax.runs.settled_settings import settle
from rwkv7_jax.runs.waiting import report_wait
from rwkv7_jax.training.train_step import TrainState

_EVENTS = "events.jsonl"

_PROTECTED = "protected_steps.json"


class RunDirectory:
    """The outputs of a run. Only process 0 keeps what is logged to it.

    Attributes:
        path: the directory that this process writes to.
        workdir: the run directory as this process would name it.
        settings: of the run; what the command leaves open has the value that the run began with.
        began: the settings that the run began with; empty for a new run.
        checkpoints: of the run.
    """

    path: Path
    workdir: Path
    settings: Settings
    began: Mapping[str, Any]
    checkpoints: CheckpointStore

    def share_checkpoints(self) -> None:
        """Makes all processes write and read each checkpoint together; all of them must call it.

        They use the run directory if all of them see it, and its backup otherwise.

        Raises:
            ValueError: a process does not see the directory of process 0, and the run has no
                backup.
            EndedElsewhere: another process cannot use the backup.
        """
        raise NotImplementedError

    def _store_to_share(self, group: AllProcesses) -> ObjectStore | None:
        """Returns the store for the shards of all processes; None if all see one directory."""
        holder = group.from_process_0(self._holder)
        # Compare the locks: another machine may have its own directory of that name.
        seen = group.allgather(self._holder() == holder)
        if all(seen):
            return None

        def open_store() -> ObjectStore:
            if not self.settings.backup:
                raise ValueError(
                    "`--workdir` must be one folder that all processes see, because each writes "
                    "its own shards of the weights, or `config.backup` must name an object store "
                    f"for them; process {seen.index(False)} does not see the folder of process 0."
                )
            store = ObjectStore(self.settings.backup)
            store.check_folder()
            return store

        return group.run_in_all(open_store)

    def _holder(self) -> str:
        """Returns the content of the run directory's lock; empty if there is none."""
        with contextlib.suppress(OSError):
            return (self.workdir / LOCK).read_text(encoding="utf-8")
        return ""

    def restore(
        self, abstract: TrainState, identity: Identity, init: Callable[[], TrainState]
    ) -> tuple[TrainState, Progress]:
        """Restores a checkpoint as `CheckpointStore.restore` does, and truncates the logs to it."""
        train, progress = self.checkpoints.restore(abstract, identity, init)
        self.resume_at(int(train.step))
        return train, progress

    def resume_at(self, step: int) -> None:
        """Truncates the logs to the step from which the run resumes.

        Args:
            step: the restored step; 0 starts anew.
        """

    def require_lock(self) -> None:
        """Checks that the directory still belongs to this process.

        Raises:
            InUse: it was deleted, and another process works in a new one.
        """

    def log(self, step: int, numbers: Mapping[str, Any]) -> None:
        """Writes the numbers of a step to the metrics files.

        Raises:
            InUse: as `require_lock`.
        """

    def log_bad(
        self, step: int, numbers: Mapping[str, float], tokens: np.ndarray
    ) -> None:
        """Records why an update was skipped, with the token ids of its batch."""

    def warn(self, text: str) -> None:
        """Prints a warning, in process 0 only: it is about the run, not about one process."""

    def note_event(self, step: int, event: str, detail: str = "") -> None:
        """Records an event at a step: start, resume, skipped, stopped or finished."""

    def note_sample(self, step: int, prompt: str, text: str) -> None:
        """Records the text that the model generated after a prompt."""

    def rows(self, steps: Collection[int] | None = None) -> list[dict]:
        """Returns the metrics so far, one row per step, including those before a resume.

        Args:
            steps: the steps to return; None for all, which may be more than memory holds.
        """
        return []


class OwnedRunDirectory(RunDirectory):
    """The run directory on disk, which one process at a time owns.

    It holds `settings.json`, `system.json`, `metrics.jsonl` and `metrics.csv` (all metrics),
    `samples.jsonl`, `events.jsonl`, `bad_batches.jsonl` (why updates were skipped), `checkpoints/`,
    and after the run `report.html`.
    """

    checkpoints: Checkpointer

    def __init__(self, path: str | Path, settings: Settings):
        """Creates or opens the directory and takes its lock.

        Args:
            path: of the directory.
            settings: of the command.

        Raises:
            ValueError: the directory holds a run with other settings or files of something else,
                another process uses it, a tracker is unknown, or the path is not UTF-8.
            ImportError: a tracker is not installed.
            DiskError: the directory or its backup cannot be written.
        """
        self.path = Path(path).absolute()
        self.workdir = self.path
        self._lock = lock_folder(self.path)
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(self._lock.release)
            self._steps = StepDirectories(self.path / STEPS)
            present = set(self._steps.numbers())
            # Fetch before reading anything: a new machine has only the backup.
            self._backup = None
            if settings.backup:
                self._backup = Backup(ObjectStore(settings.backup), self.path)
                on_failure.callback(self._backup.release)
                self._backup.fetch_files()
                present |= set(self._backup.newer_steps())
            before = self._read_settings()
            # Without a checkpoint there is nothing that other settings could invalidate.
            self.began = before if present and before is not None else {}
            self.settings = settle(settings, self.began)
            if settings.finds_rate and not self.settings.finds_rate:
                rate = self.settings.optimizer.learning_rate
                print(f"rate      {rate:g}, with which the run in {self.path} began")
            if self.began:
                self._require_same_settings(self.began)
            values = as_config(self.settings)
            self._protected = self._protect_steps(present, before, values)
            write_json(self.path / SETTINGS, values)
            self._metrics = MetricFiles(self.path, also=settings.trackers)
            self.checkpoints = self._own_checkpoints(ProcessGroup())
            # Nothing failed: keep the lock until `__exit__`.
            on_failure.pop_all()
        self._began = time.monotonic()
        self._warned = False

    def _read_settings(self) -> dict[str, Any] | None:
        """Returns the settings that the directory was last used with; None if unknown."""
        path = self.path / SETTINGS
        if not path.exists():
            return None
        values = read_object(path)
        if values is None:
            warn(
                f"{path} cannot be read; settings are checked against the checkpoints only"
            )
        return values

    def _require_same_settings(self, before: Mapping[str, Any]) -> None:
        # Paths are compared later, together with the digests of their files.
        was = without_paths(flat_settings(before))
        now = without_paths(flat_settings(self.settings))
        require_same_run(self.path, was, now)

    def _protect_steps(
        self,
        present: Collection[int],
        before: Mapping[str, Any] | None,
        now: Mapping[str, Any],
    ) -> set[int]:
        """Returns the steps that retention must not delete, and stores them.

        These are the steps that existed when the retention settings last changed: a user who asks
        for fewer checkpoints from now on has not asked to delete older ones.
        """
        path = self.path / _PROTECTED
        remembered = read_json(path) if path.exists() else []
        is_damaged = not isinstance(remembered, list)
        protected = set(present)
        if (
            before is not None
            and not is_damaged
            and _retention(before) == _retention(now)
        ):
            protected &= {step for step in remembered if isinstance(step, int)}
        if protected or path.exists():
            write_json(path, sorted(protected), indent=None)
        return protected

    def __enter__(self) -> "OwnedRunDirectory":
        """Returns itself."""
        return self

    def __exit__(self, *failure) -> None:
        """Waits for a pending save, writes the report and releases the lock."""
        with contextlib.ExitStack() as locks, report_wait("the run's last files"):
            locks.callback(self._lock.release)
            if self._backup is not None:
                locks.callback(self._backup.release)
            # First, because the report and the copy must follow the last save.
            self.checkpoints.leave()
            self._metrics.close()
            # The directory may belong to another process now.
            if not isinstance(failure[1], InUse):
                self._write_report()
                self._copy_results(failed=failure[0] is not None)

    def _write_report(self) -> None:
        """Writes the report of a run that has metrics; warns if it cannot."""
        try:
            if next(self._metrics.iterate(), None):
                write_report(self.path)
        except (OSError, ValueError) as error:
            warn(f"the report of {self.path} cannot be written: {error}")

    def _copy_results(self, *, failed: bool) -> None:
        """Copies the outputs of the run to its backup.

        Args:
            failed: whether the run ends with an error, which an error here must not hide.

        Raises:
            DiskError: the backup cannot be written.
        """
        if self._backup is None:
            return
        try:
            # The last copy of an earlier process may have failed.
            self._backup.copy_newer_steps()
            self._backup.copy_files()
        except DiskError as error:
            if not failed:
                raise
            warn(str(error))

    def share_checkpoints(self) -> None:
        """Opens the checkpoints of all processes; see `RunDirectory.share_checkpoints`."""
        group = AllProcesses()
        if self._store_to_share(group) and self._backup:
            self.checkpoints = Checkpointer(
                self._backup.steps,
                self.path,
                self.settings,
                protected=self._protected,
                fetch=self._backup.copy_newer_steps,
                copy=self._backup.copy_files,
                group=group,
            )
        else:
            self.checkpoints = self._own_checkpoints(group)

    def _own_checkpoints(self, group: ProcessGroup) -> Checkpointer:
        """Opens the checkpoints in this directory."""
        backup = self._backup
        return Checkpointer(
            self._steps,
            self.path,
            self.settings,
            protected=self._protected,
            fetch=backup.fetch_step if backup else None,
            copy=backup.copy_steps if backup else None,
            group=group,
        )

    def resume_at(self, step: int) -> None:
        """Truncates the logs to a step; see `RunDirectory.resume_at`."""
        # Events are a history: unlike metrics and samples they are never truncated.
        self.note_event(step, "resume" if step else "start")
        # A run without a checkpoint repeats step 0 too.
        last_step = step or -1
        self._metrics.truncate_after(last_step)
        for name in (BAD_BATCHES, SAMPLES):
            self._truncate_after(last_step, name)
        # The run's clock continues from where the last process left it.
        spent = 0.0
        for row in self._metrics.iterate():
            spent = max(spent, number_of(row.get("seconds")) or 0.0)
        self._began -= spent
        path = self.path / "system.json"
        self._try(path.name, lambda: write_json(path, system()))

    def _truncate_after(self, last_step: int, name: str) -> None:
        """Drops the lines of later steps, and an unfinished last line of a killed process."""
        path = self.path / name
        if not path.exists():
            return
        with atomic_write(path) as file:
            for row in iterate_steps(path):
                if row["step"] <= last_step:
                    file.write(f"{json.dumps(row)}\n".encode())

    def require_lock(self) -> None:
        """Checks the lock; see `RunDirectory.require_lock`."""
        self._lock.require()

    def log(self, step: int, numbers: Mapping[str, Any]) -> None:
        """Writes the numbers of a step; see `RunDirectory.log`."""
        self.require_lock()
        seconds = round(time.monotonic() - self._began, 3)
        row = {"seconds": seconds, **numbers}
        self._try(JSONL, lambda: self._metrics.write(step, row))

    def warn(self, text: str) -> None:
        """Prints a warning."""
        warn(text)

    def note_event(self, step: int, event: str, detail: str = "") -> None:
        """Records an event at a step: start, resume, skipped, stopped or finished."""
        row = {"step": step, "event": event, "detail": detail}
        self._append(_EVENTS, row | {"time": round(time.time(), 3)})

    def note_sample(self, step: int, prompt: str, text: str) -> None:
        """Records the text that the model generated after a prompt."""
        self._append(SAMPLES, {"step": step, "prompt": prompt, "text": text})

    def log_bad(
        self, step: int, numbers: Mapping[str, float], tokens: np.ndarray
    ) -> None:
        """Records why an update was skipped, with the token ids of its batch."""
        # As text, because JSON has no NaN.
        texts = {name: str(value) for name, value in numbers.items()}
        self._append(
            BAD_BATCHES, {"step": step, **texts, "tokens": np.asarray(tokens).tolist()}
        )
        detail = ", ".join(f"{name} {text}" for name, text in texts.items())
        self.note_event(step, "skipped", detail)

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        path = self.path / name
        self._try(name, lambda: append_line(path, json.dumps(row)))

    def _try(self, name: str, write: Callable[[], None]) -> None:
        """Calls `write`; warns once if it fails, because a log line must not end a run."""
        try:
            write()
        # `atomic_write` raises ValueError if the folder was deleted.
        except (OSError, ValueError) as error:
            if not self._warned:
                warn(f"{self.path / name} cannot be written: {error}; training goes on")
            self._warned = True

    def rows(self, steps: Collection[int] | None = None) -> list[dict]:
        """Returns the metrics so far; see `RunDirectory.rows`."""
        return self._metrics.rows(steps)


class NullRunDirectory(RunDirectory):
    """The run directory of a process other than process 0, which writes no logs.

    If checkpoints are sharded over several processes, it writes the shards of its own process.
    """

    def __init__(
        self, path: Path, workdir: Path, settings: Settings, began: Mapping[str, Any]
    ):
        """Takes a directory for temporary files.

        Args:
            path: of that directory.
            workdir: the run directory, which this machine need not have.
            settings: of the command.
            began: the settings that the run began with, as process 0 read them.
        """
        self.path = path
        self.workdir = workdir
        self.began = began
        self.settings = settle(settings, began)
        self.checkpoints = CheckpointStore()

    def share_checkpoints(self) -> None:
        """Opens the checkpoints of all processes; see `RunDirectory.share_checkpoints`."""
        group = AllProcesses()
        store = self._store_to_share(group)
        steps = (
            StepDirectories(self.workdir / STEPS)
            if store is None
            else StoredSteps(store, STEPS)
        )
        self.checkpoints = Checkpointer(steps, self.workdir, self.settings, group=group)


def _retention(values: Mapping[str, Any]) -> tuple[Any, ...]:
    """Returns the settings that decide which checkpoints are kept."""
    evaluation = values.get("evaluation")
    patience = evaluation.get("patience") if isinstance(evaluation, Mapping) else None
    # With patience the best step is kept regardless of `keep_best`.
    return (
        values.get("keep"),
        values.get("keep_every"),
        values.get("keep_best"),
        bool(patience),
    )
