"""Every mode of train.py as a program on a toy model: what it saves, and that it learns."""

import json
from pathlib import Path

import pytest
from run_programs import ROOT, program

from rwkv7_jax.checkpoints import load_state, read_sidecar
from rwkv7_jax.checkpoints.model_files import load_model
from rwkv7_jax.observer.files import load_observer

BASE = ROOT / "assets" / "toy-small.pth"
TOY = [
    f"--config.init={BASE}",
    "--config.model.dtype=float32",
    "--config.model.implementation=scan",  # it compiles fastest
    "--config.evaluation.every=0",
    "--config.evaluation.windows=32",
]


def run(config: str, folder: Path, *changes: str) -> list[dict]:
    """The metrics of a finished run."""
    done = program(
        "train.py",
        f"--config=configs/{config}.py",
        f"--workdir={folder}",
        *TOY,
        *changes,
    )
    assert done.returncode == 0, done.stderr
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def facts(batch: int = 16) -> list[str]:
    return [
        "--config.data.path=task:facts-64",
        "--config.data.length=24",
        f"--config.data.batch_size={batch}",
        "--config.evaluation.length=24",
        "--config.log_every=5",
    ]


@pytest.mark.slow
def test_an_upscaled_state_is_tuned_by_dbp(tmp_path):
    rows = run(
        "upscaled_state",
        tmp_path,
        *facts(),
        "--config.tuning.decorrelate=dbp",
        "--config.optimizer.schedule=constant",
        "--config.upscaling.rows=16",
        "--config.steps=20",
    )
    assert rows[-1]["held_out_accuracy"] > rows[0]["held_out_accuracy"] + 0.05
    one = load_state(tmp_path / "state.safetensors")
    assert one.upscaled.memory.shape == (2, 1, 2, 32, 128)
    assert one.upscaled.features.map is None
    assert len(read_sidecar(tmp_path / "state.safetensors")["base_model"]) == 32


@pytest.mark.slow
def test_an_observer_is_trained_and_evaluated_by_its_proposals(tmp_path):
    rows = run(
        "observer",
        tmp_path,
        "--config.data.path=task:mapping",
        "--config.data.length=32",
        "--config.data.batch_size=16",
        "--config.evaluation.length=32",
        "--config.observer.least=25",
        "--config.observer.most=25",
        "--config.steps=40",
    )
    assert rows[-1]["proposal_nats"] < rows[0]["proposal_nats"]
    assert rows[0]["own_state_accuracy"] > rows[0]["no_state_accuracy"] + 0.3
    _, config = load_model(BASE)
    observer, _ = load_observer(tmp_path / "observer", config)
    assert observer.model.config.width == 32


STEER = [
    "--config.data.path=task:steer",
    "--config.test_time.tokens=6",
    "--config.log_every=5",
]


@pytest.mark.slow
def test_rewards_alone_steer_a_model(tmp_path):
    rows = run("test_time", tmp_path, *STEER, "--config.steps=15")
    assert rows[-1]["held_out_reward"] > rows[0]["held_out_reward"] + 0.1
    assert load_state(tmp_path / "state.pth").wkv.shape == (2, 1, 2, 32, 32)


@pytest.mark.slow
def test_a_guides_verified_traces_steer_a_model(tmp_path):
    guide = ROOT / "assets" / "toy-large.pth"
    rows = run(
        "test_time",
        tmp_path,
        *STEER,
        "--config.steps=25",
        "--config.test_time.method=distil",
        f"--config.test_time.guide={guide}",
        "--config.test_time.substitute=('?','R')",
        "--config.test_time.traces=64",
        "--config.optimizer.learning_rate=0.3",
    )
    assert rows[-1]["held_out_reward"] > rows[0]["held_out_reward"] + 0.2
    assert (tmp_path / "traces.jsonl").stat().st_size > 0


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            ["--config.test_time.method=magic"],
            "`config.test_time.method` must be grpo, distil,",
        ),
        pytest.param(
            ["--config.test_time.method=distil"],
            "`config.test_time.guide` must name the larger",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["--config.test_time.verifier=nothing:there"],
            "must be one of exact, hash_number, last_number, letter or module:function; got",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_settings_that_a_mode_cannot_use_end_in_one_line(tmp_path, changes, sentence):
    done = program(
        "train.py", "--config=configs/test_time.py", f"--workdir={tmp_path / 'run'}", *TOY,
        *STEER, *changes,
    )  # fmt: skip
    assert done.returncode == 2 and sentence in done.stderr
    assert len([line for line in done.stderr.splitlines() if line]) == 1
