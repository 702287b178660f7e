"""The folder of a run: it is created, locked, and must not hold files of something else."""

import os
import tempfile
from pathlib import Path

from rwkv7_jax.data.jsonl import iterate_log
from rwkv7_jax.json_files import read_object
from rwkv7_jax.local_paths import require_unicode
from rwkv7_jax.reports.metric_writers import CSV, JSONL
from rwkv7_jax.runs.exit_codes import DiskError, warn
from rwkv7_jax.runs.run_lock import LOCK, RunLock

SETTINGS = "settings.json"

BAD_BATCHES = "bad_batches.jsonl"

SAMPLES = "samples.jsonl"

# The logs of which a resumed run drops the lines of later steps, and those without a step.
_LOGS = (JSONL, SAMPLES, BAD_BATCHES)


def lock_folder(path: Path) -> RunLock:
    """Creates the folder of a run if it is missing, and takes its lock.

    Raises:
        ValueError: the path is not UTF-8 or not a folder, it holds files of something else, or
            another process uses it.
        DiskError: the folder cannot be written.
    """
    require_unicode(path, "`--workdir`")
    # Also a link to nowhere, in whose place no folder can be created.
    if os.path.lexists(path) and not path.is_dir():
        raise ValueError(f"`--workdir` must be a folder; `{path}` is not one.")
    try:
        _refuse_files_of_others(path)
        path.mkdir(parents=True, exist_ok=True)
        # Not `os.access`: only an attempt shows whether a file can be created here.
        with tempfile.TemporaryFile(dir=path):
            pass
        lock = RunLock(path / LOCK)
    except OSError as error:
        raise DiskError(f"`--workdir` {path} cannot be written: {error}.") from None
    if lock.stale:
        warn(
            f"{lock.stale} ended without releasing {path} (killed, out of memory or power "
            "failure); the run resumes from its newest checkpoint"
        )
    return lock


def _refuse_files_of_others(folder: Path) -> None:
    """Raises if a run would replace files that no run has written.

    Raises:
        ValueError: there are such files.
        OSError: the folder or a file cannot be read.
    """
    # The lock stays in the folder of a run, whose other files may be damaged.
    if (folder / LOCK).exists():
        return
    found = []
    for name in (SETTINGS, CSV, *_LOGS):
        path = folder / name
        if path.is_file() and path.stat().st_size and not _is_of_run(path):
            found.append(name)
    if found:
        raise ValueError(
            f"`--workdir` must be a new folder or that of a run; `{folder}` has "
            f"{', '.join(found)} of something else, which the run would replace."
        )


def _is_of_run(path: Path) -> bool:
    """Returns whether a file has the form that a run gives to files of its name."""
    if path.name == SETTINGS:
        return "mode" in (read_object(path) or {})
    if path.name == CSV:
        with path.open("rb") as file:
            return file.read(5) in (b"step,", b"step\n")
    # The first line tells: a file of something else may be long.
    return "step" in next(iterate_log(path), {})
