"""A run's numbers, step by step, in files and trackers."""

import csv
import importlib
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from rwkv7_jax.atomic_write import atomic_write
from rwkv7_jax.data.jsonl import read_log

JSONL, CSV = "metrics.jsonl", "metrics.csv"


class Tracker(Protocol):
    """Where numbers go beside the files."""

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Take the numbers of a step."""

    def close(self) -> None:
        """Send what is left."""


def merged(rows: Iterable[Mapping[str, Any]]) -> list[dict]:
    """One row a step, in order of steps; what came last under a name counts."""
    by_step: dict[int, dict] = {}
    for row in rows:
        by_step[row["step"]] = {**by_step.get(row["step"], {}), **row}
    return [by_step[step] for step in sorted(by_step)]


class MetricFiles:
    """`metrics.jsonl` and `metrics.csv` of one run, and the trackers that were asked for.

    Both files hold every number. They are appended to at each write, so that a killed process
    leaves what it had measured; a name that the table does not have yet widens it.
    """

    def __init__(self, folder: str | Path, *, also: Iterable[str] = ()):
        """Open the folder's files, with what earlier processes wrote.

        Args:
            folder: of the run; it is made where it does not exist.
            also: names of `TRACKERS`.

        Raises:
            ValueError: an unknown tracker.
            ImportError: a tracker whose package is missing; the sentence names the extra.
        """
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._rows = [row for row in read_log(self._jsonl) if "step" in row]
        self._columns = _columns(self._rows)
        if self._jsonl.exists():
            self._rewrite()  # without a half line, to which the next write would be glued
        self._makers = [_maker(name) for name in also]
        self._trackers: list[Tracker] = []

    @property
    def _jsonl(self) -> Path:
        return self._folder / JSONL

    def write(self, step: int, numbers: Mapping[str, Any]) -> None:
        """Append the numbers of a step; a step may be written more than once."""
        row = {"step": step, **numbers}
        self._rows.append(row)
        with self._jsonl.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        new = [name for name in row if name not in self._columns]
        if new:
            self._columns += new
            self._write_table()
        else:
            with (self._folder / CSV).open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self._columns).writerow(row)
        if not self._trackers:
            self._trackers = [make(self._folder, step) for make in self._makers]
        for tracker in self._trackers:
            tracker.write(step, {k: v for k, v in numbers.items() if isinstance(v, int | float)})

    def rows(self) -> list[dict]:
        """One row a step, in order, from earlier processes as well; the last number counts."""
        return merged(self._rows)

    def truncate_after(self, step: int) -> None:
        """No file has a row behind `step` any more, as a run restored at `step` will write them.

        -1 empties them. TensorBoard hides what it had from the next written step on; Weights &
        Biases keeps its first numbers of a step and passes over the second.
        """
        self._rows = [row for row in self._rows if row["step"] <= step]
        self._columns = _columns(self._rows)
        self._rewrite()
        self.close()

    def _rewrite(self) -> None:
        with atomic_write(self._jsonl) as file:
            file.write("".join(json.dumps(row) + "\n" for row in self._rows).encode())
        self._write_table()

    def _write_table(self) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._columns)
        writer.writeheader()
        writer.writerows(self._rows)
        with atomic_write(self._folder / CSV) as file:
            file.write(text.getvalue().encode())

    def close(self) -> None:
        """Trackers have everything; a further write opens them anew."""
        for tracker in self._trackers:
            tracker.close()
        self._trackers = []


def _columns(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Every name, in the order in which they came; the step first."""
    return list(dict.fromkeys(["step", *(name for row in rows for name in row)]))


def _package(name: str, extra: str):
    """The module, or a sentence about what to install."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ImportError(
            f"MetricFiles: `also` names {extra!r}, which needs the package {name}: "
            f"pip install 'rwkv7_jax[{extra}]'."
        ) from None


class _TensorBoard:
    """Event files under `tensorboard/`."""

    def __init__(self, package, folder: Path, first: int):
        where = str(folder / "tensorboard")
        self._writer = package.SummaryWriter(where, purge_step=first or None)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """The step's numbers are queued."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """All are written."""
        self._writer.close()


class _WandB:
    """A run of Weights & Biases, which a resumed process continues by the id in `wandb.id`."""

    def __init__(self, package, folder: Path, first: int):
        kept = folder / "wandb.id"
        identity = kept.read_text().strip() if kept.exists() else None
        self._run = package.init(dir=str(folder), name=folder.name, id=identity, resume="allow")
        kept.write_text(self._run.id + "\n")

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """The step's numbers are queued."""
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        """All are written."""
        self._run.finish()


# By the name that settings have and the extra's: the package and what is made of it.
_KINDS = {"tensorboard": ("tensorboardX", _TensorBoard), "wandb": ("wandb", _WandB)}

TRACKERS = tuple(_KINDS)


def _maker(name: str):
    """Makes the tracker, given the folder and the first step it will get; its package is loaded."""
    if name not in _KINDS:
        raise ValueError(f"MetricFiles: `also` must be of {', '.join(TRACKERS)}; got {name!r}.")
    module, kind = _KINDS[name]
    package = _package(module, name)
    return lambda folder, first: kind(package, folder, first)
