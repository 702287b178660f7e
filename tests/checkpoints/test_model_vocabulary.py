"""The vocabulary in a folder or a GGUF file, and the default for models without one."""

import json
import shutil
import sys

import jax.numpy as jnp
import pytest
from random_checkpoints import random_params
from small_vocabularies import DIGITS, WORDS, byte_level_bpe

from rwkv7_jax.checkpoints.model_files import load_model, save_model
from rwkv7_jax.checkpoints.model_vocabulary import kept_vocabulary, model_tokenizer
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.text.fast_tokenizer import byte_characters, fast_tokenizer
from rwkv7_jax.text.tokenizer import Tokenizer
from rwkv7_jax.text.vocabularies import load_vocabulary


def save(path, vocab_size, tokenizer):
    """Write the smallest model with that many ids."""
    config = RWKV7Config(
        vocab_size=vocab_size, num_layers=1, width=16, head_size=16, ffn_width=16
    )
    params = random_params(config, dtype=jnp.float32, scale=0.1)
    save_model(path, params, config, tokenizer=tokenizer)


@pytest.mark.parametrize("name", ["bytes256", "ids", "digits.txt", "words.txt"])
def test_a_folder_keeps_its_vocabulary(tmp_path, name):
    (tmp_path / "digits.txt").write_text(DIGITS)
    (tmp_path / "words.txt").write_text(WORDS)
    path = tmp_path / name if name.endswith(".txt") else name
    save(tmp_path / "m", 300, load_vocabulary(path, 300))
    for file in tmp_path.glob("*.txt"):
        file.unlink()
    kept = model_tokenizer(tmp_path / "m", 300, argument="`x`")
    assert kept.vocab_size == 300
    assert kept.kind == ("file" if name.endswith(".txt") else name)
    load_model(tmp_path / "m")


def test_a_folder_keeps_a_tokenizer_json_and_its_end_of_text(tmp_path):
    pytest.importorskip("tokenizers", reason="the extra tokenizers is not installed")
    file = byte_level_bpe(tmp_path / "hf")
    tokenizer = load_vocabulary(file, 400)
    save(tmp_path / "m", 400, tokenizer)
    shutil.rmtree(tmp_path / "hf")
    kept = model_tokenizer(tmp_path / "m", 400, argument="`x`")
    assert kept.identity == tokenizer.identity and kept.stop_ids == (0,)


def test_overwriting_a_folder_can_change_its_vocabulary(tmp_path):
    (tmp_path / "d.txt").write_text(DIGITS)
    save(tmp_path / "m", 300, load_vocabulary(tmp_path / "d.txt"))
    save(tmp_path / "m", 257, Tokenizer.bytes())
    assert kept_vocabulary(tmp_path / "m", 257) is Tokenizer.bytes()
    assert not (tmp_path / "m" / "vocabulary.txt").exists()
    save(tmp_path / "m", 300, None)
    assert kept_vocabulary(tmp_path / "m", 12) is None


def test_a_modified_or_missing_vocabulary_is_rejected(tmp_path):
    (tmp_path / "d.txt").write_text(DIGITS)
    save(tmp_path / "m", 12, load_vocabulary(tmp_path / "d.txt"))
    file = tmp_path / "m" / "vocabulary.txt"
    file.write_text(DIGITS.replace("','", "';'"))
    with pytest.raises(ValueError, match=r"vocabulary.txt` was changed after it was w"):
        kept_vocabulary(tmp_path / "m", 12)
    # Named, it is taken as it is.
    assert model_tokenizer(tmp_path / "m", 12, str(file), argument="`x`").encode(";")
    file.write_bytes(b"1 '\xff' 1")
    with pytest.raises(ValueError, match=f"{tmp_path}.* is damaged: .*utf-8"):
        kept_vocabulary(tmp_path / "m", 12)
    file.unlink()
    with pytest.raises(ValueError, match=r"incomplete: vocabulary.txt is missing"):
        kept_vocabulary(tmp_path / "m", 12)


@pytest.mark.parametrize(
    "name", ["vocab.json", "merges.txt", "tokenizer.model", "spiece.model"]
)
def test_unsupported_vocabulary_files_are_rejected_by_name(tmp_path, name):
    (tmp_path / name).write_text("{}")
    sentence = rf"{name}` holds a vocabulary in a format that cannot be read"
    with pytest.raises(ValueError, match=sentence) as caught:
        model_tokenizer(tmp_path, 65536, None, argument="`x`")
    assert "name another with" in str(caught.value)
    assert model_tokenizer(tmp_path, 65536, "world", argument="`x`").encode("a")
    # World's own file is what a model of its size has.
    (tmp_path / name).rename(tmp_path / "rwkv_vocab_v20230424.txt")
    assert kept_vocabulary(tmp_path, 65536) is None


def test_an_unknown_vocabulary_entry_is_rejected(tmp_path):
    save(tmp_path / "m", 12, load_vocabulary("ids"))
    card = json.loads((tmp_path / "m" / "rwkv7_jax.json").read_text())
    for entry in (3, {"kind": None}, {"kind": "runes"}):
        card["vocabulary"] = entry
        (tmp_path / "m" / "rwkv7_jax.json").write_text(json.dumps(card))
        with pytest.raises(ValueError, match=r"rwkv7_jax.json` has an unknown vocabul"):
            kept_vocabulary(tmp_path / "m", 12)


@pytest.mark.parametrize(
    ("vocab_size", "name"),
    [(256, "bytes256"), (257, "bytes"), (65530, "world"), (65536, "world")],
)
def test_an_unambiguous_size_determines_the_vocabulary(tmp_path, vocab_size, name):
    found = model_tokenizer(tmp_path / "x.pth", vocab_size, argument="`x`")
    assert found.name == name


@pytest.mark.parametrize(
    ("vocab_size", "fitting"),
    [
        (12, "12 ids: ids, a vocabulary file or a tokenizer.json fit."),
        (
            258,
            "258 ids: bytes256, bytes, ids, a vocabulary file or a tokenizer.json fit.",
        ),
        (70000, "70,000 ids: bytes256, bytes, world, ids, a vocabulary file or a tok"),
    ],
)
def test_an_ambiguous_size_lists_the_vocabularies_that_fit(vocab_size, fitting):
    with pytest.raises(ValueError) as caught:
        model_tokenizer(None, vocab_size, argument="`--vocabulary`")
    begin = "`--vocabulary` must name the vocabulary of a model of "
    assert str(caught.value).startswith(begin + fitting)


@pytest.mark.parametrize("vocab_size", [257, 400, 65536])
def test_a_folders_tokenizer_json_takes_precedence(tmp_path, vocab_size):
    pytest.importorskip("tokenizers", reason="the extra tokenizers is not installed")
    file = byte_level_bpe(tmp_path, vocab_size=257)
    found = model_tokenizer(tmp_path, vocab_size, argument="`x`")
    assert found.kind == "tokenizer.json" and found.vocab_size == vocab_size
    assert found.identity == load_vocabulary(file).identity


def turned_bytes():
    """Make a vocabulary of 257 ids: those of `bytes` in reverse order."""
    entries = {256 - byte: bytes([byte]) for byte in range(256)}
    return Tokenizer(entries, vocab_size=257, name="turned", kind="file")


def named(name):
    """Return a vocabulary that fits a model of 257 ids."""
    return turned_bytes() if name == "turned" else load_vocabulary(name, 257)


@pytest.mark.parametrize("target", ["hf", "transformers", "m.gguf"])
@pytest.mark.parametrize("name", ["turned", "bytes", "bytes256", "ids"])
def test_a_vocabulary_round_trips_when_several_fit_the_size(
    tmp_path, monkeypatch, name, target
):
    if target == "m.gguf":
        pytest.importorskip("gguf", reason="the extra gguf is not installed")
    # What takes the longest entry at a place needs no other package.
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    config = RWKV7Config(
        vocab_size=257, num_layers=1, width=64, head_size=64, ffn_width=64
    )
    params = random_params(config, dtype=jnp.float32, scale=0.1)
    form = None if target.endswith(".gguf") else target
    path = tmp_path / target
    save_model(path, params, config, format=form, tokenizer=named(name))
    found = model_tokenizer(path, 257, argument="`x`")
    assert found.identity == named(name).identity
    assert found.vocab_size == 257 and found.stop_ids == named(name).stop_ids
    if name != "ids":
        text = "Zo\u00eb\n\\'\"\x00"
        assert found.encode(text) == named(name).encode(text)


def pieces_of_world():
    """Make the `tokenizer.json` of the RWKV project's folders, which names unused ids."""
    content = fast_tokenizer({1: b"a"})
    characters = byte_characters()
    names = {"<|endoftext|>": 0}
    for number in range(1, 65536):
        entry = Tokenizer.world().token_bytes(number)
        spelled = "".join([characters[byte] for byte in entry])
        names[spelled or f"\ue000{number}\ue001"] = number
    content["pre_tokenizer"] = content["pre_tokenizer"]["pretokenizers"][0]
    content["model"] = {
        "type": "WordPiece",
        "unk_token": "<|endoftext|>",
        "continuing_subword_prefix": "",
        "max_input_chars_per_word": 2**31 - 1,
        "vocab": names,
    }
    return content


def test_a_folder_with_worlds_table_uses_the_built_in_vocabulary(tmp_path):
    content = pieces_of_world()
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert model_tokenizer(tmp_path, 65536, argument="`x`") is Tokenizer.world()
    # Two entries that changed places make another vocabulary of the same size.
    names = content["model"]["vocab"]
    names["a"], names["b"] = names["b"], names["a"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    found = model_tokenizer(tmp_path, 65536, argument="`x`")
    assert found.kind == "file" and found.encode("a") == [99]


def test_an_unreadable_vocabulary_is_rejected_with_a_remedy(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises((ValueError, ImportError)) as caught:
        model_tokenizer(tmp_path, 65536, argument="`x`")
    assert str(caught.value).endswith(
        "; name another with `--vocabulary` (`config.data.vocabulary`)."
    )
    named = model_tokenizer(tmp_path, 65536, "world", argument="`x`")
    assert named is Tokenizer.world()


@pytest.mark.parametrize(
    ("kind", "tokens", "sentence"),
    [
        (
            "gpt2",
            ["a"],
            r"vocabulary of the kind rwkv; got 'gpt2'; name another with `--vocabulary`",
        ),
        ("rwkv", ["a", "b"], r"a type for each token of its vocabulary; got 2 and 1; "),
        ("rwkv", [1], r"must have a text and a type for each token"),
    ],
)
def test_an_unreadable_gguf_vocabulary_is_rejected(tmp_path, kind, tokens, sentence):
    gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "rwkv7")
    writer.add_tokenizer_model(kind)
    writer.add_array("tokenizer.ggml.tokens", tokens)
    writer.add_token_types([1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ValueError, match=sentence):
        kept_vocabulary(tmp_path / "m.gguf", 257)


def test_gguf_metadata_that_is_not_utf8_is_rejected(tmp_path):
    gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "rwkv7")
    writer.add_tokenizer_model("rwkv")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    content = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(content.replace(b"rwkv", b"rw\xffv"))
    with pytest.raises(ValueError, match=r"m\.gguf") as caught:
        kept_vocabulary(tmp_path / "m.gguf", 257)
    assert type(caught.value) is ValueError
    (tmp_path / "m.gguf").write_bytes(
        content.replace(b"\4\0\0\0\0\0\0\0rwkv", b"\4\0\0\0\0\0\0\0rw\xffv")
    )
    with pytest.raises(ValueError, match=r"m\.gguf. is damaged: .* name another with"):
        kept_vocabulary(tmp_path / "m.gguf", 257)
