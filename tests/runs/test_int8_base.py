"""Runs that hold a frozen model in 8 bits, and runs that cannot."""

import dataclasses

import jax
import pytest
from smallest_runs import mode_settings, save_base_model

from rwkv7_jax.checkpoints.model_files import load_model, model_hash
from rwkv7_jax.model.int8_weights import origin_of
from rwkv7_jax.runs.modes.model_setup import load_or_init
from rwkv7_jax.runs.modes.registry import make_mode
from rwkv7_jax.runs.settings import read_settings


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A checkpoint of one layer."""
    path = tmp_path_factory.mktemp("base") / "m.pth"
    save_base_model(path)
    return path


def test_a_frozen_model_is_held_in_8_bits(base, tmp_path):
    settings = mode_settings("state", base)
    settings = dataclasses.replace(settings, model={"weights": "int8"})
    mode = make_mode(settings, tmp_path)
    floats, config = load_model(base)
    assert origin_of(mode.frozen) == model_hash(floats, config)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(mode.frozen))
    trained = 4 * mode.trained_count(mode.make_params())
    assert mode.memory_estimate().parameters == held + trained


def test_trained_weights_cannot_be_held_in_8_bits(base, tmp_path):
    settings = mode_settings("pretrain", base)
    values = {"mode": "pretrain", "init": str(base), "model": {"weights": "int8"}}
    sentence = (
        '`config.model.weights` must be left out in mode "pretrain": integers cannot be '
        "trained; got 'int8'."
    )
    with pytest.raises(ValueError) as caught:
        make_mode(read_settings(values), tmp_path)
    assert str(caught.value) == sentence
    with pytest.raises(ValueError, match=r"without `config.init`"):
        load_or_init(dataclasses.replace(settings, init=None, model=values["model"]))


@pytest.mark.parametrize(
    ("where", "value", "sentence"),
    [
        ("model", "int4", r"`config.model.weights` must be .*int8.*; got 'int4'"),
        ("observer", "int8", r"`config.observer.model.weights` is not a setting"),
    ],
)
def test_other_values_and_other_models_are_rejected(where, value, sentence):
    group = {"weights": value}
    values = {"model": group} if where == "model" else {"observer": {"model": group}}
    with pytest.raises(ValueError, match=sentence):
        read_settings(values)
