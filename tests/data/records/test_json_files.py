"""Files of JSON: which are records, which are text, and which are damaged."""

import json

import pytest

from rwkv7_jax.data.jsonl import ReadStats
from rwkv7_jax.data.readers import documents

RECORDS = [{"instruction": "a", "output": "b"}, {"text": "c"}]

TEXTS = [b"User: a\n\nAssistant: b", b"c"]

LINES = "\n".join(map(json.dumps, RECORDS))


def texts(path, **choices):
    return [document.text() for document in documents(path, **choices)]


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(RECORDS),
        json.dumps(RECORDS, indent=1),
        "\n " + json.dumps(RECORDS),
        LINES,
        json.dumps({"data": RECORDS, "version": "1.0"}),
        json.dumps({"train": RECORDS, "authors": [{"name": "a"}]}),
    ],
)
@pytest.mark.parametrize("in_folder", [False, True])
def test_records_are_read_however_a_json_file_holds_them(tmp_path, content, in_folder):
    (tmp_path / "x.Json").write_text(content)
    assert texts(tmp_path if in_folder else tmp_path / "x.Json") == TEXTS


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".jsonlines", ".JL"])
def test_lines_of_records_may_be_one_list(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    for content in (LINES, json.dumps(RECORDS), json.dumps(RECORDS, indent=1)):
        path.write_text(content)
        assert texts(path) == TEXTS
    path.write_text(json.dumps(RECORDS)[:-9])
    with pytest.raises(ValueError, match=f"x{suffix}` is damaged JSON or was cut"):
        texts(path)


def test_an_object_that_is_a_record_is_one(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps(RECORDS[0], indent=1))
    assert texts(tmp_path / "x.json") == TEXTS[:1]


@pytest.mark.parametrize(
    "content",
    ['{"name": "package"}', "[1, 2]", "not JSON", "[]", '{"a": [{"name": "b"}]}', "{}"],
)
def test_json_without_records_is_a_text(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    assert texts(tmp_path / "x.json") == [content.encode()]


@pytest.mark.parametrize(
    "content", ['{"a": 1} // remark', "[{", json.dumps(RECORDS)[:-9], LINES[:-3]]
)
def test_damaged_json_is_refused_where_it_is_named_and_a_text_in_a_folder(
    tmp_path, content
):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"x.json` is damaged JSON or was cut: "):
        texts(path)
    assert texts(tmp_path) == [content.encode()] == texts(path, as_bytes=True)


def test_records_under_two_names_are_not_guessed(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"train": RECORDS, "test": RECORDS}))
    with pytest.raises(ValueError, match=r'x.json` holds records under "train" and'):
        texts(tmp_path / "x.json")


def test_a_bad_record_is_named_by_its_number(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('[{"text": "a"}, {"txt": "b"}]')
    with pytest.raises(
        ValueError, match=r'x.json: record 2: must have .* keys are "txt"'
    ):
        texts(path)
    stats = ReadStats()
    assert texts(path, on_bad="skip", stats=stats) == [b"a"]
    assert stats.skipped == 1


@pytest.mark.parametrize("name", ["x.txt", "x", "x.txt.gz"])
def test_records_that_are_named_as_a_text_are_refused(tmp_path, name):
    path = tmp_path / name
    path.write_text(LINES)
    with pytest.raises(ValueError, match=r"holds records as lines of JSON.*x.*\.jsonl"):
        texts(path)
    assert texts(path, as_bytes=True) == [LINES.encode()]
    for prose in ('{"name": "a"} is JSON.', "{ and so on", '{"name": 1}\n{}'):
        path.write_text(prose)
        assert texts(path) == [prose.encode()]
