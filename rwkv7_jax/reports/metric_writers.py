"""Writes the metrics of a run to files and trackers."""

import contextlib
import csv
import functools
import importlib
import io
import json
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rwkv7_jax.atomic_write import append_line, atomic_write
from rwkv7_jax.checks import first_line
from rwkv7_jax.data.jsonl import iterate_log
from rwkv7_jax.json_files import number_of

JSONL = "metrics.jsonl"
CSV = "metrics.csv"

# Rows in one event file of TensorBoard; some megabytes.
_WRITES_TO_A_FILE = 5000


def iterate_steps(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the lines of a log that have a step, one at a time; none if the file is missing."""
    return filter(_has_step, iterate_log(path))


def merged(rows: Iterable[Mapping[str, Any]]) -> list[dict]:
    """Returns one row per step, in order of steps; a later value replaces an earlier one."""
    by_step: dict[int, dict] = {}
    for row in rows:
        step = row["step"]
        # Training and evaluation write separate rows of the same step.
        by_step[step] = {**by_step.get(step, {}), **row}
    return [by_step[step] for step in sorted(by_step)]


class MetricFiles:
    """`metrics.jsonl` and `metrics.csv` of one run, and the trackers that the settings name.

    Both files hold every number; memory holds none of them. Each write appends to them, so a killed
    process leaves its metrics behind. A new name adds a column to the CSV file.
    """

    def __init__(self, folder: str | Path, *, also: Iterable[str] = ()):
        """Opens the files of the directory and keeps the rows of earlier processes.

        Args:
            folder: the run directory; created if missing.
            also: trackers, each one of `TRACKERS`.

        Raises:
            ValueError: a tracker is unknown.
            ImportError: the package of a tracker is missing; the message names the extra.
        """
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        # Columns of the CSV file; empty until the first write.
        self._columns: list[str] = []
        # Whether the CSV file has every row, under a header of all columns.
        self._csv_is_whole = False
        self._openers = {name: _tracker_opener(name) for name in also}
        self._trackers: dict[str, Tracker] = {}

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
        columns = list(dict.fromkeys([*self._columns, *row]))
        # A new column changes the header, so the whole file is rewritten.
        is_whole = self._csv_is_whole and columns == self._columns
        self._columns = columns
        # If the write fails, the next one rewrites the file with this row.
        self._csv_is_whole = False
        if is_whole:
            append_line(self._folder / CSV, _csv_text(columns, row))
        else:
            self._write_csv(columns)
        self._csv_is_whole = True
        self._track(step, numbers)

    def _track(self, step: int, numbers: Mapping[str, Any]) -> None:
        if not self._trackers:
            # The step at which a resumed run starts is known only at the first write.
            for name, open_at in list(self._openers.items()):
                with self._dropped_on_failure(name):
                    self._trackers[name] = open_at(self._folder, step)
        # Trackers take only numbers; the files take everything.
        numeric = {}
        for name, value in numbers.items():
            if isinstance(value, int | float):
                numeric[name] = value
        for name, tracker in list(self._trackers.items()):
            with self._dropped_on_failure(name):
                tracker.write(step, numeric)

    @contextlib.contextmanager
    def _dropped_on_failure(self, name: str) -> Iterator[None]:
        """Warns if the block fails and uses its tracker no more: a service must not end a run."""
        try:
            yield
        # The packages of trackers raise errors of their own classes.
        except Exception as error:
            self._openers.pop(name)
            self._trackers.pop(name, None)
            warnings.warn(
                f"the tracker {name} failed: {first_line(error)}; it receives no more metrics, "
                f"which {self._jsonl} holds",
                stacklevel=2,
            )

    def iterate(self) -> Iterator[dict]:
        """Yields all rows as written, including rows of earlier processes."""
        return iterate_steps(self._jsonl)

    def rows(self, steps: Collection[int] | None = None) -> list[dict]:
        """Returns one row per step, in order, including rows of earlier processes.

        Args:
            steps: the steps to return; None for all.
        """
        return merged(
            row for row in self.iterate() if steps is None or row["step"] in steps
        )

    def truncate_after(self, step: int) -> None:
        """Drops the rows of later steps, which a run restored at `step` repeats.

        TensorBoard hides its old points from the next written step on. Weights & Biases keeps the
        first numbers of a step and ignores later ones.

        Args:
            step: last step to keep; -1 keeps none.
        """
        self._rewrite(row for row in self.iterate() if row["step"] <= step)
        # Reopening the trackers at the restored step hides their later points.
        self.close()

    def _rewrite(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Replaces both files by some of their rows."""
        # A dict keeps the order of appearance; a set does not.
        names = {"step": None}
        with atomic_write(self._jsonl) as file:
            for row in rows:
                names |= dict.fromkeys(row)
                file.write(json.dumps(row).encode() + b"\n")
        self._columns = list(names)
        self._csv_is_whole = False
        self._write_csv(self._columns)
        self._csv_is_whole = True

    def _write_csv(self, columns: Sequence[str]) -> None:
        with atomic_write(self._folder / CSV) as file:
            # A damaged line may hold an unpaired surrogate, which UTF-8 cannot encode.
            text = io.TextIOWrapper(file, "utf-8", errors="replace", newline="")
            writer = csv.DictWriter(text, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.iterate())
            # Flushes the text without closing the file.
            text.detach()

    def close(self) -> None:
        """Flushes and closes the trackers; another write reopens them."""
        for name, tracker in list(self._trackers.items()):
            with self._dropped_on_failure(name):
                tracker.close()
        self._trackers = {}


def _csv_text(columns: Sequence[str], row: Mapping[str, Any]) -> str:
    """Returns a line of a CSV file, without the line break."""
    text = io.StringIO(newline="")
    csv.DictWriter(text, columns, lineterminator="\n").writerow(row)
    return text.getvalue().removesuffix("\n")


def _has_step(row: Mapping[str, Any]) -> bool:
    """Tells whether a line of a log has a valid step; a damaged line may hold anything there."""
    step = row.get("step")
    # bool is a subclass of int; an integer too large for a float cannot be drawn.
    is_integer = isinstance(step, int) and not isinstance(step, bool)
    return is_integer and number_of(step) is not None


class _TensorBoard:
    """Event files under `tensorboard/`, of limited size, because a backup copies changed files."""

    def __init__(self, package: Any, folder: Path, first_step: int):
        self._where = str(folder / "tensorboard")
        self._package = package
        # The purge hides the later steps that a resumed run wrote before; a run that was killed
        # before its first checkpoint repeats step 0 too.
        self._writer = self._open(purge_step=first_step)
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
    """A Weights & Biases run, which a resumed process continues by the id in `wandb.id`."""

    def __init__(self, package: Any, folder: Path, first_step: int):
        id_file = folder / "wandb.id"
        run_id = None
        if id_file.exists():
            # A killed process may have left the file empty.
            run_id = id_file.read_text(encoding="utf-8").strip() or None
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


# A service that receives the metrics in addition to the files.
Tracker = _TensorBoard | _WandB

# Package and class of each tracker, by its name in the settings, which is also its extra.
_TRACKERS = {"tensorboard": ("tensorboardX", _TensorBoard), "wandb": ("wandb", _WandB)}

TRACKERS = tuple(_TRACKERS)


def _tracker_opener(name: str) -> Callable[[Path, int], Tracker]:
    """Imports a tracker's package; returns a function of directory and first step to open it."""
    if name not in _TRACKERS:
        raise ValueError(
            f"MetricFiles: `also` must name only {', '.join(TRACKERS)}; got {name!r}."
        )
    module, tracker = _TRACKERS[name]
    try:
        # A missing package must end the run before anything compiles.
        package = importlib.import_module(module)
    except ImportError:
        raise ImportError(
            f"MetricFiles: `also` names {name!r}, which needs the package {module}: "
            f"pip install 'rwkv7_jax[{name}]'."
        ) from None
    return functools.partial(tracker, package)
