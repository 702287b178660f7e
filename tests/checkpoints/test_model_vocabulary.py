"""The vocabulary in an Orbax folder, and which one a model has when nobody names it."""

import json
import shutil

import jax.numpy as jnp
import pytest
from random_checkpoints import random_params
from small_vocabularies import DIGITS, WORDS, byte_level_bpe

from rwkv7_jax.checkpoints.model_files import load_model, save_model
from rwkv7_jax.checkpoints.model_vocabulary import kept_vocabulary, model_tokenizer
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.text.tokenizer import Tokenizer
from rwkv7_jax.text.vocabularies import load_vocabulary


def save(path, vocab_size, tokenizer):
    """Writes the smallest model of that many ids."""
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


def test_a_folder_may_be_written_again_with_another_vocabulary(tmp_path):
    (tmp_path / "d.txt").write_text(DIGITS)
    save(tmp_path / "m", 300, load_vocabulary(tmp_path / "d.txt"))
    save(tmp_path / "m", 257, Tokenizer.bytes())
    assert kept_vocabulary(tmp_path / "m", 257) is Tokenizer.bytes()
    assert not (tmp_path / "m" / "vocabulary.txt").exists()
    save(tmp_path / "m", 300, None)
    assert kept_vocabulary(tmp_path / "m", 12) is None


def test_a_vocabulary_that_was_changed_or_lost_is_refused(tmp_path):
    (tmp_path / "d.txt").write_text(DIGITS)
    save(tmp_path / "m", 12, load_vocabulary(tmp_path / "d.txt"))
    file = tmp_path / "m" / "vocabulary.txt"
    file.write_text(DIGITS.replace("','", "';'"))
    with pytest.raises(ValueError, match=r"vocabulary.txt` was changed after it was w"):
        kept_vocabulary(tmp_path / "m", 12)
    # Named, it is taken as it is.
    assert model_tokenizer(tmp_path / "m", 12, str(file), argument="`x`").encode(";")
    file.unlink()
    with pytest.raises(ValueError, match=r"incomplete: vocabulary.txt is missing"):
        kept_vocabulary(tmp_path / "m", 12)


def test_an_unknown_entry_is_refused(tmp_path):
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
def test_a_size_that_tells_needs_no_name(tmp_path, vocab_size, name):
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
def test_a_size_that_does_not_tell_is_a_sentence_with_what_fits(vocab_size, fitting):
    with pytest.raises(ValueError) as caught:
        model_tokenizer(None, vocab_size, argument="`--vocabulary`")
    begin = "`--vocabulary` must name the vocabulary of a model of "
    assert str(caught.value).startswith(begin + fitting)


def test_an_hf_folders_own_file_counts_where_the_size_tells_nothing(tmp_path):
    pytest.importorskip("tokenizers", reason="the extra tokenizers is not installed")
    byte_level_bpe(tmp_path)
    assert model_tokenizer(tmp_path, 400, argument="`x`").kind == "tokenizer.json"
    assert model_tokenizer(tmp_path, 65536, argument="`x`").name == "world"
