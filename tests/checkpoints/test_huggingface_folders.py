"""Folders for Hugging Face libraries: both layouts are complete and round-trip bit-exactly."""

import dataclasses
import json

import pytest
from genuine_checkpoints import TINY, genuine
from random_checkpoints import CONFIG, differing, random_params

from rwkv7_jax.checkpoints.model_files import load_model, model_hash, save_model
from rwkv7_jax.checkpoints.model_vocabulary import model_tokenizer
from rwkv7_jax.checkpoints.tensor_files import read_tensors
from rwkv7_jax.checkpoints.tensor_names import file_shape, shapes
from rwkv7_jax.checkpoints.unused_value_residual import without_unused_value_residual
from rwkv7_jax.text.id_tokenizer import IdTokenizer
from rwkv7_jax.text.tokenizer import Tokenizer

# One rule for the epsilons of all norms, which is also the official one.
HEADS_OF_64 = dataclasses.replace(CONFIG, head_size=64)
BYTES = dataclasses.replace(HEADS_OF_64, vocab_size=257)
LAYOUTS = ("hf", "transformers")
WITHOUT_VOCABULARY = {"config.json", "model.safetensors", "generation_config.json"}
COMPLETE = WITHOUT_VOCABULARY | {
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
}


def names(folder) -> set[str]:
    return {file.name for file in folder.iterdir()}


def table(path) -> dict:
    return json.loads(path.read_text())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_folder_round_trips_bit_exactly(tmp_path, layout, dtype):
    params = random_params(BYTES, dtype=dtype)
    save_model(tmp_path / "m", params, BYTES, format=layout)
    again, config = load_model(tmp_path / "m")
    assert config == BYTES
    assert differing(params, without_unused_value_residual(again)) == []
    assert table(tmp_path / "m" / "config.json")["dtype"] == dtype


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_published_model_round_trips(tmp_path, layout):
    params, config = load_model(genuine(TINY))
    save_model(tmp_path / "m", params, config, format=layout)
    again, same = load_model(tmp_path / "m")
    assert same == config and model_hash(again, config) == model_hash(params, config)
    save_model(tmp_path / "m.pth", again, config)
    last, _ = load_model(tmp_path / "m.pth")
    assert differing(params, without_unused_value_residual(last)) == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_is_complete_and_can_be_overwritten(tmp_path, layout):
    for _ in range(2):
        save_model(tmp_path / "m", random_params(BYTES), BYTES, format=layout)
        assert names(tmp_path / "m") == COMPLETE
    other = LAYOUTS[layout == LAYOUTS[0]]
    save_model(tmp_path / "m", random_params(BYTES, seed=1), BYTES, format=other)
    again, _ = load_model(tmp_path / "m")
    again = without_unused_value_residual(again)
    assert differing(random_params(BYTES, seed=1), again) == []


def test_official_names_match_the_rwkv_publisher(tmp_path):
    """The names are those of aabbdev/rwkv-publisher@67f4b55 src/rwkv_publisher/conversion.py."""
    save_model(tmp_path / "m", random_params(BYTES), BYTES, format="transformers")
    tensors = read_tensors(tmp_path / "m" / "model.safetensors")
    expected = {}
    for name, shape in shapes(BYTES).items():
        prefix = "" if name == "head.weight" else "rwkv7."
        expected[prefix + name] = file_shape(name, shape)
    width = BYTES.width
    rank = BYTES.value_rank
    expected["rwkv7.blocks.0.att.v0"] = (1, 1, width)
    expected["rwkv7.blocks.0.att.v1"] = (width, rank)
    expected["rwkv7.blocks.0.att.v2"] = (rank, width)
    assert {name: tensor.shape for name, tensor in tensors.items()} == expected


def test_a_config_with_official_names_has_the_expected_keys(tmp_path):
    save_model(tmp_path / "m", random_params(BYTES), BYTES, format="transformers")
    config = table(tmp_path / "m" / "config.json")
    wanted = {
        "architectures": ["Rwkv7ForCausalLM"],
        "model_type": "rwkv7",
        "vocab_size": 257,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_heads": 1,
        "head_dim": 64,
        "intermediate_size": 136,
        "decay_low_rank_dim": 8,
        "a_low_rank_dim": 16,
        "v_low_rank_dim": 24,
        "gate_low_rank_dim": 40,
        "norm_eps": 1e-5,
        "norm_bias": True,
        "wkv_state_dtype": "float32",
        "wkv_implementation": "eager",
        "use_cache": True,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "dtype": "bfloat16",
    }
    assert config.items() >= {**wanted, "architectures": ["Rwkv7ForCausalLM"]}.items()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_vocabulary_is_saved_unless_one_is_given(tmp_path, layout):
    save_model(tmp_path / "m", random_params(HEADS_OF_64), HEADS_OF_64, format=layout)
    assert names(tmp_path / "m") == WITHOUT_VOCABULARY


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_given_vocabulary_round_trips(tmp_path, layout):
    entries = {number: bytes([number + 47]) for number in range(1, 75)}
    letters = Tokenizer(entries, vocab_size=75, name="letters", kind="file")
    params = random_params(HEADS_OF_64)
    save_model(tmp_path / "m", params, HEADS_OF_64, format=layout, tokenizer=letters)
    for _ in range(2):
        again = model_tokenizer(tmp_path / "m", 75, argument="`m`")
        assert again.encode("0ay") == letters.encode("0ay") == [1, 50, 74]
        assert again.end_of_text == 0
        # It is written once more.
        save_model(tmp_path / "m", params, HEADS_OF_64, format=layout, tokenizer=again)
    config = table(tmp_path / "m" / "config.json")
    assert config["eos_token_id"] == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_plain_ids_have_no_tokenizer_files(tmp_path, layout):
    params = random_params(HEADS_OF_64)
    numbers = IdTokenizer(75)
    save_model(tmp_path / "m", params, HEADS_OF_64, format=layout, tokenizer=numbers)
    assert names(tmp_path / "m") == WITHOUT_VOCABULARY
    assert table(tmp_path / "m" / "config.json")["eos_token_id"] is None


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_vocabulary_larger_than_the_model_is_rejected(tmp_path, layout):
    with pytest.raises(ValueError, match="save_model: `tokenizer` must have ids below"):
        save_model(
            tmp_path / "m",
            random_params(HEADS_OF_64),
            HEADS_OF_64,
            format=layout,
            tokenizer=Tokenizer.bytes(),
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("layout", "changes", "sentence"),
    [
        ("hf", {"head_size": 32}, ".*must be head_size times `norm_eps`"),
        ("transformers", {"head_size": 32}, ".*must be head_size times `norm_eps`"),
        (
            "transformers",
            {"head_size": 32, "group_norm_eps": 32e-5},
            "`config.group_norm_eps` of a folder with official names must be 0.00064",
        ),
    ],
)
def test_epsilons_that_a_layout_cannot_express_are_rejected(
    tmp_path, layout, changes, sentence
):
    config = dataclasses.replace(BYTES, **changes)
    with pytest.raises(ValueError, match=f"save_model: {sentence}"):
        save_model(tmp_path / "m", random_params(config), config, format=layout)
    assert not list(tmp_path.iterdir())


def test_an_unknown_layout_is_rejected(tmp_path):
    with pytest.raises(ValueError, match=r"`format` must be one of .*transformers"):
        save_model(tmp_path / "m", random_params(BYTES), BYTES, format="huggingface")
