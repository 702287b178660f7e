"""GGUF files round-trip bit-exactly; models that llama.cpp cannot run are rejected."""

import dataclasses
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from genuine_checkpoints import TINY, genuine
from random_checkpoints import CONFIG, differing, random_params
from run_programs import ROOT

from rwkv7_jax.checkpoints.integrity.verification import verify
from rwkv7_jax.checkpoints.model_files import load_model, model_hash, save_model
from rwkv7_jax.checkpoints.tensor_files import gguf_files
from rwkv7_jax.checkpoints.unused_value_residual import without_unused_value_residual
from rwkv7_jax.cli.commands import main
from rwkv7_jax.text.json_tokenizer import JsonTokenizer
from rwkv7_jax.text.tokenizer import Tokenizer

gguf = pytest.importorskip("gguf", reason="the gguf extra is not installed")

BYTES = dataclasses.replace(CONFIG, vocab_size=257)


def values(path) -> dict:
    """Return the metadata of a file."""
    reader = gguf.GGUFReader(path)
    return {key: field.contents() for key, field in reader.fields.items()}


def rewritten(path, target, *, metadata=None, tensors=None):
    """Write a copy of a file with other metadata (None removes a key) or other tensors."""
    changes = metadata or {}
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(
        target,
        changes.get(
            "general.architecture", gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.RWKV7]
        ),
    )
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        value = changes.get(key, field.contents())
        if value is not None:
            sub_type = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(key, value, field.types[0], sub_type)
    for tensor in reader.tensors:
        array, dtype = (tensors or {}).get(
            tensor.name, (tensor.data, tensor.tensor_type)
        )
        writer.add_tensor(tensor.name, array, raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A file of random weights in bfloat16."""
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    save_model(path, random_params(BYTES), BYTES)
    return path


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_round_trip_keeps_bits_and_dtypes(tmp_path, dtype):
    params = random_params(BYTES, dtype=dtype)
    save_model(tmp_path / "m.gguf", params, BYTES)
    again, config = load_model(tmp_path / "m.gguf")
    assert config == BYTES
    assert differing(params, again) == []


def test_a_round_trip_keeps_mixed_dtypes(tmp_path):
    # The shapes of square matrices do not tell their orientation.
    ranks = ("decay_rank", "icl_rank", "value_rank", "gate_rank")
    config = dataclasses.replace(BYTES, **dict.fromkeys(ranks, BYTES.width))
    params = random_params(config, dtype=jnp.float32)
    params["layers"]["att"]["x_r"] = params["layers"]["att"]["x_r"].astype(jnp.bfloat16)
    params["layer_0"]["att"]["w1"] = params["layer_0"]["att"]["w1"].astype(jnp.float16)
    params["head"]["weight"] = params["head"]["weight"].astype(jnp.bfloat16)
    save_model(tmp_path / "m.gguf", params, config)
    again, _ = load_model(tmp_path / "m.gguf")
    assert differing(params, again) == []
    # That of the embedding.
    file_type = values(tmp_path / "m.gguf")["general.file_type"]
    assert file_type == gguf.LlamaFileType.ALL_F32


def test_a_part_of_a_widened_tensor_has_its_original_dtype(written):
    scale = gguf_files().read_gguf(written).tensors["ln_out.weight"]
    part = scale.part((slice(0, 4),))
    assert part.dtype == scale.dtype == jnp.bfloat16
    np.testing.assert_array_equal(part, scale.read()[:4])


@pytest.mark.parametrize("source", ["assets/tiny.pth", TINY])
def test_published_models_round_trip(tmp_path, source):
    path = genuine(source) if source == TINY else ROOT / source
    params, config = load_model(path)
    save_model(tmp_path / "m.gguf", params, config)
    again, same = load_model(tmp_path / "m.gguf")
    assert same == config
    # The value residual of block 0, which nothing reads, has no place there.
    assert differing(without_unused_value_residual(params), again) == []
    save_model(tmp_path / "m.pth", again, config)
    last, _ = load_model(tmp_path / "m.pth")
    assert differing(without_unused_value_residual(last), again) == []
    assert model_hash(again, config) == model_hash(params, config)


def test_the_vocabulary_is_stored_as_escaped_bytes(written):
    table = values(written)
    assert table["tokenizer.ggml.model"] == "rwkv"
    tokens = table["tokenizer.ggml.tokens"]
    assert len(tokens) == 257 and tokens[0] == "<|endoftext|>"
    for number in range(256):
        text = tokens[number + 1].encode()
        assert text.decode("unicode_escape").encode("latin-1") == bytes([number])
    kinds = table["tokenizer.ggml.token_type"]
    assert kinds == [gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * 256


def test_world_has_an_end_of_turn_id_and_padding_ids(tmp_path):
    config = dataclasses.replace(CONFIG, vocab_size=65536)
    save_model(tmp_path / "m.gguf", random_params(config), config)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    eot = reader.get_field("tokenizer.ggml.eot_token_id").contents()
    assert Tokenizer.world().token_bytes(eot) == b"\n\n"
    kinds = reader.get_field("tokenizer.ggml.token_type").contents()
    assert kinds[-6:] == [gguf.TokenType.UNUSED] * 6 and len(kinds) == 65536
    # No text of a prompt matches these.
    tokens = reader.get_field("tokenizer.ggml.tokens").contents()
    assert tokens[-1] == r"\xff[PAD65535]"


def test_a_file_without_our_metadata_loads_the_same_weights(written, tmp_path):
    """llama.cpp's converter stores vectors in float32 and does not record their dtype."""
    keys = {key: None for key in values(written) if key.startswith("rwkv7_jax.")}
    assert keys
    rewritten(written, tmp_path / "m.gguf", metadata=keys)
    again, config = load_model(tmp_path / "m.gguf")
    ours, _ = load_model(written)
    assert config == BYTES
    assert again["ln0"]["weight"].dtype == jnp.float32
    assert again["emb"]["weight"].dtype == jnp.bfloat16
    widened = jax.tree.map(lambda leaf, other: leaf.astype(other.dtype), ours, again)
    assert differing(widened, again) == []


def test_block_0_has_the_tensors_that_llama_cpp_requires(written):
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(written).tensors}
    for part in "012":
        copy = tensors[f"blk.0.time_mix_v{part}.weight"]
        np.testing.assert_array_equal(
            copy.data, tensors[f"blk.0.time_mix_a{part}.weight"].data
        )
    assert list(tensors["blk.1.time_mix_lerp_fused.weight"].shape) == [64, 1, 1, 6]
    kinds = [
        tensors[f"blk.1.time_mix_{part}.weight"].tensor_type for part in ("w1", "w2")
    ]
    assert kinds == [gguf.GGMLQuantizationType.F32] * 2


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"general.architecture": "arwkv7"},
            "is a GGUF file of 'arwkv7', not of 'rwkv7'",
        ),
        (
            {"rwkv7.wkv.head_size": None},
            r"positive number rwkv7\.wkv\.head_size; got None",
        ),
        ({"rwkv7.wkv.head_size": 0}, r"positive number rwkv7\.wkv\.head_size; got 0"),
        (
            {"rwkv7.wkv.head_size": 48},
            r"blocks\.0\.att\.r_k of shape \(64,\), not a matrix",
        ),
        (
            {"rwkv7.attention.layer_norm_epsilon": float("nan")},
            r"positive number rwkv7\.attention\.layer_norm_epsilon; got nan",
        ),
    ],
)
def test_invalid_metadata_is_rejected(written, tmp_path, changes, sentence):
    rewritten(written, tmp_path / "m.gguf", metadata=changes)
    with pytest.raises(ValueError, match=rf"m\.gguf` .*{sentence}"):
        load_model(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("mark", "sentence"),
    [
        (
            lambda writer: writer.add_type(gguf.GGUFType.ADAPTER),
            r"is an adapter such as LoRA.*llama-export-lora",
        ),
        (
            lambda writer: writer.add_uint16(gguf.Keys.Split.LLM_KV_SPLIT_COUNT, 2),
            r"is one of 2 parts of a GGUF file; .*llama-gguf-split --merge",
        ),
    ],
)
def test_an_adapter_or_a_part_of_a_model_is_named(tmp_path, mark, sentence):
    writer = gguf.GGUFWriter(tmp_path / "lora.gguf", "rwkv7")
    mark(writer)
    name = "blk.0.time_mix_key.weight.lora_a"
    writer.add_tensor(name, np.ones((4, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=sentence):
        load_model(tmp_path / "lora.gguf")


# Types of blocks of 32 and 256 numbers; the package writes the former.
WRITABLE = ["Q8_0", "Q4_0", "Q5_1", "MXFP4"]
SUPER_BLOCKS = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ2_S", "TQ1_0"]
MATRICES = {
    "token_embd.weight": ("emb", "weight"),
    "output.weight": ("head", "weight"),
    "blk.0.time_mix_key.weight": ("layer_0", "att", "key", "weight"),
    "blk.0.time_mix_g1.weight": ("layer_0", "att", "g1"),
    "blk.0.channel_mix_value.weight": ("layer_0", "ffn", "value", "weight"),
}


@pytest.mark.parametrize("name", [*WRITABLE, *SUPER_BLOCKS])
def test_quantized_matrices_are_dequantized(tmp_path, name):
    kind = gguf.GGMLQuantizationType[name]
    config = dataclasses.replace(BYTES, width=256, num_layers=2, ffn_width=512)
    params = random_params(config, dtype=jnp.float32)
    save_model(tmp_path / "m.gguf", params, config)
    random = np.random.default_rng(4)
    tensors = {}
    for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors:
        if tensor.name not in MATRICES:
            continue
        if name in WRITABLE:
            stored = gguf.quantize(tensor.data, kind)
        else:
            numbers, size = gguf.GGML_QUANT_SIZES[kind]
            rows, columns = tensor.data.shape
            # Below 0x38 every two bytes are a finite float16.
            stored = random.integers(0, 0x38, (rows, columns // numbers * size))
            stored = stored.astype(np.uint8)
        tensors[tensor.name] = (stored, kind)
    assert set(tensors) == set(MATRICES)
    # The digest is of other numbers.
    changes = {"rwkv7_jax.digest": None}
    rewritten(
        tmp_path / "m.gguf", tmp_path / "q.gguf", tensors=tensors, metadata=changes
    )
    found, again = load_model(tmp_path / "q.gguf")
    assert again == config
    expected = jax.tree.map(np.asarray, params)
    for theirs, path in MATRICES.items():
        place = expected
        for key in path[:-1]:
            place = place[key]
        was = place[path[-1]]
        numbers = gguf.dequantize(*tensors[theirs])
        # As all low-rank matrices.
        if path[-1] == "g1":
            numbers = numbers.T
        place[path[-1]] = numbers
        if name == "Q8_0":
            np.testing.assert_allclose(numbers, was, atol=np.abs(was).max() / 127)
    assert differing(expected, found) == []
    assert found["head"]["weight"].dtype == jnp.float32
    narrow, _ = load_model(tmp_path / "q.gguf", dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(narrow)} == {np.dtype(jnp.bfloat16)}


def test_unsupported_tensor_types_are_rejected_by_name(written, tmp_path):
    kind = gguf.GGMLQuantizationType.Q8_K
    stored = np.zeros((64, 292), np.uint8)
    name = "blk.1.time_mix_key.weight"
    rewritten(written, tmp_path / "m.gguf", tensors={name: (stored, kind)})
    with pytest.raises(
        ValueError, match=r"blk\.1\.time_mix_key\.weight as Q8_K; floats and the"
    ):
        load_model(tmp_path / "m.gguf")


def test_values_that_do_not_fit_their_recorded_dtype_are_rejected(written, tmp_path):
    numbers = np.full(64, 1 / 3, np.float32)
    kind = gguf.GGMLQuantizationType.F32
    rewritten(
        written, tmp_path / "m.gguf", tensors={"output_norm.weight": (numbers, kind)}
    )
    with pytest.raises(
        ValueError, match=r"values in ln_out\.weight that bfloat16 cannot hold"
    ):
        load_model(tmp_path / "m.gguf")


def test_the_digest_detects_a_changed_value(written, tmp_path):
    assert verify(written) == ["m.gguf: the digest of tensors and sizes agrees"]
    content = bytearray(written.read_bytes())
    content[-3000] ^= 1
    (tmp_path / "m.gguf").write_bytes(content)
    load_model(tmp_path / "m.gguf")
    with pytest.raises(
        ValueError, match=r"m\.gguf` is damaged: .*their digest differs"
    ):
        verify(tmp_path / "m.gguf")
    for size in (
        {"rwkv7.wkv.head_size": 64},
        {"rwkv7.attention.layer_norm_epsilon": 2e-5},
    ):
        rewritten(written, tmp_path / "n.gguf", metadata=size)
        with pytest.raises(ValueError, match="their digest differs"):
            verify(tmp_path / "n.gguf")
    rewritten(written, tmp_path / "o.gguf", metadata={"rwkv7_jax.digest": None})
    assert verify(tmp_path / "o.gguf") == []


@pytest.mark.parametrize("kept", [0, 3, 20, 300, 5_000, -1])
def test_a_truncated_file_is_rejected(written, tmp_path, kept):
    (tmp_path / "m.gguf").write_bytes(written.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"load_model: .*m\.gguf`") as caught:
        load_model(tmp_path / "m.gguf")
    assert "\n" not in str(caught.value)


def test_damaged_headers_are_rejected_or_harmless(written, tmp_path, unchecked):
    """A flipped bit is detected or changes nothing that is loaded."""
    content = bytearray(written.read_bytes())
    rng = np.random.default_rng(0)
    refused = 0
    for place in rng.integers(4, 4_000, 60):
        damaged = bytearray(content)
        damaged[place] ^= 1 << rng.integers(8)
        (tmp_path / "m.gguf").write_bytes(damaged)
        try:
            load_model(tmp_path / "m.gguf", allow_nan=True)
        except ValueError as error:
            assert "m.gguf`" in str(error)
            refused += 1
    assert refused > 5


def test_deeply_nested_lists_are_rejected(tmp_path):
    list_type = gguf.GGUFValueType.ARRAY.value
    nested = struct.pack("<IQ", list_type, 1) * 3_000
    key = struct.pack("<Q", 3) + b"a.b" + struct.pack("<I", list_type)
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)
    (tmp_path / "m.gguf").write_bytes(head + key + nested)
    with pytest.raises(ValueError, match=r"m\.gguf` is not a GGUF file, or a damaged"):
        load_model(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"group_norm_eps": 32e-5},
            "`config.group_norm_eps` of a .gguf file must be 0.00064",
        ),
        (
            {"head_size": 16},
            "`config.head_size` of a .gguf file must be a multiple of 32",
        ),
        ({"vocab_size": 75}, "`tokenizer` must be given for a .gguf file of 75 ids"),
    ],
)
def test_configs_that_llama_cpp_computes_differently_are_rejected(
    tmp_path, changes, sentence
):
    config = dataclasses.replace(BYTES, **changes)
    (tmp_path / "m.gguf").write_text("what was there")
    with pytest.raises(ValueError, match=f"save_model: {sentence}"):
        save_model(tmp_path / "m.gguf", random_params(config), config)
    assert (tmp_path / "m.gguf").read_text() == "what was there"


def test_a_vocabulary_larger_than_the_model_is_rejected(tmp_path):
    with pytest.raises(ValueError, match="must have ids below the model's 75; got 255"):
        save_model(
            tmp_path / "m.gguf",
            random_params(CONFIG),
            CONFIG,
            tokenizer=Tokenizer.bytes256(),
        )


def test_raw_bytes_have_no_end_of_text_id(tmp_path):
    config = dataclasses.replace(CONFIG, vocab_size=256)
    save_model(tmp_path / "m.gguf", random_params(config), config)
    table = values(tmp_path / "m.gguf")
    assert table["tokenizer.ggml.tokens"][0] == "\\x00"
    assert "tokenizer.ggml.eos_token_id" not in table


def test_vocabularies_that_llama_cpp_encodes_differently_are_rejected(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(
        tokenizers.models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")])
    )
    words.decoder = tokenizers.decoders.ByteLevel()
    vocabulary = JsonTokenizer(words, name="words.json")
    with pytest.raises(ValueError, match=r"must use greedy longest match.*words\.json"):
        save_model(
            tmp_path / "m.gguf", random_params(CONFIG), CONFIG, tokenizer=vocabulary
        )


def test_nan_is_not_saved(tmp_path):
    params = random_params(BYTES)
    params["head"]["weight"] = params["head"]["weight"].at[3, 5].set(np.nan)
    with pytest.raises(ValueError, match=r"`params` must be finite.*head\.weight"):
        save_model(tmp_path / "m.gguf", params, BYTES)
    assert not list(tmp_path.iterdir())
    save_model(tmp_path / "m.gguf", params, BYTES, allow_nan=True)
    again, _ = load_model(tmp_path / "m.gguf", allow_nan=True)
    assert differing(params, again) == []


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    monkeypatch.delitem(
        __import__("sys").modules, "rwkv7_jax.checkpoints.gguf_files", raising=False
    )
    with pytest.raises(ImportError, match=r"save_model: .*rwkv7_jax\[gguf\]"):
        save_model(tmp_path / "m.gguf", random_params(BYTES), BYTES)


def test_convert_goes_through_gguf_and_official_names(tmp_path, capsys):
    """The size is not World's, so the vocabulary is named; the folder keeps it."""
    config = dataclasses.replace(CONFIG, head_size=64)
    save_model(tmp_path / "m.pth", random_params(config), config)
    (tmp_path / "digits.txt").write_text(
        "".join(f"{number + 1} '{number}' 1\n" for number in range(10))
    )
    named = ["--vocabulary", str(tmp_path / "digits.txt")]
    steps = (
        ["m.pth", "m.gguf", *named],
        ["m.gguf", "folder", "--format", "transformers", *named],
        ["folder", "back.pth"],
    )
    for source, target, *options in steps:
        paths = [str(tmp_path / source), str(tmp_path / target)]
        assert main(["convert", *paths, *options]) == 0, capsys.readouterr().err
    back, _ = load_model(tmp_path / "back.pth")
    assert differing(random_params(config), without_unused_value_residual(back)) == []
    assert values(tmp_path / "m.gguf")["tokenizer.ggml.tokens"][1:11] == list(
        "0123456789"
    )
    assert main(["convert", str(tmp_path / "m.pth"), str(tmp_path / "n.gguf")]) == 2
    assert "`tokenizer` must be given for a .gguf file" in capsys.readouterr().err
