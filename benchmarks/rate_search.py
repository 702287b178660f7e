"""The search for a learning rate against a full sweep: the quality of its choice, and its cost.

    python -m benchmarks.rate_search --json benchmarks/results/cpu-rate-search.json

On three styles of text the start state of the shipped base is tuned; on one of them also an
upscaled state, LoRA and all weights. If the genuine model that reverses digits is available, its
start state is tuned to copy them. Each subject is searched as in a run, with a tenth of its
arithmetic, and tuned at full length at the rates that can be best: states at the largest of the
list and one beyond it, weights at smaller ones. A search in two rounds of the same cost is compared
(all rates for a third of the steps, then the best three for the rest). Cells are cached, so an
interrupted run resumes.
"""

import argparse
import dataclasses
import functools
import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
import optax

import rwkv7_jax as rwkv
from benchmarks import record, text_table
from benchmarks.paper_table import Cells
from benchmarks.rates import at_edge, lowest_loss_rate
from benchmarks.timing import RepeatedStep, time_call
from rwkv7_jax.data.batch import Batch
from rwkv7_jax.data.loading import batch_at, windows
from rwkv7_jax.evaluation.scoring import frequency_nats, score_answers
from rwkv7_jax.optim.optimizer import learning_rate_schedule
from rwkv7_jax.training.costs import flops_per_token
from rwkv7_jax.training.stacked_step import (
    create_stack,
    make_stacked_step,
    params_of,
    stack_params,
)
from rwkv7_jax.training.train_step import TrainState, TrainStep, make_train_step
from rwkv7_jax.tuning.rate_search import (
    FINAL_SHARE,
    RATES,
    SearchPlan,
    find_rate,
    plan_search,
    repeat_rows,
)
from rwkv7_jax.tuning.state_tuning import state_loss

STEPS = 160
ROWS = 8
LENGTH = 64
WARMUP = 10
# Windows that judge a rate in the search, and a state at the end.
QUICK = 8
WINDOWS = 48

# Of a sweep at full length. The others are far from the best: see the losses of the searches.
STATE_RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
WEIGHT_RATES = {
    "LoRA": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    "all weights": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
}

# Rates of the second of two rounds.
FINALISTS = 3

REVERSE = "blinkdl-reverse-260123/derived-official-layout.pth"
COPYING = "copying"
DIGITS = 24  # of a number at most
COMMA, END = 10, 11


class Subject(NamedTuple):
    """What is tuned, on what, and how it is measured.

    Attributes:
        config: of the model.
        rates: of a sweep at full length.
        loss: of the trainables and a batch.
        statistics: for DBP; None without it.
        optimizer: from a learning rate to the optimizer.
        start: from a seed to the trainables before tuning.
        batch: from a step and a seed to its rows.
        measure: from trainables and a number of windows to their held-out loss.
        guess: from a number of windows to the loss of guessing by frequency.
    """

    config: rwkv.RWKV7Config
    rates: tuple[float, ...]
    loss: Any
    statistics: Any
    optimizer: Callable[[Any], optax.GradientTransformation]
    start: Callable[[int], Any]
    batch: Callable[[int, int], Batch]
    measure: Callable[[Any, int], float]
    guess: Callable[[int], float]


def text_subject(kind: str, style: str) -> Subject:
    """Makes a row of the table of text."""
    model, _ = text_table.base()

    def batch(step: int, seed: int) -> Batch:
        return batch_at(
            text_table.stream(style, "train"),
            step,
            batch_size=ROWS,
            length=LENGTH,
            seed=seed,
        )

    def measure(trained: Any, count: int) -> float:
        found = text_table.held_out_score(
            kind, style, trained, length=LENGTH, count=count
        )
        return found.bits_per_byte

    def guess(count: int) -> float:
        read = windows(text_table.stream(style, "held_out"), LENGTH, count)
        # A token is a byte.
        return frequency_nats(read) / math.log(2)

    return Subject(
        config=model.config,
        rates=WEIGHT_RATES.get(kind, STATE_RATES),
        loss=text_table.loss_of(kind),
        statistics=text_table.statistics_of(kind),
        optimizer=functools.partial(text_table.optimizer_of, kind),
        start=lambda seed: text_table.start(kind, style, seed),
        batch=batch,
        measure=measure,
        guess=guess,
    )


def copy_rows(seed: int, rows: int) -> Batch:
    """Makes rows of a number, a comma, the number again and a sign for the end."""
    rng = np.random.default_rng(seed)
    tokens = np.full((rows, 2 * DIGITS + 3), END, np.int32)
    mask = np.zeros((rows, 2 * DIGITS + 2), np.float32)
    for row in range(rows):
        count = int(rng.integers(1, DIGITS + 1))
        number = rng.integers(0, 10, count)
        tokens[row, :count] = number
        tokens[row, count] = COMMA
        tokens[row, count + 1 : 2 * count + 1] = number
        mask[row, count : 2 * count + 1] = 1
    return Batch(tokens=tokens, mask=mask)


def copy_subject(path: Path) -> Subject:
    """Makes the start state of the reversing model, tuned to copy."""
    params, config = rwkv.load_model(path, dtype="float32")
    # It compiles in a fraction of the time, which for rows this short is most of it.
    model = rwkv.RWKV7(dataclasses.replace(config, implementation="scan"))
    held_out = copy_rows(10**6, WINDOWS)

    def measure(state: Any, count: int) -> float:
        rows = held_out.select_rows(slice(0, count))
        return score_answers(model, params, state, rows, rows=count).nats

    return Subject(
        config=config,
        rates=STATE_RATES,
        loss=state_loss(model, params),
        statistics=None,
        optimizer=functools.partial(text_table.optimizer_of, "start state"),
        start=lambda seed: rwkv.init_state(config),
        batch=lambda step, seed: copy_rows(1000 * seed + step, ROWS),
        measure=measure,
        guess=lambda count: frequency_nats(held_out.select_rows(slice(0, count))),
    )


def schedule(steps: int) -> optax.Schedule:
    """Makes the schedule of a rate of 1, as runs of train.py have it."""
    return learning_rate_schedule(
        "cosine",
        1.0,
        FINAL_SHARE,
        warmup_steps=min(WARMUP, steps // 4),
        total_steps=steps,
    )


def plan_of(subject: Subject, steps: int, rows: int) -> SearchPlan:
    """Sizes the search as a run of train.py does."""
    flops = flops_per_token(subject.config)
    return plan_search(
        len(RATES),
        steps=steps,
        rows=rows,
        share=0.1,
        measuring=QUICK * flops.forward / flops.state,
    )


def short_batches(subject: Subject, seed: int, rows: int) -> Iterator[Batch]:
    """Makes the batches of a run with fewer rows."""
    for step in itertools.count():
        yield subject.batch(step, seed).select_rows(slice(0, rows))


def halved(
    subject: Subject, seed: int, *, steps: int = STEPS, rows: int = ROWS
) -> dict[str, Any]:
    """Searches in two rounds: all rates for a third of the steps, the best few for the rest.

    Each round starts from scratch, with its own schedule. What it costs to measure the second one
    comes on top.

    Source: successive halving, Karnin et al. 2013; Jamieson and Talwalkar 2016.
    """
    plan = plan_of(subject, steps, rows)
    first = max(plan.steps // 3, 1)
    second = (plan.steps - first) * len(RATES) // FINALISTS
    tried = RATES
    rounds = []
    for length in (first, second):
        choice = find_rate(
            subject.loss,
            subject.optimizer(schedule(length)),
            subject.start(seed),
            short_batches(subject, seed, plan.rows),
            lambda trained: subject.measure(trained, QUICK),
            steps=length,
            rates=tried,
            statistics=subject.statistics,
        )
        losses = {
            rate: one for rate, one in choice.losses.items() if math.isfinite(one)
        }
        tried = tuple(sorted(losses, key=lambda rate: losses[rate])[:FINALISTS])
        by_rate = {str(rate): loss for rate, loss in choice.losses.items()}
        rounds.append({"steps": length, "losses": by_rate})
    return {"rate": tried[0], "rounds": rounds}


def searched(
    subject: Subject, seed: int, *, steps: int = STEPS, rows: int = ROWS
) -> dict[str, Any]:
    """Searches; the seconds are CPU time without compilation."""
    plan = plan_of(subject, steps, rows)
    measuring: list[float] = []

    def measure(trained: Any) -> float:
        began = time.process_time()
        loss = subject.measure(trained, QUICK)
        measuring.append(time.process_time() - began)
        return loss

    tx = subject.optimizer(schedule(plan.steps))
    choice = find_rate(
        subject.loss,
        tx,
        subject.start(seed),
        short_batches(subject, seed, plan.rows),
        measure,
        steps=plan.steps,
        statistics=subject.statistics,
        guess=subject.guess(QUICK),
    )
    # Steps do not wait for their results, so they are timed again, one by one.
    step = make_stacked_step(
        subject.loss, tx, np.asarray(RATES), statistics=subject.statistics
    )
    train = create_stack(stack_params([subject.start(seed)] * len(RATES)), tx)
    batch = next(short_batches(subject, seed, plan.rows))
    batch = repeat_rows(batch, len(RATES))
    seconds = plan.steps * step_seconds(step, train, batch)
    # The first one compiles.
    seconds += statistics.median(measuring[1:]) * len(measuring)
    return {
        "rate": choice.rate,
        "edge": choice.edge,
        "near": choice.near,
        "why": choice.why,
        "losses": {str(rate): loss for rate, loss in choice.losses.items()},
        "untuned": choice.base,
        "guess": subject.guess(QUICK),
        "processor_seconds": seconds,
        "plan": plan._asdict(),
    }


def tuned_at_all_rates(
    subject: Subject, seed: int, steps: int
) -> Iterator[tuple[float, Any]]:
    """Tunes at the rates of a sweep for the full length, as one stack; gives each and its rate."""
    rates = subject.rates
    tx = subject.optimizer(schedule(steps))
    step = make_stacked_step(
        subject.loss, tx, np.asarray(rates), statistics=subject.statistics
    )
    train = create_stack(stack_params([subject.start(seed)] * len(rates)), tx)
    for number in range(steps):
        train, _ = step(train, repeat_rows(subject.batch(number, seed), len(rates)))
    for index, rate in enumerate(rates):
        yield rate, params_of(train.params, index)


def swept(subject: Subject, seed: int) -> dict[str, float]:
    """Measures the held-out losses of a sweep at full length."""
    losses = {}
    for rate, trained in tuned_at_all_rates(subject, seed, STEPS):
        losses[str(rate)] = subject.measure(trained, WINDOWS)
    return losses


def step_seconds(step: TrainStep, train: TrainState, batch: Batch) -> float:
    """Measures the CPU seconds of one step, the median of ten, without compilation."""
    run = RepeatedStep(step, train, batch)
    times = [time_call(run).processor for _ in range(12)]
    return statistics.median(times[2:])


def run_seconds(subject: Subject) -> float:
    """Measures the CPU seconds of the steps of one run, without compilation."""
    tx = subject.optimizer(schedule(STEPS))
    step = make_train_step(subject.loss, tx, statistics=subject.statistics)
    train = TrainState.create(subject.start(0), tx)
    return STEPS * step_seconds(step, train, subject.batch(0, 0))


def compared(found: dict[str, Any], losses: dict[str, float]) -> dict[str, Any]:
    """Compares the rate that a search found with the best one of a sweep."""
    best = lowest_loss_rate(losses)
    # A rate outside the sweep counts as the worst: it must not be found.
    chosen = losses.get(str(found["rate"]), math.inf)
    return {
        "search": found,
        "sweep": losses,
        "best_rate": float(best),
        "at_edge": at_edge(best, losses),
        "excess": chosen / losses[best] - 1,
    }


def subjects() -> dict[str, tuple[Callable[[], Subject], int]]:
    """Lists the available subjects with the number of seeds of each."""
    found: dict[str, tuple[Callable[[], Subject], int]] = {}
    folder = os.environ.get("RWKV7_CHECKPOINTS", "../shared/checkpoints")
    path = Path(folder) / REVERSE
    if path.is_file():
        found[f"start state | {COPYING}"] = (functools.partial(copy_subject, path), 3)
    for style in text_table.STYLES:
        make = functools.partial(text_subject, "start state", style)
        found[f"start state | {style}"] = (make, 3)
    for kind in ("upscaled, whitened", "LoRA", "all weights"):
        for style in text_table.STYLES:
            make = functools.partial(text_subject, kind, style)
            found[f"{kind} | {style}"] = (make, 1)
    return found


def main() -> None:
    """Runs all cells, prints a line for each, and writes JSON where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", help="file for the numbers")
    parser.add_argument(
        "--cells", default="runs/rate-search", help="folder of the results' cache"
    )
    parser.add_argument(
        "--only", default="", help="only subjects whose names contain this text"
    )
    options = parser.parse_args()
    chosen = {}
    for name, subject in subjects().items():
        if options.only in name:
            chosen[name] = subject
    record.require_rows_kept(options.json, "results", chosen)
    cells = Cells(Path(options.cells))
    results: dict[str, Any] = {}
    for name, (make, seeds) in chosen.items():
        make = functools.cache(make)
        seconds = cells.get(f"{name} | time", lambda make=make: run_seconds(make()))
        runs = []
        for seed in range(seeds):
            found = cells.get(
                f"{name} | {seed} | search",
                lambda make=make, seed=seed: searched(make(), seed),
            )
            losses = cells.get(
                f"{name} | {seed} | sweep",
                lambda make=make, seed=seed: swept(make(), seed),
            )
            rounds = cells.get(
                f"{name} | {seed} | halved",
                lambda make=make, seed=seed: halved(make(), seed),
            )
            runs.append(compared(found["found"], losses["found"]))
            runs[-1]["halved"] = rounds["found"]
            search = runs[-1]["search"]
            edge = " (edge)" if runs[-1]["at_edge"] else ""
            extra = search["processor_seconds"] / seconds["found"]
            print(
                f"{name:36} seed {seed}  found {search['rate']}  best "
                f"{runs[-1]['best_rate']}{edge}  excess {runs[-1]['excess']:+.2%}  "
                f"time {extra:+.1%}  in two rounds {rounds['found']['rate']}",
                flush=True,
            )
        results[name] = {"run_processor_seconds": seconds["found"], "seeds": runs}
    # Once: the cells keep what is known, and half a table must not replace a whole one.
    if options.json:
        record.write(
            options.json,
            "benchmarks.rate_search",
            packages=("jax", "optax"),
            steps=STEPS,
            rows=ROWS,
            length=LENGTH,
            rates=RATES,
            results=results,
        )


if __name__ == "__main__":
    main()
