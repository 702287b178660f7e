"""Files of the `tokenizers` package: its ids, and token bytes that give the text."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_vocabularies import TEXT, byte_level_bpe, sentence_pieces

from rwkv7_jax.text.detokenizer import StreamingDetokenizer
from rwkv7_jax.text.vocabularies import load_vocabulary

pytest.importorskip("tokenizers", reason="the extra tokenizers is not installed")


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """Return a byte-level BPE file."""
    return byte_level_bpe(tmp_path_factory.mktemp("bpe"))


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """Return a SentencePiece-style file."""
    return sentence_pieces(tmp_path_factory.mktemp("pieces"), prefix=False)


@pytest.fixture(scope="module", params=["bpe", "pieces"])
def pair(request, bpe, pieces):
    """Return our tokenizer and the package's for the same file."""
    from tokenizers import Tokenizer

    file = bpe if request.param == "bpe" else pieces
    own = Tokenizer.from_file(str(file))
    own.no_truncation()
    return load_vocabulary(file), own


def test_ids_and_text_match_the_package(pair):
    ours, theirs = pair
    for text in (TEXT, "", " ", "\n\n", "unseen \u0416 \x00", "  a"):
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == ours.encode(text.encode()) == ids
        assert ours.decode(ids) == theirs.decode(ids) == text


@settings(max_examples=200)
@given(text=st.text())
def test_any_text_round_trips_token_by_token(bpe, text):
    tokenizer = load_vocabulary(bpe)
    stream = StreamingDetokenizer()
    ids = tokenizer.encode(text)
    spelled = "".join([stream.push(tokenizer.token_bytes(number)) for number in ids])
    assert spelled + stream.close() == text
    assert sum(len(tokenizer.token_bytes(number)) for number in ids) == len(
        text.encode()
    )


def test_special_tokens_end_texts_but_are_never_encoded(bpe):
    tokenizer = load_vocabulary(bpe)
    assert tokenizer.stop_ids == (0,) and tokenizer.token_bytes(0) == b""
    ids = tokenizer.encode("a<|endoftext|>b")
    assert 0 not in ids
    assert tokenizer.decode(ids) == "a<|endoftext|>b"


def test_the_tokenizer_config_names_the_end_of_text(bpe, tmp_path):
    content = json.loads(bpe.read_text())
    number = len(content["model"]["vocab"])
    token = {**content["added_tokens"][0], "id": number, "content": "</s>"}
    content["added_tokens"].append(token)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    for eos in ("</s>", {"content": "</s>"}):
        config = {"eos_token": eos, "bos_token": None}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        assert load_vocabulary(tmp_path / "tokenizer.json").stop_ids == (number,)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    with pytest.raises(
        ValueError, match=r"must have the end-of-text token '<end>' that"
    ):
        load_vocabulary(tmp_path / "tokenizer.json")
    for damaged in ("[]", "[" * 100_000, "{"):
        (tmp_path / "tokenizer_config.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"config.json` must hold a JSON object"):
            load_vocabulary(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"tokenizer_config.json` must hold a JSON ob"):
        load_vocabulary(tmp_path / "tokenizer.json")


def test_a_document_is_encoded_as_a_whole_whatever_the_chunks(bpe):
    tokenizer = load_vocabulary(bpe)
    data = TEXT.encode()
    chunks = [data[i : i + 7] for i in range(0, len(data), 7)]
    (ids,) = tokenizer.encode_chunks(chunks)
    assert ids.tolist() == tokenizer.encode(data) and ids.dtype == np.uint16
    assert list(tokenizer.encode_chunks([])) == []


def test_invalid_utf8_is_rejected(bpe):
    with pytest.raises(
        ValueError, match=r"must be UTF-8 for .*; it is not at byte 1\."
    ):
        load_vocabulary(bpe).encode(b"a\xff")


def test_a_prefix_space_is_rejected(tmp_path):
    file = sentence_pieces(tmp_path, prefix=True)
    with pytest.raises(ValueError, match=r"tokens that round-trip; '.*' comes bac"):
        load_vocabulary(file)


def test_an_unsupported_decoder_is_rejected(tmp_path, bpe):
    content = json.loads(bpe.read_text())
    content["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    (tmp_path / "t.json").write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=r"decoder of the kinds ByteLevel.*got WordPie"
    ):
        load_vocabulary(tmp_path / "t.json")


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"model": 3}', "\x00"])
def test_a_damaged_file_is_rejected(tmp_path, content):
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(
        ValueError, match=r"must be a tokenizer.json; `tokenizers` says"
    ):
        load_vocabulary(tmp_path / "t.json")


def test_identity_does_not_depend_on_json_formatting(bpe, tmp_path):
    content = json.loads(bpe.read_text())
    (tmp_path / "t.json").write_text(json.dumps(content, indent=7))
    one = load_vocabulary(bpe)
    assert load_vocabulary(tmp_path / "t.json").identity == one.identity
    # Editors of Windows begin files with a byte order mark.
    (tmp_path / "t.json").write_text(json.dumps(content), encoding="utf-8-sig")
    assert load_vocabulary(tmp_path / "t.json").identity == one.identity
    content["model"]["merges"].pop()
    (tmp_path / "t.json").write_text(json.dumps(content))
    assert load_vocabulary(tmp_path / "t.json").identity != one.identity


def test_a_character_without_a_token_is_rejected(tmp_path, bpe):
    content = json.loads(bpe.read_text())
    # "z" is no part of a longer token here.
    content["model"]["vocab"].pop("z")
    (tmp_path / "t.json").write_text(json.dumps(content))
    tokenizer = load_vocabulary(tmp_path / "t.json")
    assert tokenizer.decode(tokenizer.encode("the cat")) == "the cat"
    with pytest.raises(
        ValueError, match=r"must consist of tokens of .*at byte 3, b'z'"
    ):
        tokenizer.encode("catz")


def test_normalization_is_supported(tmp_path, bpe):
    content = json.loads(bpe.read_text())
    content["normalizer"] = {"type": "NFC"}
    (tmp_path / "t.json").write_text(json.dumps(content))
    tokenizer = load_vocabulary(tmp_path / "t.json")
    assert tokenizer.decode(tokenizer.encode("cafe\u0301")) == "caf\u00e9"


@pytest.mark.parametrize("kind", ["bpe", "pieces"])
def test_added_tokens_decode_to_themselves(request, tmp_path, kind):
    content = json.loads(request.getfixturevalue(kind).read_text())
    number = len(content["model"]["vocab"])
    words = ["\u00e9", "w\u00f6rld", "<0x41>", "\u4f60", "a b"]
    plain = {**content["added_tokens"][0], "special": False, "normalized": False}
    for place, word in enumerate(words):
        content["added_tokens"].append({**plain, "id": number + place, "content": word})
    (tmp_path / "t.json").write_text(json.dumps(content))
    tokenizer = load_vocabulary(tmp_path / "t.json")
    text = "the w\u00f6rld of caf\u00e9s, <0x41> \u4f60\u597d a b"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    spelled = [tokenizer.token_bytes(token).decode(errors="replace") for token in ids]
    assert set(words) <= set(spelled)


def test_bpe_dropout_is_disabled(tmp_path, bpe):
    content = json.loads(bpe.read_text())
    content["model"]["dropout"] = 0.5
    (tmp_path / "t.json").write_text(json.dumps(content))
    tokenizer = load_vocabulary(tmp_path / "t.json")
    assert tokenizer.encode(TEXT) == load_vocabulary(bpe).encode(TEXT)
    assert tokenizer.identity == load_vocabulary(bpe).identity


def split_by(path, target, pattern):
    """Write a copy of a file that first splits texts by a regular expression."""
    content = json.loads(path.read_text())
    step = {"type": "Split", "behavior": "Isolated", "invert": False}
    steps = [step | {"pattern": {"Regex": pattern}}, content["pre_tokenizer"]]
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    target.write_text(json.dumps(content))
    return target


def test_text_that_exceeds_the_regex_retry_limit_is_rejected(tmp_path, bpe):
    tokenizer = load_vocabulary(split_by(bpe, tmp_path / "t.json", r"(z+)+$"))
    assert tokenizer.decode(tokenizer.encode("the cat")) == "the cat"
    with pytest.raises(
        ValueError,
        match=r"Tokenizer.encode: `text` must be text that .*t\.json can encode; .*retry",
    ):
        tokenizer.encode("z" * 40 + "!")


def test_a_file_that_cannot_encode_its_tokens_is_rejected(tmp_path, bpe):
    content = json.loads(split_by(bpe, tmp_path / "t.json", r"(z+)+$").read_text())
    number = len(content["model"]["vocab"])
    content["model"]["vocab"]["z" * 40 + "!"] = number
    (tmp_path / "t.json").write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=r"t\.json` must encode its own tokens; .*retry"
    ):
        load_vocabulary(tmp_path / "t.json")
