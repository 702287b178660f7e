"""The chains round the recurrence: the gradients of plain autodiff from fewer stored numbers."""

import contextlib
import io
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals
from tolerances import assert_trees_close

from rwkv7_jax.model import chains, layers
from rwkv7_jax.model.block import Block
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.model.state import init_state, layer_states

BATCH, LENGTH, HEADS, SIZE = 2, 7, 3, 4
WIDTH = HEADS * SIZE


def draw(dtype):
    noise = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(noise.normal(size=shape), dtype)

    tokens = (BATCH, LENGTH, WIDTH)
    heads = (BATCH, LENGTH, HEADS, SIZE)
    vectors = tuple(normal(WIDTH) for _ in range(6))
    return {
        "token_shift": (normal(*tokens), normal(BATCH, WIDTH), vectors),
        "log_decay": (normal(*tokens), normal(WIDTH)),
        "mix_values": (*(normal(*tokens) for _ in range(3)), normal(WIDTH)),
        "removal_and_replacement": (
            normal(*tokens),
            normal(*tokens),
            normal(WIDTH),
            normal(HEADS, SIZE),
            normal(WIDTH),
        ),
        "read_out": (
            normal(*heads),
            tuple(normal(*heads) for _ in range(3)),
            normal(*tokens),
            normal(HEADS, SIZE),
            (normal(WIDTH), normal(WIDTH)),
        ),
        "squared_relu": (normal(*tokens),),
        "layer_norm": (normal(*tokens), normal(WIDTH), normal(WIDTH)),
    }


def plain_shift(x, before, coefficients):
    previous = layers.previous_tokens(x, before)
    return tuple(layers.lerp(x, previous, vector) for vector in coefficients)


def forms(name):
    """A chain, and the same function without its rule for the backward pass."""
    if name == "token_shift":
        return chains.token_shift, plain_shift
    if name == "layer_norm":
        of, last = layers.layer_norm, (1e-5,)
    else:
        of, last = getattr(chains, name), (64e-5,) if name == "read_out" else ()

    def ours(*x):
        return of(*x, *last)

    def plain(*x):
        return of.__wrapped__(*x, *last)

    return ours, plain


@pytest.mark.parametrize(("dtype", "bar"), [("float32", 1e-6), ("float64", 1e-6)])
@pytest.mark.parametrize("name", draw("float32"))
def test_gradients_equal_those_of_plain_autodiff(name, dtype, bar):
    with jax.enable_x64(dtype == "float64"):
        inputs = draw(dtype)[name]
        results = []
        for function in forms(name):

            def loss(inputs, function=function):
                found = jax.tree.leaves(function(*inputs))
                return sum(jnp.sum(jnp.sin(leaf)) for leaf in found)

            results.append(jax.jit(jax.value_and_grad(loss))(inputs))
    assert_trees_close(results[0], results[1], bar)


def stored_bytes(trained: str) -> float:
    """Bytes of one layer's activations that are kept for the backward pass, a token and channel.

    The recurrence's states are left out: how many there are depends on the implementation.
    """
    config = RWKV7Config(
        vocab_size=64,
        num_layers=2,
        width=128,
        dtype="bfloat16",
        implementation="chunked",
    )
    rows, length = 2, 64
    block = Block(config, False, ())
    x = jnp.zeros((rows, length, config.width), jnp.bfloat16)
    state = jax.tree.map(lambda leaf: leaf[0], layer_states(init_state(config, rows)))

    def run(params, x, state):
        out, (memories, _, _) = block.apply(params, x, state, 1, x, None)
        return out, memories.wkv

    shapes = jax.eval_shape(block.init, jax.random.key(0), x, state, 1, x, None)
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        if trained == "state":
            print_saved_residuals(lambda x, state: run(params, x, state), x, state)
        else:
            print_saved_residuals(run, params, x, state)
    total = 0
    for kind, sizes in re.findall(
        r"^(f32|bf16|bool)\[([\d,]+)\]", printed.getvalue(), re.M
    ):
        shape = tuple(map(int, sizes.split(",")))
        if shape[:2] == (rows, length):
            total += {"f32": 4, "bf16": 2, "bool": 1}[kind] * math.prod(shape)
    return total / (rows * length * config.width)


@pytest.mark.parametrize(("trained", "bar"), [("state", 50), ("weights", 80)])
def test_a_layer_stores_few_bytes(trained, bar):
    assert stored_bytes(trained) <= bar
