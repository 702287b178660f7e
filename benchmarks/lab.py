"""Models, tuning runs and measurements shared by the experiments on the toy base models.

A run's learning rate is an argument of the compiled step, so runs that differ only in rate, task or
seed share one program.
"""

import dataclasses
import functools
import math
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import rwkv7_jax as rwkv
from rwkv7_jax.data.batch import Batch
from rwkv7_jax.data.tasks.synthetic_tasks import task_batch
from rwkv7_jax.evaluation.scoring import Answers, score_answers
from rwkv7_jax.model.state import RWKV7State
from rwkv7_jax.optim.decorrelation import decorrelate
from rwkv7_jax.tuning.read_statistics import state_statistics
from rwkv7_jax.tuning.state_tuning import state_loss, trainable_mask
from rwkv7_jax.tuning.upscaling import upscale

ASSETS = Path(__file__).parent.parent / "assets"
ROWS = 32  # of a training batch

# Rules of decorrelation: ours, ours with one iteration an update, and the published one with a
# small and a large step.
_PUBLISHED = {
    "iterations": 1,
    "damping": 0.0,
    "average": 0.0,
    "clip": None,
    "normalise": False,
}
RULES: dict[str, dict[str, Any]] = {
    "ours": {},
    "one iteration": {"iterations": 1},
    "as published, step 1e-4": _PUBLISHED | {"rate": 1e-4},
    "as published, step 1e-3": _PUBLISHED | {"rate": 1e-3},
    "as published, step 1e-2": _PUBLISHED | {"rate": 1e-2},
}


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to tune a state.

    Attributes:
        rate: Adam's peak learning rate.
        size: features of a head; 0 tunes the start state itself.
        prepare: of the features.
        dynamics: of the memory.
        rule: by which inputs are decorrelated while tuning, of `RULES`; empty for none.
        anchor: weight of KL(base || tuned) on the mixture.
    """

    rate: float
    size: int = 0
    prepare: str = "none"
    dynamics: str = "static"
    rule: str = ""
    anchor: float = 0.0


STANDARD = Method(rate=2.0)
RAW = Method(rate=0.3, size=128)
WHITENED = Method(
    rate=0.3,
    size=128,
    prepare="whiten",
)
DBP = Method(
    rate=1.0,
    size=128,
    rule="ours",
)


@dataclasses.dataclass(frozen=True)
class Tuned:
    """The result of a run: the state, the loss of every step, and seconds without compiling."""

    state: RWKV7State
    losses: list[float]
    seconds: float


@functools.cache
def base(name: str) -> tuple[rwkv.RWKV7, Any]:
    """Loads a shipped toy model: "small", "small16" or "large"."""
    params, config = rwkv.load_model(ASSETS / f"toy-{name}.pth", dtype="float32")
    return rwkv.RWKV7(config), params


def length_of(task: str) -> int:
    """Returns the tokens of a training row: 8 facts, or a row as the bases were trained on."""
    return 24 if task.startswith("facts") else 32


def batch(
    task: str,
    step: int,
    *,
    seed: int = 0,
    rows: int = ROWS,
    length: int = 0,
    **more,
) -> Batch:
    """Makes rows of a task."""
    length = length or length_of(task)
    return task_batch(
        task,
        step,
        batch_size=rows,
        length=length,
        seed=seed,
        **more,
    )


def _adam(learning_rate) -> optax.GradientTransformation:
    return optax.adam(
        learning_rate,
        b1=0.9,
        b2=0.99,
        eps=1e-8,
    )


@functools.cache
def _program(
    name: str,
    leaves: tuple[str, ...],
    rule: str,
    anchor: float,
):
    """Makes the optimizer, with a settable rate, and the compiled step of one kind of run."""
    model, params = base(name)
    # The anchor's weight is a constant of the program: only two or three are in use.
    loss = state_loss(
        model,
        params,
        leaves=leaves,
        anchor=anchor,
    )

    def mask(state):
        return trainable_mask(state, leaves)

    def build(learning_rate):
        adam = _adam(learning_rate)
        return optax.masked(decorrelate(adam, **RULES[rule]) if rule else adam, mask)

    tx = optax.inject_hyperparams(build)(learning_rate=1.0)
    statistics = state_statistics(model, params, leaves=leaves) if rule else None
    return tx, rwkv.make_train_step(loss, tx, statistics=statistics)


def start(
    name: str,
    task: str,
    method: Method,
    seed: int,
) -> RWKV7State:
    """Makes the state before tuning; features are calibrated on 96 rows of the task."""
    model, params = base(name)
    if not method.size:
        return rwkv.init_state(model.config)
    # Calibration must not show the facts that are tuned: it sees others of the same form.
    text = "facts-1024" if task.startswith("facts") else task
    shown = batch(
        text,
        0,
        seed=seed + 1000,
        rows=96,
        length=length_of(task),
    )
    widths = (1.0, 4.0, 16.0) if method.prepare == "whiten" else (1.0,)
    return upscale(
        model,
        params,
        shown.inputs,
        size=method.size,
        dynamics=method.dynamics,
        prepare=method.prepare,
        widths=widths,
        seed=seed,
    )


def rate_at(step: int, steps: int, warmup: int = 50) -> float:
    """Computes the share of the peak rate: a warm-up, then a cosine to a twentieth."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    falling = 0.05 + 0.95 * cosine
    return min(1.0, (step + 1) / warmup) * falling


def tune(
    task: str,
    method: Method,
    *,
    name: str = "small",
    steps: int = 150,
    seed: int = 0,
) -> Tuned:
    """Tunes a state of a base model on a task."""
    leaves = ("memory",) if method.size else ("wkv",)
    tx, step = _program(name, leaves, method.rule, method.anchor)
    train = rwkv.TrainState.create(start(name, task, method, seed), tx)
    losses = []
    began = 0.0
    for number in range(steps):
        rows = batch(task, number, seed=seed)
        if method.anchor:
            length = rows.tokens.shape[1] - 1
            general = batch(
                "mixture",
                number,
                seed=seed + 1,
                rows=16,
                length=length,
            )
            rows = rows.replace(anchor=general.tokens)
        # An array, and not a number: another number would compile another program.
        rate = np.float32(method.rate * rate_at(number, steps))
        train.opt_state.hyperparams["learning_rate"] = jax.numpy.asarray(rate)
        train, metrics = step(train, rows)
        losses.append(metrics["loss_nats"])
        if number == 0:
            # The clock starts after the step that compiles.
            jax.block_until_ready(metrics)
            began = time.monotonic()
    return Tuned(train.params, [float(x) for x in losses], time.monotonic() - began)


def measure(
    task: str,
    state: RWKV7State | None = None,
    *,
    name: str = "small",
    seed: int = 0,
    **more,
) -> Answers:
    """Scores the answers to 256 held-out rows of a task, from a state or from none."""
    model, params = base(name)
    state = rwkv.init_state(model.config) if state is None else state
    return score_answers(
        model,
        params,
        state,
        batch(
            task,
            0,
            seed=seed,
            rows=256,
            held_out=True,
            **more,
        ),
    )
