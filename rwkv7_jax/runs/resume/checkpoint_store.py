"""The interface of a run's checkpoints, which is also that of a process that keeps none."""

from collections.abc import Callable

from rwkv7_jax.runs.early_stopping import Progress
from rwkv7_jax.runs.resume.run_identity import Identity
from rwkv7_jax.training.train_step import TrainState


class CheckpointStore:
    """Checkpoints of one run, by step; here those of a process that leaves them to process 0.

    Such a process gets the restored state from process 0, and makes no result: only a
    `Checkpointer` restores and loads.
    """

    def save(self, train: TrainState, progress: Progress, identity: Identity) -> None:
        """Starts to save a step in the background.

        A failure is a warning, and an error of `close`: training goes on.
        """

    def poll(self) -> None:
        """Reports a save that has ended in the meantime."""

    def leave(self) -> None:
        """Waits for the save that is under way, at the end of this process."""

    def close(self) -> None:
        """Waits until everything is on disk.

        Raises:
            DiskError: the newest save failed.
        """

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
        raise NotImplementedError

    def load(self, number: int, train: TrainState, identity: Identity) -> TrainState:
        """Loads one step of this run.

        Args:
            number: the step.
            train: a state of the same shapes and dtypes; it may be abstract.
            identity: of the run.

        Raises:
            NoValidCheckpoint: it is damaged.
        """
        raise NotImplementedError
