"""train.py and eval.py as programs: bad settings, a run from start to end."""

import json
from pathlib import Path

import numpy as np
import pytest
from run_programs import program

SMALL = [
    "--config.model.width=32",
    "--config.model.head_size=16",
    "--config.model.num_layers=2",
    "--config.data.path=pydoc-topics",
    "--config.data.length=32",
    "--config.data.batch_size=2",
    "--config.evaluation.windows=2",
    "--config.evaluation.length=32",
    "--config.sample.prompts=()",
    "--config.optimizer.schedule=constant",
]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            ["--config.optimizer.learnig_rate=1.0"],
            "`config.optimizer.learnig_rate` is not a setting; the nearest is "
            "`config.optimizer.learning_rate`.",
        ),
        (
            ["--config.model.width=33"],
            "`width` must be a multiple of `head_size`; got 33 and 16.",
        ),
        pytest.param(
            ["--config.data.path=nothing.jsonl"],
            "`nothing.jsonl` must be a file, a folder or one of",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_bad_settings_end_in_one_line_and_exit_code_2(tmp_path, changes, sentence):
    config = "--config=configs/pretrain_tiny.py"
    done = program(
        "train.py", config, f"--workdir={tmp_path / 'run'}", *SMALL, *changes
    )
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line]
    assert len(lines) == 1 and sentence in lines[0]
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def pretrain(folder: Path, *changes: str) -> str:
    config = "--config=configs/pretrain_tiny.py"
    done = program("train.py", config, f"--workdir={folder}", *SMALL, *changes)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_state_is_tuned_saved_and_evaluated(tmp_path):
    pretrain(tmp_path / "base", "--config.steps=20")
    base = tmp_path / "base" / "model.pth"
    before = base.read_bytes()
    common = [
        f"--config.init={base}",
        "--config.data.path=charmaps",
        "--config.evaluation.windows=4",
    ]
    done = program(
        "train.py", "--config=configs/quickstart.py", f"--workdir={tmp_path / 'run'}", *common,
        "--config.steps=12", "--config.data.length=32", "--config.evaluation.length=64",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert base.read_bytes() == before
    for name in (
        "state.pth",
        "state.pth.json",
        "metrics.jsonl",
        "metrics.csv",
        "settings.json",
    ):
        assert (tmp_path / "run" / name).stat().st_size > 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert rows[-1]["held_out_bits_per_byte"] < rows[0]["held_out_bits_per_byte"]

    done = program(
        "eval.py", "--config=configs/eval.py", *common, "--config.evaluation.length=64",
        f"--config.state={tmp_path / 'run' / 'state.pth'}",
        "--config.evaluation.prompt_tokens=(100,)",
        f"--config.workdir={tmp_path / 'eval'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "eval" / "eval.json").read_text())["new text"]
    assert list(report) == ["base", "tuned state", "prompt 100"]
    assert report["tuned state"]["bits_per_byte"] < report["base"]["bits_per_byte"]
    assert np.isfinite([row["perplexity"] for row in report.values()]).all()


@pytest.mark.slow
def test_a_run_on_a_task_logs_the_accuracy_of_its_answers(tmp_path):
    done = program(
        "train.py", "--config=configs/pretrain_toy.py:small", f"--workdir={tmp_path / 'run'}",
        "--config.steps=30", "--config.data.path=task:steer", "--config.evaluation.every=20",
        "--config.evaluation.retention=task:copy", "--config.evaluation.length=40",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "held_out_accuracy" in row]
    assert [row["step"] for row in rows] == [0, 20, 30]
    assert rows[-1]["held_out_accuracy"] > rows[0]["held_out_accuracy"]
    assert "copy_accuracy" in rows[0] and "held_out_bits_per_byte" not in rows[0]


@pytest.mark.slow
def test_tasks_are_compared_by_accuracy(tmp_path):
    done = program(
        "eval.py", "--config=configs/eval.py", "--config.init=assets/toy-small.pth",
        "--config.data.path=task:steer", "--config.evaluation.retention=task:modular,pydoc-topics",
        "--config.evaluation.length=32", "--config.evaluation.windows=4",
        "--config.evaluation.prompt_tokens=()", f"--config.workdir={tmp_path}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "eval.json").read_text())
    assert list(report) == ["new task", "modular", "own text"]
    assert report["modular"]["base"]["accuracy"] > 0.9
    assert report["own text"]["base"]["bits_per_byte"] > 1
