"""A run's metrics in files and trackers: none lost, none duplicated."""

import csv
import json
import sys
import tracemalloc
import types

import pytest

from rwkv7_jax.reports import metric_writers
from rwkv7_jax.reports.metric_writers import MetricFiles


def table(folder):
    """Return the rows of the CSV file without empty cells."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]


def lines(folder):
    return [
        json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]


def test_every_metric_is_written_to_both_files_at_once(tmp_path):
    files = MetricFiles(tmp_path / "run")
    files.write(1, {"loss": 2.5})
    files.write(2, {"loss": 2.25, "accuracy": 0.5})
    assert lines(tmp_path / "run") == [
        {"step": 1, "loss": 2.5},
        {"step": 2, "loss": 2.25, "accuracy": 0.5},
    ]
    assert table(tmp_path / "run") == [
        {"step": "1", "loss": "2.5"},
        {"step": "2", "loss": "2.25", "accuracy": "0.5"},
    ]


def test_a_failed_header_is_written_with_the_next_row(tmp_path, monkeypatch):
    files = MetricFiles(tmp_path)
    files.write(1, {"loss": 2.5})

    def full(path):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("rwkv7_jax.reports.metric_writers.atomic_write", full)
        with pytest.raises(OSError, match="No space"):
            files.write(2, {"accuracy": 0.5})
    files.write(3, {"accuracy": 0.75})
    assert table(tmp_path) == [
        {"step": "1", "loss": "2.5"},
        {"step": "2", "accuracy": "0.5"},
        {"step": "3", "accuracy": "0.75"},
    ]


@pytest.mark.parametrize("lost", ["append_line", "atomic_write"])
def test_a_row_that_the_table_lacks_is_written_with_the_next_one(
    tmp_path, monkeypatch, lost
):
    files = MetricFiles(tmp_path)
    files.write(1, {"loss": 2.5})
    kept = getattr(metric_writers, lost)

    def full(path, *rest):
        if path.name == metric_writers.CSV:
            raise OSError(28, "No space left on device")
        return kept(path, *rest)

    name = "loss" if lost == "append_line" else "accuracy"
    with monkeypatch.context() as patched:
        patched.setattr(metric_writers, lost, full)
        with pytest.raises(OSError, match="No space"):
            files.write(2, {name: 0.5})
    files.write(3, {"loss": 0.75})
    files.write(4, {"loss": 0.25})
    assert table(tmp_path) == [
        {"step": "1", "loss": "2.5"},
        {"step": "2", name: "0.5"},
        {"step": "3", "loss": "0.75"},
        {"step": "4", "loss": "0.25"},
    ]


def test_a_step_has_one_row_with_the_last_values(tmp_path):
    files = MetricFiles(tmp_path)
    for step, numbers in [
        (2, {"loss": 1.0}),
        (1, {"loss": 3.0}),
        (2, {"held_out": 4.0}),
    ]:
        files.write(step, numbers)
    files.write(2, {"loss": 0.5})
    expected = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 0.5, "held_out": 4.0}]
    assert files.rows() == MetricFiles(tmp_path).rows() == expected


def test_memory_does_not_hold_the_log(tmp_path):
    numbers = {f"metric_{index}": 0.123456789 for index in range(40)}
    log = tmp_path / "metrics.jsonl"
    rows = [json.dumps({"step": step, **numbers}) for step in range(3000)]
    log.write_text("\n".join(rows) + "\n")
    tracemalloc.start()
    files = MetricFiles(tmp_path)
    files.write(3000, {"another": 1.0})
    files.truncate_after(2999)
    assert next(files.iterate())["step"] == 0
    assert [row["step"] for row in files.rows({0, 2999})] == [0, 2999]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < log.stat().st_size / 4


def test_a_resumed_run_has_no_duplicate_steps(tmp_path):
    first = MetricFiles(tmp_path)
    for step in range(6):
        first.write(step, {"loss": float(step)})
    second = MetricFiles(tmp_path)
    second.truncate_after(3)
    for step in (4, 5):
        second.write(step, {"loss": 10.0 + step})
    losses = [0.0, 1.0, 2.0, 3.0, 14.0, 15.0]
    assert [row["loss"] for row in lines(tmp_path)] == losses
    assert [float(row["loss"]) for row in table(tmp_path)] == losses
    second.truncate_after(-1)
    assert second.rows() == lines(tmp_path) == table(tmp_path) == []


def test_a_line_cut_by_a_kill_is_dropped(tmp_path):
    MetricFiles(tmp_path).write(1, {"loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    files = MetricFiles(tmp_path)
    files.write(3, {"loss": 3.0})
    assert [row["step"] for row in lines(tmp_path)] == [1, 3]
    assert [row["step"] for row in table(tmp_path)] == ["1", "3"]


def test_a_row_cut_by_a_full_disk_does_not_damage_the_next(tmp_path):
    files = MetricFiles(tmp_path)
    files.write(1, {"loss": 2.5})
    for name, rest in (("metrics.jsonl", '{"step": 2, "lo'), ("metrics.csv", "2,")):
        with (tmp_path / name).open("a") as file:
            file.write(rest)
    files.write(3, {"loss": 2.0})
    assert table(tmp_path)[-1] == {"step": "3", "loss": "2.0"}
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1]) == {
        "step": 3,
        "loss": 2.0,
    }
    assert [row["step"] for row in MetricFiles(tmp_path).rows()] == [1, 3]


def test_an_unknown_tracker_is_rejected(tmp_path):
    with pytest.raises(ValueError) as caught:
        MetricFiles(tmp_path, also=("tensorbord",))
    sentence = (
        "MetricFiles: `also` must name only tensorboard, wandb; got 'tensorbord'."
    )
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("name", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")]
)
def test_a_missing_package_names_its_extra(tmp_path, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError) as caught:
        MetricFiles(tmp_path, also=(name,))
    assert str(caught.value) == (
        f"MetricFiles: `also` names '{name}', which needs the package {package}: "
        f"pip install 'rwkv7_jax[{name}]'."
    )


def test_trackers_are_imported_on_demand(tmp_path, monkeypatch):
    for package in ("tensorboardX", "wandb"):
        monkeypatch.setitem(sys.modules, package, None)
    MetricFiles(tmp_path).write(1, {"loss": 1.0})


class FakeRun:
    """A Weights & Biases run that records its calls."""

    def __init__(self, calls, **how):
        self.id = how["id"] or "abc"
        self._calls = calls
        calls.append(how)

    def log(self, numbers, step):
        self._calls.append((step, numbers))

    def finish(self):
        self._calls.append("finished")


def test_a_resumed_process_continues_the_wandb_run(tmp_path, monkeypatch):
    calls = []
    fake = types.SimpleNamespace(init=lambda **how: FakeRun(calls, **how))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    # As a process leaves it that is killed while it writes.
    (tmp_path / "wandb.id").write_text("")
    first = MetricFiles(tmp_path, also=("wandb",))
    assert calls == []
    first.write(1, {"loss": 1.0, "note": "text"})
    first.close()
    second = MetricFiles(tmp_path, also=("wandb",))
    second.truncate_after(1)
    second.write(2, {"loss": 0.5})
    assert [call["id"] for call in calls if isinstance(call, dict)] == [None, "abc"]
    assert calls[1:3] == [(1, {"loss": 1.0}), "finished"]
    assert calls[-1] == (2, {"loss": 0.5})


def test_tensorboard_purges_the_steps_that_a_resumed_run_repeats(tmp_path, monkeypatch):
    calls = []

    class Writer:
        def __init__(self, where, purge_step):
            calls.append((where, purge_step))

        def add_scalar(self, *call):
            calls.append(call)

        def close(self):
            calls.append("closed")

    monkeypatch.setitem(
        sys.modules, "tensorboardX", types.SimpleNamespace(SummaryWriter=Writer)
    )
    files = MetricFiles(tmp_path, also=("tensorboard",))
    files.write(0, {"accuracy": 0.1})
    # Killed before its first checkpoint.
    files.truncate_after(-1)
    files.write(0, {"accuracy": 0.1})
    files.close()
    where = str(tmp_path / "tensorboard")
    assert calls == [(where, 0), ("accuracy", 0.1, 0), "closed"] * 2
    calls.clear()
    files.write(1, {"loss": 1.0, "rate": 0.5})
    files.write(2, {"loss": 0.9})
    files.truncate_after(1)
    files.write(2, {"loss": 0.8})
    files.close()
    assert calls == [
        (where, 1), ("loss", 1.0, 1), ("rate", 0.5, 1), ("loss", 0.9, 2), "closed",
        (where, 2), ("loss", 0.8, 2), "closed",
    ]  # fmt: skip


def test_tensorboard_files_have_a_bounded_size(tmp_path, monkeypatch):
    opened = []

    class Writer:
        def __init__(self, where, purge_step):
            opened.append((purge_step, []))

        def add_scalar(self, name, value, step):
            opened[-1][1].append(step)

        def close(self):
            pass

    monkeypatch.setitem(
        sys.modules, "tensorboardX", types.SimpleNamespace(SummaryWriter=Writer)
    )
    monkeypatch.setattr(metric_writers, "_WRITES_TO_A_FILE", 3)
    files = MetricFiles(tmp_path, also=("tensorboard",))
    for step in range(1, 8):
        files.write(step, {"loss": 1.0})
    assert opened == [(1, [1, 2, 3]), (None, [4, 5, 6]), (None, [7])]


def test_real_tensorboard_files_are_written(tmp_path):
    pytest.importorskip("tensorboardX", reason="the tensorboard extra is not installed")
    files = MetricFiles(tmp_path, also=("tensorboard",))
    files.write(1, {"loss": 1.5})
    files.close()
    (events,) = (tmp_path / "tensorboard").glob("events*")
    assert b"loss" in events.read_bytes()
