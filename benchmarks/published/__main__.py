"""Writes the tables of the documentation again, from the records in benchmarks/results.

    python -m benchmarks.published

Run it after a benchmark has written its record. A test compares pages and records.
"""

import argparse

from benchmarks.published import plans, rates, speed, tuning
from benchmarks.published.markdown import ROOT, Table, replaced

TABLES: tuple[Table, ...] = (
    *tuning.TABLES,
    *rates.TABLES,
    *speed.TABLES,
    *plans.TABLES,
)


def main() -> None:
    """Writes the pages whose tables differ, and names them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.parse_args()
    for name in sorted({table.page for table in TABLES}):
        path = ROOT / name
        before = path.read_text(encoding="utf-8")
        after = before
        for table in TABLES:
            if table.page == name:
                after = replaced(after, table)
        if after != before:
            path.write_text(after, encoding="utf-8")
            print(f"wrote {name}")


if __name__ == "__main__":
    main()
