"""Tables: each row is a record whose keys are the column names."""

import csv
import gzip
import io
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rwkv7_jax.data.jsonl import ReadStats
from rwkv7_jax.data.readers import documents
from rwkv7_jax.data.records.record import parse_record

CELLS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"))


def texts(path, **choices):
    return [document.text() for document in documents(path, **choices)]


@given(rows=st.lists(st.tuples(CELLS.filter(bool), CELLS.filter(bool)), min_size=1))
@pytest.mark.parametrize(
    ("suffix", "separator"),
    [(".csv", ","), (".tsv", "\t"), (".csv", ";"), (".csv", "\t"), (".tsv", "|")],
)
def test_a_row_round_trips_as_a_record(tmp_path_factory, suffix, separator, rows):
    text = io.StringIO()
    writer = csv.writer(text, delimiter=separator)
    writer.writerow(["prompt", "answer"])
    writer.writerows(rows)
    path = tmp_path_factory.getbasetemp() / f"x{suffix}"
    path.write_bytes(text.getvalue().encode())
    assert texts(path) == [f"{prompt}{answer}".encode() for prompt, answer in rows]


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"instruction,input,output\na,,b\n\n", [b"User: a\n\nAssistant: b"]),
        (b"\xef\xbb\xbftext, label\r\na,1\r\n", [b"a"]),
        (gzip.compress(b'text\n"a\n""b"""\n'), [b'a\n"b"']),
        (b"text\n" + b"x" * 200_000, [b"x" * 200_000]),
    ],
)
def test_empty_cells_blank_lines_bom_and_quotes_are_handled(tmp_path, content, found):
    (tmp_path / "x.csv").write_bytes(content)
    assert texts(tmp_path / "x.csv") == found
    assert texts(tmp_path) == found


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"text,label\na\n", "x.csv:2: 1 cells, but the first line names 2 columns"),
        (b'text,n\n"a\nb",1\nc\n', "x.csv:4: 1 cells"),
        (b"text,text\na,b\n", 'x.csv:1: names two columns "text"'),
        (b"text:label\na;1\n", 'its keys are "text:label"'),
        (b"a,b\n,\n", "x.csv:2: must have .* it has no keys"),
        (b'text\n"a', "x.csv:2: not a row of a table: unexpected end"),
        (b'text\n"a" b\n', "x.csv:2: not a row of a table"),
        (b"text\n\xe4\n", "x.csv:2: not UTF-8 at byte 0; `encoding` reads"),
        ("text\na".encode("utf-16"), "encoding=utf-16"),
        (b"<html>", "web page"),
        (b"PAR1", "rename it to .parquet"),
        (b"", "is an empty file"),
    ],
)
def test_invalid_tables_are_rejected_with_the_line(tmp_path, content, reason):
    (tmp_path / "x.csv").write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        texts(tmp_path / "x.csv")


def test_invalid_rows_are_skipped_and_counted(tmp_path):
    (tmp_path / "x.csv").write_text("text,label\na,1\n,1\nb\nc,1\n")
    stats = ReadStats()
    assert texts(tmp_path / "x.csv", on_bad="skip", stats=stats) == [b"a", b"c"]
    assert stats.skipped == 2
    assert stats.first_error.startswith(f"{tmp_path}/x.csv:3: must have")


def test_a_row_with_an_undesired_answer_is_rejected(tmp_path):
    (tmp_path / "x.csv").write_text(
        "prompt,completion,label\na,b,True\na,c,False\na,d,\n"
    )
    with pytest.raises(
        ValueError, match=r'x.csv:3: "label" is false, which marks an undesired answer'
    ):
        texts(tmp_path / "x.csv")
    stats = ReadStats()
    assert texts(tmp_path / "x.csv", on_bad="skip", stats=stats) == [b"ab", b"ad"]


def write_parquet(path, columns):
    arrow = pytest.importorskip("pyarrow", reason="the extra parquet is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table(columns), path)


def test_parquet_rows_may_hold_lists_of_messages(tmp_path):
    messages = [
        {"role": "user", "content": "a", "tool_calls": None},
        {"role": "assistant", "content": "b", "tool_calls": None},
    ]
    columns = {"messages": [messages] * 1500, "text": [None] * 1500, "n": range(1500)}
    write_parquet(tmp_path / "x.parquet", columns)
    assert texts(tmp_path / "x.parquet") == [b"User: a\n\nAssistant: b"] * 1500
    write_parquet(tmp_path / "x.parquet", {"text": ["a", None]})
    with pytest.raises(ValueError, match=r"x.parquet: row 2: must have"):
        texts(tmp_path / "x.parquet")


def test_parquet_adds_no_keys_of_other_rows_to_calls_or_functions(tmp_path):
    def record(arguments):
        schema = {"properties": {name: {"type": "string"} for name in arguments}}
        function = {"name": "f", "arguments": arguments}
        return {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "tool_calls": [{"function": function}]},
            ],
            "tools": [{"function": {"name": "f", "parameters": schema}}],
        }

    records = [
        record({"city": "Rome", "days": [1, None]}),
        record({"zone": {"name": "CET"}}),
        record({"zone": {"hours": 1}}),
    ]
    columns = {key: [row[key] for row in records] for key in records[0]}
    write_parquet(tmp_path / "x.parquet", columns)
    expected = [parse_record(row).text() for row in records]
    assert texts(tmp_path / "x.parquet") == expected
    assert b'"arguments":{"city":"Rome","days":[1,null]}' in expected[0]


@pytest.mark.parametrize("end", [-1, -8, 300, 40, 5])
def test_truncated_and_damaged_parquet_is_named(tmp_path, end):
    path = tmp_path / "x.parquet"
    write_parquet(path, {"text": [str(number) for number in range(1000)]})
    content = path.read_bytes()
    path.write_bytes(content[:end])
    with pytest.raises(
        ValueError, match=r"x.parquet` is not a Parquet table, or is damaged"
    ):
        texts(path)
    path.write_bytes(content[:4] + bytes(300) + content[304:])
    with pytest.raises(
        ValueError, match=r"x.parquet` is not a Parquet table, or is damaged"
    ):
        texts(path)


@pytest.mark.parametrize("kind", ["date32", "timestamp"])
def test_an_out_of_range_date_is_named(tmp_path, kind):
    arrow = pytest.importorskip("pyarrow", reason="the extra parquet is not installed")
    from pyarrow import parquet

    kinds = {"date32": arrow.date32(), "timestamp": arrow.timestamp("us")}
    largest = {"date32": 2**31 - 1, "timestamp": 2**62}
    dates = arrow.array([largest[kind]], kinds[kind])
    parquet.write_table(
        arrow.table({"text": ["a"], "day": dates}), tmp_path / "x.parquet"
    )
    with pytest.raises(
        ValueError, match=r"x\.parquet` is not a Parquet table, or is damaged"
    ):
        texts(tmp_path / "x.parquet")


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"pip install 'rwkv7_jax\[parquet\]'"):
        texts(tmp_path / "x.parquet")


def test_an_empty_text_in_parquet_is_a_document_as_in_json(tmp_path):
    write_parquet(tmp_path / "x.parquet", {"text": ["a", "", "b"], "n": [1, 2, 3]})
    assert texts(tmp_path / "x.parquet") == [b"a", b"", b"b"]
    columns = {"text": ["", ""], "prompt": ["a", "b"], "answer": ["c", "d"]}
    write_parquet(tmp_path / "x.parquet", columns)
    assert texts(tmp_path / "x.parquet") == [b"ac", b"bd"]


def test_two_parquet_columns_of_one_name_are_rejected(tmp_path):
    arrow = pytest.importorskip("pyarrow", reason="the extra parquet is not installed")
    from pyarrow import parquet

    table = arrow.Table.from_arrays([["a"], ["b"]], names=["text", "text"])
    parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r'x\.parquet: names two columns "text"'):
        texts(tmp_path / "x.parquet")


def test_an_unknown_time_zone_is_named(tmp_path):
    arrow = pytest.importorskip("pyarrow", reason="the extra parquet is not installed")
    times = arrow.array([1], arrow.timestamp("ns", "Mars/Base"))
    write_parquet(tmp_path / "x.parquet", {"text": ["a"], "time": times})
    with pytest.raises(ValueError, match=r"x\.parquet` .*Mars/Base"):
        texts(tmp_path / "x.parquet")
