"""A run's checkpoints: saved in the background, verified on every read.

A step is valid if its record is consistent, every array still has the checksum computed on the
device before the save, and every file matches the manifest. A damaged step is set aside, and the
next older one is used.

If arrays are sharded over several processes, all processes call the same methods in the same order.
Each process writes and reads its own shards. Only process 0 names, keeps and deletes steps. An
error in one process is an error in all.

Orbax writes and reads the arrays. Its CheckpointManager is not used: it changes files of a step
after the last hook in which a manifest could be written, so a kill in between would leave an intact
step that counts as damaged (docs/decisions-checkpoints.md has the experiment).
"""

import dataclasses
import functools
import itertools
import threading
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import jax

from rwkv7_jax.checkpoints.orbax_import import import_orbax
from rwkv7_jax.checks import first_line
from rwkv7_jax.runs.early_stopping import Progress
from rwkv7_jax.runs.exit_codes import DiskError, NoValidCheckpoint, warn
from rwkv7_jax.runs.process_group import ProcessGroup
from rwkv7_jax.runs.resume.checkpoint_record import (
    list_names,
    make_record,
    nonfinite_leaves,
    require_same_leaves,
    validation_error,
)
from rwkv7_jax.runs.resume.checkpoint_store import CheckpointStore
from rwkv7_jax.runs.resume.checksums import changed_leaves, leaf_checksums
from rwkv7_jax.runs.resume.run_identity import Identity, require_same_identity
from rwkv7_jax.runs.resume.steps import Steps, steps_to_keep
from rwkv7_jax.runs.settings import Settings
from rwkv7_jax.runs.waiting import report_wait
from rwkv7_jax.training.train_step import TrainState

# Seconds that the processes of a save wait for each other, while training continues. A process
# reports its failure to the others only afterwards.
SAVE_SECONDS = 600

# An error of Orbax or TensorStore can fill pages. Its first line begins with what failed and ends
# with the reason; this many characters of each are shown.
_REASON_CHARACTERS = 100


class _Damaged(Exception):
    """The step differs from what was saved."""


@dataclasses.dataclass
class SaveJob:
    """A save in the background.

    Attributes:
        step: the step of the checkpoint.
        size: the size of its arrays in bytes.
        best: steps that retention must keep because of their evaluation.
        error: why the save failed; None unless it did.
        not_copied: why the copy of the saved step failed; empty unless it did.
        thread: the thread that finishes the save; None if it failed before the thread started.
    """

    step: int
    size: int
    best: set[int]
    error: Exception | None = None
    not_copied: str = ""
    thread: threading.Thread | None = None

    def join(self) -> None:
        """Waits for the thread, with messages while that takes long."""
        if self.thread is not None:
            with report_wait(f"the checkpoint of step {self.step} to be written"):
                self.thread.join()


class Checkpointer(CheckpointStore):
    """The checkpointer of one run.

    Attributes:
        steps: the checkpoints.
        failure: why the newest save or its copy failed; empty if neither did.
    """

    def __init__(
        self,
        steps: Steps,
        workdir: Path,
        settings: Settings,
        *,
        protected: Collection[int] = (),
        fetch: Callable[[], None] | None = None,
        copy: Callable[[], None] | None = None,
        group: ProcessGroup | None = None,
    ):
        """Deletes the incomplete steps that an earlier process left.

        Args:
            steps: the storage of the checkpoints.
            workdir: the run directory.
            settings: the settings of the run.
            protected: steps that retention never deletes, because they were saved under other
                retention settings.
            fetch: downloads newer steps from elsewhere, each at most once; called before a
                restore.
            copy: copies the run to its backup; called after every save.
            group: the processes that save and restore together; None for this process alone.

        Raises:
            OSError: the folder of the steps cannot be written.
        """
        self.steps = steps
        self.failure = ""
        self._workdir = workdir
        self._settings = settings
        self._protected = frozenset(protected)
        self._fetch = fetch or _do_nothing
        self._copy = copy or _do_nothing
        self._saved: int | None = None
        self._job: SaveJob | None = None
        self._orbax: Any = None
        self._failures = 0
        self._group = group or ProcessGroup()
        # Identical in all processes, whose run directories may have different names.
        self._name = self._group.from_process_0(lambda: workdir.name)
        if self._group.is_primary:
            steps.clean()

    def _orbax_checkpointer(self) -> Any:
        """Returns Orbax's checkpointer; creates it on first use and after a failure."""
        if self._orbax is None:
            ocp = import_orbax()
            processes = ocp.options.MultiprocessingOptions(
                primary_host=0,
                # Always set: otherwise Orbax synchronises with device collectives, which have no
                # timeout.
                active_processes=set(self._group.members),
                # A new prefix after a failed save: some processes have passed more of its barriers
                # than others.
                barrier_sync_key_prefix=f"{self._name}.{self._failures}",
            )
            handler = ocp.CompositeCheckpointHandler(
                train=ocp.StandardCheckpointHandler(multiprocessing_options=processes),
                record=ocp.JsonCheckpointHandler(multiprocessing_options=processes),
                composite_options=ocp.CompositeOptions(
                    multiprocessing_options=processes
                ),
            )
            self._orbax = ocp.AsyncCheckpointer(
                handler,
                async_options=ocp.options.AsyncOptions(timeout_secs=SAVE_SECONDS),
                multiprocessing_options=processes,
            )
        return self._orbax

    def save(self, train: TrainState, progress: Progress, identity: Identity) -> None:
        """Starts to save a step in the background; `poll` and `close` report the outcome."""
        self.wait()
        step = int(train.step)
        # Already saved: the run resumed at its last step, or ends right after a save.
        if step == self._saved:
            return
        if self._acts_for_others():
            # Orbax would save a `jax.Array` together with all processes of the run.
            train = jax.device_get(train)
        job = SaveJob(
            step=step,
            size=sum(leaf.nbytes for leaf in jax.tree.leaves(train)),
            best=progress.best_steps(self._settings.kept_best),
        )
        ocp = import_orbax()
        args = ocp.args.Composite(
            train=ocp.args.StandardSave(train),
            record=ocp.args.JsonSave(make_record(step, train, progress, identity)),
        )
        self._job = job
        try:
            if self._group.is_primary:
                self.steps.begin(step)
            # Copies the arrays to the host before it returns, and writes them in the background.
            self._orbax_checkpointer().save(self.steps.unfinished(step), args=args)
        except Exception as error:
            job.error = error
            self.poll()
            return
        job.thread = threading.Thread(target=self._finish, args=(job,))
        job.thread.start()

    def _finish(self, job: SaveJob) -> None:
        """Commits the step once it is written, and deletes old ones; runs in the thread."""
        try:
            # With several processes this waits until all of them have written.
            self._orbax_checkpointer().wait_until_finished()
            if not self._group.is_primary:
                self.steps.note_digests(job.step, self._group.index)
                return
            others = self._group.members[1:]
            self.steps.commit(job.step, others=others, seconds=SAVE_SECONDS)
            keep = steps_to_keep(
                self.steps.complete(),
                newest=self._settings.keep,
                every=self._settings.keep_every,
                best=job.best,
            )
            # Last: until the new step is committed, a run can resume only from the old ones.
            self.steps.keep_only(keep | self._protected)
        # Any exception: Orbax, TensorStore and the system raise many classes. The main thread
        # reports it. Signals and KeyboardInterrupt occur only in the main thread.
        except Exception as error:
            job.error = error
            return
        try:
            self._copy()
        except (ValueError, OSError) as error:
            job.not_copied = f"step {job.step} is saved, but not copied: {error}"

    def poll(self) -> None:
        """Reports the outcome of a save that has finished; training continues either way.

        With several processes it does nothing, because they would have to communicate. They report
        the outcome when the next save starts.
        """
        if self._job is None or self._group.size > 1:
            return
        if self._job.thread is None or not self._job.thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Waits for the pending save and reports its outcome."""
        if self._job is None:
            return
        job = self._job
        self._job = None
        # Once its thread has ended, the fields of `job` can be read without a lock.
        job.join()
        if reason := self._first_reason(job):
            self._give_up(job, reason)
            return
        self._saved = job.step
        # Only process 0 copies.
        self.failure = self._group.from_process_0(lambda: job.not_copied)
        if self.failure:
            self._warn(f"{self.failure} Training continues")

    def leave(self) -> None:
        """Waits for the pending save, at the end of this process.

        One process also reports the outcome. Several do not, because the others may have ended.
        """
        if self._group.size == 1:
            self.wait()
        elif self._job is not None:
            self._job.join()

    def _first_reason(self, job: SaveJob) -> str:
        """Returns why a save failed in any process; empty if it did not fail."""
        reason = ""
        if job.error is not None:
            reason = first_line(job.error, limit=None)
        # Prefer the reason of the process that failed: the others only report a timeout.
        waited = isinstance(job.error, TimeoutError) or "DEADLINE_EXCEEDED" in reason
        failures = self._group.allgather((waited, reason))
        return min((one for one in failures if one[1]), default=(False, ""))[1]

    def _give_up(self, job: SaveJob, reason: str) -> None:
        """Cleans up after a failed save and prints why it failed."""
        # The old checkpointer would raise the same error again on its next use.
        self._orbax = None
        self._failures += 1
        self.failure = self._group.from_process_0(lambda: self._clean_up(job, reason))
        self._warn(f"{self.failure}; training continues")

    def _clean_up(self, job: SaveJob, reason: str) -> str:
        """Deletes what a failed save left; returns the message about the failure."""
        failed = (
            f"the checkpoint of step {job.step} could not be written: it needs "
            f"{job.size:,} bytes"
        )
        try:
            self.steps.give_up()
            free = self.steps.free_bytes()
            older = self.steps.numbers()
        # A disk or a store that is unavailable now may return before the next save.
        except OSError:
            return f"{failed}; {self.steps.place} is unavailable ({_shortened(reason)})"
        space = "" if free is None else f", {free:,} are free in {self.steps.place}"
        newest = (
            f"the newest checkpoint is of step {older[0]}"
            if older
            else "there is no checkpoint yet"
        )
        return f"{failed}{space}; {newest} ({_shortened(reason)})"

    def _warn(self, text: str) -> None:
        if self._group.is_primary:
            warn(text)

    def close(self) -> None:
        """Waits for the pending save; see `CheckpointStore.close`."""
        self.wait()
        if self.failure:
            raise DiskError(self.failure)

    def restore(
        self, abstract: TrainState, identity: Identity, init: Callable[[], TrainState]
    ) -> tuple[TrainState, Progress]:
        """Sets damaged steps aside until one is intact; see `CheckpointStore.restore`."""
        from_process_0 = self._group.from_process_0
        while (number := from_process_0(self._newest_step)) is not None:
            try:
                restored = self._load(number, abstract, identity)
            except _Damaged as error:
                from_process_0(functools.partial(self._set_aside, number, str(error)))
                continue
            # A run that ends without an update need not save this step again.
            self._saved = number
            return restored
        from_process_0(self._require_no_damaged_steps)
        # Import and compile now: there is no time for it between a signal and the final save.
        self._orbax_checkpointer()
        train = init()
        leaf_checksums(train)
        return train, Progress()

    def _newest_step(self) -> int | None:
        """Returns the newest step here or, if it is newer, elsewhere; None if there is none."""
        # Again after each damaged step, of which there may be an intact copy.
        self._fetch()
        for number in self.steps.numbers():
            if not self.steps.drop_if_empty(number):
                return number
        return None

    def _set_aside(self, number: int, reason: str) -> None:
        moved = self.steps.set_aside(number)
        warn(f"step {number} is damaged: {reason}; it is now in {moved}")

    def _require_no_damaged_steps(self) -> None:
        """Raises NoValidCheckpoint if all steps were damaged, rather than start a new run."""
        if damaged := self.steps.damaged():
            raise NoValidCheckpoint(
                f"no checkpoint in {self.steps.place} is intact (see {damaged}), and a new run "
                "would overwrite the old one. Use another --workdir to start anew."
            )

    def load(self, number: int, train: TrainState, identity: Identity) -> TrainState:
        """Loads one step of this run; see `CheckpointStore.load`."""
        try:
            return self._load(number, train, identity)[0]
        except _Damaged as error:
            raise NoValidCheckpoint(f"step {number} is damaged: {error}") from None

    def _load(
        self, number: int, train: TrainState, identity: Identity
    ) -> tuple[TrainState, Progress]:
        def read() -> tuple[dict[str, Any], TrainState]:
            record = self._read_record(number)
            require_same_identity(self._workdir, record["identity"], identity)
            require_same_leaves(self._workdir, record["leaves"], train)
            return record, self._read_arrays(number, train)

        # If one process finds the step damaged, no process may use it.
        record, restored = self._group.run_in_all(read, expected=_Damaged)
        # Check the arrays first: the name of a leaf tells a user more than the name of a file.
        if leaves := changed_leaves(record["leaves"], restored):
            raise _Damaged(list_names("leaves", leaves))
        share = slice(self._group.index, None, self._group.size)
        broken_files = functools.partial(self.steps.broken_files, number, share)
        parts = self._group.allgather_results(broken_files)
        if files := list(itertools.chain.from_iterable(parts)):
            raise _Damaged(list_names("files", files))
        if not self._settings.allow_nan and (
            leaves := nonfinite_leaves(restored.params)
        ):
            found = list_names("in", leaves)
            raise _Damaged(f"it has NaN or Inf (config.allow_nan accepts it) {found}")
        return restored, Progress.from_json(record["course"])

    def _read_record(self, number: int) -> dict[str, Any]:
        ocp = import_orbax()
        args = ocp.args.Composite(record=ocp.args.JsonRestore())
        try:
            record = self._restore(number, args).record
        # Damaged metadata raises many classes, including KeyError and UnicodeDecodeError.
        except Exception:
            files = self.steps.broken_files(number)
            broken = f"; {list_names('files', files)}" if files else ""
            raise _Damaged(f"its record cannot be read{broken}") from None
        if reason := validation_error(record, number):
            raise _Damaged(reason)
        return record

    def _read_arrays(self, number: int, train: TrainState) -> TrainState:
        ocp = import_orbax()
        args = ocp.args.Composite(
            train=ocp.args.StandardRestore(self._restore_target(train))
        )
        try:
            return self._restore(number, args).train
        except Exception as error:
            files = self.steps.broken_files(number)
            # If the files are intact, the cause is memory or a bug; the step must stay in place.
            if not files:
                raise
            raise _Damaged(
                f"it cannot be read; {list_names('files', files)}"
            ) from error

    def _restore(self, number: int, args: Any) -> Any:
        # Not the checkpointer's own `restore`: it then waits for processes that may have failed.
        handler = self._orbax_checkpointer().handler
        return handler.restore(self.steps.path(number), args=args)

    def _restore_target(self, train: TrainState) -> TrainState:
        """Returns the shapes, dtypes and shardings of the arrays for Orbax to restore.

        If one process restores for several, the arrays go to host memory, to be broadcast.
        """
        on_host = self._acts_for_others()
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

        def target(leaf: Any) -> jax.ShapeDtypeStruct:
            if on_host:
                return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
            # Without a sharding Orbax would restore to the devices that the arrays were saved from.
            sharding = leaf.sharding or device
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        return jax.tree.map(target, train)

    def _acts_for_others(self) -> bool:
        return jax.process_count() > self._group.size


def _do_nothing() -> None:
    """Does nothing: the run has no backup."""


def _shortened(reason: str) -> str:
    if len(reason) <= 2 * _REASON_CHARACTERS:
        return reason
    return f"{reason[:_REASON_CHARACTERS]} ... {reason[-_REASON_CHARACTERS:]}"
