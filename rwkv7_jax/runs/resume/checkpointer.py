"""A run's checkpoints: saved in the background, verified whenever they are read.

A step is valid when its record is consistent, every array has the checksum that it had on the
device when it was saved, and every file is the one that was written. A damaged step is set aside,
and the next older one is used.

Where the shards of an array lie over several processes, all of them call the same methods in the
same order: each writes and reads its own shards, the first one alone names, keeps and deletes
steps, and what fails in one fails in all.

Orbax writes and reads the arrays. Its CheckpointManager is not used: it changes files of a step
after the last hook in which a manifest could be written, so a kill at the wrong moment would leave
an intact step that counts as damaged (docs/decisions-checkpoints.md has the experiment).
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
from rwkv7_jax.runs.early_stopping import Progress, RunProgress, read_progress
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
from rwkv7_jax.training.train_step import TrainState

# Seconds that the processes of a save wait for each other. Training goes on meanwhile; one that
# failed tells the others only after that.
SAVE_SECONDS = 600

# An error of Orbax or TensorStore can have pages. The first line begins with what failed and ends
# with why; so much of both is shown.
_REASON_CHARACTERS = 100


class _Damaged(Exception):
    """A step that is not what was saved."""


@dataclasses.dataclass
class SaveJob:
    """A save in the background.

    Attributes:
        step: of the checkpoint.
        size: bytes of its arrays.
        best: steps that retention has to keep because of their evaluation.
        error: why the save failed; None while it has not.
        not_copied: why the copy of a saved step failed; empty while it has not.
        thread: finishes the save; None if it failed before there was a thread.
    """

    step: int
    size: int
    best: tuple[int, ...]
    error: Exception | None = None
    not_copied: str = ""
    thread: threading.Thread | None = None


class Checkpointer(CheckpointStore):
    """The checkpointer of one run.

    Attributes:
        steps: its checkpoints.
        failure: why the newest save, or its copy, failed; empty if it did not.
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
        """Deletes what an ended process left half written.

        Args:
            steps: where the checkpoints lie.
            workdir: folder of the run.
            settings: of the run.
            protected: steps that retention leaves alone, because other settings made them.
            fetch: gets steps that lie elsewhere; called before the newest one is restored.
            copy: copies what the run has to its backup; called after every save.
            group: the processes that save and restore together; None for this one alone.

        Raises:
            OSError: the place of the steps cannot be written.
        """
        self.steps = steps
        self.failure = ""
        self._workdir = workdir
        self._settings = settings
        self._protected = frozenset(protected)
        self._fetch = fetch or _do_nothing
        self._copy = copy or _do_nothing
        self._newest: int | None = None
        self._job: SaveJob | None = None
        self._orbax: Any = None
        self._failures = 0
        self._group = group or ProcessGroup()
        # The same in all processes, which may have folders of different names.
        self._name = self._group.from_process_0(lambda: workdir.name)
        if self._group.is_primary:
            steps.clean()

    def _orbax_checkpointer(self) -> Any:
        """Returns Orbax's checkpointer, made when it is first needed and after a failure."""
        if self._orbax is None:
            ocp = import_orbax()
            processes = ocp.options.MultiprocessingOptions(
                primary_host=0,
                # Always named: otherwise Orbax waits at programs of all devices, without a bound.
                active_processes=set(self._group.members),
                # Of a failed save some processes have passed more barriers than others.
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
        """Starts to save a step in the background; `poll` and `close` tell how it ended."""
        self.wait()
        step = int(train.step)
        # A run that is resumed at its last step, or ends right after a save, would write it again.
        if step == self._newest:
            return
        if self._acts_for_others():
            # Orbax saves a `jax.Array` of such a run together with all processes.
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
            # Copies the arrays to the host before it returns; writes them afterwards.
            self._orbax_checkpointer().save(self.steps.unfinished(step), args=args)
        except Exception as error:
            job.error = error
            self.poll()
            return
        job.thread = threading.Thread(target=self._finish, args=(job,))
        job.thread.start()

    def _finish(self, job: SaveJob) -> None:
        """Lets the step count once it is complete, and deletes old ones; the thread."""
        try:
            # Of several processes, until all have written.
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
            # Only now: until the new step is in place, a run could only resume from the old ones.
            self.steps.keep_only(keep | self._protected)
        # Any failure to write, in whatever class of Orbax, TensorStore or the system. The main
        # thread reports it; only there can signals and KeyboardInterrupt occur.
        except Exception as error:
            job.error = error
            return
        try:
            self._copy()
        except (ValueError, OSError) as error:
            job.not_copied = f"step {job.step} is saved, but not copied: {error}"

    def poll(self) -> None:
        """Reports a save that has ended in the meantime; training goes on either way.

        Several processes report it when the next one begins: they would have to ask each other.
        """
        if self._job is None or self._group.size > 1:
            return
        if self._job.thread is None or not self._job.thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Waits for the save that is under way, and reports how it ended."""
        if self._job is None:
            return
        job = self._job
        self._job = None
        if job.thread is not None:
            # After the thread has ended, its fields of `job` are read without a lock.
            job.thread.join()
        if reason := self._first_reason(job):
            self._give_up(job, reason)
            return
        self._newest = job.step
        # Only the first process copies.
        self.failure = self._group.from_process_0(lambda: job.not_copied)
        if self.failure:
            self._warn(f"{self.failure} Training goes on")

    def leave(self) -> None:
        """Waits for the save that is under way, at the end of this process.

        Reports how it ended, unless the other processes would have to be asked: they may be gone.
        """
        if self._group.size == 1:
            self.wait()
        elif self._job is not None and self._job.thread is not None:
            self._job.thread.join()

    def _first_reason(self, job: SaveJob) -> str:
        """Returns why a save failed, in whichever process; empty if it did not."""
        reason = ""
        if job.error is not None:
            reason = first_line(job.error, limit=None)
        # The others only know that they waited in vain for the one that failed.
        waited = isinstance(job.error, TimeoutError) or "DEADLINE_EXCEEDED" in reason
        failures = self._group.allgather((waited, reason))
        return min((one for one in failures if one[1]), default=(False, ""))[1]

    def _give_up(self, job: SaveJob, reason: str) -> None:
        """Cleans up after a failed save and prints why it failed."""
        # The checkpointer would raise the same error once more at its next use.
        self._orbax = None
        self._failures += 1
        self.failure = self._group.from_process_0(lambda: self._clean_up(job, reason))
        self._warn(f"{self.failure}; training goes on")

    def _clean_up(self, job: SaveJob, reason: str) -> str:
        """Deletes what a failed save left; returns what happened."""
        failed = (
            f"the checkpoint of step {job.step} could not be written: it needs "
            f"{job.size:,} bytes"
        )
        try:
            self.steps.give_up()
            free = self.steps.free_bytes()
            older = self.steps.numbers()
        # A disk or a store that is away now may come back before the next save.
        except OSError:
            return f"{failed}; {self.steps.place} is away ({_shortened(reason)})"
        room = "" if free is None else f", {free:,} are free in {self.steps.place}"
        newest = (
            f"the newest one is of step {older[0]}" if older else "there is none yet"
        )
        return f"{failed}{room}; {newest} ({_shortened(reason)})"

    def _warn(self, text: str) -> None:
        if self._group.is_primary:
            warn(text)

    def close(self) -> None:
        """Waits until everything is on disk; see `CheckpointStore.close`."""
        self.wait()
        if self.failure:
            raise DiskError(self.failure)

    def restore(
        self, abstract: TrainState, identity: Identity, init: Callable[[], TrainState]
    ) -> tuple[TrainState, Progress]:
        """Moves damaged steps away until one is intact; see `CheckpointStore.restore`."""
        from_process_0 = self._group.from_process_0
        from_process_0(self._fetch)
        for number in from_process_0(self.steps.numbers):
            if from_process_0(functools.partial(self.steps.drop_if_empty, number)):
                continue
            try:
                restored = self._load(number, abstract, identity)
            except _Damaged as error:
                from_process_0(functools.partial(self._set_aside, number, str(error)))
                continue
            # So that a run which ends without an update does not save this step anew.
            self._newest = number
            return restored
        from_process_0(self._refuse_to_begin_anew)
        # Import and compile now: between a signal and the end of the process there is no time.
        self._orbax_checkpointer()
        train = init()
        leaf_checksums(train)
        return train, RunProgress()

    def _set_aside(self, number: int, reason: str) -> None:
        moved = self.steps.set_aside(number)
        warn(f"step {number} is damaged: {reason}; it lies in {moved} now")

    def _refuse_to_begin_anew(self) -> None:
        """Raises NoValidCheckpoint where there have been steps, all of them damaged."""
        if damaged := self.steps.damaged():
            raise NoValidCheckpoint(
                f"no checkpoint in {self.steps.place} is intact (see {damaged}), and a new run "
                "would write over an old one. Take another --workdir to begin anew."
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

        # A step that one process finds damaged must not be used by another.
        record, restored = self._group.run_in_all(read, expected=_Damaged)
        # The arrays first: the name of a leaf tells a user more than the name of a file.
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
            raise _Damaged(f"NaN or Inf in it (config.allow_nan takes it); {found}")
        return restored, read_progress(record["course"])

    def _read_record(self, number: int) -> dict[str, Any]:
        ocp = import_orbax()
        args = ocp.args.Composite(record=ocp.args.JsonRestore())
        try:
            record = self._restore(number, args).record
        # Damaged metadata fails in many classes, down to KeyError and UnicodeDecodeError.
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
            # With intact files it is no damage, but memory or a bug, and must not move the step.
            if not files:
                raise
            raise _Damaged(
                f"it cannot be read; {list_names('files', files)}"
            ) from error

    def _restore(self, number: int, args: Any) -> Any:
        # Not the checkpointer's own, which waits afterwards for processes that may have failed.
        handler = self._orbax_checkpointer().handler
        return handler.restore(self.steps.path(number), args=args)

    def _restore_target(self, train: TrainState) -> TrainState:
        """Describes the arrays that Orbax restores, and the devices for each.

        Where one of several processes restores for all, they come into host memory, from where
        they are broadcast.
        """
        on_host = self._acts_for_others()
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

        def target(leaf: Any) -> jax.ShapeDtypeStruct:
            if on_host:
                return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
            # Without a sharding Orbax would restore to the devices of the run that saved.
            sharding = leaf.sharding or device
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        return jax.tree.map(target, train)

    def _acts_for_others(self) -> bool:
        return jax.process_count() > self._group.size


def _do_nothing() -> None:
    """Stands for copies of a run that has no backup."""


def _shortened(reason: str) -> str:
    if len(reason) <= 2 * _REASON_CHARACTERS:
        return reason
    return f"{reason[:_REASON_CHARACTERS]} ... {reason[-_REASON_CHARACTERS:]}"
