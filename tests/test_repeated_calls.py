"""Calls outside of any program, as in a notebook: the second one compiles nothing.

Gradients are of a function that is made anew each time, as a cell makes it that is run again.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import wkv_inputs
from tiny_models import TINIEST, lively, random_state, tokens
from tolerances import SAME, assert_close

import rwkv7_jax as rwkv
from pallas_kernels import wkv7_reference
from pallas_kernels.eager import is_eager
from rwkv7_jax.based import (
    Based,
    BasedConfig,
    features,
    init_based_state,
    linear_attention,
)
from rwkv7_jax.data.batch import Batch
from rwkv7_jax.observer import init_observer, observer_loss, propose
from rwkv7_jax.training.losses import next_token_loss
from rwkv7_jax.training.projection_statistics import layer_statistics
from rwkv7_jax.tuning import calibrate, state_statistics

MODEL = rwkv.RWKV7(TINIEST)
IDS = tokens(2, 7, TINIEST)
KEY = jax.random.key(0)
PROGRAMS = []


def note_program(event, seconds, **_):
    if event.endswith("backend_compile_duration"):
        PROGRAMS.append(seconds)


jax.monitoring.register_event_duration_secs_listener(note_program)


def gradient(function, *arguments):
    """Calls a new function's gradient."""
    return jax.grad(lambda *values: jnp.sum(function(*values)))(*arguments)


@functools.cache
def params():
    return lively(TINIEST)


@functools.cache
def two_states():
    return random_state(TINIEST, 2)


@functools.cache
def batch():
    ids = tokens(2, 8, TINIEST)
    return Batch(tokens=ids, mask=jnp.ones((2, 7)))


def logits(state, ids=IDS, weights=None):
    return MODEL.apply({"params": weights or params()}, ids, state)[0]


def op(state, implementation):
    return wkv_inputs.op(wkv_inputs.INPUTS, state, implementation=implementation)[0]


def pretrain_gradient():
    loss = rwkv.pretrain_loss(MODEL)
    return gradient(lambda weights: loss(weights, batch())[0], params())


def state_gradient():
    loss = rwkv.state_loss(MODEL, params())
    return gradient(lambda state: loss(state, batch())[0], rwkv.init_state(TINIEST))


def mapped():
    """Maps over pairs of a state and a row."""
    rows = jax.tree.map(lambda leaf: leaf[:, :, None], two_states())
    one = lambda state, ids: logits(state, ids[None])  # noqa: E731
    return jax.vmap(one, in_axes=(1, 0))(rows, IDS)


def linear_gradient():
    q = jnp.ones((2, 5, 1, 3))
    memory = jnp.zeros((2, 1, features(q).shape[-1], 4))
    return gradient(lambda q: linear_attention(q, q, q, memory, chunk=2)[0], q)


def based_gradient():
    layers = ("linear", "window")
    config = BasedConfig(
        vocab_size=13, width=8, layers=layers, feature_size=2, window=3
    )
    model = Based(config)
    state = init_based_state(config, 2)
    variables = model.init(KEY, IDS, state)
    return gradient(lambda weights: model.apply(weights, IDS, state)[0], variables)


@functools.cache
def observer():
    return init_observer(TINIEST, TINIEST, KEY)


def observer_gradient():
    shells, own = observer()
    loss = observer_loss(shells, MODEL, params())
    split = np.array([2, 3], np.int32)
    return gradient(lambda own: loss(own, batch().replace(split=split))[0], own)


@functools.cache
def upscaled():
    return rwkv.upscale(MODEL, params(), IDS, size=8, dynamics="delta")


def moments(start, leaf):
    statistics = state_statistics(MODEL, params(), leaves=(leaf,))
    return jax.tree.leaves(statistics(start, batch()))


def decorrelated(mode):
    """Moves a matrix once, with a new optimizer."""
    tx = rwkv.decorrelate(optax.sgd(1.0), mode=mode)
    leaf = jnp.ones((2, 3, 4))
    statistics = jnp.broadcast_to(jnp.diag(jnp.arange(1.0, 5.0)), (2, 4, 4))
    return tx.update(leaf, tx.init(leaf), leaf, stats=statistics)[0]


CALLS = {
    "scan": lambda: op(wkv_inputs.STATE, "scan"),
    "scan's gradient": lambda: gradient(lambda s: op(s, "scan"), wkv_inputs.STATE),
    "chunked": lambda: op(wkv_inputs.STATE, "chunked"),
    "chunked's gradient": lambda: gradient(
        lambda s: op(s, "chunked"), wkv_inputs.STATE
    ),
    "reference": lambda: wkv7_reference(wkv_inputs.INPUTS, wkv_inputs.STATE),
    "init": lambda: MODEL.init(KEY, IDS, rwkv.init_state(TINIEST, 2)),
    "apply": lambda: logits(two_states()),
    "gradient of states": lambda: gradient(logits, two_states()),
    "gradient of weights": lambda: gradient(
        lambda weights: logits(two_states(), weights=weights), params()
    ),
    "vmap": mapped,
    "pretrain_loss": pretrain_gradient,
    "state_loss": state_gradient,
    "next_token_loss": lambda: next_token_loss(MODEL, params(), two_states(), batch()),
    "upscale": lambda: rwkv.upscale(MODEL, params(), IDS, dynamics="delta"),
    "init_observer": lambda: init_observer(TINIEST, TINIEST, KEY)[1],
    "propose": lambda: propose(*observer(), IDS),
    "observer_loss": observer_gradient,
    "state_statistics": lambda: moments(rwkv.init_state(TINIEST), "wkv"),
    "state_statistics of a memory": lambda: moments(upscaled(), "memory"),
    "layer_statistics": lambda: layer_statistics(MODEL)(params(), batch()),
    "calibrate": lambda: calibrate(jnp.ones((2, 9, 2, 4)), size=5),
    "decorrelate online": lambda: decorrelated("online"),
    "decorrelate exact": lambda: decorrelated("exact"),
    "linear_attention": linear_gradient,
    "Based": based_gradient,
}


@pytest.mark.parametrize("name", CALLS)
def test_a_second_call_compiles_nothing(unchecked, name):
    first = CALLS[name]()
    before = len(PROGRAMS)
    assert before
    second = CALLS[name]()
    assert len(PROGRAMS) == before
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_an_eager_call_sends_nothing_to_the_device():
    state = two_states()
    first = logits(state)
    with jax.transfer_guard_host_to_device("disallow"):
        second = logits(state)
    np.testing.assert_array_equal(first, second)


def test_an_eager_call_matches_a_compiled_one():
    state = two_states()
    assert_close(logits(state), jax.jit(logits)(state), SAME["model"])
    alone = gradient(logits, state).wkv
    inside = jax.jit(functools.partial(gradient, logits))(state).wkv
    assert_close(alone, inside, SAME["gradient"])


def test_initial_weights_are_the_same_eager_and_compiled():
    state = rwkv.init_state(TINIEST, 2)
    alone = MODEL.init(KEY, IDS, state)
    inside = jax.jit(MODEL.init)(KEY, IDS, state)
    jax.tree.map(np.testing.assert_array_equal, alone, inside)


def test_grad_and_vmap_do_not_compile_but_loops_do():
    found = []

    def look(x):
        found.append(is_eager())
        return 2.0 * x

    look(1.0)
    jax.grad(look)(1.0)
    jax.vmap(look)(jnp.ones(2))
    jax.grad(jax.grad(look))(1.0)
    assert found == [True] * 4
    found.clear()
    for program in (
        jax.jit(look),
        jax.grad(jax.jit(look)),
        jax.checkpoint(look),
        lambda x: jax.lax.map(look, jnp.full(2, x)),
        lambda x: jax.eval_shape(look, x),
        jax.make_jaxpr(look),
    ):
        # Traces of one function are kept, and it would not look again.
        jax.clear_caches()
        program(1.0)
    assert found == [False] * len(found) and len(found) >= 6
