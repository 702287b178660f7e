"""Tables as the documentation has them: numbers as text, rows as Markdown, rows in a page."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


class Table(NamedTuple):
    """A table of a page.

    Attributes:
        page: its path from the repository's root.
        heading: the first line, by which the page's table is found.
        rows: makes the other rows from the records.
    """

    page: str
    heading: str
    rows: Callable[[], list[list[str]]]

    def lines(self) -> list[str]:
        """Returns the table in Markdown."""
        rule = "|" + "---|" * (self.heading.count("|") - 1)
        return [self.heading, rule, *map(_line, self.rows())]


def _line(cells: Sequence[str]) -> str:
    return re.sub(r" +\|", " |", "| " + " | ".join(cells) + " |")


def read(name: str) -> dict[str, Any]:
    """Reads a record."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def short(number: float, digits: int = 2) -> str:
    """Formats a number without the zero before its point: .38, -.016, 1.00."""
    return re.sub(r"^(-?)0\.", r"\1.", f"{number:.{digits}f}")


def rate(number: float | str) -> str:
    """Formats a learning rate: .0006, .3, 10."""
    return re.sub(r"^0\.", ".", f"{float(number):g}")


def replaced(page: str, table: Table) -> str:
    """Returns a page's text with one table made again.

    Args:
        page: the text.
        table: the table.

    Raises:
        ValueError: no line of the page is the table's heading, or several are.
    """
    lines = page.split("\n")
    count = lines.count(table.heading)
    if count != 1:
        raise ValueError(
            f"{table.page}: must have one table with the heading `{table.heading}`; has {count}."
        )
    first = lines.index(table.heading)
    last = first
    while last < len(lines) and lines[last].startswith("|"):
        last += 1
    return "\n".join([*lines[:first], *table.lines(), *lines[last:]])
