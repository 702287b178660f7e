"""The interface of a run's checkpoints, and its implementation where another process keeps them."""

import abc
from collections.abc import Callable

from rwkv7_jax.runs.early_stopping import Progress, RunProgress
from rwkv7_jax.runs.exit_codes import NoValidCheckpoint
from rwkv7_jax.runs.resume.run_identity import Identity
from rwkv7_jax.training.train_step import TrainState


class CheckpointStore(abc.ABC):
    """Checkpoints of one run, by step."""

    @abc.abstractmethod
    def save(self, train: TrainState, progress: Progress, identity: Identity) -> None:
        """Starts to save a step in the background.

        A failure is a warning, and an error of `close`: training goes on.
        """

    @abc.abstractmethod
    def poll(self) -> None:
        """Reports a save that has ended in the meantime."""

    @abc.abstractmethod
    def wait(self) -> None:
        """Waits for the save that is under way, if there is one."""

    @abc.abstractmethod
    def leave(self) -> None:
        """Waits for the save that is under way, at the end of this process."""

    @abc.abstractmethod
    def close(self) -> None:
        """Waits until everything is on disk.

        Raises:
            DiskError: the newest save failed.
        """

    @abc.abstractmethod
    def restore(
        self, abstract: TrainState, identity: Identity, init: Callable[[], TrainState]
    ) -> tuple[TrainState, Progress]:
        """Restores the newest intact step, or makes the first state where there is no step.

        Args:
            abstract: shapes and dtypes of the state.
            identity: of the run, from `identity_of`.
            init: makes the state of a new run; called only where there is nothing to restore.

        Raises:
            NoValidCheckpoint: there are steps, or have been, and all are damaged.
            ValueError: the steps are of another run.
        """

    @abc.abstractmethod
    def load(self, number: int, train: TrainState, identity: Identity) -> TrainState:
        """Loads one step of this run.

        Args:
            number: the step.
            train: a state of the same shapes and dtypes; it may be abstract.
            identity: of the run.

        Raises:
            NoValidCheckpoint: it is damaged, or not here.
        """


class NullCheckpointer(CheckpointStore):
    """The checkpointer of a process that has no run directory. Saving does nothing."""

    def save(self, train: TrainState, progress: Progress, identity: Identity) -> None:
        """Does nothing; process 0 saves."""

    def poll(self) -> None:
        """Does nothing."""

    def wait(self) -> None:
        """Does nothing."""

    def leave(self) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""

    def restore(
        self, abstract: TrainState, identity: Identity, init: Callable[[], TrainState]
    ) -> tuple[TrainState, Progress]:
        """Makes the first state: there is no step here."""
        return init(), RunProgress()

    def load(self, number: int, train: TrainState, identity: Identity) -> TrainState:
        """Refuses: there is no step here.

        Raises:
            NoValidCheckpoint: always.
        """
        raise NoValidCheckpoint(f"step {number} can only be loaded by process 0")
