r"""Trains weights or a start state: config -> data -> model -> step -> log, evaluate, save.

    python train.py --config=configs/state_tuning.py --workdir=runs/poet \
        --config.init=model.pth --config.data.path=poems.jsonl

The same command resumes a stopped or killed run from its newest valid checkpoint. The result has
the same bits as an uninterrupted run.

Exit codes: 0 done, or saved on a signal without --stopped_code; 2 bad settings or data; 3 no valid
checkpoint; 4 stopped on NaN; 5 disk; 6 another process was lost; 7 out of memory; 130 Ctrl-C.
"""

import os
import signal

if __name__ == "__main__":
    # The imports take seconds. Until `main` handles it, Ctrl-C exits without a traceback.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import contextlib
import dataclasses
import functools
from typing import Any

import jax
from absl import flags

from rwkv7_jax import sharding
from rwkv7_jax.local_paths import local_path
from rwkv7_jax.runs import (
    compilation_cache,
    config_flags,
    multihost,
    process,
    rate_record,
)
from rwkv7_jax.runs.after_step import evaluate_and_save
from rwkv7_jax.runs.devices import check_devices
from rwkv7_jax.runs.early_stopping import Progress
from rwkv7_jax.runs.exit_codes import Stopped, check_stopped_code
from rwkv7_jax.runs.modes.rate_stack import SEARCH_FOLDER, RateStackMode
from rwkv7_jax.runs.monitoring.memory_advice import explain_out_of_memory
from rwkv7_jax.runs.monitoring.metrics_logger import MetricsLogger
from rwkv7_jax.runs.monitoring.profiler import ProfileWindow
from rwkv7_jax.runs.monitoring.run_summary import print_summary
from rwkv7_jax.runs.multihost import open_run_directory
from rwkv7_jax.runs.process import StopSignals
from rwkv7_jax.runs.process_group import is_process_0
from rwkv7_jax.runs.results import check_stopped, save_result
from rwkv7_jax.runs.resume.first_state import restore_or_init
from rwkv7_jax.runs.resume.run_identity import flat_settings
from rwkv7_jax.runs.run_directory import RunDirectory
from rwkv7_jax.runs.settings import read_settings
from rwkv7_jax.runs.settings.fields import refuse_remote_target
from rwkv7_jax.runs.settings.readers import (
    refuse_flags_without_effect,
    refuse_settings_of_evaluation,
)
from rwkv7_jax.runs.training_run import TrainingRun, set_up
from rwkv7_jax.runs.waiting import report_first_call, report_wait
from rwkv7_jax.training.train_step import TrainState

_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run, new or to be resumed."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", "", "Address:port of process 0, or auto."
)
_PROCESSES = flags.DEFINE_integer(
    "processes", 1, "Number of processes of the run; not with auto."
)
_PROCESS = flags.DEFINE_integer(
    "process", 0, "Index of this process, from 0; not with auto."
)
_STOPPED_CODE = flags.DEFINE_integer(
    "stopped_code",
    0,
    "Exit code of a run that a signal stopped, such as 75 if a supervisor restarts failures.",
)


def train_steps(
    run: TrainingRun, folder: RunDirectory, stop: StopSignals
) -> tuple[TrainState, Progress]:
    """Trains from the newest checkpoint to the last step, or until a signal."""
    mode = run.mode
    mesh = run.mesh
    settings = run.settings
    devices = mesh.size if mesh else 1
    with stop.interruptible():
        rates, tx = mode.optimizer()
        state, progress = restore_or_init(mode, tx, folder, run.identity, mesh)
        first = int(state.step)
        print_summary(mode, state, progress, identity=run.identity, mesh=mesh)
        batches = mode.batches(first, mesh)
        stop.agree_with(multihost.AnyProcess(mesh))
    update = report_first_call(mode.train_step(tx, mesh), "the step's compilation")
    log = MetricsLogger(
        folder,
        mode,
        progress,
        start_step=first,
        batches=batches,
        rates=rates,
        devices=devices,
    )
    profile = ProfileWindow(settings.profile_window, folder.path / "profile")
    if first > settings.steps:
        folder.warn(
            f"the run already has {first} steps, more than `config.steps` ({settings.steps}); "
            "it trains nothing and keeps its checkpoints"
        )
    # On the host: reading `state.step` would wait for the device.
    step = first
    with (
        explain_out_of_memory(mode, mesh),
        contextlib.closing(batches),
        contextlib.closing(log),
        contextlib.closing(profile),
    ):
        while not evaluate_and_save(run, state, step, folder, log, stop):
            profile.before(step + 1)
            with jax.profiler.StepTraceAnnotation("train", step_num=step + 1):
                with sharding.use_mesh(mode.mesh):
                    batch = batches(step, functools.partial(run.local_params, state))
                step += 1
                log.before_step(step, state.opt_state)
                if batch is None:
                    # An update without a batch would only apply old momentum.
                    state = dataclasses.replace(state, step=state.step + 1)
                    stop.has_unsaved_updates = True
                    log.log_step(step, {"updated": 0.0, **batches.metrics}, None)
                else:
                    state, metrics = update(state, batch.device)
                    # Set after the update: a signal while the first step compiles need not wait.
                    stop.has_unsaved_updates = True
                    log.log_step(step, metrics, batch.host)
            profile.after(step, state)
            folder.checkpoints.poll()

    return sharding.local_view(mesh, state), log.progress


def search_rates(run: TrainingRun, folder: RunDirectory, stop: StopSignals) -> bool:
    """Finds the learning rates of a run; returns whether any of them improves on not tuning."""

    def search(mode: RateStackMode) -> Any:
        place = folder.workdir / SEARCH_FOLDER
        with open_run_directory(place, mode.settings) as inner:
            own = TrainingRun(
                mode=mode,
                identity={**run.identity, "settings": flat_settings(mode.settings)},
                mesh=sharding.stack_mesh(run.mesh, len(mode.names)),
            )
            state, _ = train_steps(own, inner, stop)
            check_stopped(state, inner, stop, what=" of the search for a learning rate")
            return state.params

    return rate_record.find_rates(run.mode, folder, run.identity, search)


def train(folder: RunDirectory, stop: StopSignals) -> None:
    """Trains from the newest checkpoint to the last step, and saves the result."""
    with stop.interruptible():
        run = set_up(folder)
    if folder.settings.finds_rate and not search_rates(run, folder, stop):
        multihost.shutdown()
        reason = f"no learning rate is better than {folder.settings.untuned}"
        folder.note_event(0, "finished", reason)
        return
    state, progress = train_steps(run, folder, stop)
    together = sharding.is_shared(run.mesh)
    if not together:
        # Process 0 alone writes the result, so the other processes can end.
        multihost.shutdown()
    try:
        check_stopped(state, folder, stop)
    except Stopped:
        multihost.shutdown()
        raise
    if together or is_process_0():
        # A process must not exit while others wait for its shards.
        interruptible = contextlib.nullcontext() if together else stop.interruptible()
        with (
            interruptible,
            sharding.use_mesh(run.mode.mesh),
            report_wait("the result to be written"),
        ):
            save_result(run.mode, state, progress, folder, run.identity)
    multihost.shutdown()


def main(arguments: list[str]) -> None:
    """Reads the flags and trains; user errors end with one line and an exit code."""
    with process.program("train.py"):
        if len(arguments) > 1:
            raise ValueError(f"unknown argument {arguments[1]!r}.")
        if not _WORKDIR.value or not _WORKDIR.value.strip():
            raise ValueError("`--workdir` must name the run's folder.")
        refuse_remote_target("--workdir", _WORKDIR.value)
        workdir = local_path(_WORKDIR.value, "`--workdir`")
        code = check_stopped_code(_STOPPED_CODE.value)
        settings = read_settings(config_flags.config_values())
        refuse_settings_of_evaluation(settings)
        refuse_flags_without_effect(settings, config_flags.changed_values())
        multihost.join(
            _COORDINATOR.value, processes=_PROCESSES.value, process=_PROCESS.value
        )
        check_devices()
        with (
            StopSignals(code) as stop,
            open_run_directory(workdir, settings) as folder,
        ):
            compilation_cache.enable_compilation_cache(compilation_cache.user_folder())
            train(folder, stop)


if __name__ == "__main__":
    config_flags.run("train.py", main)
