"""Loading with int8 matrices: every format, and what is rejected."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_checkpoints import CONFIG, random_params

from rwkv7_jax.checkpoints.model_files import load_model, model_hash, save_model
from rwkv7_jax.model.int8_weights import dequantize, is_int8, quantize

FORMATS = ("m.pth", "m.safetensors", "orbax")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One model in every format."""
    folder = tmp_path_factory.mktemp("models")
    params = random_params(CONFIG)
    for name in FORMATS:
        save_model(folder / name, params, CONFIG)
    return folder


@pytest.mark.parametrize("dtype", [None, "float32"])
@pytest.mark.parametrize("name", FORMATS)
def test_loading_in_int8_equals_quantizing_the_float_model(folder, name, dtype):
    floats, config = load_model(folder / name, dtype=dtype)
    found, same = load_model(folder / name, dtype=dtype, weights="int8")
    assert same == config
    expected = quantize(floats, model_hash(floats, config))
    # Their structures hold the origins.
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for leaf, other in zip(
        jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
    ):
        assert leaf.dtype == other.dtype
        np.testing.assert_array_equal(leaf, other)
        assert leaf.devices() == set(jax.devices()[:1])


@pytest.mark.parametrize("name", FORMATS)
def test_int8_loading_keeps_the_model_hash(folder, name):
    """A state tuned on int8 weights belongs to the checkpoint that they came from."""
    floats, config = load_model(folder / name)
    rounded, _ = load_model(folder / name, weights="int8")
    assert model_hash(rounded, config) == model_hash(floats, config)


def test_a_file_with_mixed_dtypes_hashes_like_its_tree(tmp_path):
    params = random_params(CONFIG)
    params["head"] = {"weight": params["head"]["weight"].astype(jnp.float32)}
    save_model(tmp_path / "m.pth", params, CONFIG)
    floats, config = load_model(tmp_path / "m.pth")
    rounded, _ = load_model(tmp_path / "m.pth", weights="int8")
    assert model_hash(rounded, config) == model_hash(floats, config)


@pytest.mark.parametrize("number", [np.nan, np.inf])
@pytest.mark.parametrize("name", FORMATS)
def test_non_finite_values_are_rejected(tmp_path, name, number):
    params = random_params(CONFIG)
    weight = params["head"]["weight"]
    params["head"] = {"weight": weight.at[1, 2].set(number)}
    save_model(tmp_path / name, params, CONFIG, allow_nan=True)
    with pytest.raises(ValueError, match=r"NaN or Inf in head.weight"):
        load_model(tmp_path / name, weights="int8")
    sentence = "load_model: `allow_nan` must be left out with int8 weights"
    with pytest.raises(ValueError, match=sentence):
        load_model(tmp_path / name, weights="int8", allow_nan=True)


@pytest.mark.parametrize("weights", ["int4", "float32", ""])
def test_unknown_weight_formats_are_rejected(folder, weights):
    sentence = f"load_model: `weights` must be one of int8; got {weights!r}."
    with pytest.raises(ValueError) as caught:
        load_model(folder / "m.pth", weights=weights)
    assert str(caught.value) == sentence


@pytest.mark.parametrize("name", ["n.pth", "n.safetensors", "n.st", "folder"])
def test_int8_weights_are_not_saved(folder, tmp_path, name):
    rounded, config = load_model(folder / "m.pth", weights="int8")
    sentence = (
        r"^save_model: `params` must be floating-point; got int8 weights.*dequantize"
    )
    with pytest.raises(TypeError, match=sentence):
        save_model(tmp_path / name, rounded, config)
    assert not list(tmp_path.iterdir())


def test_dequantized_weights_are_saved_as_a_separate_model(folder, tmp_path):
    rounded, config = load_model(folder / "m.pth", weights="int8")
    floats = dequantize(rounded)
    save_model(tmp_path / "n.pth", floats, config)
    again, _ = load_model(tmp_path / "n.pth")
    assert model_hash(again, config) == model_hash(floats, config)
    assert model_hash(again, config) != model_hash(rounded, config)
    assert not any(is_int8(leaf) for leaf in jax.tree.leaves(again, is_leaf=is_int8))
