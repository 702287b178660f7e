"""One layer's upscaled memory: read, erased and written as its equations say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import SAME, assert_close
from upscaled_states import ADDITIVE, SIZE, noise

from rwkv7_jax.model import recurrence as model_recurrence
from rwkv7_jax.model.kernel_features import kernel_features
from rwkv7_jax.tuning.calibration import calibrate
from rwkv7_jax.tuning.read_statistics import (
    initial_state_read_vectors,
    memory_read_vectors,
)
from rwkv7_jax.tuning.upscaling import empty_memory, stability_ratio

B, T, H, N = 2, 19, 3, 8


def parts(seed=0, rows=B, length=T):
    """One layer's vectors as the model makes them, N channels a head."""
    shape = (rows, length, H, N)
    draw = np.random.default_rng(seed)
    r, k, v, key, rate, z = (draw.normal(size=shape) for _ in range(6))
    key = key / np.linalg.norm(key, axis=-1, keepdims=True)
    rate = 1 / (1 + np.exp(-rate))
    log_w = -0.6 / (1 + np.exp(-z))
    named = {
        "r": r,
        "k": k,
        "v": v,
        "a": -key,
        "b": key * rate,
        "icl_rate": rate,
        "log_w": log_w,
    }
    return {name: jnp.asarray(x, jnp.float32) for name, x in named.items()}


def layer(dynamics, seed=0, size=SIZE, write=0.0, **choices):
    """One layer's upscaled memory with something in it, B rows of it unless static."""
    reads = noise((1, 300, H, N), seed + 10)
    features = calibrate(reads, size=size, **choices)
    one = jax.tree.map(lambda x: x[0], empty_memory(features, dynamics=dynamics))
    rows = 1 if dynamics == "static" else B
    shape = (rows, *one.memory.shape[1:])
    return one.replace(memory=noise(shape, seed + 11, 0.2), write=one.write + write)


def recurrence(one, wkv, upscaled):
    """The layer's recurrence, of the arrays that a trace has."""
    return model_recurrence.recurrence(
        model_recurrence.wkv_inputs_of(one),
        one["icl_rate"],
        wkv,
        upscaled,
        implementation=None,
        lengths=None,
    )


compiled = jax.jit(recurrence)


def wanted(upscaled, one):
    """The additive read-out in numpy, token by token, float64; and the memory after it."""
    phi = lambda x: np.asarray(kernel_features(upscaled.features, x), np.float64)  # noqa: E731
    reads = phi(one["r"])
    keys = phi(-one["a"])
    keys = keys / np.linalg.norm(keys, axis=-1, keepdims=True)
    w = np.exp(np.asarray(one["log_w"], np.float64)).mean(-1)
    rate, v = (np.asarray(one[name], np.float64) for name in ("icl_rate", "v"))
    rate = rate.mean(-1) if upscaled.dynamics == "delta" else 0 * w
    memory = np.broadcast_to(upscaled.memory, (B, *upscaled.memory.shape[1:])).astype(
        np.float64
    )
    write = np.asarray(upscaled.write)[0]
    out = []
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
def test_the_memory_is_read_erased_and_written_by_its_equations(dynamics, write):
    one = parts()
    upscaled = layer(dynamics, write=write)
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
    one = parts()
    upscaled = layer(dynamics)
    nothing = jnp.zeros((B, H, N, N))
    psi = memory_read_vectors(upscaled, one)
    memory = jnp.broadcast_to(upscaled.memory, (B, H, N, SIZE))
    read = jnp.einsum("bhvm,bthm->bthv", memory, psi)
    change = compiled(one, nothing, upscaled)[0] - compiled(one, nothing, None)[0]
    np.testing.assert_allclose(change, read, atol=2e-5, rtol=1e-4)


def test_a_wkv_start_state_is_read_linearly_with_psi():
    one = parts()
    state = noise((B, H, N, N), 3)
    read = jnp.einsum("bhvk,bthk->bthv", state, initial_state_read_vectors(one))
    change = compiled(one, state, None)[0] - compiled(one, 0 * state, None)[0]
    np.testing.assert_allclose(change, read, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("dynamics", ["replace", "replace_raw"])
def test_the_papers_form_follows_its_equation_and_leaves_the_wkv_state(dynamics):
    one = parts()
    upscaled = layer(dynamics, kind="gaussian_raw", prepare="none", widths=(0.1,))
    state = noise((B, H, N, N), 3)
    y, wkv, memory = compiled(one, state, upscaled)
    np.testing.assert_array_equal(wkv, state)

    def phi(x):
        return np.asarray(kernel_features(upscaled.features, x), np.float64)

    r, k, v, rate = (phi(one[name]) for name in ("r", "k", "v", "icl_rate"))
    w = phi(jnp.exp(one["log_w"]))
    removal = k
    if dynamics == "replace":
        removal = k / np.linalg.norm(k, axis=-1, keepdims=True)
    ratio = np.sum(rate * removal**2, -1) / (1 + w.min(-1))
    assert_close(stability_ratio(upscaled, one), ratio.max(), SAME["op"], "ratio")
    expected = np.asarray(upscaled.memory, np.float64)
    read = []
    for t in range(T):
        removed = np.einsum("bhvm,bhm->bhv", expected, removal[:, t])
        expected = expected * w[:, t, :, None, :]
        erased = removed[..., None] * (rate * removal)[:, t, :, None, :]
        expected = expected - erased + v[:, t, ..., None] * k[:, t, :, None, :]
        rows = np.einsum("bhvm,bhm->bhv", expected, r[:, t])
        read.append(np.einsum("hvm,bhm->bhv", upscaled.readout[0], rows))
    assert_close(y, np.stack(read, 1), SAME["op"], "y")
    assert_close(memory, expected, SAME["op"], "memory")


def test_delta_memories_never_grow_however_long_the_sequence():
    """10,000 steps; with a scalar rate every step is symmetric with norm at most 1."""
    one = parts(rows=1, length=10_000)
    upscaled = layer("delta")
    upscaled = upscaled.replace(memory=upscaled.memory[:1])
    sizes = [jnp.linalg.norm(upscaled.memory)]
    for first in range(0, 10_000, 500):
        piece = {name: x[:, first : first + 500] for name, x in one.items()}
        _, _, memory = compiled(piece, jnp.zeros((1, H, N, N)), upscaled)
        upscaled = upscaled.replace(memory=memory)
        sizes.append(jnp.linalg.norm(memory))
    assert (np.diff(sizes) <= 1e-5 * float(sizes[0])).all()


def test_the_papers_form_diverges_unless_its_removal_keys_have_length_1():
    one = parts(length=200)
    growth = {}
    excess = {}
    for dynamics in ("replace", "replace_raw"):
        upscaled = layer(
            dynamics, size=64, kind="gaussian_raw", prepare="none", widths=(0.1,)
        )
        excess[dynamics] = float(stability_ratio(upscaled, one))
        _, _, memory = compiled(one, jnp.zeros((B, H, N, N)), upscaled)
        growth[dynamics] = np.abs(np.asarray(memory)).max()
    assert excess["replace"] <= 1 and growth["replace"] < 1e3
    assert excess["replace_raw"] > 1 and not growth["replace_raw"] < 1e6
