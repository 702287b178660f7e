"""Train weights or a start state: config -> data -> model -> step -> log, evaluate, save.

    python train.py --config=configs/state_tuning.py --workdir=runs/poet \
        --config.init=model.pth --config.data.path=poems.jsonl

A run that was stopped or killed goes on from its newest whole checkpoint when the same command is
given again, and ends as the unbroken one does. Exit codes: 0 done, or saved on a signal; 2 bad
settings or data; 3 no valid checkpoint; 4 stopped on NaN; 5 disk; 6 another process was lost.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax
from absl import flags

from rwkv7_jax import sharding as parallel
from rwkv7_jax.data.token_streams import TokenStream
from rwkv7_jax.generation.generate import generate
from rwkv7_jax.optim.optimizer import build_optimizer, group_table, learning_rate_schedule
from rwkv7_jax.runs import compilation_cache as compile_cache
from rwkv7_jax.runs import config_flags as command_line
from rwkv7_jax.runs import datasets as job_data
from rwkv7_jax.runs import evaluators as jobs
from rwkv7_jax.runs import multihost as processes
from rwkv7_jax.runs import process
from rwkv7_jax.runs.early_stopping import RunProgress
from rwkv7_jax.runs.exit_codes import Stopped
from rwkv7_jax.runs.input_pipeline import InputPipeline
from rwkv7_jax.runs.metrics_logger import RunLog
from rwkv7_jax.runs.modes.base import Job, memory_line, step_flops, step_rows
from rwkv7_jax.runs.modes.registry import make_job
from rwkv7_jax.runs.multihost import open_run_directory, restore_and_broadcast
from rwkv7_jax.runs.process import StopSignals
from rwkv7_jax.runs.profiler import ProfileWindow
from rwkv7_jax.runs.resume.run_identity import identity_of
from rwkv7_jax.runs.run_directory import Folder
from rwkv7_jax.runs.run_plots import draw
from rwkv7_jax.runs.settings import Settings, profiled, read_settings
from rwkv7_jax.training.train_step import TrainState, make_train_step

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; it is made or continued.")
_COORDINATOR = flags.DEFINE_string("coordinator", "", "First process's address:port, or auto.")
_PROCESSES = flags.DEFINE_integer("processes", 1, "Processes that make the run, unless auto.")
_PROCESS = flags.DEFINE_integer("process", 0, "Which one this is, from 0, unless auto.")


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run works with.

    Attributes:
        settings: as they were given.
        job: what is trained, and its loss.
        rate: the learning rate at a step.
        tx: the optimizer.
        stream: the ids that it reads; None where batches are made of the trainables.
        anchor: general text that it reads beside them.
        looks: what is measured.
        identity: what a continuation must share.
        mesh: the devices that share a step's rows; None for a single one.
    """

    settings: Settings
    job: Job
    rate: Callable[[Any], Any]
    tx: optax.GradientTransformation
    stream: TokenStream | None
    anchor: TokenStream | None
    looks: list[jobs.Evaluator]
    identity: dict[str, dict[str, str]]
    mesh: jax.sharding.Mesh | None


def set_up(settings: Settings, folder: Folder) -> Run:
    """Model, optimizer and data of a run."""
    mesh = parallel.make_data_mesh(step_rows(settings))
    job, optimizer = make_job(settings, folder.path), settings.optimizer
    rate = learning_rate_schedule(
        optimizer.schedule,
        optimizer.learning_rate,
        optimizer.final_learning_rate,
        warmup_steps=optimizer.warmup_steps,
        total_steps=settings.steps,
    )
    names = ("kind", "weight_decay", "clip", "b1", "b2", "eps")
    choices = {name: getattr(optimizer, name) for name in names}
    stream = None if job.batch else job_data.training_stream(settings, job.tokenizer)
    anchor = None if job.batch else job_data.anchor_stream(settings, job.tokenizer)
    frozen = None if settings.mode == "pretrain" else job.weights(job.trainables)
    inputs = {"frozen": frozen, "read": job_data.what_is_read(settings, stream, anchor)}
    return Run(
        settings=settings,
        job=job,
        rate=rate,
        tx=job.optimizer(build_optimizer(rate, **choices)),
        stream=stream,
        anchor=anchor,
        looks=jobs.make_evaluators(settings, job),
        identity=identity_of(settings, job.model.config, job.tokenizer, **inputs),
        mesh=mesh,
    )


def describe(run: Run, state: TrainState, course: RunProgress) -> None:
    """Print what is about to happen."""
    settings, job, start = run.settings, run.job, int(state.step)
    weights = sum(leaf.size for leaf in jax.tree.leaves(job.weights(job.trainables)))
    rows = settings.data.batch_size
    used = run.mesh.size if run.mesh else 1
    print(f"devices   {used} of {jax.device_count()}: {jax.devices()[0].device_kind}")
    print(f"model     {job.model.config}")
    print(f"trained   {job.trained:,} numbers in mode {settings.mode}, of a model of {weights:,}")
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    print(f"memory    {memory_line(settings, job.model.config, held, devices=used)}")
    if settings.mode == "pretrain":
        print(group_table(job.trainables))
    endless = run.stream is None or settings.data.path.startswith("task:")
    amount = "made as it goes" if endless else f"{len(run.stream):,} tokens"
    print(f"data      {settings.data.path}: {amount}, hash {run.identity['inputs']['data']}")
    size = f", {rows * settings.data.length:,} tokens each" if run.stream is not None else ""
    print(f"steps     {start} to {settings.steps}{size}")
    best = f"; best so far: {course.best[0][0]:.4g} at {course.best[0][1]}" if course.best else ""
    print(f"resume    {f'from step {start}{best}' if start else 'no: a new run'}", flush=True)


def evaluate(run: Run, state: TrainState, folder: Folder) -> dict[str, float]:
    """Every measure on held-out data, and sample text on the terminal."""
    job, sample, params = (
        run.job,
        run.settings.sample,
        parallel.local_replica(run.mesh, state.params),
    )
    weights, start = job.weights(params), job.start(params)
    numbers = {name: value for look in run.looks for name, value in look(params).items()}
    line = "  ".join(f"{name} {value:.4f}" for name, value in numbers.items())
    print(f"step {int(state.step)}  {line}", flush=True)
    for prompt in sample.prompts:
        out = generate(
            job.model,
            weights,
            job.tokenizer.encode(prompt),
            start,
            tokens=sample.tokens,
            temperature=sample.temperature,
            top_p=sample.top_p,
            key=jax.random.key(run.settings.seed),
        )
        text = job.tokenizer.decode(out.tokens[0])
        print(f"--- {prompt!r}\n{prompt}{text}\n---", flush=True)
        folder.note_sample(int(state.step), prompt, text)
    return numbers


def look_and_save(
    run: Run, state: TrainState, number: int, folder: Folder, log: RunLog, stop: StopSignals
) -> bool:
    """What is due behind an update has been done; gives whether the run ends there."""
    settings, last = run.settings, number == run.settings.steps
    every = settings.evaluation.every
    due = number == 0 or last or (every and number % every == 0)
    if due and log.course.evaluated != number:
        # A signal ends the evaluation; it is made up for when the run goes on. Several processes
        # have to agree first, behind it.
        alone = stop.interruptible() if jax.process_count() == 1 else contextlib.nullcontext()
        with log.paused(), contextlib.suppress(Stopped), alone:
            log.evaluated(number, evaluate(run, state, folder))
    early = log.course.ended_early(settings.evaluation) if log.course.evaluated == number else ""
    if early and not last:
        print(f"ends early at step {number}: {early}")
    ends = bool(last or early or stop.should_stop())
    best = number in log.course.best_steps(settings.kept_best)
    regular = settings.save_every and number % settings.save_every == 0
    if stop.has_unsaved_updates and (ends or best or regular):
        with log.paused():
            folder.checkpoints.save(
                parallel.local_replica(run.mesh, state), log.course, run.identity
            )
    if ends:
        folder.checkpoints.close()
        stop.saved()
    return ends


def result(run: Run, state: TrainState, course: RunProgress, folder: Folder) -> Any:
    """The trainables that a run ends with: the last ones, or with patience the best ones."""
    best = course.best[0][1] if run.settings.evaluation.patience and course.best else None
    if best in (None, int(state.step)):
        return state.params
    print(f"step {best} measured best: the result is what it was then")
    return folder.checkpoints.load(best, state, run.identity).params if best else run.job.trainables


def train(settings: Settings, folder: Folder, stop: StopSignals) -> None:
    """The loop."""
    with stop.interruptible():
        run = set_up(settings, folder)
        job, mesh, pieces = run.job, run.mesh, settings.optimizer.accumulate
        # A restored state is bound to its device; a fresh one, too, so that both run one program.
        fresh = parallel.replicate(None, TrainState.create(job.trainables, run.tx))
        state, course = restore_and_broadcast(folder, fresh, run.identity)
        number = start = int(state.step)
        describe(run, state, course)
        state = parallel.replicate(mesh, state)
        ahead = {"start_step": start, "anchor": run.anchor, "mesh": mesh}
        feed = InputPipeline(settings, job, run.stream, **ahead)
        stop.agree_with(processes.AnyProcess(mesh))
    choices = {"statistics": job.statistics, "accumulate": pieces, "mesh": mesh}
    step = make_train_step(job.loss, run.tx, **choices)
    known = {"rate": run.rate, "flops": step_flops(settings, job.model.config)}
    known["devices"] = mesh.size if mesh else 1
    log = RunLog(folder, settings, course, start_step=start, feed=feed, **known)
    profile = ProfileWindow(profiled(settings.profile_steps), folder.path / "profile")
    with contextlib.closing(feed), contextlib.closing(log), contextlib.closing(profile):
        while not look_and_save(run, state, number, folder, log, stop):
            profile.before(number + 1)
            batch, placed = feed(number, parallel.local_replica(mesh, state.params))
            stop.updated()
            if batch is None:
                state, metrics = state.replace(step=state.step + 1), None
            else:
                state, metrics = step(state, placed)
            number += 1
            log.note(number, metrics, batch)
            profile.after(number, state)
            folder.checkpoints.poll()

    processes.shutdown()
    if int(state.skipped):
        print(f"warning: {int(state.skipped)} updates were skipped: loss or gradient not finite")
    if stop.requested:
        said = f"step {number} is saved" if number else "nothing was to save"
        folder.note_event(number, "stopped", f"by {stop.requested}")
        raise Stopped(f"stopped by {stop.requested}; {said}. The same command goes on from there.")
    if not processes.is_process_0():
        return
    with stop.interruptible():
        params = result(run, parallel.local_replica(mesh, state), log.course, folder)
        print(f"saved {job.save(folder.path, params)}")
        draw(folder, settings, job, params, run.stream)
        folder.note_event(number, "finished")


def main(arguments: list[str]) -> None:
    """Read the flags; what users can set right ends in one line and an exit code of its own."""
    with process.program("train.py"):
        if len(arguments) > 1:
            raise ValueError(f"unknown argument {arguments[1]!r}.")
        if not _WORKDIR.value:
            raise ValueError("`--workdir` must name the run's folder.")
        settings = read_settings(command_line.config_values())
        which = {"processes": _PROCESSES.value, "process": _PROCESS.value}
        processes.join(_COORDINATOR.value, **which)
        with StopSignals() as stop, open_run_directory(_WORKDIR.value, settings) as folder:
            compile_cache.enable_compilation_cache(compile_cache.user_folder())
            train(settings, folder, stop)


if __name__ == "__main__":
    command_line.run("train.py", main)
