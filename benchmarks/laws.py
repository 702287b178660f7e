"""Exact laws of upscaled, decorrelated and stacked states, checked on the toy base models.

Each function returns its numbers and `passed`: whether they meet the target in its docstring.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import rwkv7_jax as rwkv
from benchmarks.lab import STANDARD, WHITENED, base, batch, start, tune
from rwkv7_jax.model.recurrence import wkv7_sharded, wkv_inputs_of
from rwkv7_jax.optim.decorrelation import decorrelate
from rwkv7_jax.tuning.read_statistics import initial_state_read_vectors

Numbers = dict[str, Any]


def identity() -> Numbers:
    """Checks that an empty memory leaves logits bit for bit as they are, in all additive forms."""
    model, params = base("small")
    ids = batch("mixture", 0, rows=16).inputs
    run = jax.jit(lambda params, state: model.apply({"params": params}, ids, state)[0])
    plain = run(params, rwkv.init_state(model.config, 16))
    found = {}
    for dynamics in ("static", "decay", "delta"):
        wide = start(
            "small", "mixture", dataclasses.replace(WHITENED, dynamics=dynamics), 0
        )
        found[dynamics] = float(
            jnp.abs(run(params, rwkv.repeat(wide, 16)) - plain).max()
        )
    return {"largest_difference": found, "passed": not any(found.values())}


def linearity() -> Numbers:
    """Checks that a start state is read linearly: y(S) - y(0) = S psi up to 1e-5."""
    model, params = base("small")
    ids = batch("mixture", 0, rows=8).inputs
    zero = rwkv.init_state(model.config, 8)
    *_, trace = model.apply({"params": params}, ids, zero, method="trace")
    parts = {name: part[0] for name, part in trace.items()}
    state = jax.random.normal(jax.random.key(0), zero.wkv[0].shape)

    def read(state):
        return wkv7_sharded(wkv_inputs_of(parts), state)[0]

    wanted = jnp.einsum(
        "bhvk,bthk->bthv", state, initial_state_read_vectors(parts), precision="highest"
    )
    error = jnp.linalg.norm(read(state) - read(0 * state) - wanted) / jnp.linalg.norm(
        wanted
    )
    return {"relative_error": float(error), "passed": float(error) <= 1e-5}


def reparametrisation() -> Numbers:
    """Compares 20 steps of SGD on S' = S R^-1 with 20 of the transform on S: within 1e-5."""
    key = jax.random.split(jax.random.key(0), 4)
    inputs = jax.random.normal(key[0], (64, 12))
    target = jax.random.normal(key[1], (64, 7))
    turn = jnp.eye(12) + 0.2 * jax.random.normal(key[2], (12, 12))

    def loss(matrix):
        return jnp.mean(jnp.square(inputs @ matrix.T - target))

    tx = decorrelate(optax.sgd(0.05), rate=0.0)
    start = jax.random.normal(key[3], (7, 12))
    params: Any = {"s": start}
    state: Any = tx.init(params)
    state = state._replace(whitener={"s": turn})
    in_new_basis = start @ jnp.linalg.inv(turn)
    for _ in range(20):
        updates, state = tx.update({"s": jax.grad(loss)(params["s"])}, state, params)
        params = optax.apply_updates(params, updates)
        gradient = jax.grad(lambda basis: loss(basis @ turn))(in_new_basis)
        in_new_basis = in_new_basis - 0.05 * gradient
    error = float(jnp.abs(params["s"] - in_new_basis @ turn).max())
    return {"largest_difference": error, "passed": error <= 1e-5}


def serving() -> Numbers:
    """Compares four tuned states in one batch with four single runs: logits within 1e-5."""
    model, params = base("small")
    states = [
        tune(
            "steer",
            STANDARD,
            seed=s,
            steps=5,
        ).state
        for s in range(2)
    ]
    states += [
        tune(
            "steer",
            WHITENED,
            seed=s,
            steps=5,
        ).state
        for s in range(2)
    ]
    ids = batch("sequence", 0, rows=8).inputs
    state_of_row = np.arange(8) % 4
    run = jax.jit(
        lambda params, ids, state: model.apply({"params": params}, ids, state)[0]
    )
    together = run(params, ids, rwkv.select(rwkv.stack(states), state_of_row))
    rows = []
    for row, number in enumerate(state_of_row):
        rows.append(run(params, ids[row : row + 1], states[number])[0])
    alone = jnp.stack(rows)
    largest = jnp.abs(alone).max()
    error = float(jnp.abs(together - alone).max() / largest)
    return {"relative_difference": error, "passed": error <= 1e-5}
