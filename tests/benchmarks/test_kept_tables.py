"""Published tables are not replaced by partial ones."""

import importlib
import json
import shutil
import sys

import pytest
from run_programs import ROOT

from benchmarks import paper_table, record

RESULTS = ROOT / "benchmarks" / "results"


def test_rows_that_would_be_overwritten_are_named(tmp_path):
    path = tmp_path / "t.json"
    record.require_rows_kept(str(path), "table", ["a"])
    record.require_rows_kept(None, "table", ["a"])
    path.write_text(json.dumps({"table": {name: {} for name in "abcde"}}))
    record.require_rows_kept(str(path), "table", "abcdef")
    record.require_rows_kept(str(path), "other", [])
    with pytest.raises(SystemExit, match=r'"b", "c", "d" and 1 more of "table"'):
        record.require_rows_kept(str(path), "table", ["a"])


@pytest.mark.parametrize(
    ("module", "words", "file"),
    [
        ("recall", ["--cached"], "cpu-recall.json"),
        ("recall", ["--cached", "--only", "based-4"], "cpu-recall.json"),
        ("recall", ["--full", "--minutes", "0"], "cpu-recall.json"),
        ("text_table", ["--cached"], "cpu-text-table.json"),
        ("dense_decorrelation", ["--methods", "Adam"], "cpu-dense-decorrelation.json"),
        ("rate_search", ["--only", "LoRA | charmaps"], "cpu-rate-search.json"),
        (
            "real_models",
            ["m.pth", "--data", "digits", "--kinds", "LoRA"],
            "cpu-real-tiny7v0.json",
        ),
    ],
)
def test_a_partial_table_leaves_the_published_file_unchanged(
    module, words, file, tmp_path, monkeypatch, capsys
):
    path = tmp_path / file
    shutil.copy(RESULTS / file, path)
    more = ["--json", str(path), "--cells", str(tmp_path / "cells")]
    monkeypatch.setattr(sys, "argv", [module, *words, *more])
    program = importlib.import_module(f"benchmarks.{module}")
    # Some return their exit code, and others end with the sentence.
    with pytest.raises(SystemExit) as ended:
        sys.exit(program.main())
    assert ended.value.code != 0
    assert "must hold" in capsys.readouterr().out or ".json`" in str(ended.value.code)
    assert path.read_bytes() == (RESULTS / file).read_bytes()


def test_a_partial_paper_table_keeps_the_other_rows(tmp_path, monkeypatch):
    path = tmp_path / "cpu-paper-table.json"
    shutil.copy(RESULTS / path.name, path)
    before = json.loads(path.read_text())
    monkeypatch.setattr(paper_table, "chosen_experiments", lambda options: {})
    words = ["--quick", "--json", str(path), "--cells", str(tmp_path / "cells")]
    monkeypatch.setattr(sys, "argv", ["paper_table", *words])
    assert paper_table.main() == 0
    after = json.loads(path.read_text())
    assert set(after) == set(before)
    assert after["table"]["date"]
