"""States read through kernel features: what an empty memory leaves alone, what a full one reads."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import CONFIG, lively, random_state, tokens
from tolerances import AS_USERS

from rwkv7_jax import upscaling
from rwkv7_jax.calibration import calibrate
from rwkv7_jax.generate import generate
from rwkv7_jax.model import RWKV7
from rwkv7_jax.state import init_state, repeat, select, stack
from rwkv7_jax.state_tuning import scaled, upscale

ADDITIVE = ("static", "decay", "delta")
SIZE = 24  # features of a head; its channels are 32
B, T, H, N = 2, 19, 3, 8


@pytest.fixture(scope="module")
def model():
    return RWKV7(CONFIG)


@pytest.fixture(scope="module")
def params():
    return lively()


def noise(shape, seed=0, size=1.0):
    return jnp.asarray(size * np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.fixture(scope="module")
def states(model, params):
    """An empty upscaled state of every additive kind."""
    text = tokens(6, 40, seed=5)
    return {name: upscale(model, params, text, size=SIZE, dynamics=name) for name in ADDITIVE}


def filled(state, seed=1, size=0.3, write=0.0):
    """The same state with something in its memory."""
    upscaled = state.upscaled
    memory = noise(upscaled.memory.shape, seed, size)
    return state.replace(upscaled=upscaled.replace(memory=memory, write=upscaled.write + write))


@pytest.fixture(scope="module")
def run(model, params):
    return functools.partial(jax.jit(functools.partial(_apply, model)), params)


def _apply(model, params, ids, state):
    return model.apply({"params": params}, ids, state)


@pytest.fixture(scope="module")
def run_as_users(model, params):
    """Weights are arguments, else they would be folded, and rounded, with what is near them."""
    step = jax.jit(functools.partial(_apply, model), compiler_options=AS_USERS)
    return functools.partial(step, params)


@pytest.mark.parametrize(
    "dynamics",
    ["static", *(pytest.param(name, marks=pytest.mark.slow) for name in ("decay", "delta"))],
)
def test_an_empty_memory_leaves_the_model_what_it_was_bit_for_bit(run_as_users, states, dynamics):
    run = run_as_users
    ids, start = tokens(B, T), random_state(batch=B)
    base, end = run(ids, start)
    state = start.replace(upscaled=repeat(states[dynamics], B).upscaled)
    logits, wide_end = run(ids, state)
    assert (logits == base).all()
    assert (wide_end.wkv == end.wkv).all() and (wide_end.ffn_shift == end.ffn_shift).all()
    assert not np.any(wide_end.upscaled.memory)


@pytest.mark.parametrize("dynamics", ADDITIVE)
def test_a_full_memory_changes_the_logits(run, states, dynamics):
    ids = tokens(1, T)
    assert (
        float(
            jnp.abs(run(ids, filled(states[dynamics]))[0] - run(ids, init_state(CONFIG))[0]).max()
        )
        > 0.01
    )


def parts(seed=0, rows=B, length=T):
    """One layer's vectors as the model makes them, N channels a head."""
    shape, draw = (rows, length, H, N), np.random.default_rng(seed)
    r, k, v, key, rate, z = (draw.normal(size=shape) for _ in range(6))
    key = key / np.linalg.norm(key, axis=-1, keepdims=True)
    rate, log_w = 1 / (1 + np.exp(-rate)), -0.6 / (1 + np.exp(-z))
    named = {"r": r, "k": k, "v": v, "a": -key, "b": key * rate, "icl_rate": rate, "log_w": log_w}
    return {name: jnp.asarray(x, jnp.float32) for name, x in named.items()}


def layer(dynamics, seed=0, size=SIZE, write=0.0, **choices):
    """One layer's upscaled memory with something in it, B rows of it unless static."""
    reads = noise((1, 300, H, N), seed + 10)
    features = calibrate(reads, size=size, **choices)
    one = jax.tree.map(lambda x: x[0], upscaling.empty(features, dynamics=dynamics))
    rows = 1 if dynamics == "static" else B
    shape = (rows, *one.memory.shape[1:])
    return one.replace(memory=noise(shape, seed + 11, 0.2), write=one.write + write)


def recurrence(one, wkv, upscaled):
    return upscaling.recurrence(one, wkv, upscaled, implementation=None, lengths=None)


def wanted(upscaled, one):
    """The additive read-out in numpy, token by token, float64; and the memory behind."""
    phi = lambda x: np.asarray(upscaling.evaluate(upscaled.features, x), np.float64)  # noqa: E731
    reads, keys = phi(one["r"]), phi(-one["a"])
    keys = keys / np.linalg.norm(keys, axis=-1, keepdims=True)
    w = np.exp(np.asarray(one["log_w"], np.float64)).mean(-1)
    rate, v = (np.asarray(one[name], np.float64) for name in ("icl_rate", "v"))
    rate = rate.mean(-1) if upscaled.dynamics == "delta" else 0 * w
    memory = np.broadcast_to(upscaled.memory, (B, *upscaled.memory.shape[1:])).astype(np.float64)
    write, out = np.asarray(upscaled.write)[0], []
    for t in range(T):
        if upscaled.dynamics != "static":
            key = keys[:, t]
            old = np.einsum("bhvm,bhm->bhv", memory, key)
            new = write[:, None] * v[:, t] - rate[:, t, :, None] * old
            memory = w[:, t, :, None, None] * memory + new[..., None] * key[:, :, None]
        out.append(np.einsum("bhvm,bhm->bhv", memory, reads[:, t]))
    return np.stack(out, 1), memory


@pytest.mark.parametrize("write", [0.0, 0.7])
@pytest.mark.parametrize("dynamics", ADDITIVE)
def test_the_memory_is_read_erased_and_written_as_its_equations_say(dynamics, write):
    one, upscaled = parts(), layer(dynamics, write=write)
    state = noise((B, H, N, N), 3)
    y, wkv, memory = recurrence(one, state, upscaled)
    base, base_wkv, _ = recurrence(one, state, None)
    read, end = wanted(upscaled, one)
    np.testing.assert_allclose(y - base, read, atol=2e-5, rtol=1e-4)
    np.testing.assert_array_equal(wkv, base_wkv)
    if dynamics != "static":
        np.testing.assert_allclose(memory, end, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("dynamics", ADDITIVE)
def test_a_memory_is_read_linearly_with_psi(dynamics):
    one, upscaled = parts(), layer(dynamics)
    nothing = jnp.zeros((B, H, N, N))
    psi = upscaling.memory_reads(upscaled, one)
    memory = jnp.broadcast_to(upscaled.memory, (B, H, N, SIZE))
    read = jnp.einsum("bhvm,bthm->bthv", memory, psi)
    change = recurrence(one, nothing, upscaled)[0] - recurrence(one, nothing, None)[0]
    np.testing.assert_allclose(change, read, atol=2e-5, rtol=1e-4)


def test_a_wkv_start_state_is_read_linearly_with_psi():
    one, state = parts(), noise((B, H, N, N), 3)
    read = jnp.einsum("bhvk,bthk->bthv", state, upscaling.start_reads(one))
    change = recurrence(one, state, None)[0] - recurrence(one, 0 * state, None)[0]
    np.testing.assert_allclose(change, read, atol=2e-5, rtol=1e-4)


def test_delta_memories_never_grow_however_long_the_sequence():
    """10,000 steps; with a scalar rate every step is symmetric with norm at most 1."""
    one, upscaled = parts(rows=1, length=10_000), layer("delta")
    upscaled = upscaled.replace(memory=upscaled.memory[:1])
    sizes = [jnp.linalg.norm(upscaled.memory)]
    for first in range(0, 10_000, 500):
        piece = {name: x[:, first : first + 500] for name, x in one.items()}
        _, _, memory = recurrence(piece, jnp.zeros((1, H, N, N)), upscaled)
        upscaled = upscaled.replace(memory=memory)
        sizes.append(jnp.linalg.norm(memory))
    assert (np.diff(sizes) <= 1e-5 * float(sizes[0])).all()


def test_the_papers_form_diverges_unless_its_removal_keys_have_length_1_and_the_checker_knows():
    one, growth, excess = parts(length=200), {}, {}
    for dynamics in ("replace", "replace_raw"):
        upscaled = layer(dynamics, size=64, kind="gaussian_raw", prepare="none", widths=(0.1,))
        excess[dynamics] = float(upscaling.removal_excess(upscaled, one))
        _, _, memory = recurrence(one, jnp.zeros((B, H, N, N)), upscaled)
        growth[dynamics] = np.abs(np.asarray(memory)).max()
    assert excess["replace"] <= 1 and growth["replace"] < 1e3
    assert excess["replace_raw"] > 1 and not growth["replace_raw"] < 1e6


def test_upscaling_in_the_papers_form_warns_that_it_may_diverge(model, params):
    with pytest.warns(UserWarning, match=r"removes up to .* times what keeps"):
        state = upscale(
            model, params, tokens(2, 30), size=64, dynamics="replace_raw", widths=(0.01,)
        )
    assert state.upscaled.memory.shape == (3, 1, 2, 64, 64)


@pytest.mark.parametrize(("dynamics", "cut"), [("static", 7), ("decay", 16), ("delta", 1)])
def test_cutting_a_sequence_changes_nothing(run, states, dynamics, cut):
    ids, start = tokens(B, 17), repeat(filled(states[dynamics], write=0.3), B)
    whole, end = run(ids, start)
    one, middle = run(ids[:, :cut], start)
    two, last = run(ids[:, cut:], middle)
    np.testing.assert_allclose(jnp.concatenate([one, two], 1), whole, atol=2e-4)
    np.testing.assert_allclose(last.upscaled.memory, end.upscaled.memory, atol=1e-4)


@pytest.mark.parametrize("dynamics", ["static", "decay"])
def test_folding_the_map_into_the_memory_changes_nothing(run, states, dynamics):
    ids, state = tokens(1, T), filled(states[dynamics])
    folded = state.replace(upscaled=upscaling.fold(state.upscaled))
    assert folded.upscaled.features.map is None
    np.testing.assert_allclose(run(ids, folded)[0], run(ids, state)[0], atol=2e-4)


def test_a_delta_memory_cannot_be_folded(states):
    with pytest.raises(ValueError, match=r"fold: `upscaled` must be static.*got delta"):
        upscaling.fold(states["delta"].upscaled)


@pytest.mark.parametrize("dynamics", ADDITIVE)
def test_a_batch_of_different_states_equals_single_runs(run, states, dynamics):
    plain = random_state(seed=4)
    many = [filled(states[dynamics], seed) for seed in range(3)] + [plain]
    ids = jnp.broadcast_to(tokens(1, T), (5, T))
    rows = [2, 0, 3, 1, 2]
    logits, _ = run(ids, select(stack(many), jnp.array(rows)))
    for row, which in enumerate(rows):
        alone, _ = run(ids[:1], many[which])
        np.testing.assert_allclose(logits[row], alone[0], atol=1e-4)


def test_memories_of_different_forms_are_not_stacked(states, model, params):
    other = upscale(model, params, tokens(2, 30), size=SIZE // 2)
    with pytest.raises(ValueError, match=r"one form; got static gaussian with 24 .* with 12"):
        stack([states["static"], other])
    with pytest.raises(ValueError, match=r"one form; got static .* and delta"):
        stack([states["static"], states["delta"]])


@pytest.mark.parametrize("dynamics", [pytest.param("static", marks=pytest.mark.slow), "delta"])
def test_generation_goes_on_from_an_upscaled_state(model, params, run, states, dynamics):
    state = filled(states[dynamics])
    out = generate(model, params, [[3, 4, 5], [7]], state, tokens=4, temperature=0)
    ids, current = jnp.array([[3, 4, 5]]), state
    for token in out.tokens[0]:
        logits, current = run(ids, current)
        assert int(logits[0, -1].argmax()) == token
        ids = jnp.array([[token]])


def test_a_state_scaled_to_nothing_is_the_base_model(run_as_users, states):
    run, ids = run_as_users, tokens(B, T)
    state = repeat(scaled(filled(states["static"]), 0.0), B)
    assert (run(ids, state)[0] == run(ids, init_state(CONFIG, B))[0]).all()


@pytest.mark.parametrize("kind", ["gaussian", "fourier"])
def test_whitened_features_have_unit_covariance_on_the_calibration_text(kind):
    reads = noise((2, 500, H, N), 7) * np.arange(1, N + 1).reshape(1, 1, 1, N)
    features = calibrate(reads, size=16, kind=kind, damping=1e-6)
    phi = upscaling.evaluate(jax.tree.map(lambda x: x[1], features), reads[1][None])[0]
    for head in range(H):
        np.testing.assert_allclose(phi[:, head].mean(0), 0, atol=1e-3)
        np.testing.assert_allclose(np.cov(phi[:, head].T), np.eye(16), atol=0.02)


def test_centred_features_have_mean_0_and_size_1_and_raw_ones_are_the_kernel():
    reads = noise((1, 200, H, N), 7)
    raw = calibrate(reads, size=16, prepare="none", widths=(1.0,))
    centred = calibrate(reads, size=16, prepare="centre", widths=(1.0,))
    phi = {
        name: np.asarray(upscaling.evaluate(jax.tree.map(lambda x: x[0], one), reads)[0])
        for name, one in (("raw", raw), ("centred", centred))
    }
    apart = phi["raw"] - phi["raw"].mean(0)
    apart = apart / np.sqrt(np.mean(apart**2, axis=(0, 2), keepdims=True))
    np.testing.assert_allclose(phi["centred"], apart, atol=1e-4)
    unit = np.asarray(upscaling.directions(reads[0]))
    apart = unit[:, :, None] - np.asarray(raw.landmarks[0, 0])
    kernel = np.exp(-np.asarray(raw.widths[0, 0]) * np.sum(np.square(apart), -1))
    np.testing.assert_allclose(phi["raw"], kernel, atol=1e-5)


def test_cosine_features_approximate_the_gaussian_kernel():
    reads = noise((1, 300, 1, N), 7)
    features = calibrate(reads, size=4096, kind="fourier", prepare="none", widths=(1.0,))
    phi = np.asarray(upscaling.evaluate(jax.tree.map(lambda x: x[0], features), reads)[0, :, 0])
    unit = np.asarray(upscaling.directions(reads[0, :, 0]))
    square = np.sum((unit[:, None] - unit) ** 2, -1)
    gamma = 1 / np.median(square)
    np.testing.assert_allclose(phi @ phi.T, np.exp(-gamma * square), atol=0.15)


def test_kmeans_landmarks_lie_nearer_to_the_reads_than_random_ones():
    reads = noise((1, 400, 1, N), 7)
    unit = np.asarray(upscaling.directions(reads[0, :, 0]))
    far = {}
    for method in ("random", "kmeans"):
        centres = np.asarray(calibrate(reads, size=12, landmarks=method).landmarks[0, 0, 0])
        far[method] = np.min(np.sum((unit[:, None] - centres) ** 2, -1), 1).mean()
    assert far["kmeans"] < 0.9 * far["random"]


def test_more_features_than_distinct_reads_get_landmarks_of_their_own():
    reads = jnp.tile(noise((1, 5, 1, N), 7), (1, 20, 1, 1))
    centres = np.asarray(calibrate(reads, size=16).landmarks[0, 0, 0])
    assert len(np.unique(centres, axis=0)) == 16 and np.isfinite(centres).all()


@pytest.mark.parametrize(
    ("choice", "sentence"),
    [
        ({"kind": "cubic"}, "calibrate: `kind` must be one of gaussian, fourier, gaussian_raw"),
        ({"landmarks": "grid"}, "`landmarks` must be one of random, kmeans; got 'grid'"),
        ({"prepare": "wash"}, "`prepare` must be one of none, centre, whiten; got 'wash'"),
        ({"dynamics": "still"}, "upscale: `dynamics` must be one of static, decay"),
        ({"size": -4}, "`size` must be at least 1"),
    ],
)
def test_choices_that_do_not_exist_are_named(model, params, choice, sentence):
    with pytest.raises(ValueError) as caught:
        upscale(model, params, tokens(1, 20), **choice)
    assert sentence in str(caught.value)


def test_a_memory_of_another_shape_is_refused_at_the_models_door(run, states):
    upscaled = states["static"].upscaled
    short = upscaled.replace(memory=upscaled.memory[..., :-1])
    with pytest.raises(ValueError, match=r"`state.upscaled.landmarks|`state.upscaled.features"):
        run(tokens(1, T), states["static"].replace(upscaled=short))
    with pytest.raises(ValueError, match=r"`state.upscaled.memory` must have shape"):
        run(tokens(B, T), repeat(init_state(CONFIG), B).replace(upscaled=states["delta"].upscaled))
