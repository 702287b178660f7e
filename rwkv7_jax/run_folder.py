"""A run's folder: settings, metrics, checkpoints. Level 7."""

import csv
import dataclasses
import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from .settings import Settings
from .training import TrainState

_COLUMNS = (
    "step",
    "seconds",
    "loss_nats",
    "learning_rate",
    "grad_norm",
    "tokens_per_second",
    "held_out_bits_per_byte",
)
# What may differ between a run and its continuation.
_FREE = ("steps", "log_every", "save_every", "keep", "evaluation", "sample", "workdir")


class RunFolder:
    """Everything that a run leaves behind, under one path.

    `settings.json`, `metrics.jsonl` (all numbers), `metrics.csv` (the main ones), `checkpoints/`.
    """

    def __init__(self, path: str | Path, settings: Settings):
        """Open or make the folder.

        Raises:
            ValueError: the folder belongs to a run with other settings.
            OSError: it cannot be written.
        """
        self.path = Path(path).absolute()
        self.path.mkdir(parents=True, exist_ok=True)
        self._settings = settings
        self._began = time.monotonic()
        self._refuse_other_run()
        text = json.dumps(dataclasses.asdict(settings), indent=1)
        (self.path / "settings.json").write_text(text + "\n")
        self._manager = None

    def _refuse_other_run(self) -> None:
        old = self.path / "settings.json"
        if not old.exists() or not any((self.path / "checkpoints").glob("*")):
            return
        was = json.loads(old.read_text())
        now = json.loads(json.dumps(dataclasses.asdict(self._settings)))
        for key in now:
            if key not in _FREE and was.get(key) != now[key]:
                raise ValueError(
                    f"train.py: `{self.path}` holds a run whose `{key}` is {was.get(key)}; "
                    f"got {now[key]}. Take another --workdir, or the same settings to resume."
                )

    def log(self, step: int, numbers: Mapping[str, Any]) -> None:
        """Append one line to the metrics files."""
        row = {"step": step, "seconds": round(time.monotonic() - self._began, 3), **numbers}
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        table = self.path / "metrics.csv"
        new = not table.exists()
        with table.open("a", newline="") as file:
            writer = csv.DictWriter(file, _COLUMNS, extrasaction="ignore")
            if new:
                writer.writeheader()
            writer.writerow(row)

    def rows(self) -> list[dict]:
        """All metrics so far, from resumed runs as well."""
        path = self.path / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def _checkpoints(self):
        """Orbax's manager, imported when first needed: it takes seconds."""
        if self._manager is None:
            logging.getLogger("absl").setLevel(logging.ERROR)
            import orbax.checkpoint as ocp

            options = ocp.CheckpointManagerOptions(max_to_keep=self._settings.keep, create=True)
            self._manager = ocp.CheckpointManager(self.path / "checkpoints", options=options)
        return self._manager

    def save(self, train: TrainState) -> None:
        """Keep `train` under its step; writing goes on in the background."""
        import orbax.checkpoint as ocp

        self._checkpoints().save(int(train.step), args=ocp.args.StandardSave(train))

    def restore(self, train: TrainState) -> TrainState:
        """The newest checkpoint, or `train` itself where there is none."""
        import orbax.checkpoint as ocp

        newest = self._checkpoints().latest_step()
        if newest is None:
            return train
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, train)
        return self._checkpoints().restore(newest, args=ocp.args.StandardRestore(like))

    def close(self) -> None:
        """Wait until all checkpoints are on disk."""
        if self._manager is not None:
            self._manager.wait_until_finished()
            self._manager.close()
