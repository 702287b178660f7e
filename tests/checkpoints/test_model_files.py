"""Model files round-trip bit-exactly; every fault gives one clear sentence or table."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_checkpoints import CONFIG, differing, random_params

from rwkv7_jax.checkpoints.model_files import (
    describe_model,
    load_model,
    model_hash,
    save_model,
)
from rwkv7_jax.checkpoints.param_tree import official_tensors
from rwkv7_jax.checkpoints.pth import read_pth_metadata, write_pth
from rwkv7_jax.checkpoints.tensor_files import (
    EPSILONS,
    read_metadata,
    read_tensors,
    write_safetensors,
)
from rwkv7_jax.checkpoints.unused_value_residual import without_unused_value_residual
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import init_state

HF_CONFIG = dataclasses.replace(
    CONFIG, group_norm_eps=CONFIG.head_size * CONFIG.norm_eps
)
# The value residual of block 0, which official files have and no model reads.
UNUSED = ("v0", "v1", "v2")


@pytest.fixture(scope="module")
def params():
    return random_params()


def official(params, config=CONFIG) -> dict[str, np.ndarray]:
    """Return the flat official dict, with time-mix and channel-mix vectors shaped [1, 1, D]."""
    tensors = {}
    for name, array in official_tensors(params, config):
        is_vector = array.ndim == 1
        is_norm = any(part in name for part in ("ln", "emb", "head"))
        if is_vector and not is_norm:
            array = array.reshape(1, 1, -1)
        tensors[name] = array
    return tensors


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors", "folder"])
def test_a_round_trip_is_bit_exact(params, tmp_path, name):
    save_model(tmp_path / name, params, CONFIG)
    again, config = load_model(tmp_path / name)
    assert config == CONFIG
    assert differing(params, without_unused_value_residual(again)) == []


@pytest.mark.parametrize("name", ["m.pth", "m.safetensors", "m.st", "folder"])
@pytest.mark.parametrize(
    "fields", [["norm_eps"], ["group_norm_eps"], [*EPSILONS.values()]]
)
def test_other_epsilons_than_the_official_ones_are_kept(params, tmp_path, name, fields):
    odd = dataclasses.replace(CONFIG, **dict.fromkeys(fields, np.float32(0.003)))
    save_model(tmp_path / name, params, odd)
    assert load_model(tmp_path / name)[1] == odd
    if name != "folder":
        # The folder of a single file stands for the file.
        assert load_model(tmp_path)[1] == odd


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"rwkv7_jax.norm_eps": "x"}, "`rwkv7_jax.norm_eps` in the metadata must be a"),
        (
            {"rwkv7_jax.group_norm_eps": []},
            "`rwkv7_jax.group_norm_eps` in the metadata",
        ),
        ({"rwkv7_jax.norm_eps": "-1"}, "`norm_eps` must lie between 0 and 1"),
        ([1], "its metadata must be an object"),
    ],
)
def test_damaged_epsilons_are_named(params, tmp_path, metadata, message):
    write_pth(tmp_path / "m.pth", official(params).items(), metadata=metadata)
    with pytest.raises(ValueError, match=message) as error:
        load_model(tmp_path / "m.pth")
    assert "m.pth" in str(error.value)


def test_a_file_with_the_official_epsilons_has_no_entry_for_them(params, tmp_path):
    save_model(tmp_path / "m.pth", params, CONFIG)
    save_model(tmp_path / "m.safetensors", params, CONFIG)
    assert read_pth_metadata(tmp_path / "m.pth") == {}
    assert not read_metadata(tmp_path / "m.safetensors").keys() & EPSILONS.keys()


def test_pth_to_orbax_to_pth_is_bit_exact(params, tmp_path):
    rng = np.random.default_rng(1)
    unused = {
        "blocks.0.att.v0": rng.normal(size=(1, 1, 64)),
        "blocks.0.att.v1": rng.normal(size=(64, 24)),
        "blocks.0.att.v2": rng.normal(size=(24, 64)),
    }
    first = official(params) | {n: x.astype(jnp.bfloat16) for n, x in unused.items()}
    write_pth(tmp_path / "a.pth", first.items())
    save_model(tmp_path / "orbax", *load_model(tmp_path / "a.pth"))
    save_model(tmp_path / "b.pth", *load_model(tmp_path / "orbax"))
    last = {name: t.read() for name, t in read_tensors(tmp_path / "b.pth").items()}
    assert differing(first, last) == []


def test_hf_to_orbax_to_hf_is_bit_exact(params, tmp_path):
    save_model(tmp_path / "hf", params, HF_CONFIG, format="hf")
    save_model(tmp_path / "orbax", *load_model(tmp_path / "hf"))
    save_model(tmp_path / "hf2", *load_model(tmp_path / "orbax"), format="hf")
    one, two = (
        {
            n: t.read()
            for n, t in read_tensors(tmp_path / f / "model.safetensors").items()
        }
        for f in ("hf", "hf2")
    )
    assert differing(one, two) == []
    assert load_model(tmp_path / "hf2")[1] == HF_CONFIG


def test_web_rwkv_files_are_float16_and_transposed(params, tmp_path):
    save_model(tmp_path / "m.st", params, CONFIG)
    stored = {name: t for name, t in read_tensors(tmp_path / "m.st").items()}
    assert stored["blocks.1.att.w1"].shape == (8, 64)
    assert {t.dtype for t in stored.values()} == {np.dtype(np.float16)}
    again, config = load_model(tmp_path / "m.st")
    assert config == CONFIG
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), params)
    assert differing(half, without_unused_value_residual(again)) == []


def test_every_format_gives_the_same_fingerprint(params, tmp_path):
    hashes = set()
    for name, kwargs in (
        ("m.pth", {}),
        ("m.safetensors", {}),
        ("orbax", {}),
        ("hf", {"format": "hf"}),
    ):
        save_model(tmp_path / name, params, HF_CONFIG, **kwargs)
        hashes.add(model_hash(*load_model(tmp_path / name)))
    assert len(hashes) == 1
    assert model_hash(random_params(seed=1), CONFIG) not in hashes


def test_missing_unused_tensors_of_block_0_are_saved_as_zeros(params, tmp_path):
    write_pth(tmp_path / "a.pth", official(params).items())
    loaded, config = load_model(tmp_path / "a.pth")
    assert not any(name in loaded["layer_0"]["att"] for name in UNUSED)
    save_model(tmp_path / "b.pth", loaded, config)
    v1 = read_tensors(tmp_path / "b.pth")["blocks.0.att.v1"]
    assert v1.shape == (64, 24) and not v1.read().any()


def test_the_unused_value_residual_does_not_change_the_logits(params, tmp_path):
    save_model(tmp_path / "a.pth", params, CONFIG)
    loaded, _ = load_model(tmp_path / "a.pth")
    assert "v1" in loaded["layer_0"]["att"]
    tokens = jnp.arange(7)[None]
    apply = jax.jit(RWKV7(dataclasses.replace(CONFIG, implementation="scan")).apply)
    one, two = (
        apply({"params": p}, tokens, init_state(CONFIG))[0] for p in (params, loaded)
    )
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("prefix", ["_forward_module.", "base_model.model.", "module."])
def test_trainer_prefixes_are_stripped(params, tmp_path, prefix):
    named = {f"{prefix}{name}": array for name, array in official(params).items()}
    write_pth(tmp_path / "a.pth", named.items())
    assert differing(params, load_model(tmp_path / "a.pth")[0]) == []


# What stands around the tensors: a trainer's names for them, and what else it saves.
AROUND = {
    "state_dict": {"epoch": 1, "optimizer_states": [{}]},
    "model_state_dict": {"optimizer_state_dict": {"state": {}}},
    "module": {
        "param_shapes": [(3, 4)],
        "sparse": {"a"},
        "ds_config": {"b": [1, None]},
    },
    "model": {"ema": "a", "step": 3},
    "weights": {"step": 3, "config": {"width": 64}},
}


@pytest.mark.parametrize("name", AROUND)
def test_trainer_wrappers_are_unwrapped(params, tmp_path, name):
    torch = pytest.importorskip("torch", reason="the oracle extra is not installed")
    content = {}
    for key, array in official(params).items():
        tensor = torch.from_numpy(np.array(array, np.float32)).bfloat16()
        content[key] = tensor
    shapes = {key: tensor.shape for key, tensor in content.items()}
    torch.save({**AROUND[name], "shapes": shapes, name: content}, tmp_path / "a.pth")
    assert differing(params, load_model(tmp_path / "a.pth")[0]) == []


@pytest.mark.parametrize("promotion", ["standard", "strict"])
def test_mixed_dtypes_are_promoted_only_within_a_stack(params, tmp_path, promotion):
    named = official(params)
    named["blocks.2.att.w0"] = named["blocks.2.att.w0"].astype(np.float32)
    named["head.weight"] = named["head.weight"].astype(np.float32)
    write_pth(tmp_path / "a.pth", named.items())
    with jax.numpy_dtype_promotion(promotion):
        loaded, _ = load_model(tmp_path / "a.pth")
        save_model(tmp_path / "folder", loaded, CONFIG)
        described = [describe_model(tmp_path / name) for name in ("a.pth", "folder")]
    assert [dtype for _, dtype in described] == ["float32", "float32"]
    assert loaded["head"]["weight"].dtype == jnp.float32
    assert loaded["layers"]["att"]["w0"].dtype == jnp.float32
    assert loaded["layers"]["att"]["a0"].dtype == jnp.bfloat16
    expected = np.asarray(params["layers"]["att"]["w0"], np.float32)
    np.testing.assert_array_equal(loaded["layers"]["att"]["w0"], expected)


def test_old_hf_files_with_packed_lerps_load(params, tmp_path):
    save_model(tmp_path / "hf", params, HF_CONFIG, format="hf")
    file = tmp_path / "hf" / "model.safetensors"
    named = {n: t.read() for n, t in read_tensors(file).items()}
    for layer in range(3):
        stem = f"model.layers.{layer}.attn."
        packed = np.stack([named.pop(f"{stem}x_{c}").reshape(-1) for c in "rwkvag"])
        named[f"{stem}x_x"] = packed.reshape(6, 1, 1, 64)
    write_safetensors(file, named.items())
    assert differing(params, load_model(tmp_path / "hf")[0]) == []


def test_shapes_overrule_wrong_hf_metadata(params, tmp_path):
    save_model(tmp_path / "hf", params, HF_CONFIG, format="hf")
    card = tmp_path / "hf" / "config.json"
    wrong = {"num_heads": 32, "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 4096}
    card.write_text(json.dumps(json.loads(card.read_text()) | wrong))
    assert load_model(tmp_path / "hf")[1] == HF_CONFIG


def test_one_table_lists_all_faults(params, tmp_path):
    named = official(params)
    del named["blocks.1.att.k_k"], named["ln_out.bias"]
    named["blocks.2.ffn.key.weight"] = named["blocks.2.ffn.key.weight"].T
    named["blocks.1.att.novel"] = named["blocks.1.att.k_a"]
    write_pth(tmp_path / "a.pth", named.items())
    with pytest.raises(ValueError, match=r"4 differences") as caught:
        load_model(tmp_path / "a.pth")
    text = str(caught.value)
    assert "blocks.1.att.k_k" in text and "ln_out.bias" in text and "missing" in text
    assert "(136, 64)" in text and "(64, 136)" in text
    assert "blocks.1.att.novel" in text and "extra" in text


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("blocks.0.ffn.s_emb.weight", "rwkv7a"),
        ("blocks.0.qkv.qq.weight", "rwkv7b"),
        ("blocks.0.ffn.enn.weight", "an RWKV-8 .x080."),
        ("rosa1.rosa_qkv.emb", "an RWKV-8 .ROSA."),
        ("blocks.0.att.time_maa_x", "an RWKV-6"),
        ("blocks.0.att.time_faaaa", "an RWKV-5"),
        ("blocks.0.att.time_decay", "an RWKV-5"),
        ("model.layers.0.attn.q_proj.weight", "a hybrid"),
    ],
)
def test_rwkv_variants_are_rejected_by_name(params, tmp_path, name, sentence):
    named = official(params) | {name: np.zeros((3, 3), np.float32)}
    write_pth(tmp_path / "a.pth", named.items())
    with pytest.raises(ValueError, match=sentence) as caught:
        load_model(tmp_path / "a.pth")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.pth", "folder"])
def test_nan_is_rejected_with_the_tensor_name_by_default(params, tmp_path, name):
    leaf = params["layers"]["att"]["a0"].at[1, 5].set(jnp.nan)
    att = params["layers"]["att"] | {"a0": leaf}
    bad = params | {"layers": params["layers"] | {"att": att}}
    with pytest.raises(
        ValueError, match=r"save_model.*NaN or Inf in blocks\.2\.att\.a0"
    ):
        save_model(tmp_path / name, bad, CONFIG)
    assert not (tmp_path / name).exists()
    save_model(tmp_path / name, bad, CONFIG, allow_nan=True)
    with pytest.raises(
        ValueError, match=r"load_model.*NaN or Inf in blocks\.2\.att\.a0"
    ):
        load_model(tmp_path / name)
    loaded, _ = load_model(tmp_path / name, allow_nan=True)
    assert bool(jnp.isnan(loaded["layers"]["att"]["a0"][1, 5]))


def test_loading_warns_of_a_merged_state(params, tmp_path):
    named = official(params) | {
        "blocks.0.att.time_state": np.zeros((2, 32, 32), np.float32)
    }
    write_pth(tmp_path / "a.pth", named.items())
    with pytest.warns(UserWarning, match=r"tuned state as well; load_state"):
        load_model(tmp_path / "a.pth")


def good_safetensors(tmp_path) -> bytes:
    write_safetensors(
        tmp_path / "good.safetensors", [("a", np.arange(6, dtype=np.float32))]
    )
    return (tmp_path / "good.safetensors").read_bytes()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda good: good[:-3],
        lambda good: good + b"xyz",
        lambda good: (2**40).to_bytes(8, "little") + good[8:],
        lambda good: good[:8] + b"{" * (len(good) - 8),
        lambda good: good.replace(b"[0,24]", b"[0,99]"),
        lambda good: b"",
        lambda good: b"<!DOCTYPE html><html><body>404</body></html>",
    ],
    ids=[
        "truncated",
        "trailing",
        "huge header",
        "bad json",
        "lying offsets",
        "empty",
        "html",
    ],
)
def test_a_malformed_safetensors_file_is_named(tmp_path, spoil):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(spoil(good_safetensors(tmp_path)))
    with pytest.raises(ValueError, match=r"bad\.safetensors") as caught:
        load_model(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("none.pth", "does not exist"),
        ("model.bin", "is not a checkpoint"),
        ("plain", "not a checkpoint"),
    ],
)
def test_a_path_without_a_checkpoint_is_named(tmp_path, path, sentence):
    (tmp_path / "model.bin").write_bytes(b"x")
    (tmp_path / "plain").mkdir()
    with pytest.raises(ValueError, match=sentence):
        load_model(tmp_path / path)


def test_saving_never_replaces_a_folder_with_other_files(params, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="holds other files"):
        save_model(tmp_path / "mine", params, CONFIG)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    ("name", "format"), [("m.pth", None), ("orbax", None), ("hf", "hf")]
)
def test_saving_mismatched_shapes_names_the_leaf(params, tmp_path, name, format):
    wrong = params | {"head": {"weight": jnp.zeros((3, 64))}}
    sentence = (
        r"save_model: `params` must hold head/weight of shape \(75, 64\); got \(3, 64\)"
    )
    with pytest.raises(ValueError, match=sentence):
        save_model(tmp_path / name, wrong, HF_CONFIG, format=format)
    assert not (tmp_path / name).exists()


def test_float16_overflow_is_rejected(params, tmp_path):
    large = params | {"head": {"weight": params["head"]["weight"].at[3, 5].set(1e5)}}
    sentence = "must be at most 65504 in magnitude; got larger values in head.weight"
    with pytest.raises(ValueError, match=sentence):
        save_model(tmp_path / "m.st", large, CONFIG)
    assert not (tmp_path / "m.st").exists()


def test_an_orbax_folder_with_a_mismatched_config_is_rejected(params, tmp_path):
    save_model(tmp_path / "orbax", params, CONFIG)
    card = tmp_path / "orbax" / "rwkv7_jax.json"
    table = json.loads(card.read_text())
    table["config"]["vocab_size"] = 76
    card.write_text(json.dumps(table))
    sentence = (
        r"load_model: `params` must hold emb/weight of shape \(76, 64\); got \(75, 64\)"
    )
    with pytest.raises(ValueError, match=sentence):
        load_model(tmp_path / "orbax", allow_nan=True)


def test_an_hf_folder_cannot_hold_two_norm_epsilons(params, tmp_path):
    with pytest.raises(ValueError, match="must be head_size times `norm_eps`"):
        save_model(tmp_path / "hf", params, CONFIG, format="hf")


def test_a_single_layer_model_round_trips(tmp_path):
    config = RWKV7Config(vocab_size=20, num_layers=1, width=32, head_size=16)
    params = random_params(config)
    save_model(tmp_path / "m.pth", params, config)
    again, inferred = load_model(tmp_path / "m.pth")
    assert inferred == config
    assert differing(params, without_unused_value_residual(again)) == []


def test_parameter_differences_round_trip(params, tmp_path):
    difference = jax.tree.map(lambda x: x - x, params)
    save_model(tmp_path / "difference.pth", difference, CONFIG)
    assert (
        differing(
            difference,
            without_unused_value_residual(load_model(tmp_path / "difference.pth")[0]),
        )
        == []
    )


def test_torch_loads_our_pth_files_with_weights_only(params, tmp_path):
    torch = pytest.importorskip("torch", reason="the oracle extra is not installed")
    save_model(tmp_path / "m.pth", params, CONFIG)
    loaded = torch.load(tmp_path / "m.pth", weights_only=True)
    assert loaded["blocks.0.att.x_r"].shape == (1, 1, 64)
    for name, array in official(params).items():
        ours = np.asarray(array, np.float32)
        np.testing.assert_array_equal(loaded[name].float().numpy(), ours)
