"""Streaming detokenization: whole characters, stop strings across chunks, any bytes."""

import numpy as np
import pytest

from rwkv7_jax.text.detokenizer import (
    StreamingDetokenizer,
    check_stop_strings,
    whole_tokens,
)


class Sizes:
    """A tokenizer whose ids decode to as many bytes as their value."""

    def encode(self, text):
        return [len(text)]

    def token_bytes(self, token):
        return b"a" * token


@pytest.mark.parametrize("seed", range(40))
def test_text_does_not_depend_on_the_chunks(seed):
    random = np.random.default_rng(seed)
    data = "aéa\n\nb€b\n\nUser: 𝄞".encode() + random.bytes(6) + b"x\n\nUser:y"[:seed]
    stops = ("\n\nUser:", "b\n\nU", "€b\n\nX")
    whole = StreamingDetokenizer(stops)
    expected = whole.push(data) + whole.close()
    cuts = np.sort(random.integers(0, len(data), 9))
    stream = StreamingDetokenizer(stops)
    pieces = []
    for piece in np.split(np.frombuffer(data, np.uint8), cuts):
        pieces.append(stream.push(piece.tobytes()))
    pieces.append(stream.close())
    assert "".join(pieces) == expected == "aéa\n\nb€"
    assert stream.stopped


def test_random_bytes_decode_like_the_standard_decoder():
    random = np.random.default_rng(0)
    for _ in range(300):
        data = random.bytes(20)
        stream = StreamingDetokenizer(["no such end"])
        text = "".join(stream.push(bytes([byte])) for byte in data) + stream.close()
        assert text == data.decode(errors="replace")
        text.encode()


def test_an_incomplete_character_and_a_possible_stop_string_are_held_back():
    stream = StreamingDetokenizer(["\n\nUser:"])
    given = [
        stream.push(piece)
        for piece in (b"a\xe2\x82", b"\xac\n", b"\nUse", b"d", b"\xe2")
    ]
    assert given == ["a", "€", "", "\n\nUsed", ""]
    assert stream.close() == "\ufffd"


def test_whole_tokens_counts_dropped_bytes_from_the_end():
    ids = [2, 1, 0, 2]
    counts = [whole_tokens(ids, drop, Sizes()) for drop in range(6)]
    assert counts == [(4, 0), (3, 1), (3, 0), (1, 0), (0, 1), (0, 0)]


def test_the_first_complete_or_longest_stop_string_wins():
    assert StreamingDetokenizer(["bcd", "c"]).push(b"abcd") == "ab"
    assert StreamingDetokenizer(["c", "bc"]).push(b"abcd") == "a"


def test_invalid_stop_strings_are_rejected():
    check_stop_strings(["a", "b"])
    with pytest.raises(ValueError, match=r"^`stop_strings` must hold no empty string"):
        check_stop_strings(["a", ""])
    with pytest.raises(TypeError):
        check_stop_strings("ab")


def test_lone_surrogates_are_rejected_unless_they_escape_a_byte():
    with pytest.raises(ValueError, match="got a lone surrogate at character 1 of 'a"):
        check_stop_strings(["a\ud83d"])
    with pytest.raises(ValueError, match="`stop_strings` must be valid Unicode"):
        StreamingDetokenizer(["\udfff"])
    assert StreamingDetokenizer(["\udcff"]).push(b"a\xffb") == "a"
