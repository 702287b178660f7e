"""Norm, largest entry and rank of a state, per head."""

import jax.numpy as jnp
import numpy as np
from tiny_models import CONFIG, random_state
from upscaled_states import SIZE, empty_state, filled

from rwkv7_jax.evaluation.head_statistics import head_statistics
from rwkv7_jax.model.state import init_state


def test_each_head_has_its_own_norm_and_largest_entry():
    state = random_state()
    statistics = head_statistics(state)
    assert list(statistics) == ["norm", "max", "rank"]
    matrix = np.asarray(state.wkv)[2, 0, 1]
    np.testing.assert_allclose(
        statistics["norm"][2, 1], np.linalg.norm(matrix), rtol=1e-6
    )
    assert statistics["max"][2, 1] == np.abs(matrix).max()


def test_an_outer_product_has_rank_1_and_the_identity_full_rank():
    wkv = np.zeros(init_state(CONFIG).wkv.shape, np.float32)
    wkv[0, 0, 0, 3, 5] = 1e-20
    wkv[0, 0, 1] = np.eye(CONFIG.head_size)
    statistics = head_statistics(init_state(CONFIG).replace(wkv=jnp.asarray(wkv)))
    np.testing.assert_allclose(statistics["norm"][0, 0], 1e-20, rtol=1e-6)
    np.testing.assert_allclose(statistics["rank"][0, 1], CONFIG.head_size, rtol=1e-5)


def test_an_upscaled_memory_has_its_own_columns():
    state = filled(empty_state())
    statistics = head_statistics(state)
    assert list(statistics)[3:] == ["upscaled norm", "upscaled max", "upscaled rank"]
    memory = np.asarray(state.upscaled.memory)[1, 0, 0]
    assert memory.shape == (CONFIG.head_size, SIZE)
    np.testing.assert_allclose(
        statistics["upscaled norm"][1, 0], np.linalg.norm(memory), rtol=1e-6
    )
