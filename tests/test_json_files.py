"""JSON files are complete or what they were before; a damaged one is none."""

import pytest

from rwkv7_jax.json_files import read_json, read_object, write_json


def test_what_was_written_is_read_again(tmp_path):
    write_json(tmp_path / "x.json", {"a": [1, None]})
    assert read_object(tmp_path / "x.json") == {"a": [1, None]}
    assert (tmp_path / "x.json").read_text().endswith("}\n")
    write_json(tmp_path / "x.json", [1, 2], indent=None)
    assert (tmp_path / "x.json").read_text() == "[1, 2]\n"
    assert read_json(tmp_path / "x.json") == [1, 2]


def test_a_value_that_is_no_json_leaves_what_was_there_before(tmp_path):
    write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", {"a": object()})
    assert read_object(tmp_path / "x.json") == {"a": 1}


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b"[" * 100_000])
def test_what_holds_no_object_reads_as_none(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    assert read_object(tmp_path / "x.json") is None
    assert read_object(tmp_path / "absent.json") is None
