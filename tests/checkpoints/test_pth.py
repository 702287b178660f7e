"""PyTorch zip checkpoints: torch reads ours, and we read those of torch."""

import collections
import os
import pickle
import struct
import time
import zipfile

import ml_dtypes
import numpy as np
import pytest

from rwkv7_jax.checkpoints.pth import open_pth, read_pth, write_pth
from rwkv7_jax.checkpoints.tensor_files import named_arrays, open_tensors, read_tensors

DTYPES = (
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint8",
)


def arrays() -> dict[str, np.ndarray]:
    """Arrays of each dtype and of odd shapes, including an empty one and a scalar."""
    rng = np.random.default_rng(0)
    found = {d: (rng.normal(size=(3, 5)) * 9).astype(np.dtype(d)) for d in DTYPES}
    flags = np.array([True, False, True])
    return found | {
        "flags": flags,
        "empty": np.zeros((0, 7), np.float32),
        "one": np.float32(3.5),
    }


def same(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(
        np.asarray(one[n]).dtype == two[n].dtype
        and np.asarray(one[n]).shape == two[n].shape
        and np.asarray(one[n]).tobytes() == two[n].tobytes()
        for n in one
    )


def test_arrays_round_trip_bit_exactly(tmp_path):
    write_pth(tmp_path / "a.pth", ((n, np.asarray(x)) for n, x in arrays().items()))
    assert same(arrays(), read_pth(tmp_path / "a.pth"))


def test_arrays_are_read_only_views_of_the_file(tmp_path):
    write_pth(tmp_path / "a.pth", [("x", np.arange(7.0))])
    x = read_pth(tmp_path / "a.pth")["x"]
    assert not x.flags.writeable and not x.flags.owndata


def test_data_are_aligned_to_64_bytes(tmp_path):
    write_pth(
        tmp_path / "a.pth", [(n, np.arange(7.0)) for n in ("x", "a longer name", "y")]
    )
    for array in read_pth(tmp_path / "a.pth").values():
        assert array.ctypes.data % 64 == 0


def test_a_failed_write_leaves_only_the_old_file(tmp_path):
    write_pth(tmp_path / "a.pth", [("x", np.arange(7.0))])
    before = (tmp_path / "a.pth").read_bytes()
    with pytest.raises(
        ValueError, match="`y` must have a dtype that PyTorch stores; got complex64"
    ):
        write_pth(
            tmp_path / "a.pth", [("x", np.ones(3)), ("y", np.ones(2, np.complex64))]
        )
    assert (tmp_path / "a.pth").read_bytes() == before
    assert os.listdir(tmp_path) == ["a.pth"]


@pytest.mark.parametrize("mapped", [False, True])
def test_torch_reads_our_files_with_weights_only_and_mmap(tmp_path, mapped):
    torch = pytest.importorskip("torch", reason="the oracle extra is not installed")
    write_pth(tmp_path / "a.pth", ((n, np.asarray(x)) for n, x in arrays().items()))
    loaded = torch.load(tmp_path / "a.pth", weights_only=True, mmap=mapped)
    assert list(loaded) == list(arrays())
    for name, ours in arrays().items():
        theirs = loaded[name]
        assert tuple(theirs.shape) == ours.shape
        if theirs.dtype == torch.bfloat16:
            assert theirs.view(torch.int16).numpy().tobytes() == ours.tobytes()
        else:
            assert theirs.numpy().tobytes() == ours.tobytes()


def test_we_read_any_strides_and_storages_of_torch(tmp_path):
    torch = pytest.importorskip("torch", reason="the oracle extra is not installed")
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "plain": base,
        "transposed": base.T,
        "sliced": base[1:3, ::2],
        "half": base.half(),
        "brain": base.bfloat16(),
        "parameter": torch.nn.Parameter(base + 1),
        "scalar": torch.tensor(7),
        "flags": torch.tensor([True, False]),
    }
    torch.save({"state_dict": tensors, "step": 3, "name": "x"}, tmp_path / "a.pth")
    found = read_pth(tmp_path / "a.pth")
    assert (found["step"], found["name"]) == (3, "x")
    for name, tensor in tensors.items():
        ours = found["state_dict"][name]
        assert ours.shape == tuple(tensor.shape)
        np.testing.assert_array_equal(
            ours.astype(np.float32), tensor.detach().float().numpy()
        )
    assert found["state_dict"]["brain"].dtype == ml_dtypes.bfloat16


def test_we_read_a_torch_modules_state_dict(tmp_path):
    torch = pytest.importorskip("torch", reason="the oracle extra is not installed")
    module = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.LayerNorm(5))
    torch.save(module.state_dict(), tmp_path / "a.pth")
    assert list(read_pth(tmp_path / "a.pth")) == list(module.state_dict())


def trainers_things(torch) -> dict:
    """Return objects that trainers save next to tensors, of every type that torch loads as safe."""
    with_attribute = torch.ones(3)
    with_attribute.note = 1
    return {
        "dtype": torch.bfloat16,
        "eighth": torch.float8_e4m3fn,
        "device": torch.device("cuda", 1),
        "layout": torch.strided,
        "counter": collections.Counter("aab"),
        "bytes": b"ab",
        "buffer": bytearray(b"ab"),
        "complex": 1 + 2j,
        "set": {1, 2},
        "shape": torch.Size([2, 3]),
        "by rate": {0.5: 1, None: 2, 3: 4, True: 5, b"k": 6, torch.float32: 7},
        "in eight bits": torch.ones(3).to(torch.float8_e5m2),
        "unsigned": torch.ones(3, dtype=torch.uint16),
        "waves": torch.ones(3, dtype=torch.complex64),
        "sparse": torch.eye(2).to_sparse(),
        "meta": torch.ones(2, device="meta"),
        "attribute": with_attribute,
        "loss": torch.tensor(2.0),
    }


@pytest.mark.parametrize("place", ["under a usual name", "under any name"])
def test_we_find_the_model_among_a_trainers_other_entries(tmp_path, place):
    torch = pytest.importorskip("torch", reason="the oracle extra is not installed")
    content = {"hyper": trainers_things(torch), "loss": torch.tensor(2.0)}
    content["hyper"] = {"nested": content["hyper"]}
    weights = {"emb.weight": torch.ones(2, 3)}
    if place == "under a usual name":
        content |= trainers_things(torch) | {"state_dict": weights}
    else:
        content["net"] = weights
    torch.save(content, tmp_path / "a.pth")
    torch.load(tmp_path / "a.pth", weights_only=True)
    tensors = read_tensors(tmp_path / "a.pth")
    assert tensors.keys() == {"emb.weight"}
    np.testing.assert_array_equal(tensors["emb.weight"].read(), np.ones((2, 3)))
    nested = read_pth(tmp_path / "a.pth")["hyper"]["nested"]
    assert nested["counter"] == {"a": 2, "b": 1}
    np.testing.assert_array_equal(nested["attribute"], np.ones(3))


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "uint16", "complex64"])
def test_an_unsupported_dtype_lists_the_supported_ones(tmp_path, dtype):
    torch = pytest.importorskip("torch", reason="the oracle extra is not installed")
    tensors = {"x": torch.ones(2), "w": torch.ones(2).to(getattr(torch, dtype))}
    torch.save(tensors, tmp_path / "a.pth")
    sentence = (
        f"'w' of dtype {dtype}; save it in .*, float64, float32, float16, bfloat16, "
    )
    with pytest.raises(ValueError, match=sentence):
        read_tensors(tmp_path / "a.pth")


def test_two_models_in_a_file_are_both_named(tmp_path):
    torch = pytest.importorskip("torch", reason="the oracle extra is not installed")
    weights = {"emb.weight": torch.ones(2, 3)}
    torch.save({"net": weights, "ema": weights, "step": 3}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="holds tensors under 'net' and under 'ema'"):
        read_tensors(tmp_path / "a.pth")


def test_a_dict_with_many_names_is_searched_once(tmp_path):
    """The cost was names times entries: a file of 800 kB took minutes."""
    inner = pickle.dumps(dict.fromkeys(range(20_000)), 2)[2:-1] + b"q\x00"
    names = b"".join(
        b"J" + struct.pack("<i", name) + b"h\x00" for name in range(20_000)
    )
    first = b"\x80\x02}(J" + struct.pack("<i", -1) + inner
    path = tmp_path / "a.pth"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", first + names + b"u.")
    for verify in (False, True):
        begun = time.process_time()
        with pytest.raises(ValueError, match="holds no tensors by name"):
            open_tensors(path, verify=verify)
        assert time.process_time() - begun < 2


def test_one_dict_under_two_names_is_ambiguous(tmp_path):
    path = tmp_path / "a.pth"
    write_pth(path, [("w", np.ones(3, np.float32))])
    content, sums = open_pth(path)
    with pytest.raises(ValueError, match="under 'a' and under 'b'"):
        named_arrays({"a": content, "b": content}, path, sums)
    assert list(named_arrays({"a": content, "b": {}}, path, sums)) == ["w"]
