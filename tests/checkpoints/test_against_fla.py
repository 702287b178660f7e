"""Comparison with flash-linear-attention on CPU: our HF folders, and every weight's gradient."""

import importlib.util

import jax
import numpy as np
import pytest
import trained_scale_models as calm_models
from child_programs import run_child

from rwkv7_jax.checkpoints.model_files import load_model, save_model
from rwkv7_jax.checkpoints.tensor_files import read_tensors
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import init_state
from rwkv7_jax.training.losses import next_token_loss

pytestmark = pytest.mark.slow
LOGITS, STATES, GRADIENTS = 1e-4, 1e-5, 1e-4
# Strong enough to show in every gradient; officially 1e-4.
L2WRAP = 0.1
CONFIG = calm_models.config(32, width=64, group_norm_eps=32 * 1e-5)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Our model loaded from a folder that we wrote, the data, and fla's results on them."""
    # The child alone imports them: that takes seconds, also of those who run no slow test.
    if not all(map(importlib.util.find_spec, ("torch", "fla", "triton"))):
        pytest.skip("the oracle extra is not installed")
    folder = tmp_path_factory.mktemp("hf")
    save_model(folder / "model", calm_models.calm(CONFIG), CONFIG, format="hf")
    data = {
        "ids": np.asarray(calm_models.ids(CONFIG, 2, 21)),
        "batch": np.asarray(calm_models.ids(CONFIG, 2, 34, seed=3)),
        "l2wrap": np.float32(L2WRAP),
    }
    np.savez(folder / "in.npz", **data)
    run_child(
        "fla_process",
        folder / "model",
        folder / "in.npz",
        folder / "out.npz",
        TRITON_INTERPRET="1",
    )
    params, config = load_model(folder / "model")
    assert config == CONFIG
    return RWKV7(config), params, data, dict(np.load(folder / "out.npz"))


def test_logits_and_states_match_fla(both):
    model, params, data, theirs = both
    logits, end = jax.jit(model.apply)(
        {"params": params}, data["ids"], init_state(CONFIG, 2)
    )
    assert 0.5 < theirs["logits"].std() < 2
    assert np.abs(np.asarray(logits) - theirs["logits"]).max() <= LOGITS
    for i, wkv in enumerate(np.asarray(end.wkv)):
        found = theirs[f"state.{i}"].swapaxes(-1, -2)  # fla: key channels are the rows
        assert np.abs(wkv - found).max() <= STATES * np.abs(found).max(), i
        assert np.abs(wkv.swapaxes(-1, -2) - found).max() > 0.1 * np.abs(found).max()


def test_gradients_with_l2wrap_match_fla(both, tmp_path):
    model, params, data, theirs = both
    batch = {"tokens": data["batch"], "mask": np.ones((2, 33), np.float32)}

    def loss(params):
        return next_token_loss(
            model, params, init_state(CONFIG, 2), batch, l2wrap=L2WRAP
        )

    (_, metrics), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert abs(float(metrics["loss_nats"]) - float(theirs["loss"])) <= 1e-5
    wanted = {
        n.removeprefix("grad."): g for n, g in theirs.items() if n.startswith("grad.")
    }
    save_model(tmp_path / "grads", grads, CONFIG, format="hf")
    ours = read_tensors(tmp_path / "grads" / "model.safetensors")
    assert ours.keys() == wanted.keys()
    for name, tensor in ours.items():
        expected = wanted[name]
        assert (
            np.abs(tensor.read() - expected).max() <= GRADIENTS * np.abs(expected).max()
        ), name
