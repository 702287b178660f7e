"""Every kind of vocabulary: found by name, checked against the model, identified by content."""

import lzma
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_vocabularies import DIGITS, WORDS, byte_level_bpe

import rwkv7_jax.text as text_room
from rwkv7_jax.text.detokenizer import spell
from rwkv7_jax.text.tokenizer import Tokenizer
from rwkv7_jax.text.vocabularies import NAMES, load_vocabulary, vocabulary_of_text
from rwkv7_jax.text.vocabulary_file import format_vocabulary, parse_vocabulary


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Make a folder with the files of small vocabularies."""
    folder = tmp_path_factory.mktemp("vocabularies")
    (folder / "digits.txt").write_text(DIGITS)
    (folder / "words.txt").write_text(WORDS)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_built_in_vocabularies_load_by_name(name):
    tokenizer = load_vocabulary(name)
    assert tokenizer.name == tokenizer.kind == tokenizer.identity == name


def test_a_vocabulary_may_lack_an_end_of_text(folder):
    digits = load_vocabulary(folder / "digits.txt", 12)
    assert digits.encode("120,021#") == [1, 2, 0, 10, 0, 2, 1, 11]
    assert digits.decode([1, 2, 0, 10]) == "120,"
    assert digits.end_of_text is None and digits.stop_ids == ()
    assert digits.vocab_size == 12


def test_bytes256_maps_bytes_to_themselves():
    raw = load_vocabulary("bytes256", 256)
    data = bytes(range(256))
    assert raw.encode(data) == list(data)
    assert raw.decode_bytes(range(256)) == data
    assert raw.stop_ids == () and Tokenizer.for_vocabulary(256) is raw


def test_an_unused_id_0_is_the_end_of_text(folder):
    words = load_vocabulary(folder / "words.txt")
    assert words.stop_ids == (0,) and words.token_bytes(0) == b""
    assert words.encode("abbaab a\u20ac") == [4, 3, 7, 1, 9, 10]


def test_an_id_without_an_entry_is_not_decoded(folder):
    words = load_vocabulary(folder / "words.txt", 24)
    assert words.vocab_size == 24
    assert words.token_bytes(5) == words.token_bytes(23) == b""
    with pytest.raises(ValueError, match=r"must be entries of the .*; got 5 at posi"):
        words.decode([1, 5])
    with pytest.raises(ValueError, match="below 24; got 24"):
        words.token_bytes(24)


def test_bytes_without_an_entry_are_rejected_with_their_position(folder):
    words = load_vocabulary(folder / "words.txt")
    with pytest.raises(ValueError, match=r"none begins at byte 2, b'xy'\.$"):
        words.encode("abxy")
    with pytest.raises(ValueError, match=r"begins at byte 2, b'\\xe2\\x82'\.$"):
        load_vocabulary(folder / "digits.txt").encode(b"12\xe2\x82")


@pytest.mark.parametrize("name", ["digits.txt", "words.txt"])
def test_ids_do_not_depend_on_the_chunks(folder, name):
    tokenizer = load_vocabulary(folder / name)
    pieces = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
    random = np.random.default_rng(0)
    for _ in range(40):
        data = b"".join(random.choice([piece for piece in pieces if piece], 30))
        cuts = np.sort(random.integers(0, len(data), 8))
        chunks = [
            part.tobytes() for part in np.split(np.frombuffer(data, np.uint8), cuts)
        ]
        found = np.concatenate(list(tokenizer.encode_chunks(chunks)))
        assert found.tolist() == tokenizer.encode(data)
        assert tokenizer.decode_bytes(found.tolist()) == data


@settings(max_examples=100)
@given(st.lists(st.integers(0, 11)), st.integers(1, 7))
def test_numeric_ids_round_trip(ids, size):
    numbers = load_vocabulary("ids", 12)
    written = numbers.decode_bytes(ids)
    assert numbers.encode(written) == ids
    chunks = [written[i : i + size] for i in range(0, len(written), size)]
    found = [number for piece in numbers.encode_chunks(chunks) for number in piece]
    assert found == ids
    assert written == b"".join([numbers.token_bytes(number) for number in ids])


def test_an_overlong_number_is_rejected_immediately():
    taken = []

    def chunks():
        for number in range(1000):
            taken.append(number)
            yield b"7" * 100

    with pytest.raises(ValueError, match="must hold ids from 0 and below 12"):
        list(load_vocabulary("ids", 12).encode_chunks(chunks()))
    assert len(taken) == 1


def test_ids_may_be_separated_by_blanks_commas_and_newlines():
    numbers = load_vocabulary("ids", 300)
    assert numbers.encode(" 3,1 4,\n15\t\r\n 299 ,") == [3, 1, 4, 15, 299]
    assert numbers.encode("") == numbers.encode(" , ") == []
    assert numbers.stop_ids == ()


@pytest.mark.parametrize("text", ["1 x", "-1", "1.5", "12", "9" * 30, "\u0663", "1;2"])
def test_invalid_ids_are_rejected(text):
    with pytest.raises(
        ValueError, match=r"ids from 0 and below 12 separated by spaces or com"
    ):
        load_vocabulary("ids", 12).encode(text)


def test_the_digest_of_ids_does_not_depend_on_the_size():
    assert load_vocabulary("ids").digest == load_vocabulary("ids", 12).digest


@pytest.mark.parametrize(
    ("name", "vocab_size", "sentence"),
    [
        (
            "digits.txt",
            11,
            "below the model's 11; got .*digits.txt, whose largest is 11",
        ),
        ("words.txt", 20, "below the model's 20; got .*words.txt, whose largest is 20"),
        (
            "world",
            65529,
            "below the model's 65,529; got world, whose largest is 65,529",
        ),
        ("bytes", 256, "below the model's 256; got bytes, whose largest is 256"),
        ("bytes256", 12, "below the model's 12; got bytes256, whose largest is 255"),
    ],
)
def test_a_vocabulary_larger_than_the_embedding_is_rejected(
    folder, name, vocab_size, sentence
):
    path = name if name in NAMES else folder / name
    with pytest.raises(ValueError, match=f"^`--vocabulary` must have ids {sentence}"):
        load_vocabulary(path, vocab_size, argument="`--vocabulary`")


def test_an_unknown_name_is_rejected():
    with pytest.raises(
        ValueError, match=r"^load_vocabulary: `name` must be world, byt"
    ):
        load_vocabulary("nowhere.txt")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "has no entries"),
        ("0 '' 0", "has no entries"),
        ("1 'a' 1\n1 'b' 1", "line 2 repeats the id 1"),
        ("1 'a' 1\n2 'a' 1", "line 2 has the bytes of line 1"),
        ("1 'a' 1\n2 'b 1", "line 2 is not an entry"),
        ("1 'a','b' 1\n2 'b' 1", "line 1 is not an entry"),
        ("1 7 1", "line 1 is not an entry"),
        ("1 [] 0", "line 1 is not an entry"),
        ("1 '\\ud800' 3", "line 1 is not an entry"),
        ("1 f() 1", "line 1 is not an entry"),
        (f"1 {'(' * 500} 1", "line 1 is not an entry"),
        ("<html>", "line 1 is not an entry"),
        (f"{'9' * 5000} 'a' 1", "line 1 is not an entry"),
        (f"1 'a' {'9' * 5000}", "line 1 is not an entry"),
        ("1 'a' 1\n4000000000 'b' 1", "ids below 16,777,216; got 4,000,000,000"),
    ],
)
def test_a_damaged_file_is_rejected_with_the_line(tmp_path, content, sentence):
    file = tmp_path / "v.txt"
    file.write_text(content)
    with pytest.raises(ValueError, match=sentence) as caught:
        load_vocabulary(file, argument="`--vocabulary`")
    said = str(caught.value)
    assert said.startswith(f"`--vocabulary` must be a vocabulary: `{file}`")


def test_a_file_that_is_not_utf8_is_rejected(tmp_path):
    (tmp_path / "v.txt").write_bytes(b"1 '\xff' 1")
    with pytest.raises(ValueError, match=r"must be UTF-8\.$"):
        load_vocabulary(tmp_path / "v.txt")


def test_identity_depends_on_content_and_not_on_the_file_name(folder, tmp_path):
    (tmp_path / "other.txt").write_text("\ufeff" + WORDS.replace("\n", "\r\n"))
    (tmp_path / "changed.txt").write_text(WORDS.replace("'abba'", "'abab'"))
    words = load_vocabulary(folder / "words.txt")
    assert load_vocabulary(tmp_path / "other.txt").identity == words.identity
    assert load_vocabulary(tmp_path / "changed.txt").identity != words.identity
    assert words.with_vocab_size(99).identity == words.identity
    assert words.identity == f"file {words.digest}"


def test_the_world_file_is_recognized_under_any_name(tmp_path):
    source = Path(text_room.__file__).parent / "vocabulary"
    (packed,) = source.glob("*.xz")
    (tmp_path / "v.txt").write_bytes(lzma.decompress(packed.read_bytes()))
    assert load_vocabulary(tmp_path / "v.txt") is Tokenizer.world()


def test_a_vocabulary_round_trips(folder):
    for name in ("digits.txt", "words.txt"):
        entries = parse_vocabulary((folder / name).read_text())
        assert parse_vocabulary(format_vocabulary(entries)) == entries
        tokenizer = load_vocabulary(folder / name)
        again = vocabulary_of_text(tokenizer.file_text(), "again")
        assert again.identity == tokenizer.identity


def test_the_dtype_of_ids_depends_on_the_vocabulary_size():
    assert load_vocabulary("world").dtype is np.uint16
    assert load_vocabulary("ids", 65536).dtype is np.uint16
    assert load_vocabulary("ids", 65537).dtype is np.int32
    pieces = list(load_vocabulary("ids", 70000).encode_chunks([b"69999 1"]))
    assert np.concatenate(pieces).tolist() == [69999, 1]


def test_spell_gives_no_ids_for_unencodable_text(folder):
    assert spell("ab", load_vocabulary(folder / "words.txt")) == [3]
    assert spell("x", load_vocabulary(folder / "words.txt")) == []
    # The id 1 is written with a blank.
    assert spell("1", load_vocabulary("ids", 12)) == []
    assert spell("1 ", load_vocabulary("ids", 12)) == [1]


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    pytest.importorskip("tokenizers", reason="the extra tokenizers is not installed")
    import sys

    file = byte_level_bpe(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"^`--vocabulary`: a tokenizer.json needs"):
        load_vocabulary(file, argument="`--vocabulary`")


def test_text_with_a_lone_surrogate_has_no_ids():
    assert spell("\udc80", Tokenizer.bytes()) == []


def test_bytes_without_an_entry_are_reported_by_their_position_in_the_text(folder):
    digits = load_vocabulary(folder / "digits.txt")
    for chunks in ([b"0" * 30 + b"x"], [b"0" * 20, b"0" * 10, b"x0"]):
        with pytest.raises(ValueError, match="none begins at byte 30, b'x"):
            list(digits.encode_chunks(chunks))
