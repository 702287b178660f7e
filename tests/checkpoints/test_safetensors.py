"""Our .safetensors files are those of the package and need no second copy in memory."""

import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from rwkv7_jax.checkpoints.tensor_files import (
    read_metadata,
    read_tensors,
    write_safetensors,
)

DTYPES = [
    *("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8"),
    "bool",
    ml_dtypes.bfloat16,
]
SHAPES = arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
TENSOR = st.sampled_from(DTYPES).flatmap(
    lambda dtype: st.builds(
        lambda shape: np.arange(np.prod(shape)).reshape(shape).astype(dtype), SHAPES
    )
)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        np.testing.assert_array_equal(found[name], array)


def read_here(path):
    return {
        name: tensor.read() for name, tensor in read_tensors(path, verify=True).items()
    }


@settings(max_examples=60)
@given(tensors=st.dictionaries(st.text('ab.é"\\', min_size=1), TENSOR, min_size=1))
def test_the_package_reads_our_files(tmp_path_factory, tensors):
    path = tmp_path_factory.mktemp("written") / "a.safetensors"
    write_safetensors(path, tensors.items(), metadata={"said": "yes"})
    assert_same(safetensors.numpy.load_file(path), tensors)
    assert_same(read_here(path), tensors)
    assert read_metadata(path) == {"said": "yes"}


@settings(max_examples=60)
@given(tensors=st.dictionaries(st.text("ab.", min_size=1), TENSOR, min_size=1))
def test_we_read_the_packages_files(tmp_path_factory, tensors):
    path = tmp_path_factory.mktemp("theirs") / "a.safetensors"
    safetensors.numpy.save_file(tensors, path)
    assert_same(read_here(path), tensors)


def test_a_changed_value_is_detected(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, [("a", np.arange(9.0))])
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.safetensors` is damaged"):
        read_tensors(path, verify=True)


def test_writing_and_reading_hold_one_tensor_at_a_time(tmp_path):
    path = tmp_path / "large.safetensors"
    size = 2**20
    stack = np.ones((16, 4, size // 16), np.float32)
    # Turned, so that each has to be copied before it is written.
    turned = [(f"{index}", matrix.T) for index, matrix in enumerate(stack)]
    tracemalloc.start()
    write_safetensors(path, turned)
    assert path.stat().st_size > 16 * size
    assert tracemalloc.get_traced_memory()[1] < 3 * size
    tracemalloc.reset_peak()
    total = sum(float(tensor.read().sum()) for tensor in read_tensors(path).values())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == stack.size and peak < size


def test_an_unsupported_dtype_lists_the_supported_ones(tmp_path):
    path = tmp_path / "a.safetensors"
    safetensors.numpy.save_file({"w": np.ones(3, np.uint16)}, path)
    with pytest.raises(
        ValueError,
        match=r"has 'w' of dtype U16; save it in .*, float64, .* or bool",
    ):
        read_tensors(path)
