"""JSON files: records, text or damaged."""

import json

import pytest

from rwkv7_jax.data.jsonl import ReadStats
from rwkv7_jax.data.readers import documents

RECORDS = [{"instruction": "a", "output": "b"}, {"text": "c"}]

TEXTS = [b"User: a\n\nAssistant: b", b"c"]

LINES = "\n".join(map(json.dumps, RECORDS))

# The same as `DataFrame.to_json` writes it, by `orient`; and as Hugging Face's server answers.
TABLES = {
    "columns": {
        "instruction": {"0": "a", "1": None},
        "output": {"0": "b", "1": None},
        "text": {"0": None, "1": "c"},
    },
    "index": {"0": RECORDS[0], "1": RECORDS[1]},
    "split": {
        "columns": ["instruction", "output", "text"],
        "index": [0, 1],
        "data": [["a", "b", None], [None, None, "c"]],
    },
    "table": {"schema": {"fields": [{"name": "index"}]}, "data": RECORDS},
    "server": {
        "features": [{"feature_idx": 0, "name": "text"}],
        "rows": [{"row_idx": i, "row": row} for i, row in enumerate(RECORDS)],
    },
}


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
        *map(json.dumps, TABLES.values()),
    ],
)
@pytest.mark.parametrize("in_folder", [False, True])
def test_records_are_read_from_any_json_structure(tmp_path, content, in_folder):
    (tmp_path / "x.Json").write_text(content)
    assert texts(tmp_path if in_folder else tmp_path / "x.Json") == TEXTS


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".jsonlines", ".JL"])
def test_a_jsonl_file_may_hold_one_list(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    for content in (LINES, json.dumps(RECORDS), json.dumps(RECORDS, indent=1)):
        path.write_text(content)
        assert texts(path) == TEXTS
    path.write_text(json.dumps(RECORDS)[:-9])
    with pytest.raises(ValueError, match=f"x{suffix}` is damaged or truncated JSON"):
        texts(path)


CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]

CHATS = "\n".join([json.dumps(CHAT)] * 3)

CALL = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json"])
@pytest.mark.parametrize("choices", [{}, {"on_bad": "skip"}])
def test_a_list_of_messages_is_a_conversation(tmp_path, suffix, choices):
    path = tmp_path / f"x{suffix}"
    for content, count in (
        (CHATS, 3),
        (f"\n {CHATS}\n", 3),
        (json.dumps(CHAT), 1),
        (json.dumps(CALL, indent=1), 1),
        (json.dumps([CHAT, CALL]), 2),
        (json.dumps([{"text": "User: a\n\nAssistant: b"}, CHAT]), 2),
    ):
        path.write_text(content)
        assert texts(path, **choices) == [TEXTS[0]] * count


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".jsonlines", ".JL"])
@pytest.mark.parametrize(
    ("content", "place", "good"),
    [
        ('["bad"]\n{"text":"a"}\n{"text":"c"}\n', "1: must be an object", ["a", "c"]),
        ('\n [] \n{"text":"a"}', "2: must be an object; got list", ["a"]),
        ("[1, 2]\n", "1: must be an object; got list", []),
        ("[]", "1: must be an object; got list", []),
        ("[\n1,\n2\n]", "1: not one JSON object", []),
        (f'{json.dumps(CHAT[:1])}\n{{"text":"a"}}', '1: "messages" do not end', ["a"]),
        (f"{CHATS}\n[3]\n", "4: must be an object; got list", [TEXTS[0].decode()] * 3),
        (
            '[{"text":"a"}, null, 3]',
            " record 2: must be an object; got NoneType",
            ["a"],
        ),
        ('[null, {"text":"a"}]', " record 1: must be an object; got NoneType", ["a"]),
        (json.dumps(CHAT[:1]), ' record 1: "messages" do not end', []),
    ],
)
def test_a_jsonl_file_is_never_read_as_text(tmp_path, suffix, content, place, good):
    path = tmp_path / f"x{suffix}"
    path.write_text(content)
    for source in (path, tmp_path):
        with pytest.raises(ValueError, match=rf"x{suffix}:{place}"):
            texts(source)
    found = texts(path, on_bad="skip", stats=ReadStats())
    assert [text.decode() for text in found] == good


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ('{"data":[{"text":null},{"text":"good"}]}', "record 1: must have"),
        ('{"data":[{"text":"good"},{"text":null}]}', "record 2: must have"),
        ('{"data":[null,{"text":"good"}]}', "record 1: must be an object"),
        (
            '{"train":[{"instruction":"a","output":""}]}',
            "record 1: message 2: an empty",
        ),
        ('{"question":"a","answer":""}', "record 1: message 2: an empty answer"),
        ('{"rows":[{"prompt":"a"},{"messages":[]}]}', 'record 1: no "answer" or'),
        ('[{"text":"a"}, null]', "record 2: must be an object; got NoneType"),
        ('["bad", {"text":"a"}]', "record 1: must be an object; got str"),
        ('["bad"]\n{"text":"a"}', "record 1: must be an object; got list"),
    ],
)
def test_a_bad_record_does_not_turn_the_file_into_text(tmp_path, content, place):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"x.json: {place}"):
        texts(path)
    stats = ReadStats()
    for text in texts(path, on_bad="skip", stats=stats):
        assert text in (b"a", b"good")
    assert stats.skipped


def test_a_single_object_is_one_record(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps(RECORDS[0], indent=1))
    assert texts(tmp_path / "x.json") == TEXTS[:1]


@pytest.mark.parametrize(
    "content",
    ['{"name": "package"}', "[1, 2]", "not JSON", "[]", '{"a": [{"name": "b"}]}', "{}"],
)
def test_json_without_records_is_read_as_text(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    assert texts(tmp_path / "x.json") == [content.encode()]


@pytest.mark.parametrize(
    "content", ['{"a": 1} // remark', "[{", json.dumps(RECORDS)[:-9], LINES[:-3]]
)
def test_damaged_json_is_rejected_by_path_but_read_as_text_in_a_folder(
    tmp_path, content
):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"x.json` is damaged or truncated JSON: "):
        texts(path)
    assert texts(tmp_path) == [content.encode()] == texts(path, as_bytes=True)


def test_records_under_two_names_are_rejected(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"train": RECORDS, "test": RECORDS}))
    with pytest.raises(ValueError, match=r'x.json` holds records under "train" and'):
        texts(tmp_path / "x.json")


def test_a_bad_record_is_reported_by_number(tmp_path):
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
def test_records_in_a_text_file_are_rejected(tmp_path, name):
    path = tmp_path / name
    path.write_text(LINES)
    with pytest.raises(ValueError, match=r"holds records as lines of JSON.*x.*\.jsonl"):
        texts(path)
    assert texts(path, as_bytes=True) == [LINES.encode()]
    for records in (CHATS, json.dumps(RECORDS), '{"text": null}', "x" * 70_000):
        if records.startswith("x"):
            records = json.dumps({"text": records})
        path.write_text(f"\n{records}\n")
        with pytest.raises(ValueError, match="holds records as lines of JSON"):
            texts(path)
    for prose in (
        "[1] See there.",
        "[1, 2]",
        "[]\n",
        '{"name": "a"} is JSON.',
        "{ and so on",
        '{"name": 1}\n{}',
    ):
        path.write_text(prose)
        assert texts(path) == [prose.encode()]


@pytest.mark.parametrize("in_folder", [False, True])
@pytest.mark.parametrize(
    "content", ['[{"text": "a", "text": "b"}]', '{"text": "a", "text": "b"}\n' * 2]
)
def test_a_repeated_key_of_a_record_is_rejected(tmp_path, in_folder, content):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r'x\.json` has "text" twice in one object'):
        texts(tmp_path if in_folder else path)


def test_repeated_keys_do_not_hide_the_kind_of_a_file(tmp_path):
    (tmp_path / "x.json").write_text('{"a": 1, "a": 2}')
    assert texts(tmp_path / "x.json") == [b'{"a": 1, "a": 2}']
    turn = '[{"role": "user", "content": "a", "role": "user"}]'
    (tmp_path / "x.jsonl").write_text(f"{turn}\n{turn}\n")
    with pytest.raises(ValueError, match=r'x\.jsonl:1: "role" twice in one object'):
        texts(tmp_path / "x.jsonl")
    (tmp_path / "x.txt").write_text('{"text": "a", "text": "b"}\n')
    with pytest.raises(ValueError, match=r"rename it to x\.jsonl"):
        texts(tmp_path / "x.txt")
