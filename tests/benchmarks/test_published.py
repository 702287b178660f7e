"""The tables of the documentation are those that their records give."""

import re
from pathlib import Path

import pytest
from run_programs import ROOT

from benchmarks import published
from benchmarks.published.__main__ import TABLES
from benchmarks.published.markdown import RESULTS, Table, rate, replaced, short

PAGE = "| a | b |\n|---|---|\n| 1 | 2 |\n| 3 | |\n\nMore.\n"

# Of docs/results.md, the tables without numbers of a benchmark.
OTHERS = ("| compared with | tolerance | test |",)


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.rows.__name__)
def test_a_table_is_the_one_of_its_record(table):
    page = (ROOT / table.page).read_text(encoding="utf-8")
    if replaced(page, table) != page:
        raise AssertionError(
            f"{table.page} and its records differ; run `python -m benchmarks.published`."
        )


def test_every_table_of_results_has_a_record():
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    headings = re.findall(r"^(\|.*\|)\n\|(?:---\|)+$", page, re.M)
    known = {table.heading for table in TABLES} | set(OTHERS)
    assert [heading for heading in headings if heading not in known] == []


def test_every_record_is_published():
    sources = [
        *(ROOT / "docs").glob("*.md"),
        *Path(published.__file__).parent.glob("*.py"),
    ]
    text = "".join(path.read_text(encoding="utf-8") for path in sources)
    records = [*RESULTS.glob("*.json"), *RESULTS.glob("*.md")]
    assert records
    assert [path.name for path in records if path.stem not in text] == []


def test_pictures_of_the_pages_are_those_of_the_records():
    pictures = [*(ROOT / "docs" / "images").glob("*.png")]
    both = [path for path in pictures if (RESULTS / path.name).exists()]
    assert both
    for path in both:
        assert path.read_bytes() == (RESULTS / path.name).read_bytes(), path.name


def test_a_table_is_made_again_in_its_place():
    table = Table("page.md", "| a | b |", lambda: [["1", "5"], ["", "6"]])
    made = "| a | b |\n|---|---|\n| 1 | 5 |\n| | 6 |\n\nMore.\n"
    assert replaced(PAGE, table) == made
    assert replaced(made, table) == made


@pytest.mark.parametrize("page", ["", PAGE + PAGE])
def test_a_table_that_is_missing_or_there_twice_is_named(page):
    table = Table("page.md", "| a | b |", list)
    count = page.count(table.heading)
    with pytest.raises(ValueError, match=rf"^page\.md: .*; has {count}\.$"):
        replaced(page, table)


def test_numbers_are_written_without_the_zero_before_the_point():
    assert [short(one) for one in (0.384, -0.4, 0.999, -1.5)] == [
        ".38",
        "-.40",
        "1.00",
        "-1.50",
    ]
    assert short(-0.0158, 3) == "-.016"
    assert [rate(one) for one in (6e-4, "0.3", 10.0)] == [".0006", ".3", "10"]
