"""Features and forms of an upscaled memory that a user adds to the package's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import TINIEST as CONFIG
from tiny_models import lively, tokens
from tolerances import SAME, assert_close, assert_trees_close
from upscaled_states import filled

import rwkv7_jax as rwkv
from rwkv7_jax.model import (
    FEATURE_MAPS,
    MEMORY_FORMS,
    MemoryForm,
    RecurrentMemory,
    kernel_features,
)
from rwkv7_jax.tuning.read_statistics import state_statistics

MODEL = rwkv.RWKV7(CONFIG)
IDS = tokens(2, 9, CONFIG)


class Copying(RecurrentMemory):
    """A memory that never fades: S~_t = S~_{t-1} + c v phi(k)^T."""

    def wkv_inputs(self, upscaled, inputs, icl_rate):
        """Features of the receptance and of the key."""
        r = kernel_features(upscaled.features, inputs.r)
        key = kernel_features(upscaled.features, inputs.k)
        nothing = jnp.zeros_like(r)
        key = key * upscaled.write[:, None, :, None]
        return inputs._replace(r=r, log_w=nothing, k=key, a=nothing, b=nothing)


class Unknown(MemoryForm):
    """A form that changes in a way of its own."""

    def read(self, upscaled, inputs, icl_rate, op):
        """Nothing."""
        return jnp.zeros(inputs.v.shape, jnp.float32), upscaled.memory


@pytest.fixture(autouse=True)
def added(monkeypatch):
    """The user's own, for a test."""
    monkeypatch.setitem(
        FEATURE_MAPS, "relu", lambda features, x, inner: jax.nn.relu(inner)
    )
    monkeypatch.setitem(MEMORY_FORMS, "copying", Copying())
    monkeypatch.setitem(MEMORY_FORMS, "unknown", Unknown())


def upscaled_state(dynamics="static", prepare="whiten"):
    """An empty one, of ReLU features."""
    return rwkv.upscale(
        MODEL,
        lively(CONFIG),
        IDS,
        size=24,
        dynamics=dynamics,
        kind="relu",
        prepare=prepare,
    )


def run(state, ids=IDS, method=None):
    """The model's results from one state for all rows."""
    if state.batch == 1:
        state = rwkv.repeat(state, len(ids))
    return MODEL.apply({"params": lively(CONFIG)}, ids, state, method=method)


def test_own_features_are_centred_whitened_and_read():
    state = upscaled_state()
    layer = jax.tree.map(lambda leaf: leaf[1], state.upscaled.features)
    reads = run(rwkv.init_state(CONFIG), method="trace")[2]["r"][1]
    found = np.asarray(kernel_features(layer, reads), np.float64)
    x = np.asarray(reads, np.float64)
    x = x / np.linalg.norm(x, axis=-1, keepdims=True)
    phi = np.einsum("bthn,hmn->bthm", x, np.asarray(layer.landmarks[0], np.float64))
    phi = np.maximum(phi, 0) - np.asarray(layer.mean)
    wanted = np.einsum("bthm,hom->btho", phi, np.asarray(layer.map[0], np.float64))
    assert_close(found, wanted, SAME["model"], "features")
    # They were fitted to these very reads.
    np.testing.assert_allclose(found.mean((0, 1)), 0, atol=SAME["model"])
    plain = run(rwkv.init_state(CONFIG))[0]
    np.testing.assert_array_equal(run(state)[0], plain)
    assert float(jnp.abs(run(filled(state))[0] - plain).max()) > 1e-3


def test_decorrelation_measures_own_features():
    state = upscaled_state(prepare="none")
    batch = {"tokens": IDS, "mask": np.ones((2, 8), np.float32)}
    measure = state_statistics(MODEL, lively(CONFIG), leaves=("memory",))
    found = measure(state, batch).upscaled.memory[0, 0]
    reads = run(rwkv.init_state(CONFIG), IDS[:, :-1], method="trace")[2]["r"][0]
    layer = jax.tree.map(lambda leaf: leaf[0], state.upscaled.features)
    phi = np.asarray(kernel_features(layer, reads), np.float64)
    wanted = np.einsum("bthm,bthn->hmn", phi, phi) / 16
    assert_close(found, wanted, SAME["model"], "second moment")


def test_own_dynamics_may_be_cut_anywhere_saved_and_loaded(tmp_path):
    state = filled(upscaled_state("copying"), write=0.7)
    logits, end = run(state)
    first, between = run(state, IDS[:, :4])
    second, after = run(between, IDS[:, 4:])
    assert_close(jnp.concatenate([first, second], 1), logits, SAME["model"], "logits")
    assert_trees_close(after, end, SAME["model"])
    assert float(jnp.abs(end.upscaled.memory - state.upscaled.memory).max()) > 1e-3
    path = tmp_path / "own.safetensors"
    rwkv.save_state(path, state)
    loaded = rwkv.load_state(path)
    assert loaded.upscaled.dynamics == "copying"
    assert loaded.upscaled.features.kind == "relu"
    np.testing.assert_array_equal(loaded.upscaled.memory, state.upscaled.memory)
    del MEMORY_FORMS["copying"]
    with pytest.raises(ValueError, match=r"must be one of static, .*; got 'copying'"):
        rwkv.load_state(path)


def test_reads_that_are_not_known_are_not_decorrelated():
    state = upscaled_state("unknown")
    batch = {"tokens": IDS, "mask": np.ones((2, 8), np.float32)}
    measure = state_statistics(MODEL, lively(CONFIG), leaves=("memory",))
    with pytest.raises(TypeError, match=r"^memory_read_vectors: `upscaled`"):
        measure(state, batch)
