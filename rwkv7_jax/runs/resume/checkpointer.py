"""A run's checkpoints: written in the background, checked whenever they are read.

A step is trusted when its record says so itself, every array has the fingerprint that it had on the
device when it was saved, and every file is the one that was written. One that is not lies under
"bad" from then on, and the next older one counts.
"""

import logging
import os
import shutil
import threading
from pathlib import Path

import jax

from rwkv7_jax.runs.early_stopping import RunProgress
from rwkv7_jax.runs.exit_codes import DiskError, NoValidCheckpoint, warn
from rwkv7_jax.runs.resume import step_directories as step_folders
from rwkv7_jax.runs.resume.checkpoint_record import (
    Identity,
    listed,
    make_record,
    not_finite,
    refuse_other_leaves,
    validation_error,
)
from rwkv7_jax.runs.resume.checksums import changed_leaves, fingerprints
from rwkv7_jax.runs.resume.run_identity import require_same_run
from rwkv7_jax.runs.settings import Settings
from rwkv7_jax.training.train_step import TrainState


class _Damaged(Exception):
    """A step is not what was saved."""


def _orbax():
    """The library, imported when it is needed (it takes seconds), without its chatter."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    import orbax.checkpoint as ocp

    return ocp


def _held(train: TrainState) -> TrainState:
    """The arrays as orbax takes them from the first of several processes: in its own memory."""
    return train if jax.process_count() == 1 else jax.device_get(train)


class Checkpoints:
    """The steps under one folder.

    Attributes:
        failure: why the newest save failed; empty if it did not.
    """

    def __init__(self, folder: Path, settings: Settings):
        """The folder is there, and what an ended process left half written is gone.

        Raises:
            OSError: it cannot be written.
        """
        self.folder, self._settings, self.failure = folder, settings, ""
        folder.mkdir(parents=True, exist_ok=True)
        saving = folder / step_folders.SAVING
        if saving.exists() and any(saving.iterdir()):
            warn(f"{saving} held a checkpoint that was never finished; it is removed")
        shutil.rmtree(saving, ignore_errors=True)
        for name in step_folders.unknown_entries(folder):
            warn(f"{folder / name} is no checkpoint; it is ignored")
        self._newest, self._thread, self._error = -1, None, None
        self._orbax = None

    def _checkpointer(self):
        if self._orbax is None:
            ocp = _orbax()
            alone = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0})
            handler = ocp.CompositeCheckpointHandler(
                train=ocp.StandardCheckpointHandler(multiprocessing_options=alone),
                record=ocp.JsonCheckpointHandler(multiprocessing_options=alone),
                composite_options=ocp.CompositeOptions(multiprocessing_options=alone),
            )
            self._orbax = ocp.AsyncCheckpointer(handler, multiprocessing_options=alone)
        return self._orbax

    def save(self, train: TrainState, course: RunProgress, identity: Identity) -> None:
        """`train` is being written in the background; see `poll` for how that ended."""
        step, train = int(train.step), _held(train)
        self.wait()
        if step == self._newest:
            return
        ocp, place = _orbax(), self.folder / step_folders.SAVING / str(step)
        args = ocp.args.Composite(
            train=ocp.args.StandardSave(train),
            record=ocp.args.JsonSave(make_record(step, train, course, identity)),
        )
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(train))
        best = course.best_steps(self._settings.kept_best)
        try:
            place.parent.mkdir(exist_ok=True)
            self._checkpointer().save(place, args=args)
        except Exception as error:
            self._thread, self._error = None, error
            self._give_up(step, size)
            return
        self._thread = threading.Thread(target=self._finish, args=(place, step, best))
        self._thread.step, self._thread.size = step, size
        self._thread.start()

    def _finish(self, place: Path, step: int, best: tuple[int, ...]) -> None:
        """The thread: the step gets its number when it is whole and sealed."""
        try:
            self._checkpointer().wait_until_finished()
            step_folders.write_manifest(place)
            os.rename(place, self.folder / str(step))
            numbers = step_folders.step_numbers(self.folder)
            choices = self._settings
            stay = step_folders.steps_to_keep(
                numbers, newest=choices.keep, every=choices.keep_every, best=best
            )
            for number in set(numbers) - stay:
                step_folders.discard(self.folder, number)
        except BaseException as error:
            self._error = error

    def poll(self) -> None:
        """A save that has ended in the meantime is accounted for; training goes on either way."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """No save is under way."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        thread.join()
        if self._error is None:
            self._newest, self.failure = thread.step, ""
        else:
            self._give_up(thread.step, thread.size)

    def _give_up(self, step: int, size: int) -> None:
        error, self._error, self._orbax = self._error, None, None
        step_folders.discard_saving(self.folder)
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        free = shutil.disk_usage(self.folder).free
        older = step_folders.step_numbers(self.folder)
        newest = f"the newest one is of step {older[0]}" if older else "there is none yet"
        self.failure = (
            f"the checkpoint of step {step} could not be written: it needs {size:,} bytes, "
            f"{free:,} are free in {self.folder}; {newest} ({reason})"
        )
        warn(f"{self.failure}; training goes on")

    def close(self) -> None:
        """All that was saved is on disk.

        Raises:
            DiskError: the newest save failed.
        """
        self.wait()
        if self.failure:
            raise DiskError(self.failure)

    def restore(self, train: TrainState, identity: Identity) -> tuple[TrainState, RunProgress]:
        """The newest step that is whole, or `train` itself where there has never been one.

        Args:
            train: as a fresh run has it.
            identity: of the run, from `identity_of`.

        Raises:
            NoValidCheckpoint: there are steps, or have been, and none is whole.
            ValueError: the steps are of another run.
        """
        numbers = step_folders.step_numbers(self.folder)
        for number in numbers:
            place = self.folder / str(number)
            if not any(place.iterdir()):
                place.rmdir()
                warn(f"{place} was an empty folder; it is removed")
                continue
            try:
                found = self._load(number, train, identity)
            except _Damaged as error:
                aside = step_folders.quarantine(self.folder, number)
                warn(f"step {number} is damaged: {error}; it lies in {aside} now")
                continue
            self._newest = number
            return found
        bad = self.folder / step_folders.BAD
        if bad.is_dir() and any(bad.iterdir()):
            raise NoValidCheckpoint(
                f"no checkpoint in {self.folder} is whole (see {bad}), and a new run would write "
                "over an old one. Take another --workdir to begin anew."
            )
        # Between a signal and the end there is no time for imports and compilations.
        self._checkpointer()
        fingerprints(train)
        return train, RunProgress()

    def load(self, number: int, train: TrainState, identity: Identity) -> TrainState:
        """The step of this number, which a run with such a state has saved.

        Raises:
            NoValidCheckpoint: it is damaged.
        """
        try:
            return self._load(number, train, identity)[0]
        except _Damaged as error:
            raise NoValidCheckpoint(f"step {number} is damaged: {error}") from None

    def _load(self, number: int, train: TrainState, identity: Identity):
        place, ocp = self.folder / str(number), _orbax()
        record = self._record(number)
        workdir = self.folder.parent
        for group, fields in identity.items():
            require_same_run(workdir, record["identity"].get(group, {}), fields)
        refuse_other_leaves(workdir, record["leaves"], train)
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, _held(train))
        args = ocp.args.Composite(train=ocp.args.StandardRestore(like))
        try:
            found = self._checkpointer().restore(place, args=args).train
        except Exception as error:
            broken = step_folders.verify_manifest(place)
            if not broken:
                raise
            raise _Damaged(f"it cannot be read; {listed('files', broken)}") from error
        if names := changed_leaves(record["leaves"], found):
            raise _Damaged(listed("leaves", names))
        if names := step_folders.verify_manifest(place):
            raise _Damaged(listed("files", names))
        if not self._settings.allow_nan and (names := not_finite(found.params)):
            raise _Damaged(f"NaN or Inf in it (config.allow_nan takes it); {listed('in', names)}")
        return found, RunProgress.from_json(record["course"])

    def _record(self, number: int) -> dict:
        ocp = _orbax()
        args = ocp.args.Composite(record=ocp.args.JsonRestore())
        try:
            record = self._checkpointer().restore(self.folder / str(number), args=args).record
        except Exception:
            broken = step_folders.verify_manifest(self.folder / str(number))
            also = f"; {listed('files', broken)}" if broken else ""
            raise _Damaged(f"its record cannot be read{also}") from None
        if reason := validation_error(record, number):
            raise _Damaged(reason)
        return record
