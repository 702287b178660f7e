"""The first block, which is outside of the scan over the others, is computed again as they are."""

import jax
import jax.numpy as jnp
import pytest

from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.model.remat import CHOICES
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import init_state

BARRIER = "optimization_barrier"


def program(layers, remat):
    """The text of a start state's gradient, for a TPU and not yet compiled."""
    config = RWKV7Config(
        vocab_size=16,
        num_layers=layers,
        width=32,
        head_size=16,
        remat=remat,
        implementation="scan",
    )
    model = RWKV7(config)
    tokens = jnp.zeros((1, 3), jnp.int32)
    start = init_state(config)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens, start)["params"]

    def loss(state, params):
        return model.apply({"params": params}, tokens, state)[0].sum()

    traced = jax.jit(jax.grad(loss)).trace(start, params)
    return traced.lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize("remat", CHOICES)
@pytest.mark.parametrize("layers", [1, 3])
def test_a_barrier_keeps_the_compiler_from_merging_its_two_passes(layers, remat):
    # XLA merges what it can see twice, and would keep the first pass's results to the end. It
    # cannot see into two loops, so the other blocks need no barrier.
    assert program(layers, remat).count(BARRIER) == 1
