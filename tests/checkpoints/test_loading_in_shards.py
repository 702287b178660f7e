"""A checkpoint is read into shards slice by slice, and nothing of it is ever whole on the host."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny_models import CONFIG as TINY
from tiny_models import lively

from rwkv7_jax import sharding
from rwkv7_jax.checkpoints.loading import tree_reader
from rwkv7_jax.checkpoints.model_files import load_model, save_model
from rwkv7_jax.checkpoints.tensor_names import Tensor

# Tensors are views of the mapped file, of which parts are copied. "st" and GGUF files have
# the low-rank matrices transposed.
FORMATS = ["model.pth", "model.safetensors", "model.st", "model.gguf", "folder"]


# A GGUF file needs a vocabulary, and bytes are one of this size.
CONFIG = dataclasses.replace(TINY, vocab_size=257)


@pytest.fixture(scope="module")
def params():
    return lively(CONFIG)


@pytest.fixture(scope="module", params=["fsdp", "tensor"])
def mesh(request):
    return sharding.make_mesh({request.param: 2}, 2)


def saved(params, folder, name):
    """Saves a model, and returns its path."""
    if name.endswith(".gguf"):
        pytest.importorskip("gguf")
    path = folder / name
    save_model(path, params, CONFIG)
    return path


def assert_same_in_shards(loaded, whole, mesh):
    """Fails unless two trees have the same bits, and the first lies as the layout says."""
    wanted = sharding.shardings(mesh, whole)
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(loaded),
        jax.tree.leaves(whole),
        jax.tree.leaves(wanted),
        strict=True,
    )
    for (path, leaf), other, placed in pairs:
        name = jax.tree_util.keystr(path)
        assert leaf.sharding.is_equivalent_to(placed, leaf.ndim), name
        assert leaf.dtype == other.dtype, name
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(other), name)


@pytest.mark.parametrize("name", FORMATS)
def test_shards_have_the_bits_of_the_whole(params, mesh, tmp_path, name):
    path = saved(params, tmp_path, name)
    loaded, config = load_model(path, mesh=mesh)
    whole, whole_config = load_model(path)
    assert config == whole_config
    assert_same_in_shards(loaded, whole, mesh)


@pytest.mark.parametrize("name", ["model.safetensors", "folder"])
def test_shards_in_8_bits_have_the_integers_of_the_whole(params, mesh, tmp_path, name):
    path = saved(params, tmp_path, name)
    loaded, _ = load_model(path, weights="int8", mesh=mesh)
    whole, _ = load_model(path, weights="int8")
    assert_same_in_shards(loaded, whole, mesh)


def test_every_number_is_read_once_and_a_shard_at_a_time(
    params, mesh, tmp_path, monkeypatch
):
    path = saved(params, tmp_path, "model.safetensors")
    read = []
    buffers = []
    original = Tensor.part
    allocate = tree_reader._aligned_empty

    def counting(tensor, index):
        part = original(tensor, index)
        read.append(part.nbytes)
        return part

    def measuring(shape, dtype):
        buffer = allocate(shape, dtype)
        buffers.append(buffer.nbytes)
        return buffer

    monkeypatch.setattr(Tensor, "part", counting)
    monkeypatch.setattr(tree_reader, "_aligned_empty", measuring)
    loaded, _ = load_model(path, mesh=mesh)
    leaves = jax.tree.leaves(loaded)
    matrices = sum(leaf.nbytes for leaf in leaves if leaf.nbytes >= max(read))
    assert sum(read) <= sum(leaf.nbytes for leaf in leaves)
    assert sum(read) >= matrices
    shards = [leaf.addressable_shards[0].data.nbytes for leaf in leaves]
    assert max(buffers) == max(shards)


def test_heads_that_the_devices_do_not_divide_are_refused_before_numbers_are_read(
    tmp_path,
):
    config = dataclasses.replace(CONFIG, head_size=64)
    save_model(tmp_path / "model.pth", lively(config), config)
    mesh = sharding.make_mesh({"tensor": 2}, 2)
    with pytest.raises(ValueError, match=r"load_model: `mesh` must .* 1 heads"):
        load_model(tmp_path / "model.pth", mesh=mesh)


def test_a_number_that_is_not_finite_is_found_in_its_shard(params, mesh, tmp_path):
    broken = jax.tree.map(lambda leaf: leaf, params)
    key = broken["layers"]["ffn"]["key"]
    key["weight"] = key["weight"].at[1, -1, -1].set(np.nan)
    path = tmp_path / "model.safetensors"
    save_model(path, broken, CONFIG, allow_nan=True)
    with pytest.raises(ValueError, match=r"NaN or Inf in blocks\.2\.ffn\.key\.weight"):
        load_model(path, mesh=mesh)
    load_model(path, mesh=mesh, allow_nan=True)
