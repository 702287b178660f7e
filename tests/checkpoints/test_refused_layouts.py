"""Other architectures and damaged files are rejected in one sentence that names the problem."""

import json
import struct
import zipfile

import foreign_layouts as layouts
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_checkpoints import CONFIG, differing, random_params

from rwkv7_jax.checkpoints.model_files import load_model, save_model
from rwkv7_jax.checkpoints.orbax_folder import load_orbax
from rwkv7_jax.checkpoints.unused_value_residual import without_unused_value_residual

# Numbers that every container holds.
DTYPE = jnp.float16
RIGHT = {"model_type": "rwkv7", "architectures": ["Rwkv7ForCausalLM"]}


@pytest.fixture(scope="module")
def params():
    return random_params(dtype=DTYPE)


@pytest.fixture(scope="module")
def arrays(params):
    return layouts.official(params, CONFIG)


def old_rwkv(*names):
    """Return the tensors of an older architecture: only the time-mix names that RWKV-7 shares."""

    def change(arrays):
        old = {
            name: array
            for name, array in arrays.items()
            if ".att." not in name or name.endswith(("key.weight", "output.weight"))
        }
        return old | {name: np.zeros(32, np.float16) for name in names}

    return change


def toy(*names):
    """Return the tensor names of an experiment."""
    return lambda arrays: {name: np.zeros((2, 2), np.float16) for name in names}


def quantized(*ends):
    """Return a model in which one matrix is quantised."""

    def change(arrays):
        others = {
            name: array for name, array in arrays.items() if ".0.att.key" not in name
        }
        return others | toy(*(f"blocks.0.att.key.{end}" for end in ends))(arrays)

    return change


REFUSED = {
    "RWKV-4": (old_rwkv("blocks.0.att.time_decay"), "is an RWKV-4 checkpoint"),
    "RWKV-4 of transformers": (
        old_rwkv("rwkv.blocks.0.attention.time_decay"),
        "is an RWKV-4 checkpoint",
    ),
    "RWKV-5.0": (
        old_rwkv("blocks.0.att.time_first", "blocks.0.att.ln_x.weight"),
        "is an RWKV-5 checkpoint",
    ),
    "RWKV-5.2": (
        old_rwkv("blocks.0.att.time_decay", "blocks.0.att.time_faaaa"),
        "is an RWKV-5 checkpoint",
    ),
    "RWKV-6": (
        old_rwkv("blocks.0.att.time_faaaa", "blocks.0.att.time_maa_w1"),
        "is an RWKV-6 checkpoint",
    ),
    "RWKV-6 of fla": (
        toy("model.embeddings.weight", "model.layers.0.attn.bonus"),
        "is an RWKV-6 checkpoint",
    ),
    "rwkv7a": (
        lambda arrays: arrays | toy("blocks.0.ffn.s_emb.weight")(arrays),
        r"is an rwkv7a \(DeepEmbed\) checkpoint",
    ),
    "rwkv7a of transformers": (
        toy("rwkv7.blocks.0.feed_forward.s_emb.weight"),
        r"is an rwkv7a \(DeepEmbed\) checkpoint",
    ),
    "rwkv7b": (
        toy("blocks.0.ffn.s_emb.weight", "blocks.0.qkv.qq.weight"),
        r"is an rwkv7b \(DeepEmbedAttention\) checkpoint",
    ),
    "x080": (toy("blocks.0.ffn.enn.weight"), r"is an RWKV-8 \(x080\) checkpoint"),
    "ROSA": (
        toy("e.weight", "rwkv1.x_r", "rosa1.rosa_qkv.emb"),
        r"is an RWKV-8 \(ROSA\) checkpoint",
    ),
    "an experiment": (
        toy("e.weight", "rwkv1.x_r"),
        "is an experimental RWKV checkpoint",
    ),
    "hybrid of fla": (
        lambda arrays: (
            layouts.in_fla_names(arrays) | toy("model.layers.1.attn.q_proj.weight")([])
        ),
        "is a hybrid .with attention layers. checkpoint",
    ),
    "LoRA of RWKV-PEFT": (
        toy("blocks.0.att.key.lora_A", "blocks.0.att.key.lora_B"),
        r"holds an adapter such as LoRA \(it has blocks\.0\.att\.key\.lora_A\)",
    ),
    "LoRA of PEFT": (
        toy("base_model.model.blocks.0.att.key.lora_A.weight"),
        "holds an adapter such as LoRA",
    ),
    "LoRA next to its model": (
        lambda arrays: arrays | toy("blocks.0.att.key.lora_A")([]),
        "merge it into its model first",
    ),
    "Bone": (toy("blocks.0.ffn.key.bone"), "holds an adapter"),
    "DiSHA": (toy("blocks.0.ffn.key.disha"), "holds an adapter"),
    "start of PiSSA": (toy("blocks.0.ffn.key.init_lora_A"), "holds an adapter"),
    "LoRA of web-rwkv": (toy("blocks.0.att.key.lora.0"), "holds an adapter"),
    "MiSS of PEFT": (
        toy("base_model.model.blocks.0.att.key.miss_block"),
        "with RWKV-PEFT's `--merge 1`",
    ),
    "Bone of PEFT": (
        toy("base_model.model.model.layers.0.attn.r_proj.bone_block"),
        "holds an adapter",
    ),
    "IA3 of PEFT": (
        toy("base_model.model.blocks.0.att.key.ia3_l"),
        "holds an adapter",
    ),
    "8 bits of bitsandbytes": (
        quantized("SCB"),
        r"is quantised by bitsandbytes \(it has blocks\.0\.att\.key\.SCB\)",
    ),
    "4 bits of bitsandbytes": (
        quantized("weight.absmax", "weight.quant_map"),
        "is quantised by bitsandbytes",
    ),
    "GPTQ": (
        quantized("qweight", "qzeros", "scales", "g_idx"),
        "is quantised by GPTQ or AWQ",
    ),
    "compressed-tensors": (
        quantized("weight_packed", "weight_scale"),
        "is quantised by compressed-tensors",
    ),
    "Quanto": (quantized("weight._data", "weight._scale"), "is quantised by Quanto"),
    "HQQ": (quantized("W_q", "scale", "zero"), "is quantised by HQQ"),
    "MLX": (
        quantized("weight", "scales", "biases"),
        "use the float model that it was made from",
    ),
    "stage 3 of DeepSpeed": (
        lambda arrays: {name: np.zeros(0, np.float16) for name in arrays},
        "without values, as in a checkpoint that DeepSpeed's stage 3",
    ),
    "twice": (
        lambda arrays: arrays | {"model.emb.weight": arrays["emb.weight"]},
        "holds emb.weight twice, as emb.weight and as model.emb.weight",
    ),
    "a model inside another": (
        lambda arrays: layouts.prefixed(arrays, "student."),
        r"has no emb\.weight, but student\.emb\.weight: save only the tensors under",
    ),
    "another model": (
        toy("model.embed_tokens.weight"),
        "is not an RWKV-7 checkpoint: it has no emb.weight",
    ),
    "float64": (
        lambda arrays: (
            arrays | {"head.weight": arrays["head.weight"].astype(np.float64)}
        ),
        r"holds float64 \(head\.weight\), which JAX would narrow to float32",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("write", ["pth", "folder"])
def test_other_architectures_are_rejected_by_name(arrays, tmp_path, kind, write):
    change, sentence = REFUSED[kind]
    path = tmp_path / "m.pth"
    if write == "pth":
        layouts.write_torch(path, change(arrays))
    else:
        path = tmp_path / "folder"
        layouts.write_folder(path, change(arrays), config=RIGHT)
    with pytest.raises(ValueError, match=sentence) as caught:
        load_model(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["zero_to_fp32.py", "latest"], "is a DeepSpeed checkpoint"),
        (["mp_rank_00_model_states.pt"], "with its zero_to_fp32.py"),
        (["latest", "checkpoint/mp_rank_00_model_states.pt"], "below stage 3"),
        ([".metadata", "__0_0.distcp"], "is a PyTorch distributed checkpoint: merge"),
        (["step-10/__0_0.distcp"], "is a PyTorch distributed checkpoint: merge"),
        (["notes.txt"], "is not a checkpoint: it holds neither"),
    ],
)
def test_unmerged_trainer_folders_are_rejected_with_a_remedy(tmp_path, names, sentence):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=sentence):
        load_model(tmp_path)


def test_a_folder_of_saved_steps_names_one_of_them(arrays, tmp_path):
    for step in (100, 200):
        layouts.write_folder(tmp_path / f"checkpoint-{step}", arrays, config=RIGHT)
    with pytest.raises(ValueError, match="a folder in it, such as checkpoint-200"):
        load_model(tmp_path)


def test_archives_of_other_programs_are_named(arrays, tmp_path):
    np.savez(tmp_path / "m.npz", **arrays)
    with pytest.raises(ValueError, match=r"it is an archive of NumPy \(\.npz\)"):
        load_model(tmp_path / "m.npz")
    for names, sentence in (
        (["m/data.pkl", "m/constants.pkl"], "it is a TorchScript program"),
        (["config.json"], r"not of PyTorch \(it holds config\.json\): unpack it"),
    ):
        with zipfile.ZipFile(tmp_path / "m.pth", "w") as archive:
            for name in names:
                archive.writestr(name, "x")
        with pytest.raises(ValueError, match=sentence):
            load_model(tmp_path / "m.pth")


def test_the_model_states_of_deepspeed_load(params, arrays, tmp_path):
    torch = pytest.importorskip("torch", reason="the oracle extra is not installed")
    tensors = {
        f"_forward_module.{name}": torch.from_numpy(np.array(array))
        for name, array in arrays.items()
    }
    content = {
        "module": tensors,
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": [{name: array.shape for name, array in tensors.items()}],
        "shared_params": {},
        "sparse_tensor_module_names": set(),
        "global_steps": 5,
        "ds_config": {"zero_optimization": {"stage": 2}},
        "ds_version": "0.16.0",
    }
    torch.save(content, tmp_path / "mp_rank_00_model_states.pt")
    loaded, _ = load_model(tmp_path / "mp_rank_00_model_states.pt")
    assert differing(loaded, params) == []


def drop_a_shard(folder):
    (folder / "model-00002-of-00003.safetensors").unlink()


def point_elsewhere(folder):
    index = folder / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    table["weight_map"]["emb.weight"] = "../elsewhere.safetensors"
    index.write_text(json.dumps(table))


def repeat_a_tensor(folder):
    first = folder / "model-00001-of-00003.safetensors"
    (folder / "model-00002-of-00003.safetensors").write_bytes(first.read_bytes())


def empty_index(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}')


@pytest.mark.parametrize(
    ("damage", "index", "sentence"),
    [
        (drop_a_shard, True, "lacks the shard model-00002-of-00003.safetensors"),
        (drop_a_shard, False, "holds 2 of the 3 shards"),
        (point_elsewhere, True, "which is not next to it"),
        (repeat_a_tensor, True, "in two files"),
        (empty_index, True, "names no files"),
    ],
)
def test_a_folder_with_inconsistent_shards_is_rejected(
    arrays, tmp_path, damage, index, sentence
):
    folder = tmp_path / "m"
    layouts.write_folder(folder, arrays, config=RIGHT, shards=3, index=index)
    damage(folder)
    with pytest.raises(ValueError, match=sentence):
        load_model(folder)


def test_a_folder_with_several_checkpoints_is_ambiguous(arrays, tmp_path):
    for name in ("a.pth", "b.pth"):
        layouts.write_torch(tmp_path / name, arrays)
    with pytest.raises(ValueError, match=r"several checkpoints, a\.pth and b\.pth"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda data: data[:10], "the file ends inside its header"),
        (lambda data: data[:40], "the file ends inside a tensor's name"),
        (lambda data: data[:-5], "the file ends inside"),
        (lambda data: data + b"\0\0\0", "the file ends between two tensors"),
        (lambda data: data + bytes(12), "is a damaged file of rwkv.cpp"),
        (
            lambda data: data[:20] + struct.pack("<i", 8) + data[24:],
            "quantised to Q5_1; use the FP32 or FP16 file",
        ),
        (
            lambda data: data[:32] + struct.pack("<i", 2) + data[36:],
            "quantised to Q4_0",
        ),
        (lambda data: data[:4] + struct.pack("<i", 7) + data[8:], "of version 7"),
        (
            lambda data: data[:36] + struct.pack("<i", -64) + data[40:],
            "is a damaged file of rwkv.cpp",
        ),
    ],
)
def test_damaged_or_quantized_rwkv_cpp_files_are_rejected(
    arrays, tmp_path, spoil, sentence
):
    path = tmp_path / "m.bin"
    layouts.write_rwkv_cpp(path, arrays)
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ValueError, match=sentence) as caught:
        load_model(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_float64_is_kept_with_x64_or_converted_on_request(params, arrays, tmp_path):
    wide = {name: array.astype(np.float64) for name, array in arrays.items()}
    layouts.write_torch(tmp_path / "m.pth", wide)
    narrowed, _ = load_model(tmp_path / "m.pth", dtype="float32")
    expected = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    assert differing(narrowed, expected) == []
    with pytest.raises(ValueError, match="`dtype` must be one that JAX keeps; float64"):
        load_model(tmp_path / "m.pth", dtype="float64")
    with jax.enable_x64(True):
        kept, config = load_model(tmp_path / "m.pth")
        assert kept["head"]["weight"].dtype == np.float64
        save_model(tmp_path / "orbax", kept, config)
        save_model(tmp_path / "again.pth", kept, config)
        again, _ = load_model(tmp_path / "again.pth")
        assert differing(without_unused_value_residual(again), kept) == []
    with pytest.raises(ValueError, match=r"holds float64 .*narrow to float32"):
        load_orbax(tmp_path / "orbax")
    with pytest.raises(ValueError, match=r"holds float64 .*narrow to float32"):
        load_model(tmp_path / "again.pth")
