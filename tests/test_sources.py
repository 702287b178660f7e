"""Documents from files: what is wrong with a line is said with its file and number."""

import json
import warnings

import pytest

from rwkv7_jax.sources import BUILT_IN, documents

GOOD = b'{"text": "good"}\n'
BAD = {
    "bad JSON": (b'{"text": "a\n', "not one JSON object"),
    "no object": (b"[1]\n", 'no object with a "text" key'),
    "missing key": (b'{"txt": "a"}\n', 'no object with a "text" key'),
    "not a string": (b'{"text": 7}\n', '"text" is no string but int'),
    "null": (b'{"text": null}\n', '"text" is no string but NoneType'),
    "NaN": (b'{"text": "a", "score": NaN}\n', "NaN is no JSON number"),
    "lone surrogate": (b'{"text": "ab\\ud800"}\n', "lone surrogate at character 2"),
    "byte order mark": (b'\xef\xbb\xbf{"text": "a"}\n', "byte order mark"),
    "UTF-16": ('{"text": "a"}\n'.encode("utf-16"), "not UTF-8 at byte 0"),
    "Latin-1": (b'{"text": "\xe4"}\n', "not UTF-8 at byte 10"),
    "two objects": (b'{"text": "a"} {"text": "b"}\n', "not one JSON object: Extra data"),
    "deep nesting": (b'{"text": ' + b"[" * 100_000 + b"\n", "nested too deeply"),
}


@pytest.fixture
def file(tmp_path):
    def write(data: bytes):
        (tmp_path / "x.jsonl").write_bytes(data)
        return tmp_path / "x.jsonl"

    return write


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_line_is_named_by_file_and_number(file, fault):
    line, reason = BAD[fault]
    path = file(GOOD + b"\n" + line + GOOD)
    with pytest.raises(ValueError) as caught:
        list(documents(path))
    assert str(caught.value).startswith(f"{path}:3: ") and reason in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("fault", BAD)
def test_bad_lines_are_skipped_when_asked_for_and_counted(file, fault):
    path = file(GOOD + BAD[fault][0] + GOOD)
    with pytest.warns(UserWarning, match=r"lines of .*x\.jsonl were skipped; the first: .*:2: "):
        found = list(documents(path, on_bad="skip"))
    assert set(found) == {b"good"}


def test_crlf_blank_lines_and_a_line_of_fifty_megabytes_are_fine(file):
    long = "x" * 50_000_000
    path = file(b'{"text": "a\\r\\n"}\r\n\r\n  \n' + json.dumps({"text": long}).encode())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(documents(path)) == [b"a\r\n", long.encode()]


def test_a_folder_is_its_files_by_path_and_other_files_are_one_document(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "one.txt").write_bytes(b"\xff two")
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    assert list(documents(tmp_path)) == [b"good", b"\xff two"]


def test_what_is_nowhere_is_named():
    with pytest.raises(ValueError, match="`nowhere` is no file, no folder and none of stdlib"):
        list(documents("nowhere"))
    with pytest.raises(ValueError, match="`on_bad` must be error or skip; got 'ignore'"):
        list(documents("stdlib", on_bad="ignore"))


@pytest.mark.parametrize("name", BUILT_IN)
def test_texts_that_python_carries_come_in_the_same_order_each_time(name):
    try:
        first = list(documents(name))
    except ValueError as error:
        pytest.skip(str(error))
    assert len(first) > 20 and all(first)
    assert first == list(documents(name))
