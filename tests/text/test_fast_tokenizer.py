"""World and bytes as `tokenizer.json` give the ids of `Tokenizer` for every text."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from run_programs import ROOT

from rwkv7_jax.text.fast_tokenizer import (
    byte_characters,
    fast_tokenizer,
    longest_entry_pattern,
    tokenizer_config,
)
from rwkv7_jax.text.tokenizer import Tokenizer
from rwkv7_jax.text.vocabulary_entries import vocabulary_entries

WORLD = Tokenizer.world()


def entries(tokenizer) -> dict[int, bytes]:
    return vocabulary_entries(tokenizer, tokenizer.vocab_size)


@pytest.fixture(scope="module")
def theirs():
    """Return a function that loads one of our vocabularies in the package."""
    tokenizers = pytest.importorskip(
        "tokenizers", reason="the package tokenizers is not installed"
    )

    def load(tokenizer):
        content = json.dumps(fast_tokenizer(entries(tokenizer)))
        loaded = tokenizers.Tokenizer.from_str(content)
        # As transformers does for `split_special_tokens`.
        loaded.encode_special_tokens = True
        return loaded

    return load


@pytest.fixture(scope="module")
def world(theirs):
    return theirs(WORLD)


@pytest.fixture(scope="module")
def readable():
    """The entries of World that are valid UTF-8."""
    texts = []
    for entry in entries(WORLD).values():
        try:
            texts.append(entry.decode())
        except UnicodeDecodeError:
            continue
    return texts


def test_every_utf8_entry_is_one_token(world, readable):
    assert len(readable) > 65_000
    batch = world.encode_batch(readable)
    assert [encoding.ids for encoding in batch] == [WORLD.encode(x) for x in readable]
    assert {len(encoding.ids) for encoding in batch} == {1}


def test_every_entry_keeps_its_id(world):
    characters = byte_characters()
    vocabulary = world.get_vocab()
    for number, entry in entries(WORLD).items():
        assert vocabulary["".join(characters[byte] for byte in entry)] == number


@settings(max_examples=400)
@given(text=st.text(max_size=200))
def test_any_text_gets_the_same_ids(world, text):
    assert world.encode(text).ids == WORLD.encode(text)
    assert world.decode(world.encode(text).ids) == text


@settings(max_examples=400)
@given(data=st.data())
def test_adjacent_entries_get_the_same_ids(world, readable, data):
    """Longer entries may span their border: the hard case."""
    places = st.integers(0, len(readable) - 1)
    parts = data.draw(st.lists(places, max_size=20))
    text = "".join(readable[place] for place in parts)
    assert world.encode(text).ids == WORLD.encode(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " " * 1000,
        "#" * 997 + "-" * 333 + "\n" * 99,
        "é e\u0301 \U0001f600\U0001f9d1\u200d\U0001f680 \uac00\ud7a3 \u0e01",
        "a\x00b\t\r\n\x7f\x80\xff",
        "\\d[^a-z](?:x|y)*$ && -- ~~",
        " x" * 5000,
    ],
)
def test_hard_texts_get_the_same_ids(world, text):
    assert world.encode(text).ids == WORLD.encode(text)


def test_whole_files_get_the_same_ids(world):
    for path in sorted((ROOT / "docs").glob("*.md")):
        text = path.read_text(encoding="utf-8")
        assert world.encode(text).ids == WORLD.encode(text), path.name


@settings(max_examples=100)
@given(text=st.text())
def test_the_byte_vocabulary_is_supported(theirs, text):
    ours = Tokenizer.bytes()
    assert theirs(ours).encode(text).ids == ours.encode(text)


@settings(max_examples=300)
@given(
    words=st.sets(st.text(alphabet="ab.[-^", min_size=1, max_size=6), min_size=1),
    text=st.text(alphabet="ab.[-^", max_size=30),
)
def test_the_pattern_matches_the_longest_entry(words, text):
    match = re.match(longest_entry_pattern(words), text)
    fitting = [word for word in words if text.startswith(word)]
    assert (match[0] if match else None) == max(fitting, key=len, default=None)


def test_the_end_of_text_token_is_not_parsed_from_text(world):
    assert world.token_to_id("<|endoftext|>") == 0
    table = tokenizer_config("<|endoftext|>")
    assert table["eos_token"] == "<|endoftext|>" and table["split_special_tokens"]
    assert world.encode("<|endoftext|>").ids == WORLD.encode("<|endoftext|>")
    # Without the configuration, in the package alone.
    world.encode_special_tokens = False
    assert world.encode("<|endoftext|>").ids == [0]
    world.encode_special_tokens = True


def test_a_vocabulary_without_an_end_of_text_has_no_special_token():
    raw = {number: bytes([number]) for number in range(256)}
    assert fast_tokenizer(raw)["added_tokens"] == []
    assert "eos_token" not in tokenizer_config(None)


def test_out_of_vocabulary_text_raises(theirs):
    digits = {number: b"%d" % number for number in range(10)}
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer.from_str(json.dumps(fast_tokenizer(digits)))
    assert theirs.encode("314").ids == [3, 1, 4]
    with pytest.raises(Exception, match="UNK"):
        theirs.encode("3a4")
