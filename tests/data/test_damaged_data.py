"""Damaged data is rejected with file and position before anything reaches a device."""

import json
import re
import warnings

import binidx_files
import numpy as np
import pytest
from tiny_models import CONFIG

from rwkv7_jax.data.jsonl import ReadStats
from rwkv7_jax.data.loading import token_stream
from rwkv7_jax.data.readers import documents
from rwkv7_jax.data.token_cache import write_cache
from rwkv7_jax.generation.generate import generate
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.test_time.questions import read_questions
from rwkv7_jax.text.tokenizer import Tokenizer

BYTES = Tokenizer.bytes()
WORLD = Tokenizer.world()
GOOD = b'{"text": "good"}\n'
BAD = {
    "bad JSON": (b'{"text": "a\n', "not one JSON object"),
    "no object": (b"[1]\n", "must be an object; got list"),
    "missing key": (b'{"txt": "a"}\n', 'must have a "text"'),
    "not a string": (b'{"text": 7}\n', '"text" must be a string; got int'),
    "null": (b'{"text": null}\n', 'must have a "text"'),
    "NaN": (b'{"text": "a", "score": NaN}\n', "NaN is not a JSON number"),
    "NaN as text": (b'{"text": NaN}\n', "NaN is not a JSON number"),
    "lone surrogate": (b'{"text": "ab\\ud800"}\n', "lone surrogate at character 2"),
    "byte order mark inside a file": (
        b'\xef\xbb\xbf{"text": "a"}\n',
        "byte order mark",
    ),
    "UTF-16": ('{"text": "a"}\n'.encode("utf-16"), "as UTF-16 does"),
    "UTF-16 without mark": (
        '{"text": "a"}'.encode("utf-16-le") + b"\n",
        "as UTF-16 does",
    ),
    "Latin-1": (b'{"text": "\xe4"}\n', "not UTF-8 at byte 10"),
    "two objects": (
        b'{"text": "a"} {"text": "b"}\n',
        "not one JSON object: Extra data",
    ),
    "deep nesting": (b'{"text": ' + b"[" * 100_000 + b"\n", "nested too deeply"),
    "two kinds": (
        b'{"text": "a", "messages": []}\n',
        '"text" and "messages" in one object',
    ),
    "no answer": (b'{"prompt": "a"}\n', 'no "answer"'),
    "empty answer": (b'{"prompt": "a", "answer": ""}\n', '"answer" is empty'),
    "surrogate in an answer": (
        b'{"prompt": "a", "answer": "\\udc00"}\n',
        '"answer" has a lone',
    ),
    "no messages": (b'{"messages": {}}\n', '"messages" must be a list of messages'),
    "unknown role": (
        b'{"messages": [{"role": "narrator"}]}\n',
        "message 1: role must be system, user",
    ),
    "role of no kind": (
        b'{"messages": [{"role": []}]}\n',
        "message 1: role must be system, user",
    ),
    "no content": (b'{"messages": [{"role": "user"}]}\n', 'message 1: no "content"'),
    "no message": (b'{"messages": ["hi"]}\n', "message 1: must be an object; got str"),
    "question last": (
        b'{"messages": [{"role": "user", "content": "a"}]}\n',
        '"messages" do not end with an answer',
    ),
    "blank answer": (
        b'{"messages": [{"role": "assistant", "content": " \\n"}]}\n',
        "message 1: an empty answer",
    ),
}


@pytest.fixture
def file(tmp_path):
    def write(data: bytes):
        (tmp_path / "x.jsonl").write_bytes(data)
        return tmp_path / "x.jsonl"

    return write


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_line_is_reported_by_file_and_number(file, fault):
    line, reason = BAD[fault]
    path = file(GOOD + b"\n" + line + GOOD)
    with pytest.raises(ValueError) as caught:
        token_stream(path, BYTES)
    assert str(caught.value).startswith(f"{path}:3: ") and reason in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("fault", BAD)
def test_bad_lines_can_be_skipped_and_counted(file, fault):
    path = file(GOOD + BAD[fault][0] + GOOD)
    stats = ReadStats()
    # The line's end has two bytes in UTF-16; the second one is the first of the next line.
    lost = 2 if fault == "UTF-16" else 1
    found = list(documents(path, on_bad="skip", stats=stats))
    assert {document.text() for document in found} == {b"good"} and len(
        found
    ) == 3 - lost
    assert stats.skipped == lost and stats.first_error.startswith(f"{path}:2: ")
    with pytest.warns(
        UserWarning, match=rf"{lost} lines of .*x\.jsonl were skipped; .*:2: "
    ):
        assert len(token_stream(path, BYTES, on_bad="skip")) == 5 * (3 - lost)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"prompt": 7}\n', '"prompt" must be a string; got int'),
        (b"[1]\n", "must be an object; got list"),
        (
            b'{"txt": "a"}\n',
            'must have a "prompt", a "question" or "messages"; its keys',
        ),
        (b'{"prompt": ""}\n', '"prompt" must hold a token; got none'),
        (b'{"prompt": "\\ud800"}\n', "lone surrogate at character 0"),
        (b'{"prompt": \xff}\n', "not UTF-8 at byte 11"),
        (b"oops\n", "not one JSON object"),
    ],
)
def test_a_bad_question_is_reported_by_file_and_number(file, line, reason):
    # A line separator inside a string ends no line.
    path = file('{"prompt": "1\u2028"}\n'.encode() + line)
    with pytest.raises(ValueError) as caught:
        read_questions(path, BYTES)
    assert str(caught.value).startswith(f"{path}:2: ") and reason in str(caught.value)


@pytest.mark.slow
def test_crlf_blank_lines_and_a_line_of_fifty_megabytes_are_read(file):
    long = "x" * 50_000_000
    path = file(
        b'{"text": "a\\r\\n"}\r\n\r\n  \n' + json.dumps({"text": long}).encode()
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [document.text() for document in documents(path)] == [
            b"a\r\n",
            long.encode(),
        ]


@pytest.mark.parametrize("tokenizer", [BYTES, WORLD], ids=lambda t: t.name)
def test_as_bytes_reads_a_text_that_is_not_utf8(tmp_path, tokenizer):
    data = b"caf\xe9 \xff\xfe\x80 \xed\xa0\x80 \xe2\x82"
    path = tmp_path / "latin.txt"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"latin.txt` is not UTF-8 at byte 3: "):
        token_stream(path, tokenizer)
    stream = token_stream(path, tokenizer, as_bytes=True)[:].tolist()
    assert stream[-1] == 0 and tokenizer.decode_bytes(stream[:-1]) == data


def test_a_lone_surrogate_in_a_prompt_is_reported_by_position():
    with pytest.raises(
        ValueError, match="valid Unicode; got a lone surrogate at character 2"
    ):
        WORLD.encode("ab\udc80c")


@pytest.mark.parametrize(
    ("file", "place", "data", "reason"),
    [
        ("x.idx", 0, b"JUNK", r"x\.idx` at byte 0: no MMIDIDX magic"),
        ("x.idx", 9, b"\x02", r"x\.idx` at byte 9: version must be 1; got 2"),
        ("x.idx", 17, b"\x06", r"x\.idx` at byte 17: no integer dtype has code 6"),
        (
            "x.idx",
            17,
            b"\x04",
            r"x\.idx` at byte 50: a sequence does not follow the last",
        ),
        ("x.idx", 18, b"\xff", r"x\.idx` must have \d+ bytes; it has"),
        ("x.idx", 34, b"\x09", r"at byte \d+: a sequence does not follow the last"),
        (
            "x.idx",
            38,
            b"\x03",
            r"x\.bin` must have 12 bytes, says its index; it has 10",
        ),
        (
            "x.idx",
            38,
            b"\xff\xff\xff\xff",
            r"x\.idx` at byte 38: a sequence of negative size",
        ),
    ],
)
def test_an_invalid_field_is_reported_by_file_and_offset(
    tmp_path, file, place, data, reason
):
    path = binidx_files.write(tmp_path, [[1, 2, 0], [7, 0]])
    whole = bytearray((tmp_path / file).read_bytes())
    whole[place : place + len(data)] = data
    (tmp_path / file).write_bytes(whole)
    with pytest.raises(ValueError, match=reason):
        token_stream(path, WORLD)


def test_files_truncated_anywhere_are_rejected(tmp_path):
    path = binidx_files.write(tmp_path, [[1, 2, 0], [7, 0]])
    for file in (path, path.with_suffix(".idx")):
        whole = file.read_bytes()
        for size in range(len(whole)):
            file.write_bytes(whole[:size])
            with pytest.raises(ValueError, match=r"read_binidx: `.*x\.(bin|idx)`"):
                token_stream(path, WORLD)
        file.write_bytes(whole)
    assert len(token_stream(path, WORLD)) == 5


def test_a_missing_file_of_the_pair_is_named(tmp_path):
    path = binidx_files.write(tmp_path, [[1]])
    path.with_suffix(".idx").unlink()
    with pytest.raises(ValueError, match=r"x\.idx` does not exist"):
        token_stream(path, WORLD)
    with pytest.raises(ValueError, match=r"y\.bin` does not exist"):
        token_stream(tmp_path / "y.bin", WORLD)


@pytest.mark.parametrize("suffix", [".mask", ".keys"])
@pytest.mark.parametrize("change", ["cut", "missing"])
def test_a_damaged_file_of_a_cache_is_named(tmp_path, suffix, change):
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "a", "answer": "b"}\n')
    write_cache([tmp_path / "a.jsonl"], tmp_path / "x.bin", BYTES)
    file = tmp_path / f"x{suffix}"
    if change == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        file.unlink()
    with pytest.raises(
        ValueError, match=rf"x\{suffix}` must have \d bytes, .*; it has \d"
    ):
        token_stream(tmp_path / "x.bin", BYTES, split="train", held_out=0.0)


@pytest.mark.parametrize("text", [b"{", b"[]", b'{"format": "other"}', b"\xff"])
def test_a_damaged_card_is_named(tmp_path, text):
    path = binidx_files.write(tmp_path, [[1, 0]])
    (tmp_path / "x.card.json").write_bytes(text)
    with pytest.raises(
        ValueError, match=r"x\.card\.json` must be of 'rwkv7_jax tokens 1': "
    ):
        token_stream(path, BYTES)


def test_a_card_of_other_files_or_of_another_vocabulary_is_rejected(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"abc")
    write_cache([tmp_path / "a.txt"], tmp_path / "x.bin", BYTES)
    with pytest.raises(
        ValueError, match="of the model's vocabulary, world; it is of bytes"
    ):
        token_stream(tmp_path / "x.bin", WORLD)
    binidx_files.write(tmp_path, [[1, 0]])
    with pytest.raises(
        ValueError, match=r"count 1 documents and 2 tokens, .*; got 1 and 4"
    ):
        token_stream(tmp_path / "x.bin", BYTES)


@pytest.mark.parametrize(("wrong", "place"), [(257, 3), (-1, 5), (70_000, 0)])
def test_an_out_of_vocabulary_id_in_data_is_reported_by_position(
    tmp_path, wrong, place
):
    ids = np.arange(9, dtype=np.int32)
    ids[place] = wrong
    path = binidx_files.write(tmp_path, [ids], dtype=np.int32, code=4)
    for source in (ids, path):
        with pytest.raises(
            ValueError, match=rf"below 257; got {wrong} at position {place}"
        ):
            token_stream(source, BYTES)
    with pytest.raises(TypeError, match="`source` must hold integers; got float64"):
        token_stream(ids / 2, BYTES)


@pytest.mark.parametrize("name", ["prompts", "stop_ids", "banned", "penalty_exempt"])
@pytest.mark.parametrize("wrong", [-1, CONFIG.vocab_size])
def test_an_out_of_vocabulary_id_in_an_argument_is_reported_by_position(name, wrong):
    ids = {"prompts": [1, 2], name: [3, 4, wrong]}
    # There are no weights, so nothing can have run on a device.
    with pytest.raises(
        ValueError, match=rf"`{name}`.*got {re.escape(str(wrong))} at position 2"
    ):
        generate(RWKV7(CONFIG), {}, **ids)
