"""Both vocabularies against two other tokenizers and brute force; any bytes round-trip."""

import copy
import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv7_jax.data.readers import documents
from rwkv7_jax.text.tokenizer import Tokenizer, joined_chunks, parse_vocabulary

WORLD = Tokenizer.world()
TEXTS = [
    "",
    " ",
    "Hello, world!",
    "\r\n\t\n\n\n",
    "The quick brown fox   jumps over 12345 lazy dogs.",
    "def f(x):\n    return x ** 2\n",
    "Käse, façade, naïve, Ωmega, Привет, 你好,世界, 日本語のテキスト, 한국어, العربية",
    "👩‍👩‍👧‍👦🏳️‍🌈 emoji",
    "User: hi\n\nAssistant:",
    "a" * 100 + " " * 100 + "-" * 100,
    "\x00\x01\x7f",
    "<|endoftext|>",
]


@functools.cache
def entries() -> dict[bytes, int]:
    """Return World's entries, but not at import, which happens in every process."""
    return {WORLD.token_bytes(i): i for i in range(1, 65530)}


def brute_force(data: bytes) -> list[int]:
    """Find the longest entry at every position by trying all lengths."""
    known = entries()
    longest = max(map(len, known))
    out = []
    place = 0
    while place < len(data):
        size = next(
            n for n in range(longest, 0, -1) if data[place : place + n] in known
        )
        out.append(known[data[place : place + size]])
        place += size
    return out


def random_bytes(count: int, seed: int):
    """Yield byte strings that mix random bytes and vocabulary entries."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        pieces = [rng.bytes(rng.integers(1, 9)) for _ in range(rng.integers(1, 9))]
        pieces += [
            WORLD.token_bytes(int(i)) for i in rng.integers(1, 65530, rng.integers(9))
        ]
        rng.shuffle(pieces)
        yield b"".join(pieces)


def test_encoding_is_greedy_longest_match():
    for data in [text.encode() for text in TEXTS] + list(random_bytes(50, seed=0)):
        assert WORLD.encode(data) == brute_force(data)


@pytest.mark.slow
def test_ids_match_the_official_and_the_rust_package():
    pytest.importorskip("rwkv", reason="the oracle extra is not installed")
    fast = pytest.importorskip(
        "pyrwkv_tokenizer", reason="the oracle extra is not installed"
    )
    import rwkv
    from rwkv.rwkv_tokenizer import TRIE_TOKENIZER

    trie = TRIE_TOKENIZER(f"{rwkv.__path__[0]}/rwkv_vocab_v20230424.txt")
    rust = fast.RWKVTokenizer()
    for text in TEXTS:
        assert WORLD.encode(text) == trie.encode(text) == list(rust.encode(text))
    for data in random_bytes(300, seed=1):
        assert WORLD.encode(data) == trie.encodeBytes(data)


@pytest.mark.parametrize(
    "tokenizer",
    [WORLD, pytest.param(Tokenizer.bytes(), marks=pytest.mark.slow)],
    ids=["world", "bytes"],
)
def test_ten_thousand_random_byte_strings_round_trip(tokenizer):
    for data in random_bytes(10_000, seed=2):
        assert tokenizer.decode_bytes(tokenizer.encode(data)) == data


@pytest.mark.parametrize(
    "tokenizer", [WORLD, Tokenizer.bytes()], ids=["world", "bytes"]
)
def test_ids_do_not_depend_on_the_chunks(tokenizer, monkeypatch):
    monkeypatch.setattr("rwkv7_jax.text.tokenizer._WORLD_BLOCK", 0)
    random = np.random.default_rng(3)
    # Long runs of spaces and marks are single ids: a cut inside of one must not show.
    text = b"".join(
        random.choice([b" " * 130, b"the words ", b"-" * 70, b"\xff\xe2", b"\n"], 99)
    )
    for _ in range(20):
        cuts = np.sort(random.integers(0, len(text), random.integers(1, 40)))
        chunks = [
            part.tobytes() for part in np.split(np.frombuffer(text, np.uint8), cuts)
        ]
        found = list(tokenizer.encode_chunks(chunks))
        assert np.concatenate(found).tolist() == tokenizer.encode(text)
    assert (
        list(tokenizer.encode_chunks([])) == list(tokenizer.encode_chunks([b""])) == []
    )


@pytest.mark.parametrize(
    ("size", "calls"), [(300_000, 1), (1_500_000, 2), (2_100_000, 2)]
)
def test_the_package_encodes_almost_all_of_a_long_file(tmp_path, size, calls):
    """The chunks of a file are shorter than the texts for which the package is loaded."""
    line = "The sea 海, \u00e9 and 12 waves;   and so on.\n".encode()
    count = size // len(line)
    path = tmp_path / "x.txt"
    path.write_bytes(line * count)
    world = copy.copy(WORLD)
    # In place of the package, which may be missing; the ids of a line begin and end with it.
    ids = WORLD.encode(line)
    given = []

    def encode(text):
        given.append(len(text.encode()))
        start = text.index("\n") + 1
        end = text.rindex("\n") + 1
        lines = ids * text.count("\n", start)
        return WORLD.encode(text[:start]) + lines + WORLD.encode(text[end:])

    world.__dict__["_text_encoder"] = encode
    (document,) = documents(path)
    found = np.concatenate([part for part, _ in document.ids(world)])
    assert found.tolist() == [*ids * count, 0]
    assert sum(given) > 0.95 * size
    assert len(given) == calls


@pytest.mark.parametrize("size", [0, 1, 7, 300])
def test_joining_chunks_keeps_the_bytes(size):
    chunks = [bytes([number]) * (number % 5) for number in range(40)]
    found = list(joined_chunks(chunks, size))
    assert b"".join(found) == b"".join(chunks)
    assert all(len(chunk) >= size for chunk in found[:-1])


@settings(max_examples=200)
@given(st.text())
def test_any_text_round_trips(text):
    assert WORLD.decode(WORLD.encode(text)) == text


def test_the_world_vocabulary_is_complete():
    assert WORLD.vocab_size == 65536
    spelt = [WORLD.token_bytes(i) for i in range(65536)]
    assert spelt[0] == b"" and spelt[1:257] == [bytes([i]) for i in range(256)]
    assert len(set(spelt[1:65530])) == 65529 and not any(spelt[65530:])
    assert WORLD.encode("\n\n") == [261]


def test_small_vocabularies_are_prefixes_of_world():
    small = Tokenizer.bytes()
    assert small.encode("Hé") == [73, 196, 170]
    assert all(small.token_bytes(i) == WORLD.token_bytes(i) for i in range(257))
    with pytest.raises(ValueError, match="below 257; got 257"):
        small.token_bytes(257)


def test_invalid_utf8_is_replaced_in_decoded_text():
    assert WORLD.decode(WORLD.encode(b"a\xffb")) == "a\ufffdb"


def test_token_0_is_never_encoded_and_decodes_to_nothing():
    assert 0 not in WORLD.encode(b"\x00" * 9)
    assert WORLD.decode([0, 34, 0]) == WORLD.decode([34])


@pytest.mark.parametrize("wrong", [-1, 65530, 65535, 65536, 10**9])
def test_an_id_without_an_entry_is_reported_by_position(wrong):
    with pytest.raises(ValueError, match=rf"got {wrong} at position 2"):
        WORLD.decode([33, 34, wrong, 35])


@pytest.mark.parametrize("text", [None, 3, ["a"]])
def test_encode_accepts_only_text_and_bytes(text, unchecked):
    with pytest.raises(TypeError, match="`text` must be str or bytes; got"):
        WORLD.encode(text)


def test_lone_surrogates_are_rejected():
    with pytest.raises(ValueError, match="lone surrogate at character 2"):
        WORLD.encode("ab\ud800")


@pytest.mark.parametrize(
    ("size", "name"),
    [(257, "bytes"), (65536, "world"), (65530, "world"), (65529, "world")],
)
def test_the_vocabulary_size_determines_the_tokenizer(size, name):
    if size == 65529:
        with pytest.raises(ValueError, match="got 65529"):
            Tokenizer.for_vocabulary(size)
    else:
        assert Tokenizer.for_vocabulary(size).name == name


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ("1 'a' 1\nx 'b' 1", "line 2 is not an entry"),
        ("1 'a' 2", "line 1 says 2 bytes; got 1"),
        ("1 'ä' 1", "line 1 says 1 bytes; got 2"),
    ],
)
def test_a_damaged_vocabulary_file_is_rejected(lines, sentence):
    with pytest.raises(ValueError, match=sentence):
        parse_vocabulary(lines)


def test_entries_are_text_or_bytes_with_any_line_ending():
    assert parse_vocabulary("1 'ä b' 4\r\n2 b'\\xff' 1\r\n") == {
        1: "ä b".encode(),
        2: b"\xff",
    }


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (
            lambda: Tokenizer({5: b"a"}, vocab_size=3, name="x"),
            ValueError,
            "`x` must have ids from 0 and below its size of 3; got 5 to 5",
        ),
        (
            lambda: Tokenizer({-1: b"a"}, vocab_size=3, name="x"),
            ValueError,
            "`x` must have ids from 0 and below its size of 3; got -1 to -1",
        ),
        (
            lambda: Tokenizer({1: "a"}, vocab_size=3, name="x"),
            TypeError,
            "`x` must have entries of bytes; got str for 1",
        ),
        (
            lambda: Tokenizer.bytes().with_vocab_size(256),
            ValueError,
            "`vocab_size` must be above the largest id, 256; got 256",
        ),
        (
            lambda: list(Tokenizer.bytes().encode_chunks(b"ab")),
            TypeError,
            "`chunks` must be pieces of a text; got bytes",
        ),
    ],
)
def test_entries_outside_the_vocabulary_and_single_texts_are_rejected(
    unchecked, call, error, sentence
):
    with pytest.raises(error, match=sentence):
        call()
