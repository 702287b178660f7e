"""States in the files of other programs; the first bytes identify the format."""

import importlib

import foreign_layouts as layouts
import jax.numpy as jnp
import numpy as np
import pytest
from random_checkpoints import CONFIG, differing, random_params, random_state
from tolerances import SAME, assert_close

from rwkv7_jax.checkpoints import has_merged_state
from rwkv7_jax.checkpoints.model_files import load_model
from rwkv7_jax.checkpoints.state_files import load_state, save_state
from rwkv7_jax.checkpoints.state_sidecar import sidecar
from rwkv7_jax.checkpoints.tensor_files import read_tensors
from rwkv7_jax.model.rwkv7 import RWKV7


@pytest.fixture(scope="module")
def arrays():
    return layouts.official(random_params(dtype=jnp.float16), CONFIG)


def unchanged(arrays):
    return arrays


@pytest.mark.parametrize("name", ["s.state", "s.pth", "s", "s.bin"])
def test_a_pytorch_state_loads_under_any_suffix(tmp_path, name):
    save_state(tmp_path / "first.pth", random_state())
    (tmp_path / "first.pth").rename(tmp_path / name)
    assert differing(load_state(tmp_path / name), random_state()) == []


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("first.st", "s.state"),
        ("first.st", "s.st"),
        ("first.safetensors", "s.safetensors"),
    ],
)
def test_safetensors_with_suffix_state_are_read_like_st(tmp_path, written, name):
    save_state(tmp_path / written, random_state())
    (tmp_path / written).rename(tmp_path / name)
    assert differing(load_state(tmp_path / name), random_state()) == []


def test_safetensors_with_another_suffix_need_the_sidecar(tmp_path):
    save_state(tmp_path / "first.st", random_state())
    (tmp_path / "first.st").rename(tmp_path / "s.bin")
    with pytest.raises(
        ValueError, match="without a suffix that gives the order of their axes"
    ):
        load_state(tmp_path / "s.bin")
    sidecar(tmp_path / "first.st").rename(sidecar(tmp_path / "s.bin"))
    assert differing(load_state(tmp_path / "s.bin"), random_state()) == []


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("m.safetensors", layouts.transposed),
        ("m.st", layouts.transposed),
        ("m.st", unchanged),
    ],
)
def test_a_merged_state_has_the_axis_order_of_its_model(arrays, tmp_path, name, change):
    merged = dict(change(arrays))
    for layer, wkv in enumerate(np.asarray(random_state().wkv[:, 0], np.float16)):
        is_turned = change is layouts.transposed
        merged[f"blocks.{layer}.att.time_state"] = (
            wkv.swapaxes(-1, -2) if is_turned else wkv
        )
    layouts.write_plain_safetensors(tmp_path / name, merged)
    assert has_merged_state(tmp_path / name)
    expected = np.asarray(random_state().wkv, np.float16)
    np.testing.assert_array_equal(load_state(tmp_path / name).wkv, expected)


def test_a_state_in_a_sharded_folder_loads(arrays, tmp_path):
    merged = dict(arrays)
    for layer, wkv in enumerate(np.asarray(random_state().wkv[:, 0])):
        merged[f"blocks.{layer}.att.time_state"] = wkv
    merged = layouts.of_base_model(merged, "model.")
    layouts.write_folder(
        tmp_path / "m", merged, config={"model_type": "rwkv7"}, shards=2
    )
    with pytest.warns(UserWarning, match="holds a tuned state as well"):
        load_model(tmp_path / "m")
    assert has_merged_state(tmp_path / "m")
    assert differing(load_state(tmp_path / "m"), random_state()) == []


def test_a_state_file_has_the_layout_of_ai00(tmp_path):
    """Safetensors in float16, each head transposed; web-rwkv reads no other dtype.

    Source: cryscan/web-rwkv@1991c4b src/runtime/v7.rs, `read_state`.
    """
    state = random_state()
    half = state.replace(wkv=state.wkv.astype(jnp.float16).astype(jnp.float32))
    save_state(tmp_path / "s.state", half)
    tensors = read_tensors(tmp_path / "s.state")
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"float16"}
    for layer in range(CONFIG.num_layers):
        found = tensors[f"blocks.{layer}.att.time_state"].read()
        np.testing.assert_array_equal(found, half.wkv[layer, 0].swapaxes(-1, -2))
    assert differing(load_state(tmp_path / "s.state"), half) == []
    save_state(tmp_path / "again.pth", load_state(tmp_path / "s.state"))
    assert differing(load_state(tmp_path / "again.pth"), half) == []


def test_a_state_that_overflows_float16_is_not_saved_as_state(tmp_path):
    large = random_state().replace(wkv=1e6 * random_state().wkv)
    with pytest.raises(ValueError, match="save_state: `dtype` must hold the state's"):
        save_state(tmp_path / "s.state", large)
    save_state(tmp_path / "s.state", large, dtype="float32")
    assert differing(load_state(tmp_path / "s.state"), large) == []


def tuned_by_rwkv_peft(seed=0):
    """The tensors of a state that RWKV-PEFT tuned with its train type "fullstate"."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for layer, wkv in enumerate(np.asarray(random_state().wkv[:, 0])):
        tensors[f"blocks.{layer}.att.time_state"] = wkv
        for part in ("att", "ffn"):
            name = f"blocks.{layer}.{part}.ts_state"
            tensors[name] = rng.normal(size=CONFIG.width).astype(np.float32)
    return tensors


@pytest.mark.parametrize("merged", [False, True])
def test_a_full_state_of_rwkv_peft_gives_its_logits(tmp_path, merged):
    torch = pytest.importorskip("torch", reason="the oracle extra is not installed")
    reference = importlib.import_module("torch_reference")
    params = random_params(dtype=jnp.float32, scale=0.2)
    arrays = layouts.official(params, CONFIG)
    tensors = tuned_by_rwkv_peft()
    path = tmp_path / "rwkv-0.pth"
    if merged:
        layouts.write_torch(path, arrays | tensors)
        with pytest.warns(UserWarning, match="holds a tuned state as well"):
            loaded, _ = load_model(path)
        assert differing(loaded, params) == []
    else:
        layouts.write_torch(path, tensors)
    tokens = np.random.default_rng(1).integers(0, CONFIG.vocab_size, (1, 7))
    weights = {
        name: torch.from_numpy(np.array(array))
        for name, array in (arrays | tensors).items()
    }
    expected = reference.logits(weights, torch.from_numpy(tokens)).numpy()
    found, _ = RWKV7(CONFIG).apply(
        {"params": params}, jnp.asarray(tokens), load_state(path)
    )
    assert_close(found, expected, SAME["model"])


def test_a_state_with_the_prefix_of_peft_is_not_an_adapter(tmp_path):
    state = layouts.prefixed(tuned_by_rwkv_peft(), "base_model.model.")
    layouts.write_torch(tmp_path / "s.pth", state)
    assert np.any(load_state(tmp_path / "s.pth").att_shift)


def test_a_state_of_another_shape_is_rejected(tmp_path):
    batch = {"blocks.0.att.time_state": np.ones((1, 2, 32, 32), np.float32)}
    layouts.write_torch(tmp_path / "s.pth", batch)
    with pytest.raises(ValueError, match=r"got shape \(1, 2, 32, 32\)"):
        load_state(tmp_path / "s.pth")


def test_a_file_without_a_state_is_named(arrays, tmp_path):
    layouts.write_torch(tmp_path / "m.pth", arrays)
    with pytest.raises(ValueError, match=r"m\.pth` is a model without a start state"):
        load_state(tmp_path / "m.pth")
    adapter = {"blocks.0.att.key.lora_A": np.ones((4, 64), np.float32)}
    layouts.write_torch(tmp_path / "a.pth", adapter)
    with pytest.raises(ValueError, match=r"a\.pth` holds an adapter such as LoRA"):
        load_state(tmp_path / "a.pth")


def test_tensors_next_to_a_state_are_not_dropped(tmp_path):
    state = tuned_by_rwkv_peft()
    others = {"blocks.0.ln1.weight": np.ones(64, np.float32)}
    layouts.write_torch(tmp_path / "s.pth", state | others)
    with pytest.raises(
        ValueError, match=r"holds blocks\.0\.ln1\.weight next to a start state"
    ):
        load_state(tmp_path / "s.pth")
    scalar = {"loss": np.float32(2.5).reshape(())}
    layouts.write_torch(tmp_path / "s.pth", state | scalar)
    assert np.any(load_state(tmp_path / "s.pth").att_shift)
