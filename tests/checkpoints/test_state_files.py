"""Start states as files."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_checkpoints import CONFIG, differing, random_params, random_state

from rwkv7_jax.checkpoints.pth import write_pth
from rwkv7_jax.checkpoints.state_files import load_state, save_state
from rwkv7_jax.checkpoints.state_sidecar import sidecar
from rwkv7_jax.checkpoints.tensor_files import read_tensors, write_safetensors
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import init_state

SUFFIXES = (".pth", ".safetensors", ".st")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_state_round_trips_bit_exactly(tmp_path, suffix):
    state = random_state()
    save_state(tmp_path / f"s{suffix}", state, config=CONFIG)
    assert differing(state, load_state(tmp_path / f"s{suffix}", config=CONFIG)) == []


def test_nonzero_shift_states_are_saved(tmp_path):
    state = random_state()
    state = state.replace(
        att_shift=state.att_shift + 0.25, ffn_shift=state.ffn_shift - 0.5
    )
    save_state(tmp_path / "s.pth", state)
    assert differing(state, load_state(tmp_path / "s.pth")) == []


@pytest.mark.parametrize(
    ("suffix", "swapped"), [(".pth", False), (".safetensors", False), (".st", True)]
)
def test_st_files_swap_the_value_and_key_axes(tmp_path, suffix, swapped):
    state = random_state()
    save_state(tmp_path / f"s{suffix}", state)
    stored = read_tensors(tmp_path / f"s{suffix}")["blocks.1.att.time_state"].read()
    ours = np.asarray(state.wkv[1, 0])
    np.testing.assert_array_equal(stored, ours.swapaxes(-1, -2) if swapped else ours)


def test_the_sidecar_has_axes_sizes_and_info(tmp_path):
    save_state(
        tmp_path / "s.pth", random_state(), info={"base_model": "abc", "score": 1.5}
    )
    card = json.loads(sidecar(tmp_path / "s.pth").read_text())
    assert card["axes"] == "head, value, key"
    assert (card["layers"], card["heads"], card["value_size"], card["key_size"]) == (
        3,
        2,
        32,
        32,
    )
    assert card["base_model"] == "abc" and card["score"] == 1.5


def test_a_state_of_another_model_is_rejected(tmp_path):
    save_state(tmp_path / "s.pth", random_state())
    other = RWKV7Config(vocab_size=75, num_layers=3, width=64, head_size=64)
    with pytest.raises(
        ValueError, match=r"\(3, 1, 64, 64\) for this model; got \(3, 2, 32, 32\)"
    ):
        load_state(tmp_path / "s.pth", config=other)
    with pytest.raises(ValueError, match=r"save_state: `state` must have"):
        save_state(tmp_path / "t.pth", random_state(), config=other)


def test_a_sidecar_with_the_other_axis_order_is_rejected(tmp_path):
    save_state(tmp_path / "s.st", random_state())
    named = {n: t.read() for n, t in read_tensors(tmp_path / "s.st").items()}
    write_pth(tmp_path / "s.pth", named.items())
    sidecar(tmp_path / "s.pth").write_text(sidecar(tmp_path / "s.st").read_text())
    with pytest.raises(ValueError, match=r"s\.pth` is transposed"):
        load_state(tmp_path / "s.pth")
    (tmp_path / "s.st").rename(tmp_path / "s.safetensors")
    sidecar(tmp_path / "s.st").rename(sidecar(tmp_path / "s.safetensors"))
    with pytest.raises(ValueError, match=r"s\.safetensors` is transposed"):
        load_state(tmp_path / "s.safetensors")


def test_a_transposed_state_fails_the_differential_test(tmp_path):
    """Check a negative control: the saved state gives equal logits, a transposed one does not."""
    params = jax.tree.map(lambda leaf: 0.2 * leaf, random_params(dtype=jnp.float32))
    state = random_state()
    save_state(tmp_path / "s.pth", state)
    apply = jax.jit(
        lambda s: RWKV7(CONFIG).apply({"params": params}, jnp.arange(9)[None], s)[0]
    )
    loaded = load_state(tmp_path / "s.pth")
    wrong = loaded.replace(wkv=loaded.wkv.swapaxes(-1, -2))
    truth = apply(state)
    np.testing.assert_array_equal(apply(loaded), truth)
    assert float(jnp.abs(apply(wrong) - truth).max()) > 0.1 * float(jnp.std(truth))


def test_a_state_merged_into_a_model_file_is_found(tmp_path):
    wkv = np.asarray(random_state().wkv[:, 0])
    named = {f"blocks.{i}.att.time_state": w for i, w in enumerate(wkv)}
    named["emb.weight"] = np.zeros((75, 64), np.float32)
    write_pth(tmp_path / "m.pth", named.items())
    np.testing.assert_array_equal(load_state(tmp_path / "m.pth").wkv[:, 0], wkv)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda named: named.pop("blocks.1.att.time_state"),
            r"has no blocks\.1\.att\\?\.time_state",
        ),
        (lambda named: named.clear(), r"holds no"),
        (
            lambda named: named["blocks.0.att.time_state"].fill(np.nan),
            r"NaN or Inf in a time_state",
        ),
    ],
)
def test_a_broken_state_file_is_rejected(tmp_path, change, sentence):
    wkv = np.asarray(random_state().wkv[:, 0])
    named = {f"blocks.{i}.att.time_state": w.copy() for i, w in enumerate(wkv)}
    change(named)
    write_safetensors(
        tmp_path / "s.safetensors", [*named.items(), ("loss", np.ones((), np.float32))]
    )
    with pytest.raises(ValueError, match=sentence) as caught:
        load_state(tmp_path / "s.safetensors")
    assert "\n" not in str(caught.value)


def test_saving_several_sequences_is_rejected(tmp_path):
    with pytest.raises(ValueError, match="must hold one sequence; got 2"):
        save_state(tmp_path / "s.pth", init_state(CONFIG, batch=2))


def test_an_unknown_suffix_is_rejected(tmp_path):
    with pytest.raises(ValueError, match=r"must end in \.pth, \.safetensors, \.st"):
        save_state(tmp_path / "s.npz", random_state())
