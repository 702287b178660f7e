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

from rwkv7_jax import sharding
from rwkv7_jax.evaluation.metric import Metric
from rwkv7_jax.generation.generate import generate
from rwkv7_jax.optim.optimizer import build_optimizer, group_table, learning_rate_schedule
from rwkv7_jax.runs import compilation_cache, config_flags, multihost, process
from rwkv7_jax.runs.early_stopping import RunProgress
from rwkv7_jax.runs.exit_codes import Stopped
from rwkv7_jax.runs.input_pipeline import InputPipeline
from rwkv7_jax.runs.metrics_logger import MetricsLogger
from rwkv7_jax.runs.modes.base import TrainingMode
from rwkv7_jax.runs.modes.registry import make_mode
from rwkv7_jax.runs.multihost import open_run_directory, restore_and_broadcast
from rwkv7_jax.runs.process import StopSignals
from rwkv7_jax.runs.profiler import ProfileWindow
from rwkv7_jax.runs.resume.run_identity import identity_of
from rwkv7_jax.runs.run_directory import RunDirectory
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
        mode: what is trained, its loss and its batches.
        learning_rate: from a step to its learning rate.
        tx: the optimizer.
        identity: what a continued run must share.
        mesh: the devices that share a step's rows; None for a single one.
    """

    settings: Settings
    mode: TrainingMode
    learning_rate: Callable[[Any], Any]
    tx: optax.GradientTransformation
    identity: dict[str, dict[str, str]]
    mesh: jax.sharding.Mesh | None


def set_up(settings: Settings, folder: RunDirectory) -> Run:
    """Loads the model and the data of a run and makes its optimizer."""
    mode = make_mode(settings, folder.path)
    optimizer = settings.optimizer
    learning_rate = learning_rate_schedule(
        optimizer.schedule,
        optimizer.learning_rate,
        optimizer.final_learning_rate,
        warmup_steps=optimizer.warmup_steps,
        total_steps=settings.steps,
    )
    tx = build_optimizer(
        learning_rate,
        kind=optimizer.kind,
        weight_decay=optimizer.weight_decay,
        clip=optimizer.clip,
        b1=optimizer.b1,
        b2=optimizer.b2,
        eps=optimizer.eps,
    )
    identity = identity_of(
        settings,
        mode.model.config,
        mode.tokenizer,
        frozen=mode.frozen,
        read=mode.input_digests(),
    )
    return Run(
        settings=settings,
        mode=mode,
        learning_rate=learning_rate,
        tx=mode.decorrelator.wrap(tx),
        identity=identity,
        mesh=sharding.make_data_mesh(mode.rows_per_step),
    )


def restore_or_init(run: Run, folder: RunDirectory) -> tuple[TrainState, RunProgress]:
    """Restores the newest checkpoint, or makes the first state where there is none.

    Neither way keeps a second copy of the trainables or of their moments alive.
    """

    def create(trainables: Any) -> TrainState:
        return TrainState.create(trainables, run.tx)

    def init() -> TrainState:
        # `create` copies; donated, the trainables become the copy.
        state = jax.jit(create, donate_argnums=0)(run.mode.init_trainables())
        # A restored state is bound to its device; a new one, too, so that both run one program.
        return sharding.replicate(None, state)

    abstract = jax.eval_shape(create, run.mode.abstract_trainables)
    state, progress = restore_and_broadcast(folder, abstract, run.identity, init)
    run.mode.release_initial()
    return state, progress


def describe(run: Run, state: TrainState, progress: RunProgress) -> None:
    """Prints what is about to happen."""
    settings = run.settings
    mode = run.mode
    start = int(state.step)
    weights = sum(leaf.size for leaf in jax.tree.leaves(mode.weights(state.params)))
    trained = mode.trained_count(state.params)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    used = run.mesh.size if run.mesh else 1
    print(f"devices   {used} of {jax.device_count()}: {jax.devices()[0].device_kind}")
    print(f"model     {mode.model.config}")
    print(f"trained   {trained:,} numbers in mode {settings.mode}, of a model of {weights:,}")
    print(f"memory    {mode.describe_memory(held, devices=used)}")
    if settings.mode == "pretrain":
        print(group_table(state.params))
    print(f"data      {mode.describe_data()}, hash {run.identity['inputs']['data']}")
    tokens = mode.tokens_per_step
    size = "" if tokens is None else f", {tokens:,} tokens each"
    print(f"steps     {start} to {settings.steps}{size}")
    if not start:
        print("resume    no: a new run", flush=True)
        return
    best = ""
    if progress.best:
        value, step = progress.best[0]
        best = f"; best so far: {value:.4g} at {step}"
    print(f"resume    from step {start}{best}", flush=True)


def evaluate(run: Run, state: TrainState, folder: RunDirectory) -> dict[str, Metric]:
    """Measures the trainables on held-out data and prints sample text."""
    mode = run.mode
    sample = run.settings.sample
    step = int(state.step)
    params = sharding.local_replica(run.mesh, state.params)
    metrics = mode.evaluate(params)
    line = "  ".join(f"{name} {metric.value:.4f}" for name, metric in metrics.items())
    print(f"step {step}  {line}", flush=True)
    for prompt in sample.prompts:
        out = generate(
            mode.model,
            mode.weights(params),
            mode.tokenizer.encode(prompt),
            mode.start_state(params),
            tokens=sample.tokens,
            temperature=sample.temperature,
            top_p=sample.top_p,
            key=jax.random.key(run.settings.seed),
        )
        text = mode.tokenizer.decode(out.tokens[0])
        print(f"--- {prompt!r}\n{prompt}{text}\n---", flush=True)
        folder.note_sample(step, prompt, text)
    return metrics


def look_and_save(
    run: Run,
    state: TrainState,
    number: int,
    folder: RunDirectory,
    log: MetricsLogger,
    stop: StopSignals,
) -> bool:
    """What is due behind an update has been done; gives whether the run ends there."""
    settings, last = run.settings, number == run.settings.steps
    every = settings.evaluation.every
    due = number == 0 or last or (every and number % every == 0)
    if due and log.progress.evaluated != number:
        # A signal ends the evaluation; it is made up for when the run goes on. Several processes
        # have to agree first, behind it.
        alone = stop.interruptible() if jax.process_count() == 1 else contextlib.nullcontext()
        with log.paused(), contextlib.suppress(Stopped), alone:
            log.log_evaluation(number, evaluate(run, state, folder))
    early = None
    if log.progress.evaluated == number:
        early = log.progress.stop_reason(settings.evaluation)
    if early and not last:
        print(f"ends early at step {number}: {early}")
    ends = bool(last or early or stop.should_stop())
    best = number in log.progress.best_steps(settings.kept_best)
    regular = settings.save_every and number % settings.save_every == 0
    if stop.has_unsaved_updates and (ends or best or regular):
        with log.paused():
            folder.checkpoints.save(
                sharding.local_replica(run.mesh, state), log.progress, run.identity
            )
    if ends:
        folder.checkpoints.close()
        stop.saved()
    return ends


def result(run: Run, state: TrainState, course: RunProgress, folder: RunDirectory) -> Any:
    """The trainables that a run ends with: the last ones, or with patience the best ones."""
    best = course.best[0][1] if run.settings.evaluation.patience and course.best else None
    if best in (None, int(state.step)):
        return state.params
    print(f"step {best} measured best: the result is what it was then")
    if best == 0:
        return run.mode.init_trainables()
    return folder.checkpoints.load(best, state, run.identity).params


def train(settings: Settings, folder: RunDirectory, stop: StopSignals) -> None:
    """Runs the loop."""
    with stop.interruptible():
        run = set_up(settings, folder)
        mode = run.mode
        mesh = run.mesh
        state, course = restore_or_init(run, folder)
        number = start = int(state.step)
        describe(run, state, course)
        state = sharding.replicate(mesh, state)
        feed = InputPipeline(mode.batches(start, mesh))
        stop.agree_with(multihost.AnyProcess(mesh))
    step = make_train_step(
        mode.loss,
        run.tx,
        statistics=mode.decorrelator.statistics,
        accumulate=settings.optimizer.accumulate,
        mesh=mesh,
    )
    log = MetricsLogger(
        folder,
        settings,
        course,
        start_step=start,
        feed=feed,
        rate=run.learning_rate,
        flops=mode.flops_per_token,
        devices=mesh.size if mesh else 1,
    )
    profile = ProfileWindow(profiled(settings.profile_steps), folder.path / "profile")
    with contextlib.closing(feed), contextlib.closing(log), contextlib.closing(profile):
        while not look_and_save(run, state, number, folder, log, stop):
            profile.before(number + 1)
            batch = feed(number, sharding.local_replica(mesh, state.params))
            stop.updated()
            number += 1
            if batch is None:
                state = state.replace(step=state.step + 1)
                log.log_step(number, None, None)
            else:
                state, metrics = step(state, batch.device)
                log.log_step(number, metrics, batch.host)
            profile.after(number, state)
            folder.checkpoints.poll()

    multihost.shutdown()
    if int(state.skipped):
        print(f"warning: {int(state.skipped)} updates were skipped: loss or gradient not finite")
    if stop.requested:
        said = f"step {number} is saved" if number else "nothing was to save"
        folder.note_event(number, "stopped", f"by {stop.requested}")
        raise Stopped(f"stopped by {stop.requested}; {said}. The same command goes on from there.")
    if not multihost.is_process_0():
        return
    with stop.interruptible():
        params = result(run, sharding.local_replica(mesh, state), log.progress, folder)
        print(f"saved {run.mode.save(folder.path, params)}")
        draw(folder, run.mode, params)
        folder.note_event(number, "finished")


def main(arguments: list[str]) -> None:
    """Read the flags; what users can set right ends in one line and an exit code of its own."""
    with process.program("train.py"):
        if len(arguments) > 1:
            raise ValueError(f"unknown argument {arguments[1]!r}.")
        if not _WORKDIR.value:
            raise ValueError("`--workdir` must name the run's folder.")
        settings = read_settings(config_flags.config_values())
        which = {"processes": _PROCESSES.value, "process": _PROCESS.value}
        multihost.join(_COORDINATOR.value, **which)
        with StopSignals() as stop, open_run_directory(_WORKDIR.value, settings) as folder:
            compilation_cache.enable_compilation_cache(compilation_cache.user_folder())
            train(settings, folder, stop)


if __name__ == "__main__":
    config_flags.run("train.py", main)
