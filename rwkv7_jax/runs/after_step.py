"""What follows a step of a run: an evaluation, a checkpoint, or the end."""

import contextlib
import sys

import jax

from rwkv7_jax import sharding
from rwkv7_jax.evaluation.metric import Metrics
from rwkv7_jax.runs.exit_codes import Stopped
from rwkv7_jax.runs.monitoring.metrics_logger import MetricsLogger
from rwkv7_jax.runs.process import StopSignals, shown_on
from rwkv7_jax.runs.run_directory import RunDirectory
from rwkv7_jax.runs.training_run import TrainingRun
from rwkv7_jax.runs.waiting import report_wait
from rwkv7_jax.training.train_step import TrainState

# Pairs of a prompt and the text that the model generates after it.
_Samples = list[tuple[str, str]]


def evaluate_and_save(
    run: TrainingRun,
    state: TrainState,
    step: int,
    folder: RunDirectory,
    log: MetricsLogger,
    stop: StopSignals,
) -> bool:
    """Evaluates and saves if that is due after a step; returns whether the run ends.

    Args:
        run: the run. Its settings say which steps to evaluate and save.
        state: the train state after the step.
        step: the number of steps so far; 0 before the first.
        folder: receives the checkpoint and the results.
        log: receives the metrics, and holds the progress.
        stop: the stop request.

    Raises:
        InUse: the run directory was deleted, and another process works in a new one.
    """
    settings = run.settings
    # Not "==": a resumed run may already have taken more steps than its settings now ask for.
    is_last = step >= settings.steps
    # A run that resumes at this step may already have evaluated it.
    if _evaluation_is_due(run, step, is_last) and log.progress.evaluated != step:
        _evaluate_unless_stopped(run, state, folder, log, stop)
    reason = None
    if log.progress.evaluated == step:
        reason = log.progress.stop_reason(settings.evaluation)
    if reason and not is_last:
        print(f"stops early at step {step}: {reason}")
    ends = bool(is_last or reason or stop.should_stop())
    is_best = step in log.progress.best_steps(settings.kept_best)
    save_due = settings.save_every and step % settings.save_every == 0
    if stop.has_unsaved_updates and (ends or is_best or save_due):
        folder.require_lock()
        with log.paused(), jax.profiler.TraceAnnotation("save_checkpoint"):
            local = sharding.local_view(run.mesh, state)
            folder.checkpoints.save(local, log.progress, run.identity)
    if ends:
        folder.checkpoints.close()
        stop.has_unsaved_updates = False
    return ends


def _evaluation_is_due(run: TrainingRun, step: int, is_last: bool) -> bool:
    """Returns whether to evaluate a step: the start, the last, or one that `every` divides."""
    if is_last or (step == 0 and run.mode.measures_start):
        return True
    every = run.settings.evaluation.every
    return bool(every) and step % every == 0


def _evaluate_unless_stopped(
    run: TrainingRun,
    state: TrainState,
    folder: RunDirectory,
    log: MetricsLogger,
    stop: StopSignals,
) -> None:
    """Evaluates unless a signal interrupts it; the resumed run then evaluates instead."""
    # Several processes must agree to stop, and they do so only after the evaluation.
    one_process = jax.process_count() == 1
    interruptible = stop.interruptible() if one_process else contextlib.nullcontext()
    with log.paused():
        measured = None
        with contextlib.suppress(Stopped), interruptible:
            measured = _measure(run, state)
        # All or nothing: a step recorded as evaluated is not evaluated again.
        if measured is not None:
            _record(int(state.step), *measured, folder, log)


def _measure(run: TrainingRun, state: TrainState) -> tuple[Metrics, _Samples]:
    """Measures the trainable parameters on held-out data and generates sample text."""
    params = run.local_params(state)
    with report_wait("an evaluation"), sharding.use_mesh(run.mode.mesh):
        return run.mode.evaluate(params), list(run.mode.sample_texts(params))


def _record(
    step: int,
    metrics: Metrics,
    samples: _Samples,
    folder: RunDirectory,
    log: MetricsLogger,
) -> None:
    """Writes all results to the run directory, then prints them."""
    log.log_evaluation(step, metrics)
    for prompt, text in samples:
        folder.note_sample(step, prompt, text)
    line = "  ".join(f"{name} {metric.value:.4f}" for name, metric in metrics.items())
    print(f"step {step}  {line}", flush=True)
    for prompt, text in samples:
        written = shown_on(sys.stdout, f"{prompt}{text}")
        print(f"--- {prompt!r}\n{written}\n---", flush=True)
