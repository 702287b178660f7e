"""A checkpoint is read into shards slice by slice; no whole tensor is ever on the host."""

import dataclasses
import json
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_checkpoints import random_params, shapes_of
from tiny_models import CONFIG as TINY
from tiny_models import lively

from rwkv7_jax import sharding
from rwkv7_jax.checkpoints import tree_reader
from rwkv7_jax.checkpoints.model_files import load_model, save_model
from rwkv7_jax.checkpoints.tensor_names import Tensor
from rwkv7_jax.model.config import RWKV7Config

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
    """Save a model and return its path."""
    if name.endswith(".gguf"):
        pytest.importorskip("gguf")
    path = folder / name
    save_model(path, params, CONFIG)
    return path


def assert_same_in_shards(loaded, whole, mesh):
    """Check that two trees have the same bits and that the first is sharded as the layout says."""
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
def test_sharded_loading_is_bit_exact(params, mesh, tmp_path, name):
    path = saved(params, tmp_path, name)
    loaded, config = load_model(path, mesh=mesh)
    whole, whole_config = load_model(path)
    assert config == whole_config
    assert_same_in_shards(loaded, whole, mesh)


@pytest.mark.parametrize("name", ["model.safetensors", "folder"])
def test_sharded_int8_loading_is_bit_exact(params, mesh, tmp_path, name):
    path = saved(params, tmp_path, name)
    loaded, _ = load_model(path, weights="int8", mesh=mesh)
    whole, _ = load_model(path, weights="int8")
    assert_same_in_shards(loaded, whole, mesh)


def test_each_value_is_read_once_and_one_shard_at_a_time(
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


# Prints how far loading into eight shards raised the most memory that the process ever had, mapped
# pages included; and the size of the largest shard.
MEASURE = """
    import json, sys
    import jax
    from rwkv7_jax import sharding
    from rwkv7_jax.checkpoints.model_files import load_model

    def memory(name):
        line = next(line for line in open("/proc/self/status") if line.startswith(name))
        return 1024 * int(line.split()[1])

    mesh = sharding.make_mesh({"fsdp": 8}, 8)
    # What is loaded and compiled at the first model is there before the second one.
    jax.block_until_ready(load_model(sys.argv[1], mesh=mesh))
    before = memory("VmRSS")
    params, _ = jax.block_until_ready(load_model(sys.argv[2], mesh=mesh))
    shards = [leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(params)]
    print(json.dumps([memory("VmHWM") - before, max(shards)]))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not os.path.exists("/proc/self/status"), reason="memory is read from /proc"
)
def test_peak_memory_is_the_weights_plus_two_shards(tmp_path):
    config = RWKV7Config(vocab_size=65536, num_layers=1, width=512)
    path = tmp_path / "large.safetensors"
    zeros = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, jnp.bfloat16),
        shapes_of(config),
    )
    save_model(path, zeros, config)
    small = dataclasses.replace(config, vocab_size=512)
    save_model(tmp_path / "small.pth", random_params(small), small)
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            textwrap.dedent(MEASURE),
            tmp_path / "small.pth",
            path,
        ],
        env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
        capture_output=True,
        text=True,
        check=True,
    )
    rise, largest_shard = json.loads(done.stdout)
    size = path.stat().st_size
    # The weights stay; pages of the file go when they were read. One large matrix read at once
    # would be eight shards.
    assert largest_shard * 8 == 65536 * 512 * 2
    assert rise <= size + 2 * largest_shard


def test_indivisible_heads_are_rejected_before_reading(
    tmp_path,
):
    config = dataclasses.replace(CONFIG, head_size=64)
    save_model(tmp_path / "model.pth", lively(config), config)
    mesh = sharding.make_mesh({"tensor": 2}, 2)
    with pytest.raises(ValueError, match=r"load_model: `mesh` must .* 1 heads"):
        load_model(tmp_path / "model.pth", mesh=mesh)


@pytest.mark.parametrize("name", ["model.pth", "folder"])
def test_a_mesh_with_explicit_axes_is_rejected_before_reading(params, tmp_path, name):
    path = saved(params, tmp_path, name)
    mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(jax.sharding.AxisType.Explicit,))
    message = (
        r"^load_model: `mesh` must have axes of type AxisType.Auto, .* for fsdp\.$"
    )
    with pytest.raises(ValueError, match=message):
        load_model(path, mesh=mesh)


def test_a_non_finite_value_in_any_shard_is_rejected(params, mesh, tmp_path):
    broken = jax.tree.map(lambda leaf: leaf, params)
    key = broken["layers"]["ffn"]["key"]
    key["weight"] = key["weight"].at[1, -1, -1].set(np.nan)
    path = tmp_path / "model.safetensors"
    save_model(path, broken, CONFIG, allow_nan=True)
    with pytest.raises(ValueError, match=r"NaN or Inf in blocks\.2\.ffn\.key\.weight"):
        load_model(path, mesh=mesh)
    load_model(path, mesh=mesh, allow_nan=True)
