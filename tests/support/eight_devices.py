"""Measures, on eight virtual devices, how far programs in shards lie from those of one device.

Run as a program: the suite's own process has two devices. It prints one JSON object.
"""

import functools
import json
import os
import re
import sys
import time
from typing import NamedTuple
from unittest import mock

if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = " ".join(
        [
            os.environ.get("XLA_FLAGS", ""),
            "--xla_force_host_platform_device_count=8",
        ]
    )

import dataclasses

import jax
import numpy as np
import optax
from tiny_models import CONFIG, lively, random_state, tokens
from tolerances import relative_error

from rwkv7_jax import sharding
from rwkv7_jax.model.int8_weights import quantize
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.training.losses import pretrain_loss
from rwkv7_jax.training.train_step import TrainState, make_train_step
from rwkv7_jax.tuning.state_tuning import LEAVES, state_loss

MESHES = {
    "fsdp 8": {"fsdp": 8},
    "data 2 x fsdp 4": {"data": 2, "fsdp": 4},
    "fsdp 2 x sequence 4": {"fsdp": 2, "sequence": 4},
    "data 2 x fsdp 2 x tensor 2": {"data": 2, "fsdp": 2, "tensor": 2},
    "tensor 2": {"tensor": 2},
}
ROWS = 8
# 2 divides it, so that devices which share heads share the tokens of the loss; 4 does not.
LENGTH = 14
STEPS = 20
RATE = 0.05

# 8 divides all sizes but the value residual's rank, which is 5.
SIZES = dataclasses.replace(CONFIG, vocab_size=32, remat="block", implementation="scan")
MODEL = RWKV7(SIZES)


def weights():
    """Draws the weights.

    With more noise the gradients of the same sums in another order, on one device, already lie as
    far apart as what is asked for here: at 0.05 half of it, at 0.03 a fifth.
    """
    return lively(SIZES, noise=0.03)


def batch(seed=0, rows=ROWS):
    """Makes rows of random ids; about half of the targets count."""
    draw = np.random.default_rng(seed)
    return {
        "tokens": np.asarray(tokens(rows, LENGTH + 1, SIZES, seed)),
        "mask": draw.integers(0, 2, (rows, LENGTH)).astype(np.float32),
    }


# Meshes on which weights are trained and no state: each axis has a state's run elsewhere.
OF_WEIGHTS = ("data 2 x fsdp 4",)

# The one mesh whose loss has an anchor: that computes the model three times and compiles as slowly.
ANCHORED = "data 2 x fsdp 2 x tensor 2"


def problems():
    """Makes the loss and the first parameters of what is trained, and the meshes that train it."""
    params = weights()
    state = random_state(SIZES)
    meshes = {name: mesh for name, mesh in MESHES.items() if name not in OF_WEIGHTS}
    anchored = {ANCHORED: meshes.pop(ANCHORED)}
    tuned = functools.partial(state_loss, MODEL, params, leaves=LEAVES[:3])
    return [
        ("state", tuned(anchor=0.1), state, anchored),
        ("state", tuned(), state, meshes),
        ("weights", pretrain_loss(MODEL), params, MESHES),
    ]


def worst(actual, expected) -> float:
    """Returns the largest relative error of a leaf."""
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    return max(relative_error(left, right) for left, right in pairs)


class Course(NamedTuple):
    """What a training run left.

    Attributes:
        losses: of each step.
        gradients: of the first step, leaf by leaf.
        program: the compiled step.
    """

    losses: list[float]
    gradients: list[np.ndarray]
    program: str


def train(mesh, loss, params, *, steps=STEPS, rows=ROWS, accumulate=1) -> Course:
    """Trains with momentum, which after one step is the gradient.

    Not with Adam: its first step is a sign, and tells rounding errors of small gradients apart.
    """
    tx = optax.sgd(RATE, momentum=0.9)
    step = make_train_step(loss, tx, mesh=mesh, accumulate=accumulate)
    state = sharding.place(mesh, TrainState.create(params, tx))
    losses = []
    gradients = []
    program = None
    for seed in range(steps):
        data = sharding.shard_batch(mesh, with_anchor(batch(seed, rows)))
        if program is None:
            program = step.lower(state, data).compile()
        state, metrics = program(*step.args, state, data)
        losses.append(float(metrics["loss"]))
        if seed == 0:
            moments = optax.tree.get(state.opt_state, "trace")
            gradients = [np.asarray(leaf) for leaf in jax.tree.leaves(moments)]
    print("trained", mesh and mesh.shape, time.process_time(), file=sys.stderr)
    return Course(losses, gradients, program.as_text())


def with_anchor(rows):
    """Adds the text on which a tuned model stays close to its base."""
    return {**rows, "anchor": rows["tokens"][::-1].copy()}


def collectives(text: str) -> dict[str, list[int]]:
    """Collects the sizes of what each kind of collective gives; devices alone send nothing."""
    found: dict[str, list[int]] = {}
    for line in text.splitlines():
        match = re.search(
            r"= (.+?) (all-gather|reduce-scatter|all-to-all|all-reduce|collective-permute)"
            r"(-start)?\(",
            line,
        )
        if match and "replica_groups={{0}," not in line:
            for shape in re.findall(r"\w+\[([\d,]*)\]", match[1]):
                size = int(np.prod([int(one) for one in shape.split(",") if one]))
                found.setdefault(match[2], []).append(size)
    return found


def shapes(text: str) -> set[str]:
    """Collects the shapes of all arrays of a program."""
    return set(re.findall(r"\w+\[[\d,]*\]", text))


def measure() -> dict:
    """Compares every mesh with one device."""
    found: dict = {}
    cases = problems()
    for name, loss, params, meshes in cases:
        alone = train(None, loss, params)
        for title, sizes in meshes.items():
            mesh = sharding.make_mesh(sizes, ROWS)
            course = train(mesh, loss, params)
            found[f"{name}, {title}"] = {
                "loss": relative_error(course.losses[0], alone.losses[0]),
                "gradient": worst(course.gradients, alone.gradients),
                "losses": relative_error(course.losses, alone.losses),
                "learnt": alone.losses[0] - alone.losses[-1],
                "collectives": collectives(course.program),
                "shapes": sorted(shapes(course.program)),
            }
    # After the last problem, the weights'.
    found["two stages"] = in_two_stages(loss, params, alone)
    mesh = sharding.make_mesh({"fsdp": 8}, ROWS)
    _, loss, params, _ = cases[1]
    # In two pieces; and rows that 8 devices do not divide, so that each computes all of them.
    for rows, accumulate in ((16, 2), (3, 1)):
        choices = {"steps": 1, "rows": rows, "accumulate": accumulate}
        course = train(mesh, loss, params, **choices)
        alone = train(None, loss, params, **choices)
        error = worst(course.gradients, alone.gradients)
        found[f"{rows} rows in {accumulate}"] = error
    found["int8"] = int8_error(mesh)
    found["undivided"] = sorted(
        {one.name for one in sharding.undivided(mesh, weights())}
    )
    return found


def in_two_stages(loss, params, alone) -> dict:
    """Compares a step whose gathers have two stages, as among more devices, with one device's."""
    mesh = sharding.make_mesh({"fsdp": 8}, ROWS)
    with mock.patch.object(sharding.collectives, "_FEW", 4):
        course = train(mesh, loss, params, steps=1)
    return {
        "loss": relative_error(course.losses[0], alone.losses[0]),
        "gradient": worst(course.gradients, alone.gradients),
        "collectives": collectives(course.program),
    }


def int8_error(mesh) -> float:
    """Compares the logits of 8-bit weights in shards with those of one device."""
    params = quantize(weights())
    ids = tokens(ROWS, LENGTH, SIZES)
    state = random_state(SIZES, ROWS)

    def logits(params):
        return MODEL.apply({"params": params}, ids, state)[0]

    alone = jax.jit(logits)(params)
    with sharding.use_mesh(mesh):
        together = jax.jit(logits)(sharding.place(mesh, params))
    return relative_error(together, alone)


if __name__ == "__main__":
    json.dump(measure(), sys.stdout)
