"""Train weights or a start state: config -> data -> model -> step -> log, evaluate, save.

    python train.py --config=configs/state_tuning.py --workdir=runs/poet \
        --config.init=model.pth --config.data.path=poems.jsonl

A killed run continues from its newest checkpoint when the same command is given again.
"""

import math
import sys
import time

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from rwkv7_jax import job_data, jobs, pictures
from rwkv7_jax.evaluation import state_after
from rwkv7_jax.generate import generate
from rwkv7_jax.job import Job
from rwkv7_jax.optim.build import build_optimizer, groups, schedule
from rwkv7_jax.progress import ProgressBar
from rwkv7_jax.run_folder import RunFolder
from rwkv7_jax.settings import Settings, read_settings
from rwkv7_jax.state_tuning import spectra
from rwkv7_jax.training import TrainState, make_train_step

_CONFIG = config_flags.DEFINE_config_file("config", lock_config=False, accept_new_attributes=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; it is made or continued.")


def describe(settings: Settings, job: Job, stream, start_step: int) -> None:
    """Print what is about to happen."""
    weights = sum(leaf.size for leaf in jax.tree.leaves(job.weights(job.trainables)))
    data, rows = settings.data, settings.data.batch_size
    print(f"devices   {', '.join(str(device) for device in jax.devices())}")
    print(f"model     {job.model.config}")
    print(f"trained   {job.trained:,} numbers in mode {settings.mode}, of a model of {weights:,}")
    if settings.mode == "pretrain":
        labels = sorted(set(jax.tree.leaves(groups(job.trainables))))
        print(f"groups    {', '.join(labels)}")
    endless = stream is None or data.path.startswith("task:")
    amount = "made as it goes" if endless else f"{len(stream):,} tokens"
    print(f"data      {data.path}: {amount}")
    size = f", {rows * data.length:,} tokens each" if stream is not None else ""
    print(f"steps     {start_step} to {settings.steps}{size}")


def evaluate(
    settings: Settings, job: Job, train: TrainState, looks: list[jobs.Look]
) -> dict[str, float]:
    """Every measure on held-out data, and sample text on the terminal."""
    weights, start = job.weights(train.params), job.start(train.params)
    numbers = {name: value for look in looks for name, value in look(train.params).items()}
    line = "  ".join(f"{name} {value:.4f}" for name, value in numbers.items())
    print(f"step {int(train.step)}  {line}")
    sample = settings.sample
    for prompt in sample.prompts:
        out = generate(
            job.model,
            weights,
            job.tokenizer.encode(prompt),
            start,
            tokens=sample.tokens,
            temperature=sample.temperature,
            top_p=sample.top_p,
            key=jax.random.key(settings.seed),
        )
        print(f"--- {prompt!r}\n{prompt}{job.tokenizer.decode(out.tokens[0])}\n---")
    return numbers


def draw(folder: RunFolder, job: Job, train: TrainState, settings: Settings, stream) -> None:
    """The run's pictures."""
    if not pictures.available():
        print("no pictures: matplotlib is missing (pip install 'rwkv7_jax[plot]')")
        return
    lines = {}
    for name in ("loss_nats", "held_out_bits_per_byte"):
        scale = 1 / math.log(2) if name == "loss_nats" else 1.0
        points = [(row["step"], row[name] * scale) for row in folder.rows() if name in row]
        label = "training (bits per token)" if name == "loss_nats" else "held out (bits per byte)"
        lines |= {label: points} if points else {}
    pictures.curves(folder.path / "loss.png", lines, x="step", y="bits")
    if settings.mode == "state":
        typical = state_after(job.model, job.weights(train.params), stream[: settings.data.length])
        tuned = job.start(train.params)
        pictures.states(folder.path / "state.png", spectra(typical), spectra(tuned))


def train(settings: Settings, workdir: str) -> None:
    """The loop."""
    job = jobs.make_job(settings, workdir)
    tokenizer, optimizer = job.tokenizer, settings.optimizer
    rate = schedule(
        optimizer.schedule,
        optimizer.learning_rate,
        optimizer.final_learning_rate,
        warmup_steps=optimizer.warmup_steps,
        total_steps=settings.steps,
    )
    tx = job.optimizer(
        build_optimizer(
            rate,
            kind=optimizer.kind,
            weight_decay=optimizer.weight_decay,
            clip=optimizer.clip,
            b1=optimizer.b1,
            b2=optimizer.b2,
            eps=optimizer.eps,
        )
    )
    stream = None if job.batch else job_data.training_stream(settings, tokenizer)
    looks = jobs.looks(settings, job)

    folder = RunFolder(workdir, settings)
    state = folder.restore(TrainState.create(job.trainables, tx))
    start_step = int(state.step)
    describe(settings, job, stream, start_step)
    batches = job.batch or job_data.batches(settings, stream, tokenizer, start_step=start_step)
    step = make_train_step(job.loss, tx, statistics=job.statistics, accumulate=optimizer.accumulate)
    if start_step == 0:
        folder.log(0, evaluate(settings, job, state, looks))

    bar = ProgressBar(settings.steps - start_step, settings.mode)
    per_step, warned, since = (
        settings.data.batch_size * settings.data.length,
        False,
        time.monotonic(),
    )
    for number in range(start_step + 1, settings.steps + 1):
        if job.batch:
            batch = job.batch(state.params, number - 1)
        else:
            batch = job.prepared(next(batches), number - 1)
        state, metrics = step(state, batch)
        last = number == settings.steps
        if number % settings.log_every == 0 or last:
            numbers = {name: float(value) for name, value in metrics.items()}
            seconds, since = time.monotonic() - since, time.monotonic()
            numbers["learning_rate"] = float(rate(number - 1))
            numbers["tokens_per_second"] = settings.log_every * per_step / seconds
            folder.log(number, numbers)
            bar.update(number - start_step, f"loss {numbers['loss_nats'] / math.log(2):.3f} bits")
            if numbers.get("state_max", 0.0) > settings.tuning.warn_above and not warned:
                warned = True
                print(
                    f"warning: the state's largest entry is {numbers['state_max']:.0f}; lower the "
                    "learning rate, set config.tuning.alpha below 1 or add an anchor."
                )
        if settings.evaluation.every and number % settings.evaluation.every == 0 and not last:
            folder.log(number, evaluate(settings, job, state, looks))
        if settings.save_every and number % settings.save_every == 0 and not last:
            folder.save(state)
    bar.close()

    if start_step < settings.steps:
        folder.log(settings.steps, evaluate(settings, job, state, looks))
        folder.save(state)
    if int(state.skipped):
        print(f"warning: {int(state.skipped)} updates were skipped: loss or gradient not finite")
    print(f"saved {job.save(folder.path, state.params)}")
    draw(folder, job, state, settings, stream)
    folder.close()


def main(arguments: list[str]) -> None:
    """Read the flags; bad settings and bad data end in one line and exit code 2."""
    logging.set_verbosity(logging.ERROR)
    if len(arguments) > 1:
        sys.exit(f"train.py: unknown argument {arguments[1]!r}.")
    try:
        if not _WORKDIR.value:
            raise ValueError("`--workdir` must name the run's folder.")
        train(read_settings(_CONFIG.value.to_dict()), _WORKDIR.value)
    except (ValueError, TypeError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    app.run(main)
