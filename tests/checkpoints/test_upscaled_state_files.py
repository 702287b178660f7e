"""Upscaled states as files."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_checkpoints import differing
from tiny_models import SCANNED as CONFIG
from tiny_models import lively, random_state, tokens

from rwkv7_jax.checkpoints.model_files import model_hash
from rwkv7_jax.checkpoints.state_files import load_state, save_state
from rwkv7_jax.checkpoints.state_sidecar import sidecar
from rwkv7_jax.checkpoints.tensor_files import read_tensors, write_safetensors
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.tuning.upscaling import upscale


@pytest.fixture(scope="module")
def state():
    """A state with nonzero, non-square memories and a nonzero WKV part."""
    wide = upscale(RWKV7(CONFIG), lively(), tokens(3, 40), size=20, dynamics="decay")
    filled = jax.tree.map(lambda x: x + 0.25, wide.upscaled)
    return random_state().replace(upscaled=filled)


def test_an_upscaled_state_round_trips_bit_exactly(tmp_path, state):
    save_state(tmp_path / "s.safetensors", state, config=CONFIG)
    back = load_state(tmp_path / "s.safetensors", config=CONFIG)
    assert differing(state, back) == []
    assert (
        back.upscaled.dynamics == "decay" and back.upscaled.features.kind == "gaussian"
    )


def test_features_without_a_map_round_trip(tmp_path, state):
    plain = state.upscaled.features.replace(map=None)
    state = state.replace(upscaled=state.upscaled.replace(features=plain))
    save_state(tmp_path / "s.safetensors", state)
    assert load_state(tmp_path / "s.safetensors").upscaled.features.map is None


@pytest.mark.parametrize("suffix", [".pth", ".st"])
def test_other_formats_cannot_hold_an_upscaled_state(tmp_path, state, suffix):
    with pytest.raises(ValueError, match=r"must end in .safetensors; got"):
        save_state(tmp_path / f"s{suffix}", state)
    assert not (tmp_path / f"s{suffix}").exists()


def test_a_state_for_other_weights_is_rejected_by_default(tmp_path, state):
    own = model_hash(lively(), CONFIG)
    other = model_hash(jax.tree.map(lambda x: x + 1, lively()), CONFIG)
    save_state(tmp_path / "s.safetensors", state, info={"base_model": own})
    load_state(tmp_path / "s.safetensors", base_model=own)
    sentence = f"tuned for the model {own}; got the model {other}.*any_base=True"
    with pytest.raises(ValueError, match=sentence):
        load_state(tmp_path / "s.safetensors", base_model=other)
    load_state(tmp_path / "s.safetensors", base_model=other, any_base=True)
    save_state(tmp_path / "unsaid.safetensors", state)
    load_state(tmp_path / "unsaid.safetensors", base_model=other)


def test_invalid_tensors_and_metadata_are_named(tmp_path, state):
    path = tmp_path / "s.safetensors"
    memory = np.asarray(state.upscaled.memory).copy()
    memory[1, 0, 1, 3, 2] = np.nan
    bad = state.replace(upscaled=state.upscaled.replace(memory=jnp.asarray(memory)))
    with pytest.raises(ValueError, match=r"save_state.*NaN or Inf in upscaled.memory"):
        save_state(path, bad)
    save_state(path, state)
    good = {name: tensor.read() for name, tensor in read_tensors(path).items()}
    spoilt = good | {"upscaled.memory": memory[:, 0]}
    write_safetensors(tmp_path / "spoilt.safetensors", spoilt.items())
    sidecar(tmp_path / "spoilt.safetensors").write_bytes(sidecar(path).read_bytes())
    with pytest.raises(ValueError, match=r"load_state.*NaN or Inf in upscaled.memory"):
        load_state(tmp_path / "spoilt.safetensors")
    card = json.loads(sidecar(path).read_text())
    sidecar(path).write_text(json.dumps(card | {"dynamics": "still"}))
    with pytest.raises(
        ValueError, match=r"`state.upscaled.dynamics` must be one of static, decay"
    ):
        load_state(path, config=CONFIG)
    sidecar(path).unlink()
    with pytest.raises(
        ValueError, match=r"must give the upscaled state's dynamics; got none"
    ):
        load_state(path)
