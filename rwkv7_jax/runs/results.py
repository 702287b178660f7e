"""The result of a run: which parameters it consists of, and how it is saved."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rwkv7_jax.evaluation.metric import logged_metric
from rwkv7_jax.runs.early_stopping import Progress, StateProgress
from rwkv7_jax.runs.exit_codes import (
    DiskError,
    NotFinite,
    NoValidCheckpoint,
    warn,
)
from rwkv7_jax.runs.modes.base import TrainingMode
from rwkv7_jax.runs.modes.stack import if_named
from rwkv7_jax.runs.monitoring.run_plots import draw, warn_if_not_drawn
from rwkv7_jax.runs.process import StopSignals
from rwkv7_jax.runs.process_group import group_of_mesh
from rwkv7_jax.runs.resume.run_identity import Identity
from rwkv7_jax.runs.run_directory import RunDirectory
from rwkv7_jax.runs.settings import EvaluationSettings
from rwkv7_jax.sharding import to_host
from rwkv7_jax.training.stacked_step import params_of, stack_params
from rwkv7_jax.training.train_step import TrainState


def _result_step(
    progress: StateProgress, evaluation: EvaluationSettings, last: int
) -> int:
    """Returns the step whose parameters are the result: with patience the best, else the last."""
    if evaluation.patience and progress.best:
        return progress.best[0][1]
    # A state of a stack may have reached `enough` before the run ended for the others.
    return progress.evaluated if progress.stop_reason(evaluation) else last


def _params_at(
    step: int,
    mode: TrainingMode,
    state: TrainState,
    folder: RunDirectory,
    identity: Identity,
) -> Any:
    """Returns the parameters of a step, or the last ones if its checkpoint is damaged."""
    last = int(state.step)
    if step == last:
        return state.params
    # Step 0 has no checkpoint, so initialise the parameters again.
    if step <= 0:
        return mode.init_params()
    try:
        return folder.checkpoints.load(step, state, identity).params
    except NoValidCheckpoint as error:
        # After a long run the last parameters are better than none.
        folder.warn(f"{error}; the result is that of the last step, {last}")
        return state.params


def final_params(
    mode: TrainingMode,
    state: TrainState,
    progress: Progress,
    folder: RunDirectory,
    identity: Identity,
) -> Any:
    """Returns the result of a run: with patience the best parameters, else the last ones."""
    evaluation = mode.settings.evaluation
    last = int(state.step)
    found: dict[int, Any] = {}
    results = []
    for index, (name, one) in enumerate(progress.states.items()):
        step = _result_step(one, evaluation, last)
        if step != last:
            of_state = if_named(" for {}", name)
            print(f"step {step} measured best{of_state}: its parameters are the result")
        if step not in found:
            found[step] = _params_at(step, mode, state, folder, identity)
        if not name:
            return found[step]
        results.append(params_of(found[step], index))
    return stack_params(results)


def check_stopped(
    state: TrainState, folder: RunDirectory, stop: StopSignals, *, what: str = ""
) -> None:
    """Reports skipped updates, and ends a run that a signal stopped.

    Args:
        state: the last train state.
        folder: of the run.
        stop: the stop request.
        what: what the steps belong to, for the message.

    Raises:
        Stopped: a signal stopped the run.
    """
    step = int(state.step)
    # The sum over all states of a stack.
    skipped = int(state.skipped.sum())
    if skipped:
        print(f"warning: {skipped} updates were skipped: non-finite loss or gradient")
    if stop.requested:
        saved = f"step {step}{what} is saved" if step else "there was nothing to save"
        folder.note_event(step, "stopped", f"by {stop.requested}")
        raise stop.stopped(f"; {saved}. The same command resumes the run")


# Rows of the metrics by step.
_Rows = Mapping[int, Mapping[str, Any]]


def _harm(rows: _Rows, progress: StateProgress, step: int, prefix: str) -> str | None:
    """Describes how much worse the result is than no training; None if not worse or unknown.

    It is unknown if different evaluations measured the start and the result.
    """
    if progress.since:
        return None
    name = f"{prefix}{progress.measure}"
    base = rows.get(0, {}).get(name)
    result = rows.get(step, {}).get(name)
    if not isinstance(base, int | float) or not isinstance(result, int | float):
        return None
    if math.isnan(base):
        return None
    higher_is_better = logged_metric(name, base).higher_is_better
    # Comparisons with NaN are false: a result that is NaN is worse.
    is_as_good = result >= base if higher_is_better else result <= base
    return None if is_as_good else f"{name} {result:.4g}, {base:.4g} before tuning"


def _decide_to_save(
    mode: TrainingMode, rows: _Rows, progress: StateProgress, step: int, name: str
) -> bool:
    """Decides whether to save a tuned state, and reports if it is worse than before tuning.

    A worse state is not saved if the run searched for its learning rate. It is saved if the user
    set the rate, because the user asked for it.
    """
    if not mode.tunes_state:
        return True
    if mode.settings.finds_rate and mode.found_rate is None:
        print(f"no state is saved{if_named(' for {}', name)}: no rate was found for it")
        return False
    harm = _harm(rows, progress, step, if_named("{}/", name))
    if harm is None:
        return True
    text = f"the tuned state is worse on held-out data than {mode.settings.untuned}: {harm}"
    if mode.settings.finds_rate:
        print(f"{text}. It is not saved")
        return False
    warn(
        f"{text}; try another `config.optimizer.learning_rate`, or leave it to the search"
    )
    return True


def save_result(
    mode: TrainingMode,
    state: TrainState,
    progress: Progress,
    folder: RunDirectory,
    identity: Identity,
) -> None:
    """Saves the result of a run that has ended, and plots it.

    Raises:
        DiskError: the result cannot be written.
        NotFinite: a state of a stack was given up; the other states are saved.
    """
    last = int(state.step)
    params = final_params(mode, state, progress, folder, identity)
    # Process 0 decides, because it has the log.
    without, given_up, kept = group_of_mesh(mode.mesh).from_process_0(
        lambda: _left_out(mode, progress, folder, last)
    )
    if kept:
        _write_result(mode, params, folder, without)
    files = mode.state_files(folder.path)
    for name in without:
        if files[name].exists():
            print(f"{files[name]} was saved when this run ended earlier")
    folder.note_event(last, "finished", "" if kept else "no result is worth saving")
    if given_up:
        raise NotFinite(
            f"no state was saved for {', '.join(given_up)}: too many consecutive updates were "
            "non-finite; the other states are saved."
        )


def _left_out(
    mode: TrainingMode, progress: Progress, folder: RunDirectory, last: int
) -> tuple[list[str], list[str], bool]:
    """Returns the states not to save, those given up, and whether anything is saved."""
    evaluation = mode.settings.evaluation
    given_up = progress.given_up(mode.settings.stop_after_bad)
    steps = {}
    for name, one in progress.states.items():
        steps[name] = _result_step(one, evaluation, last)
    # Once for all states: the log is long, and each of its rows holds the metrics of all.
    rows = {row["step"]: row for row in folder.rows({0, *steps.values()})}
    without = list(given_up)
    for name, one in progress.states.items():
        member = mode.member(name)
        if name not in given_up and not _decide_to_save(
            member, rows, one, steps[name], name
        ):
            without.append(name)
    return without, given_up, len(without) < len(progress.states)


def _write_result(
    mode: TrainingMode, params: Any, folder: RunDirectory, without: Sequence[str]
) -> None:
    if mode.tunes_state:
        # Processes that share the heads hold only their own part of it.
        params = to_host(params)
    # The folder may have been deleted during the run.
    folder.path.mkdir(parents=True, exist_ok=True)

    def save() -> str:
        try:
            return str(mode.save(folder.path, params, without=without))
        except OSError as error:
            raise DiskError(f"the result cannot be written: {error}.") from None

    result = group_of_mesh(mode.mesh).run_in_all(save)
    print(f"saved {result}")
    with warn_if_not_drawn("the state", folder.warn):
        draw(folder, mode, params)
