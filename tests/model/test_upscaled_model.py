"""A model with an upscaled memory: what an empty one leaves alone, what a full one reads."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import CONFIG, QUICK, SCANNED, SHALLOW, lively, random_state, tokens
from tolerances import AS_USERS
from upscaled_states import ADDITIVE, SIZE, empty_state, filled

from rwkv7_jax.generation.generate import generate
from rwkv7_jax.model.kernel_features import unit_vectors
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import init_state, repeat, select, stack
from rwkv7_jax.tuning.state_arithmetic import scaled
from rwkv7_jax.tuning.upscaling import fold_feature_map, upscale

B, T = 2, 19
depths = pytest.mark.parametrize(
    "config",
    [QUICK, pytest.param(SCANNED, marks=pytest.mark.slow)],
    ids=["shallow", "deep"],
)

# Decay alone is also what delta does, besides erasing.
kinds = pytest.mark.parametrize(
    "dynamics", ["static", pytest.param("decay", marks=pytest.mark.slow), "delta"]
)


@pytest.fixture(scope="module")
def model():
    return RWKV7(SCANNED)


@pytest.fixture(scope="module")
def params():
    return lively()


# What upscaled states are calibrated on.
TEXT = (6, 40)


@pytest.fixture(scope="module")
def states(model, params):
    """An empty upscaled state of every additive kind."""
    text = tokens(*TEXT, seed=5)
    return {
        name: upscale(model, params, text, size=SIZE, dynamics=name)
        for name in ADDITIVE
    }


@pytest.fixture(scope="module")
def run(params):
    return functools.partial(plainly(SCANNED), params)


def _apply(model, params, ids, state):
    return model.apply({"params": params}, ids, state)


@functools.cache
def plainly(config):
    """The model of weights, tokens and a state, compiled."""
    return jax.jit(functools.partial(_apply, RWKV7(config)))


@functools.cache
def as_users(config):
    """Weights are arguments, else they would be folded, and rounded, with what is near them."""
    step = jax.jit(functools.partial(_apply, RWKV7(config)), compiler_options=AS_USERS)
    return functools.partial(step, lively(config))


# Of one layer; the paper's table measures several (E1).
@pytest.mark.parametrize(
    "dynamics",
    [
        "static",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ADDITIVE
            if name != "static"
        ),
    ],
)
def test_an_empty_memory_is_bit_exact_with_the_base_model(dynamics):
    run = as_users(SHALLOW)
    ids = tokens(B, T)
    start = random_state(SHALLOW, batch=B)
    base, end = run(ids, start)
    state = start.replace(upscaled=repeat(empty_state(SHALLOW, dynamics), B).upscaled)
    logits, wide_end = run(ids, state)
    assert (logits == base).all()
    assert (wide_end.wkv == end.wkv).all() and (
        wide_end.ffn_shift == end.ffn_shift
    ).all()
    assert not np.any(wide_end.upscaled.memory)


@kinds
def test_a_full_memory_changes_the_logits(run, states, dynamics):
    ids = tokens(1, T)
    base, changed = (
        run(ids, state)[0] for state in (init_state(CONFIG), filled(states[dynamics]))
    )
    assert float(jnp.abs(changed - base).max()) > 0.01


def test_only_a_memory_that_erases_has_landmarks_among_removal_keys(
    model, params, states
):
    start = init_state(SCANNED, TEXT[0])
    arguments = (tokens(*TEXT, seed=5), start)
    *_, trace = model.apply(
        {"params": params}, *arguments, method="trace", names=("r", "a")
    )
    near = {}
    for name in ("static", "delta"):
        # [L H M N], and [L H B*T N] below.
        landmarks = np.asarray(states[name].upscaled.features.landmarks[:, 0])
        for source, vectors in (("r", trace["r"]), ("a", -trace["a"])):
            flat = vectors.reshape(len(vectors), -1, *vectors.shape[3:])
            points = unit_vectors(flat.swapaxes(1, 2))
            cosines = np.einsum("lhmn,lhpn->lhmp", landmarks, points)
            near[name, source] = cosines.max(-1) > 1 - 1e-4
    assert near["static", "r"].all() and not near["static", "a"].any()
    assert (near["delta", "r"] | near["delta", "a"]).all()
    assert near["delta", "a"].any((1, 2)).all()


def test_upscaling_in_the_papers_form_warns_that_it_may_diverge(model, params):
    with pytest.warns(UserWarning, match=r"removes up to .* times what a step may"):
        state = upscale(
            model,
            params,
            tokens(2, 30),
            size=64,
            dynamics="replace_raw",
            widths=(0.01,),
        )
    assert state.upscaled.memory.shape == (3, 1, 2, 64, 64)


def test_upscaling_in_the_papers_form_warns_if_it_discards_the_start_state(
    model, params
):
    def made(widths):
        return upscale(
            model, params, tokens(2, 30), size=64, dynamics="replace", widths=widths
        )

    with pytest.warns(UserWarning, match=r"keeps 0\.\d+ of a state at each token"):
        made((3.0,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made((0.01,))


@depths
@pytest.mark.parametrize(
    ("dynamics", "cut", "length"),
    [("static", 7, 14), ("decay", 9, 18), ("delta", 1, 17)],
)
def test_cutting_a_sequence_changes_nothing(config, dynamics, cut, length):
    """Equal halves share a program."""
    run = functools.partial(plainly(config), lively(config))
    state = filled(empty_state(config, dynamics), write=0.3)
    ids = tokens(B, length)
    start = repeat(state, B)
    whole, end = run(ids, start)
    one, middle = run(ids[:, :cut], start)
    two, last = run(ids[:, cut:], middle)
    np.testing.assert_allclose(jnp.concatenate([one, two], 1), whole, atol=2e-4)
    np.testing.assert_allclose(last.upscaled.memory, end.upscaled.memory, atol=1e-4)


@pytest.mark.parametrize("dynamics", ["static", "decay"])
def test_folding_the_map_into_the_memory_changes_nothing(run, states, dynamics):
    ids = tokens(1, T)
    state = filled(states[dynamics])
    folded = state.replace(upscaled=fold_feature_map(state.upscaled))
    assert folded.upscaled.features.map is None
    np.testing.assert_allclose(run(ids, folded)[0], run(ids, state)[0], atol=2e-4)


def test_a_static_memory_can_be_folded_with_any_write_strength(states):
    expected = fold_feature_map(filled(states["static"]).upscaled)
    written = filled(states["static"], write=0.5).upscaled
    for fold in (fold_feature_map, jax.jit(fold_feature_map)):
        folded = fold(written)
        assert folded.features.map is None
        np.testing.assert_allclose(folded.memory, expected.memory, rtol=1e-5)


def test_a_decay_memory_with_unknown_writes_cannot_be_folded(states):
    with pytest.raises(
        ValueError, match=r"fold_feature_map: `upscaled` must have dynamics"
    ):
        jax.jit(fold_feature_map)(states["decay"].upscaled)


def test_a_delta_memory_cannot_be_folded(states):
    with pytest.raises(
        ValueError,
        match=r"fold_feature_map: `upscaled` must have dynamics static.*got delta",
    ):
        fold_feature_map(states["delta"].upscaled)


@kinds
def test_a_batch_of_different_states_matches_single_runs(run, states, dynamics):
    plain = random_state(seed=4)
    many = [filled(states[dynamics], seed) for seed in range(3)] + [plain]
    ids = jnp.broadcast_to(tokens(1, T), (5, T))
    rows = [2, 0, 3, 1, 2]
    logits, _ = run(ids, select(stack(many), jnp.array(rows)))
    for row, which in enumerate(rows):
        alone, _ = run(ids[:1], many[which])
        np.testing.assert_allclose(logits[row], alone[0], atol=1e-4)


@depths
@pytest.mark.parametrize(
    "dynamics", [pytest.param("static", marks=pytest.mark.slow), "delta"]
)
def test_generation_continues_from_an_upscaled_state(config, dynamics):
    params = lively(config)
    state = filled(empty_state(config, dynamics))
    run = functools.partial(plainly(config), params)
    out = generate(
        RWKV7(config), params, [[3, 4, 5], [7]], state, tokens=4, temperature=0
    )
    ids = jnp.array([[3, 4, 5]])
    current = state
    for token in out.tokens[0]:
        logits, current = run(ids, current)
        assert int(logits[0, -1].argmax()) == token
        ids = jnp.array([[token]])


@pytest.mark.parametrize(
    "config",
    [SHALLOW, pytest.param(CONFIG, marks=pytest.mark.slow)],
    ids=["shallow", "deep"],
)
def test_a_state_scaled_to_zero_is_the_base_model(config):
    run = as_users(config)
    ids = tokens(B, T)
    state = repeat(scaled(filled(empty_state(config)), 0.0), B)
    assert (run(ids, state)[0] == run(ids, init_state(config, B))[0]).all()


@pytest.mark.parametrize(
    ("choice", "sentence"),
    [
        (
            {"kind": "cubic"},
            "upscale: `kind` must be one of gaussian, fourier, gaussian_raw",
        ),
        (
            {"landmarks": "grid"},
            "`landmarks` must be one of random, kmeans; got 'grid'",
        ),
        (
            {"prepare": "wash"},
            "`prepare` must be one of none, centre, whiten; got 'wash'",
        ),
        ({"dynamics": "still"}, "upscale: `dynamics` must be one of static, decay"),
        ({"size": -4}, "`size` must be at least 1"),
    ],
)
def test_unknown_choices_are_named(model, params, choice, sentence):
    with pytest.raises(ValueError) as caught:
        upscale(model, params, tokens(1, 20), **choice)
    assert sentence in str(caught.value)


def test_the_model_rejects_a_memory_of_another_shape(run, states):
    upscaled = states["static"].upscaled
    short = upscaled.replace(memory=upscaled.memory[..., :-1])
    with pytest.raises(
        ValueError, match=r"`state.upscaled.landmarks|`state.upscaled.features"
    ):
        run(tokens(1, T), states["static"].replace(upscaled=short))
    with pytest.raises(ValueError, match=r"`state.upscaled.memory` must have shape"):
        run(
            tokens(B, T),
            repeat(init_state(CONFIG), B).replace(upscaled=states["delta"].upscaled),
        )
