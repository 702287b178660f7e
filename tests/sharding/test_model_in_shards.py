"""The model, generation and scores on two devices whose weights lie in shards."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import SCANNED, SHALLOW, lively, random_state, tokens
from tolerances import SAME, assert_close, assert_trees_close

from rwkv7_jax import sharding
from rwkv7_jax.evaluation.scoring import token_nats
from rwkv7_jax.generation.generate import generate
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import init_state
from rwkv7_jax.tuning.upscaling import upscale

ROWS, LENGTH = 4, 7
MODEL = RWKV7(SCANNED)


@pytest.fixture(scope="module", params=["fsdp", "sequence", "tensor"])
def mesh(request):
    return sharding.make_mesh({request.param: 2}, ROWS)


@pytest.fixture(scope="module")
def params():
    return lively(SCANNED)


def in_shards(mesh, function, params, *arguments):
    """Runs a function of weights under a mesh, with the weights in shards."""
    with sharding.use_mesh(mesh):
        return function(sharding.place(mesh, params), *arguments)


@pytest.mark.parametrize("method", [None, "hidden", "trace", RWKV7.trace])
@pytest.mark.parametrize("rows", [ROWS, 3], ids=["shared rows", "rows of both"])
def test_every_call_gives_what_one_device_gives(mesh, params, method, rows):
    ids = tokens(rows, LENGTH, SCANNED)
    lengths = jnp.asarray([LENGTH, 0, 3, 1][:rows])

    @jax.jit
    def call(params, state):
        return MODEL.apply({"params": params}, ids, state, lengths, method=method)

    state = random_state(SCANNED, rows)
    alone = call(params, state)
    assert_trees_close(in_shards(mesh, call, params, state), alone, SAME["op"])


def test_an_upscaled_memory_that_rows_share_is_read_by_each(mesh):
    config = dataclasses.replace(SHALLOW, implementation="scan")
    model = RWKV7(config)
    params = lively(config)
    ids = tokens(ROWS, LENGTH, config)
    wide = upscale(model, params, ids, size=48, dynamics="static")
    noise = np.random.default_rng(0).normal(size=wide.upscaled.memory.shape)
    memory = jnp.asarray(noise, jnp.float32)
    one = wide.replace(upscaled=wide.upscaled.replace(memory=memory))
    state = init_state(config, ROWS).replace(upscaled=one.upscaled)

    @jax.jit
    def call(params, state):
        return model.apply({"params": params}, ids, state)

    alone = call(params, state)
    # Through the memory's features, which are squares of sums.
    assert_trees_close(in_shards(mesh, call, params, state), alone, SAME["model"])


@pytest.mark.parametrize("remat", ["none", "op", "block"])
def test_gradients_of_weights_in_shards_are_those_of_one_device(mesh, params, remat):
    model = RWKV7(dataclasses.replace(SCANNED, remat=remat))
    ids = tokens(ROWS, LENGTH, SCANNED)
    state = random_state(SCANNED, ROWS)

    @jax.jit
    @jax.grad
    def slope(params):
        logits, _ = model.apply({"params": params}, ids, state)
        return jnp.mean(jnp.square(logits))

    alone = slope(params)
    assert_trees_close(in_shards(mesh, slope, params), alone, SAME["model"])


def test_generation_draws_the_tokens_of_one_device(mesh, params):
    def draw(params):
        prompts = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10]]
        state = init_state(SCANNED)
        key = jax.random.key(0)
        return generate(MODEL, params, prompts, state, tokens=6, key=key).tokens

    alone = draw(params)
    together = in_shards(mesh, draw, params)
    for left, right in zip(together, alone, strict=True):
        np.testing.assert_array_equal(left, right)


def test_scores_are_those_of_one_device(mesh, params):
    ids = np.asarray(tokens(5, LENGTH, SCANNED))

    def score(params):
        return token_nats(MODEL, params, init_state(SCANNED), ids, rows=2)

    assert_close(in_shards(mesh, score, params), score(params), SAME["op"])


def test_ids_out_of_range_are_embedded_as_zeros_in_shards_too(mesh, params):
    ids = jnp.asarray([[SCANNED.vocab_size, -1, 0]] * ROWS)

    @jax.jit
    def call(params, ids):
        return MODEL.apply({"params": params}, ids, init_state(SCANNED, ROWS))[0]

    alone = call(params, ids)
    assert_close(in_shards(mesh, call, params, ids), alone, SAME["op"])
