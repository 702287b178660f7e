"""The interface of a run's checkpoints, also used by a process that stores none."""

from collections.abc import Callable

from rwkv7_jax.runs.early_stopping import Progress
from rwkv7_jax.runs.resume.run_identity import Identity
from rwkv7_jax.training.train_step import TrainState


class CheckpointStore:
    """Checkpoints of one run, by step.

    The base class itself serves a process that leaves checkpoints to process 0: it stores nothing
    and receives the restored state from there. Only a `Checkpointer` restores and loads.
    """

    def save(self, train: TrainState, progress: Progress, identity: Identity) -> None:
        """Starts to save a step in the background.

        If the save fails, a warning is printed and training continues; `close` raises the error.
        """

    def poll(self) -> None:
        """Reports the outcome of a save that has finished."""

    def leave(self) -> None:
        """Waits for the pending save, at the end of this process."""

    def close(self) -> None:
        """Waits until everything is on disk.

        Raises:
            DiskError: the newest save failed.
        """

    def restore(
        self, abstract: TrainState, identity: Identity, init: Callable[[], TrainState]
    ) -> tuple[TrainState, Progress]:
        """Restores the newest intact step, or creates the initial state if there is no step.

        Args:
            abstract: shapes and dtypes of the state.
            identity: the identity of the run, from `identity_of`.
            init: creates the state of a new run; called only if there is nothing to restore.

        Raises:
            NoValidCheckpoint: all steps, including those set aside earlier, are damaged.
            ValueError: the steps belong to another run.
        """
        raise NotImplementedError

    def load(self, number: int, train: TrainState, identity: Identity) -> TrainState:
        """Loads one step of this run.

        Args:
            number: the step.
            train: a state of the same shapes and dtypes; it may be abstract.
            identity: the identity of the run.

        Raises:
            NoValidCheckpoint: the step is damaged.
        """
        raise NotImplementedError
