"""What follows a step of a run: an evaluation, a checkpoint, the end."""

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
from rwkv7_jax.training.train_step import TrainState

# Prompts, and the text that the model writes after each.
_Samples = list[tuple[str, str]]


def evaluate_and_save(
    run: TrainingRun,
    state: TrainState,
    step: int,
    folder: RunDirectory,
    log: MetricsLogger,
    stop: StopSignals,
) -> bool:
    """Evaluates and saves if that is due after a step; returns whether the run ends there.

    Args:
        run: with the settings that say which steps are evaluated and saved.
        state: after the step.
        step: counted from 1; 0 is before the first.
        folder: takes the checkpoint and the results.
        log: takes the metrics, and knows how the run goes.
        stop: the signals.
    """
    settings = run.settings
    # Not "==": a run that is continued may have made more steps than it is asked for now.
    is_last = step >= settings.steps
    # A run that is continued from this step may have evaluated it already.
    if _evaluation_is_due(run, step, is_last) and log.progress.evaluated != step:
        _evaluate_unless_stopped(run, state, folder, log, stop)
    reason = None
    if log.progress.evaluated == step:
        reason = log.progress.stop_reason(settings.evaluation)
    if reason and not is_last:
        print(f"ends early at step {step}: {reason}")
    ends = bool(is_last or reason or stop.should_stop())
    is_best = step in log.progress.best_steps(settings.kept_best)
    save_due = settings.save_every and step % settings.save_every == 0
    if stop.has_unsaved_updates and (ends or is_best or save_due):
        with log.paused(), jax.profiler.TraceAnnotation("save_checkpoint"):
            local = sharding.local_view(run.mesh, state)
            folder.checkpoints.save(local, log.progress, run.identity)
    if ends:
        folder.checkpoints.close()
        stop.has_unsaved_updates = False
    return ends


def _evaluation_is_due(run: TrainingRun, step: int, is_last: bool) -> bool:
    """Tells whether a step is evaluated: the start, the last, and every few between them."""
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
    """Evaluates, until a signal ends it; the continued run makes up for that."""
    # Several processes first have to agree that they stop, which they do after the evaluation.
    one_process = jax.process_count() == 1
    interruptible = stop.interruptible() if one_process else contextlib.nullcontext()
    with log.paused():
        measured = None
        with contextlib.suppress(Stopped), interruptible:
            measured = _measure(run, state)
        # All of it or nothing: a step that counts as evaluated is not evaluated again.
        if measured is not None:
            _record(int(state.step), *measured, folder, log)


def _measure(run: TrainingRun, state: TrainState) -> tuple[Metrics, _Samples]:
    """Measures the trainable parameters on held-out data and makes sample text."""
    params = run.local_params(state)
    with sharding.use_mesh(run.mode.mesh):
        return run.mode.evaluate(params), list(run.mode.sample_texts(params))


def _record(
    step: int,
    metrics: Metrics,
    samples: _Samples,
    folder: RunDirectory,
    log: MetricsLogger,
) -> None:
    """Writes the results to the run's folder before the first of them is printed."""
    log.log_evaluation(step, metrics)
    for prompt, text in samples:
        folder.note_sample(step, prompt, text)
    line = "  ".join(f"{name} {metric.value:.4f}" for name, metric in metrics.items())
    print(f"step {step}  {line}", flush=True)
    for prompt, text in samples:
        written = shown_on(sys.stdout, f"{prompt}{text}")
        print(f"--- {prompt!r}\n{written}\n---", flush=True)
