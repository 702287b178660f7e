"""The metrics of a run, step by step, in files and trackers."""

import csv
import functools
import importlib
import io
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rwkv7_jax.atomic_write import append_line, atomic_write
from rwkv7_jax.data.jsonl import iterate_log
from rwkv7_jax.json_files import number_of

JSONL = "metrics.jsonl"
CSV = "metrics.csv"

# Rows in one event file of TensorBoard; some megabytes.
_WRITES_TO_A_FILE = 5000


def read_steps(path: Path) -> list[dict[str, Any]]:
    """Reads the lines of a log that have a step; none where the file is missing."""
    return list(iterate_steps(path))


def iterate_steps(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the lines of a log that have a step, one at a time; see `read_steps`."""
    return filter(_has_step, iterate_log(path))


def merged(rows: Iterable[Mapping[str, Any]]) -> list[dict]:
    """Returns one row per step, in the order of steps; of two values the later one counts."""
    by_step: dict[int, dict] = {}
    for row in rows:
        step = row["step"]
        # A step has one row of training and may have one of its evaluation.
        by_step[step] = {**by_step.get(step, {}), **row}
    return [by_step[step] for step in sorted(by_step)]


class MetricFiles:
    """`metrics.jsonl` and `metrics.csv` of one run, and the trackers that the settings name.

    Both files hold every number, and memory holds none of them. Each write appends to them, so that
    a killed process leaves what it had measured. A name that the CSV file does not have yet adds a
    column to it.
    """

    def __init__(self, folder: str | Path, *, also: Iterable[str] = ()):
        """Opens the files of the directory, with what earlier processes wrote.

        Args:
            folder: the run directory; it is made where it does not exist.
            also: names of `TRACKERS`.

        Raises:
            ValueError: a tracker is unknown.
            ImportError: the package of a tracker is missing; the message names the extra.
        """
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        # Of the CSV file; empty until the files are written.
        self._columns: list[str] = []
        self._openers = [_tracker_opener(name) for name in also]
        self._trackers: list[Tracker] = []

    @property
    def _jsonl(self) -> Path:
        return self._folder / JSONL

    def write(self, step: int, numbers: Mapping[str, Any]) -> None:
        """Appends the numbers of a step; a step may be written more than once."""
        row = {"step": step, **numbers}
        if not self._columns:
            # Without an unfinished last line of an earlier process.
            self._rewrite(self.iterate())
        append_line(self._jsonl, json.dumps(row))
        new_columns = [name for name in row if name not in self._columns]
        if new_columns:
            # The header is the file's first line: a new column means writing all of it again.
            columns = [*self._columns, *new_columns]
            self._write_csv(columns)
            # Only now: later rows are appended below the header that is there.
            self._columns = columns
        else:
            append_line(self._folder / CSV, _csv_text(self._columns, row))
        self._track(step, numbers)

    def _track(self, step: int, numbers: Mapping[str, Any]) -> None:
        if not self._trackers:
            # Opened at the first write: only now is it known which step a resumed run starts at.
            self._trackers = [open_at(self._folder, step) for open_at in self._openers]
        # Trackers take numbers alone; the files take everything.
        numeric = {}
        for name, value in numbers.items():
            if isinstance(value, int | float):
                numeric[name] = value
        for tracker in self._trackers:
            tracker.write(step, numeric)

    def iterate(self) -> Iterator[dict]:
        """Yields all rows as they were written, those of earlier processes included."""
        return iterate_steps(self._jsonl)

    def rows(self, steps: Collection[int] | None = None) -> list[dict]:
        """Returns one row per step, in order, those of earlier processes included.

        Args:
            steps: whose rows they are; None for all.
        """
        return merged(
            row for row in self.iterate() if steps is None or row["step"] in steps
        )

    def truncate_after(self, step: int) -> None:
        """Drops the rows of later steps, as a run that was restored at `step` repeats them.

        TensorBoard hides its old points from the next written step on. Weights & Biases keeps the
        first numbers of a step and ignores the second ones.

        Args:
            step: the last one to keep; -1 keeps none.
        """
        self._rewrite(row for row in self.iterate() if row["step"] <= step)
        # Trackers are opened again at the restored step, which hides their later points.
        self.close()

    def _rewrite(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Replaces both files by some of their rows."""
        # In the order in which they appear.
        names = {"step": None}
        with atomic_write(self._jsonl) as file:
            for row in rows:
                names |= dict.fromkeys(row)
                file.write(json.dumps(row).encode() + b"\n")
        self._write_csv(list(names))
        self._columns = list(names)

    def _write_csv(self, columns: Sequence[str]) -> None:
        with atomic_write(self._folder / CSV) as file:
            # A damaged line may hold half a surrogate pair, which UTF-8 cannot encode.
            text = io.TextIOWrapper(file, "utf-8", errors="replace", newline="")
            writer = csv.DictWriter(text, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.iterate())
            # Written out, and not closed: that is for the file.
            text.detach()

    def close(self) -> None:
        """Sends everything to the trackers; another write opens them again."""
        for tracker in self._trackers:
            tracker.close()
        self._trackers = []


def _csv_text(columns: Sequence[str], row: Mapping[str, Any]) -> str:
    """Returns a line of a CSV file, without its end."""
    text = io.StringIO(newline="")
    csv.DictWriter(text, columns, lineterminator="\n").writerow(row)
    return text.getvalue().removesuffix("\n")


def _has_step(row: Mapping[str, Any]) -> bool:
    """Tells whether a line of a log has a step; a line of junk may have anything under its name."""
    step = row.get("step")
    # True and False are integers, too; one that no float can hold has no place in a chart.
    is_integer = isinstance(step, int) and not isinstance(step, bool)
    return is_integer and number_of(step) is not None


class _TensorBoard:
    """Event files under `tensorboard/`, each of so many steps: a backup copies what has changed."""

    def __init__(self, package: Any, folder: Path, first_step: int):
        self._where = str(folder / "tensorboard")
        self._package = package
        # The purge hides what a run that was resumed had written of later steps.
        self._writer = self._open(purge_step=first_step or None)
        self._writes = 0

    def _open(self, purge_step: int | None) -> Any:
        return self._package.SummaryWriter(self._where, purge_step=purge_step)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Queues the numbers of a step."""
        if self._writes == _WRITES_TO_A_FILE:
            self._writer.close()
            self._writer = self._open(purge_step=None)
            self._writes = 0
        self._writes += 1
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Writes the queued numbers."""
        self._writer.close()


class _WandB:
    """A run of Weights & Biases, which a resumed process continues by the id in `wandb.id`."""

    def __init__(self, package: Any, folder: Path, first_step: int):
        id_file = folder / "wandb.id"
        run_id = (
            id_file.read_text(encoding="utf-8").strip() if id_file.exists() else None
        )
        self._run = package.init(
            dir=str(folder), name=folder.name, id=run_id, resume="allow"
        )
        id_file.write_text(f"{self._run.id}\n", encoding="utf-8")

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Queues the numbers of a step."""
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        """Sends the queued numbers."""
        self._run.finish()


# A service that gets the metrics in addition to the files.
Tracker = _TensorBoard | _WandB

# By the name in the settings, which is also the extra's: the package, and the class that uses it.
_TRACKERS = {"tensorboard": ("tensorboardX", _TensorBoard), "wandb": ("wandb", _WandB)}

TRACKERS = tuple(_TRACKERS)


def _tracker_opener(name: str) -> Callable[[Path, int], Tracker]:
    """Imports a tracker's package; returns what opens it, from the directory and first step."""
    if name not in _TRACKERS:
        raise ValueError(
            f"MetricFiles: `also` must be of {', '.join(TRACKERS)}; got {name!r}."
        )
    module, tracker = _TRACKERS[name]
    try:
        # Now, so that a missing package ends a run before anything is compiled.
        package = importlib.import_module(module)
    except ImportError:
        raise ImportError(
            f"MetricFiles: `also` names {name!r}, which needs the package {module}: "
            f"pip install 'rwkv7_jax[{name}]'."
        ) from None
    return functools.partial(tracker, package)
