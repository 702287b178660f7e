"""What a backward pass keeps of the forward pass: how much; no gradient depends on it."""

import contextlib
import dataclasses
import io
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals
from tolerances import assert_trees_close

from pallas_kernels import platforms
from rwkv7_jax import sharding
from rwkv7_jax.model import remat
from rwkv7_jax.model.block import Block
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import init_state

SMALL = RWKV7Config(
    vocab_size=16, num_layers=2, width=16, head_size=8, implementation="chunked"
)
# Axes of different lengths, so that shapes tell: [L-1 B T ...].
STORED = RWKV7Config(
    vocab_size=16,
    num_layers=6,
    width=128,
    dtype="bfloat16",
    implementation="chunked",
)
ROWS, LENGTH = 3, 64


def block_gradients(keep, dtype):
    """The gradients of one block's weights, input and state, in a dtype throughout."""
    noise = np.random.default_rng(0)

    def drawn(leaf):
        return jnp.asarray(noise.normal(size=leaf.shape, scale=0.3), dtype)

    rows, length = 2, 19
    x = drawn(jnp.zeros((rows, length, SMALL.width)))
    state = jax.tree.map(lambda leaf: leaf[0], init_state(SMALL, rows))
    state = jax.tree.map(drawn, state)
    shapes = jax.eval_shape(
        Block(SMALL, False, ()).init, jax.random.key(0), x, state, 1, x, None
    )
    params = jax.tree.map(drawn, shapes)
    block = keep(Block)(SMALL, False, ())

    @jax.jit
    @jax.grad
    def slope(arguments):
        params, x, state = arguments
        found, (memories, _, _) = block.apply(params, x, state, 1, x[:, ::-1], None)
        ends = jax.tree.leaves((found, memories))
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in ends)

    return slope((params, x, state))


@pytest.mark.parametrize(
    ("dtype", "bar"),
    [pytest.param("float32", 1e-6, marks=pytest.mark.slow), ("float64", 1e-12)],
)
def test_gradients_match_plain_autodiff(dtype, bar):
    with jax.enable_x64(dtype == "float64"):
        plain = block_gradients(lambda block: block, dtype)
        for choice in remat.CHOICES:
            found = block_gradients(
                lambda block, choice=choice: remat.keep_for_backward(
                    block, choice, is_scanned=False
                ),
                dtype,
            )
            assert_trees_close(found, plain, bar)


def hidden(config, rows):
    """The model's last hidden states as a function of weights and state; both as shapes."""
    model = RWKV7(config)
    tokens = jnp.zeros((rows, LENGTH), jnp.int32)
    state = init_state(config, rows)
    made = jax.eval_shape(model.init, jax.random.key(0), tokens, state)

    def run(params, state):
        x, end = model.apply({"params": params}, tokens, state, method="hidden")
        return x, end.wkv

    return run, made["params"], state


def stored_bytes(config: RWKV7Config, trained: str) -> tuple[float, float]:
    """Bytes that a layer keeps for the backward pass, a token and channel: vectors, and states."""
    run, shapes, state = hidden(config, ROWS)
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        if trained == "state":
            print_saved_residuals(lambda state: run(params, state), state)
        else:
            print_saved_residuals(run, params, state)
    vectors = states = 0
    lines = re.findall(r"^([a-z]+)(\d+)\[([\d,]+)\](.*)", printed.getvalue(), re.M)
    for _, bits, sizes, origin in lines:
        shape = tuple(map(int, sizes.split(",")))
        size = int(bits) // 8 * math.prod(shape)
        if shape[:3] == (config.num_layers - 1, ROWS, LENGTH):
            vectors += size
        # [L-1 C B H Nk Nv], which only the scan over layers makes.
        elif "scan" in origin and len(shape) == 6:
            states += size
    of_all = (config.num_layers - 1) * ROWS * LENGTH * config.width
    return vectors / of_all, states / of_all


# Kept under "none": x, r, k, v, four low ranks, y, the result of W_o and 4 D hidden channels, in 16
# bits; at this width the low ranks' own channels are 2.5 bytes.
@pytest.mark.parametrize("trained", ["state", "weights"])
@pytest.mark.parametrize(("choice", "bar"), [("none", 31), ("op", 4), ("block", 2)])
def test_a_layer_saves_few_bytes_for_its_backward_pass(choice, bar, trained):
    config = dataclasses.replace(STORED, remat=choice)
    vectors, states = stored_bytes(config, trained)
    assert bar - 2 < vectors <= bar
    # Float32 states of 64 x 64 every 16 tokens.
    assert states == (0 if choice == "block" else 4 * 64 / 16)


def test_sums_over_heads_are_not_saved_where_they_are_products(monkeypatch):
    kept_here, _ = stored_bytes(STORED, "weights")
    monkeypatch.setattr(platforms, "target_platform", lambda: "tpu")
    assert stored_bytes(STORED, "weights")[0] == kept_here


def lowered_gradient(choice: str):
    """Lowers a gradient in which each run of the WKV op is one loop, over its chunks."""
    # XLA would unroll the loop over layers if it had one turn.
    config = dataclasses.replace(SMALL, num_layers=3, remat=choice)
    run, params, state = hidden(config, 2)
    slope = jax.grad(lambda *x: sum(jnp.sum(leaf) for leaf in run(*x)))
    return jax.jit(slope).lower(params, state)


def test_the_op_is_recomputed_only_with_its_block():
    once, kept, again = map(lowered_gradient, ("none", "op", "block"))
    count = kept.as_text().count("stablehlo.while")
    assert once.as_text().count("stablehlo.while") == count > 0
    # XLA must not join the second runs with the first: that of layer 0, and the one inside the
    # backward pass's loop over layers.
    loops = [x.compile().as_text().count(" while(") for x in (kept, again)]
    assert loops[0] == loops[1] - 2 > 0


def gathers(choice: str) -> int:
    """Counts the gathers of a compiled gradient of weights that two devices share."""
    config = dataclasses.replace(SMALL, num_layers=3, remat=choice)
    run, params, state = hidden(config, 2)
    mesh = sharding.make_mesh({"fsdp": 2}, 2)
    slope = jax.grad(lambda *x: sum(jnp.sum(leaf) for leaf in run(*x)))
    with sharding.use_mesh(mesh):
        lowered = jax.jit(slope).lower(sharding.abstract_shards(mesh, params), state)
        text = lowered.compile().as_text()
    assert text
    return len(re.findall(r" all-gather(?:-start)?\(", text))


@pytest.mark.slow
def test_gathered_weights_are_gathered_again_and_never_saved(monkeypatch):
    again = gathers("block")
    assert gathers("none") == gathers("op") == again
    everything = jax.checkpoint_policies.everything_saveable
    monkeypatch.setitem(remat._KEPT, "none", everything)
    assert gathers("none") < again
