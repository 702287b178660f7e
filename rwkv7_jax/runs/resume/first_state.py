"""The train state that a run starts with: restored from the newest checkpoint, or new."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from rwkv7_jax import sharding
from rwkv7_jax.runs.early_stopping import Progress
from rwkv7_jax.runs.modes.base import TrainingMode
from rwkv7_jax.runs.process_group import group_of_run
from rwkv7_jax.runs.resume.checksums import tree_checksum
from rwkv7_jax.runs.resume.run_identity import Identity
from rwkv7_jax.runs.run_directory import RunDirectory
from rwkv7_jax.runs.same_in_all import require_same
from rwkv7_jax.runs.waiting import report_wait
from rwkv7_jax.training.train_step import TrainState


@report_wait("the newest checkpoint, or a first state")
def restore_or_init(
    mode: TrainingMode,
    tx: optax.GradientTransformation,
    folder: RunDirectory,
    identity: Identity,
    mesh: Mesh | None,
) -> tuple[TrainState, Progress]:
    """Restores the newest checkpoint, or creates the initial state if there is none.

    In both cases only one copy of the trainable parameters and their moments is alive, and sharded
    arrays are never materialised whole.

    Args:
        mode: creates the parameters of a new run.
        tx: the optimizer.
        folder: the run directory.
        identity: what the run and its checkpoints must have in common.
        mesh: the devices of the run, on which the state is placed.

    Raises:
        NoValidCheckpoint: all checkpoints, including those set aside earlier, are damaged.
        ValueError: the checkpoints belong to another run, or arrays are sharded over processes
            that do not all see the run directory and there is no backup, or that read different
            checkpoints.
        EndedElsewhere: another process raised one of these.
    """

    def create(params: Any) -> TrainState:
        return mode.train_state(params, tx)

    own = sharding.local_mesh(mesh)
    abstract = sharding.abstract_shards(
        own, jax.eval_shape(create, mode.abstract_params)
    )

    def init() -> TrainState:
        with sharding.use_mesh(mode.mesh):
            params = sharding.place(own, mode.init_params())
        shards = None if own is None else sharding.shardings(own, abstract)
        # `create` copies the parameters; donation reuses their buffers for the copy.
        state = jax.jit(create, donate_argnums=0, out_shardings=shards)(params)
        # A restored state is committed to a device. A new one must be too, or the two would run
        # differently compiled programs and the results would not be bit-exact.
        return sharding.place(own, state)

    state, progress = _restore_in_all(folder, abstract, identity, init, mesh)
    mode.release_initial()
    state = sharding.place(mesh, state)
    step = int(state.step)
    # No checkpoint has step 0, so at step 0 the run is new.
    before = progress if step else mode.new_progress()
    progress = before.for_evaluation(mode.settings.evaluation, step)
    if progress.since != before.since:
        print(
            f"resume    the data or metric of evaluations changes at step {step}: the search for "
            "the best step starts anew, and the result is not compared with the start"
        )
    return state, progress


def _restore_in_all(
    folder: RunDirectory,
    abstract: TrainState,
    identity: Identity,
    init: Callable[[], TrainState],
    mesh: Mesh | None,
) -> tuple[TrainState, Progress]:
    """Restores or creates the state in every process of the run.

    If arrays are sharded over several processes, each process reads its own shards. Otherwise
    process 0 reads the state and broadcasts it to the others, which need not see the directory.
    Every process creates a new state itself; it is broadcast only if their checksums differ.
    """
    group = group_of_run()
    if sharding.is_shared(mesh):
        folder.share_checkpoints()

        def init_together() -> TrainState:
            state = init()
            # Another copy of a checkpoint shows in the leaves that are not sharded.
            require_same(group, {"the digest of the first state": tree_checksum(state)})
            return state

        return folder.restore(abstract, identity, init_together)
    if group.size == 1:
        return folder.restore(abstract, identity, init)
    is_new = False

    def make() -> TrainState:
        nonlocal is_new
        is_new = True
        return init()

    def restore_here() -> tuple[TrainState, Progress] | None:
        return folder.restore(abstract, identity, make) if group.is_primary else None

    # `broadcast_arrays` uses only the shapes and dtypes of the other processes' arrays.
    state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract)
    progress = Progress()
    if restored := group.run_in_all(restore_here):
        state, progress = restored
    course = group.from_process_0(progress.to_json)
    if group.from_process_0(lambda: is_new):
        state = group.run_in_all(lambda: state if group.is_primary else init())
        if len(set(group.allgather(tree_checksum(state)))) == 1:
            return state, Progress.from_json(course)
    return group.broadcast_arrays(state), Progress.from_json(course)
