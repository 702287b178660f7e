"""Laws of an observer's proposals and of their error."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_observers
from tiny_observers import LENGTH, ROWS, SMALL, TEACHER
from tolerances import assert_close

from rwkv7_jax.model.state import init_state
from rwkv7_jax.observer.observer import (
    fraction_of_variance_unexplained,
    init_observer,
    moments,
    propose,
    state_moments,
)

mirror = pytest.fixture(tiny_observers.mirror, scope="module")
teacher = pytest.fixture(tiny_observers.teacher, scope="module")
made = pytest.fixture(tiny_observers.made, scope="module")
batch = pytest.fixture(tiny_observers.batch, scope="module")
own = pytest.fixture(tiny_observers.own, scope="module")
proposed = pytest.fixture(tiny_observers.proposed, scope="module")


def selecting(mirror, places):
    """The mirror with maps that put its state number `places[i]` at layer and head i."""
    observer, params = mirror
    maps = np.einsum(
        "ab,vm->abvm", np.eye(len(places))[places], np.eye(TEACHER.head_size)
    )
    maps = jnp.asarray(maps.reshape(params["left"].shape), jnp.float32)
    return observer, params | {"left": maps, "right": maps}


def assert_same_states(found, expected):
    """Every entry, by the size of the states: sums of large terms may end small."""
    size = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6 * size)
    assert_close(found, expected, 1e-6)


def test_an_observer_equal_to_the_teacher_proposes_its_states(mirror, batch, own):
    same = selecting(mirror, [0, 1, 2, 3])
    found = propose(*same, batch["tokens"][:, :-1], batch["split"])
    assert_same_states(found.wkv, own[1].wkv)


def test_a_map_moves_states_to_their_layer_and_head(mirror, batch, own):
    swapped = selecting(mirror, [3, 2, 1, 0])
    found = propose(*swapped, batch["tokens"][:, :-1], batch["split"])
    assert_same_states(found.wkv, own[1].wkv[::-1, :, ::-1])


def test_a_proposal_is_the_mapped_state_of_its_own_row(made, batch, proposed):
    found = propose(*made, batch["tokens"][:, :-1], batch["split"])
    assert_same_states(found.wkv, proposed[1].wkv)
    assert not found.att_shift.any() and not found.ffn_shift.any()


def test_an_empty_prompt_proposes_the_bias(made, batch):
    found = propose(*made, batch["tokens"][:, :-1], np.zeros(ROWS, np.int32))
    np.testing.assert_array_equal(found.wkv[:, 2], made[1]["bias"])


def test_new_parameters_are_float32_where_float64_is_enabled():
    with jax.enable_x64(True):
        params = jax.eval_shape(
            lambda key: init_observer(SMALL, TEACHER, key)[1], jax.random.key(0)
        )
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_proposal_has_the_shapes_and_dtypes_of_the_teachers_states(made, dtype):
    observer, params = made
    teacher = dataclasses.replace(TEACHER, dtype=dtype)
    observer = dataclasses.replace(observer, teacher=teacher)
    prompts = jnp.zeros((2, 3), jnp.int32)
    proposed = jax.eval_shape(lambda p: propose(observer, p, prompts), params)
    assert proposed == jax.eval_shape(lambda: init_state(teacher, 2))


def test_tokens_after_the_split_do_not_move_the_proposal(made, batch):
    observer, params = made
    inputs = batch["tokens"][:, :-1]
    later = np.arange(LENGTH)[None] >= batch["split"][:, None]
    other = np.where(later, (inputs + 7) % 23, inputs)
    one, two = (
        propose(observer, params, x, batch["split"]).wkv for x in (inputs, other)
    )
    np.testing.assert_array_equal(one, two)


def test_a_new_observer_proposes_states_of_the_scale_of_its_own(mirror, batch, own):
    found = propose(*mirror, batch["tokens"][:, :-1], batch["split"])
    assert 0.3 < float(jnp.std(found.wkv) / jnp.std(own[1].wkv)) < 3
    # Whatever the number of heads whose states a proposal sums.
    for name in ("left", "right"):
        maps = mirror[1][name]
        terms = maps.shape[-1] ** 2 * maps.shape[2]
        assert float(jnp.std(maps)) == pytest.approx(terms**-0.25, rel=0.05)


def test_a_perfect_proposal_has_error_0_and_the_mean_has_error_1(own):
    wkv = own[1].wkv
    mean, variance = moments(wkv)
    assert float(fraction_of_variance_unexplained(wkv, wkv, variance).max()) == 0.0
    constant = jnp.broadcast_to(mean[:, None], wkv.shape)
    assert float(
        fraction_of_variance_unexplained(constant, wkv, variance).mean()
    ) == pytest.approx(1.0, rel=1e-5)


def test_a_constant_head_gives_a_finite_loss(own):
    wkv = own[1].wkv.at[1, :, 0].set(0.25)
    found = fraction_of_variance_unexplained(wkv + 1e-4, wkv, moments(wkv).variance)
    assert float(found.max()) < 10
    still = jnp.ones_like(wkv)
    assert not fraction_of_variance_unexplained(
        still, still, moments(still).variance
    ).any()


def test_moments_of_prompts_match_the_states_of_the_rows(teacher, batch, own):
    found = state_moments(*teacher, batch["tokens"][:, :-1], batch["split"])
    wkv = own[1].wkv
    np.testing.assert_allclose(found.mean, wkv.mean(1), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.variance, wkv.var(1).mean((2, 3)), rtol=1e-4)
