"""Every layout of other programs loads the same weights or is rejected in one sentence."""

import dataclasses
import json

import foreign_layouts as layouts
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_checkpoints import CONFIG, differing, random_params

from rwkv7_jax.checkpoints import verify
from rwkv7_jax.checkpoints.model_files import load_model, save_model
from rwkv7_jax.checkpoints.pth import write_pth
from rwkv7_jax.checkpoints.tensor_files import write_safetensors
from rwkv7_jax.checkpoints.unused_value_residual import without_unused_value_residual
from rwkv7_jax.cli.commands import main
from rwkv7_jax.model.config import RWKV7Config

# Numbers that float16 and float32 both hold, so that every container has the same ones.
DTYPE = jnp.float16
SQUARE = RWKV7Config(
    vocab_size=20,
    num_layers=2,
    width=32,
    head_size=16,
    decay_rank=32,
    icl_rank=32,
    value_rank=32,
    gate_rank=32,
)
RIGHT = {"model_type": "rwkv7", "architectures": ["Rwkv7ForCausalLM"]}


@pytest.fixture(scope="module")
def params():
    return random_params(dtype=DTYPE)


@pytest.fixture(scope="module")
def arrays(params):
    return layouts.official(params, CONFIG)


def in_one_file(name, write, change):
    """A row of the table: one file."""

    def make(folder, arrays):
        write(folder / name, change(arrays))
        return folder / name

    return make


def in_a_folder(change, **how):
    """A row of the table: a folder."""

    def make(folder, arrays):
        layouts.write_folder(folder / "model", change(arrays), **how)
        return folder / "model"

    return make


def prefix(text):
    return lambda arrays: layouts.prefixed(arrays, text)


def base(text):
    return lambda arrays: layouts.of_base_model(arrays, text)


def unchanged(arrays):
    return arrays


def as_layers_of(text):
    return lambda arrays: layouts.of_base_model(layouts.as_layers(arrays), text)


def old_fla(arrays):
    fla = layouts.in_fla_names(arrays)
    return layouts.with_packed_lerps(fla, "attn.x_", "attn.x_x")


def in_shapes_of_mlx(arrays):
    """mlx-lm saves the vectors of the heads as matrices."""
    shaped = {}
    for name, array in layouts.in_fla_names(arrays).items():
        if name.endswith(("k_k", "k_a")) or ".g_norm." in name:
            array = array.reshape(CONFIG.num_heads, CONFIG.head_size)
        shaped[name] = array
    return shaped


SHARDED_BIN = {
    "write": layouts.write_torch,
    "stem": "pytorch_model",
    "suffix": ".bin",
    "shards": 2,
}
LAYOUTS = {
    "pth": in_one_file("m.pth", layouts.write_torch, unchanged),
    "pth called bin": in_one_file("m.bin", layouts.write_torch, unchanged),
    "pth without a suffix": in_one_file("m", layouts.write_torch, unchanged),
    "pth of torch.compile": in_one_file(
        "m.pth", layouts.write_torch, prefix("_orig_mod.")
    ),
    "pth of lightning": in_one_file(
        "m.pth", layouts.write_torch, prefix("_forward_module.")
    ),
    "pth of both": in_one_file(
        "m.pth", layouts.write_torch, prefix("_forward_module._orig_mod.model.")
    ),
    "pth of both the other way": in_one_file(
        "m.pth", layouts.write_torch, prefix("model._orig_mod._forward_module.")
    ),
    "pth of data parallel": in_one_file(
        "m.pth", layouts.write_torch, prefix("module.")
    ),
    "pth of compiled blocks": in_one_file(
        "m.pth",
        layouts.write_torch,
        lambda arrays: layouts.renamed(
            arrays, lambda name: name.replace(".att.", "._orig_mod.att.")
        ),
    ),
    "pth of fla names": in_one_file("m.pth", layouts.write_torch, layouts.in_fla_names),
    "safetensors": in_one_file(
        "m.safetensors", layouts.write_plain_safetensors, unchanged
    ),
    "safetensors called pth": in_one_file(
        "m.pth", layouts.write_plain_safetensors, unchanged
    ),
    "web-rwkv": in_one_file(
        "m.st", layouts.write_plain_safetensors, layouts.transposed
    ),
    "web-rwkv called safetensors": in_one_file(
        "m.safetensors", layouts.write_plain_safetensors, layouts.transposed
    ),
    "official called st": in_one_file(
        "m.st", layouts.write_plain_safetensors, unchanged
    ),
    "rwkv.cpp": in_one_file("m.bin", layouts.write_rwkv_cpp, unchanged),
    "rwkv.cpp called pth": in_one_file("m.pth", layouts.write_rwkv_cpp, unchanged),
    "folder, plain names": in_a_folder(unchanged, config=RIGHT),
    "folder, model.": in_a_folder(base("model."), config=RIGHT),
    "folder, rwkv7.": in_a_folder(base("rwkv7."), config=RIGHT),
    "folder, rwkv": in_a_folder(base("rwkv7."), config={"model_type": "rwkv"}),
    "folder, wrong type": in_a_folder(base("model."), config={"model_type": "llama"}),
    "folder, no type": in_a_folder(base("model."), config={}),
    "folder, no config": in_a_folder(base("model."), config=None),
    "folder, shards": in_a_folder(base("model."), config=RIGHT, shards=3),
    "folder, no index": in_a_folder(base("model."), config=None, shards=3, index=False),
    "folder, low rank as layers": in_a_folder(as_layers_of("model."), config=RIGHT),
    "folder, old transformers names": in_a_folder(
        layouts.in_old_transformers_names, config=RIGHT
    ),
    "folder, bin": in_a_folder(
        base("model."), config=RIGHT, **(SHARDED_BIN | {"shards": 1})
    ),
    "folder, bin in shards": in_a_folder(base("rwkv7."), config={}, **SHARDED_BIN),
    "folder, a pth": in_a_folder(
        unchanged, config={}, write=layouts.write_torch, suffix=".pth"
    ),
    "folder, fla": in_a_folder(layouts.in_fla_names, config=RIGHT),
    "folder, fla with six lerps in one": in_a_folder(old_fla, config=RIGHT),
    "folder, fla in bin shards": in_a_folder(
        layouts.in_fla_names, config={"model_type": "rwkv"}, **SHARDED_BIN
    ),
    "folder, fla of mlx-lm": in_a_folder(in_shapes_of_mlx, config=RIGHT),
    "folder, fla of torch.compile": in_a_folder(
        lambda arrays: layouts.prefixed(layouts.in_fla_names(arrays), "_orig_mod."),
        config=None,
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_loads_the_same_weights(params, arrays, tmp_path, layout):
    path = LAYOUTS[layout](tmp_path, arrays)
    loaded, config = load_model(path)
    expected = CONFIG
    if "fla" in layout:
        # The rule for the per-head norm belongs to the names.
        expected = dataclasses.replace(
            CONFIG, group_norm_eps=CONFIG.head_size * CONFIG.norm_eps
        )
    assert config == expected
    if layout.startswith("rwkv.cpp"):
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    assert differing(loaded, params) == []


def test_float16_rwkv_cpp_files_keep_both_dtypes(params, arrays, tmp_path):
    layouts.write_rwkv_cpp(tmp_path / "m.bin", arrays, half=True)
    loaded, config = load_model(tmp_path / "m.bin")
    assert config == CONFIG
    assert loaded["head"]["weight"].dtype == jnp.float16
    assert loaded["ln_out"]["bias"].dtype == jnp.float32
    assert loaded["layers"]["att"]["w1"].dtype == jnp.float16
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), loaded)
    expected = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    assert differing(wide, expected) == []


def test_a_file_of_a_folder_loads_like_the_folder(arrays, tmp_path):
    fla = layouts.in_fla_names(arrays)
    layouts.write_folder(tmp_path / "m", fla, config=RIGHT | {"norm_eps": 1e-4})
    of_folder, config = load_model(tmp_path / "m")
    of_file, config_of_file = load_model(tmp_path / "m" / "model.safetensors")
    assert config.norm_eps == 1e-4
    assert config.group_norm_eps == CONFIG.head_size * 1e-4
    assert config_of_file == config
    assert differing(of_folder, of_file) == []


@pytest.mark.parametrize("change", [base("model."), layouts.in_fla_names])
@pytest.mark.parametrize("file", ["", "model.safetensors"])
def test_a_tied_head_is_the_embedding(arrays, tmp_path, change, file):
    tied = change(arrays | {"head.weight": arrays["emb.weight"]})
    one = {name: tied[name] for name in tied if "head.weight" not in name}
    layouts.write_folder(tmp_path / "one", one, config=RIGHT)
    with pytest.raises(ValueError, match=r"head\.weight .* missing"):
        load_model(tmp_path / "one")
    table = RIGHT | {"tie_word_embeddings": True}
    (tmp_path / "one" / "config.json").write_text(json.dumps(table))
    layouts.write_folder(tmp_path / "two", tied, config=RIGHT)
    expected, config = load_model(tmp_path / "two")
    loaded, same = load_model(tmp_path / "one" / file)
    assert same == config
    assert differing(loaded, expected) == []


@pytest.mark.parametrize("file", ["", "model.safetensors"])
def test_another_activation_of_fla_is_rejected(arrays, tmp_path, file):
    fla = layouts.in_fla_names(arrays)
    layouts.write_folder(tmp_path / "m", fla, config=RIGHT | {"hidden_act": "gelu"})
    with pytest.raises(
        ValueError, match=r"config\.json` has hidden_act 'gelu'"
    ) as caught:
        load_model(tmp_path / "m" / file)
    assert "\n" not in str(caught.value)


def test_a_folder_with_one_gguf_file_loads(tmp_path):
    pytest.importorskip("gguf", reason="the gguf extra is not installed")
    # Bytes and an end of text: the file holds a vocabulary too.
    config = dataclasses.replace(CONFIG, vocab_size=257)
    params = random_params(config, dtype=DTYPE)
    (tmp_path / "m").mkdir()
    save_model(tmp_path / "m" / "m.gguf", params, config)
    loaded, read = load_model(tmp_path / "m")
    assert read == config
    assert differing(without_unused_value_residual(loaded), params) == []


def test_norm_eps_of_official_names_excludes_the_group_norm(arrays, tmp_path):
    table = RIGHT | {"layer_norm_epsilon": 1e-4}
    layouts.write_folder(tmp_path / "m", arrays, config=table)
    config = load_model(tmp_path / "m")[1]
    assert config == dataclasses.replace(CONFIG, norm_eps=1e-4)


# Where each rank equals the width, the shapes say nothing.


@pytest.fixture(scope="module")
def square():
    return random_params(SQUARE, dtype=DTYPE)


SQUARE_LAYOUTS = {
    "pth": in_one_file("m.pth", layouts.write_torch, unchanged),
    "rwkv.cpp": in_one_file("m.bin", layouts.write_rwkv_cpp, unchanged),
    "folder, model.": in_a_folder(base("model."), config=RIGHT),
    "folder, low rank as layers": in_a_folder(as_layers_of("model."), config=RIGHT),
    "folder, fla": in_a_folder(layouts.in_fla_names, config=RIGHT),
    "safetensors with a vector in float32": in_one_file(
        "m.safetensors",
        layouts.write_plain_safetensors,
        lambda arrays: (
            arrays | {"ln_out.bias": arrays["ln_out.bias"].astype(np.float32)}
        ),
    ),
}


@pytest.mark.parametrize("layout", SQUARE_LAYOUTS)
def test_names_or_format_settle_the_layout_of_square_ranks(square, tmp_path, layout):
    path = SQUARE_LAYOUTS[layout](tmp_path, layouts.official(square, SQUARE))
    loaded = jax.tree.map(lambda leaf: leaf.astype(DTYPE), load_model(path)[0])
    assert differing(loaded, square) == []


@pytest.mark.parametrize("name", ["m.safetensors", "m.st"])
@pytest.mark.parametrize("change", [unchanged, layouts.transposed])
def test_an_ambiguous_layout_is_rejected(square, tmp_path, name, change):
    square = change(layouts.official(square, SQUARE))
    layouts.write_plain_safetensors(tmp_path / name, square)
    with pytest.raises(
        ValueError, match="nothing in it says whether they are oriented"
    ) as caught:
        load_model(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_float16_file_without_low_rank_matrices_is_not_called_ambiguous(
    square, tmp_path
):
    named = layouts.official(square, SQUARE)
    plain = {name: array for name, array in named.items() if array.shape != (32, 32)}
    layouts.write_plain_safetensors(tmp_path / "m.safetensors", plain)
    with pytest.raises(ValueError, match=r"it has no blocks\.0\.att\.w1"):
        load_model(tmp_path / "m.safetensors")


@pytest.mark.parametrize("name", ["m.safetensors", "m.st", "m.pth"])
def test_our_square_rank_files_load_under_any_suffix(square, tmp_path, name):
    save_model(tmp_path / name, square, SQUARE)
    other = tmp_path / "renamed.bin"
    (tmp_path / name).rename(other)
    assert differing(without_unused_value_residual(load_model(other)[0]), square) == []


@pytest.mark.parametrize(
    ("name", "change"),
    [("m.safetensors", unchanged), ("m.st", layouts.transposed)],
)
def test_our_older_files_load_by_their_suffix(square, tmp_path, name, change):
    named = change(layouts.official(square, SQUARE))
    # With a digest and without the entry, as our earlier versions wrote.
    write_safetensors(tmp_path / name, named.items())
    assert differing(load_model(tmp_path / name)[0], square) == []


def test_mixed_matrix_orientations_are_rejected(arrays, tmp_path):
    mixed = arrays | {"blocks.1.att.w1": arrays["blocks.1.att.w1"].T}
    layouts.write_plain_safetensors(tmp_path / "m.safetensors", mixed)
    with pytest.raises(ValueError, match="1 differences") as caught:
        load_model(tmp_path / "m.safetensors")
    assert "blocks.1.att.w1" in str(caught.value)


# Commands.


@pytest.mark.parametrize("layout", ["rwkv.cpp", "folder, bin in shards", "folder, fla"])
def test_inspect_verify_and_convert_accept_foreign_layouts(
    arrays, tmp_path, capsys, layout
):
    path = str(LAYOUTS[layout](tmp_path, arrays))
    assert main(["inspect", "--verify", path]) == 0
    assert main(["convert", path, str(tmp_path / "out.pth")]) == 0
    assert main(["inspect", path]) == 0
    assert "3 layers, width 64" in capsys.readouterr().out
    assert verify(tmp_path / "out.pth") != []


def test_the_parameter_count_excludes_unused_tensors(params, arrays, tmp_path, capsys):
    numbers = sum(array.size for array in arrays.values())
    write_pth(tmp_path / "without.pth", arrays.items())
    save_model(tmp_path / "with.pth", params, CONFIG)
    for name in ("without.pth", "with.pth"):
        assert main(["inspect", str(tmp_path / name)]) == 0
        assert f"{numbers:,} parameters" in capsys.readouterr().out
