"""JSON files are complete or what they were before; a damaged one is none."""

import math
import re
from pathlib import Path

import pytest

from rwkv7_jax.json_files import (
    flat_items,
    number_of,
    parse_json,
    read_json,
    read_object,
    write_json,
)

PACKAGE = Path(__file__).parents[1] / "rwkv7_jax"

# Modules that parse JSON which this package or a library under it made, or that name the place.
PARSERS = {
    "checkpoints/integrity/file_signatures.py",
    "checkpoints/state_sidecar.py",
    "checkpoints/tensor_files.py",
    "data/jsonl.py",
    "json_files.py",
    "model/state.py",
    "plan/child.py",
    "plan/compiler.py",
    "runs/process_group.py",
    "text/json_tokenizer.py",
}


def test_json_round_trips(tmp_path):
    write_json(tmp_path / "x.json", {"a": [1, None]})
    assert read_object(tmp_path / "x.json") == {"a": [1, None]}
    assert (tmp_path / "x.json").read_text().endswith("}\n")
    write_json(tmp_path / "x.json", [1, 2], indent=None)
    assert (tmp_path / "x.json").read_text() == "[1, 2]\n"
    assert read_json(tmp_path / "x.json") == [1, 2]


def test_a_value_that_json_cannot_hold_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", {"a": object()})
    assert read_object(tmp_path / "x.json") == {"a": 1}


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b"[" * 100_000])
def test_a_file_without_an_object_reads_as_none(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    assert read_object(tmp_path / "x.json") is None
    assert read_object(tmp_path / "absent.json") is None


@pytest.mark.parametrize(
    "content", [b'{"a": [1]}', b'\xef\xbb\xbf{"a": [1]}\r\n', '{"a": [1]}']
)
def test_json_may_begin_with_a_byte_order_mark(content):
    assert parse_json(content) == {"a": [1]}


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff", b"[" * 100_000, b"9" * 5000, "[" * 100_000, "{"]
)
def test_invalid_json_raises_one_type_of_error(content):
    with pytest.raises(ValueError):
        parse_json(content)


def test_only_numbers_within_the_range_of_float_are_accepted():
    assert [number_of(value) for value in (2, 0.5, True)] == [2.0, 0.5, 1.0]
    assert math.isnan(number_of(math.nan))
    for value in (None, "1", [], {}, 10**400, -(10**400)):
        assert number_of(value) is None


def test_nested_objects_become_one_with_names_of_their_groups():
    fields = {"mode": "state", "data": {"length": 64, "mix": {"a": None}}, "model": {}}
    assert list(flat_items(fields)) == [
        ("mode", "state"),
        ("data.length", 64),
        ("data.mix.a", None),
        ("model", {}),
    ]


def test_external_json_is_parsed_in_one_place():
    found = set()
    for path in PACKAGE.rglob("*.py"):
        if re.search(r"json\.loads?\(", path.read_text(encoding="utf-8")):
            found.add(path.relative_to(PACKAGE).as_posix())
    assert found == PARSERS
