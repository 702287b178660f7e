"""The toy base models in the repository: what they know, and what a run on them logs."""

import pytest
from run_programs import ROOT

from rwkv7_jax.checkpoints.model_files import load_model
from rwkv7_jax.data.tasks.synthetic_tasks import task_batch
from rwkv7_jax.evaluation.scoring import score_answers
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import init_state
from rwkv7_jax.runs.datasets import TrainingData
from rwkv7_jax.runs.modes.registry import make_mode
from rwkv7_jax.runs.settings import read_settings
from rwkv7_jax.text.tokenizer import Tokenizer

ASSETS = ROOT / "assets"
LEARNT = ("dictionary", "mapping", "modular", "sequence")
ROWS = {"batch_size": 64, "length": 32, "held_out": True}


def accuracies(name, tasks):
    path = ASSETS / f"toy-{name}.pth"
    assert path.stat().st_size < 1_000_000
    params, config = load_model(path)
    model = RWKV7(config)
    start = init_state(config)
    return {
        task: score_answers(
            model, params, start, task_batch(task, 0, **ROWS), rows=64
        ).accuracy
        for task in tasks
    }


def test_the_small_model_knows_the_four_tasks_but_not_the_new_ones():
    known = accuracies("small", LEARNT)
    assert min(known.values()) >= 0.85, known
    new = accuracies("small", ("novel", "product-7", "facts-256"))
    assert max(new.values()) <= 0.35, new


@pytest.mark.slow
@pytest.mark.parametrize(("name", "least"), [("small16", 0.8), ("large", 0.85)])
def test_the_other_models_know_the_four_tasks(name, least):
    known = accuracies(name, LEARNT)
    assert min(known.values()) >= least, known


@pytest.mark.slow
def test_a_run_on_a_task_evaluates_accuracies_and_bits_per_byte_of_text():
    settings = read_settings(
        {
            "mode": "state",
            "init": str(ASSETS / "toy-small.pth"),
            "data": {"path": "task:steer", "batch_size": 4, "length": 32},
            "evaluation": {
                "windows": 64,
                "length": 32,
                "retention": "task:dictionary,pydoc-topics,task:modular",
            },
        }
    )
    mode = make_mode(settings)
    metrics = mode.evaluate(mode.init_params())
    numbers = {name: metric.value for name, metric in metrics.items()}
    names = ["held_out_accuracy", "dictionary_accuracy", "modular_accuracy"]
    assert list(numbers) == [*names, "retention_bits_per_byte"]
    assert (
        numbers["dictionary_accuracy"]
        == accuracies("small", ["dictionary"])["dictionary"]
    )
    assert 0.3 < numbers["held_out_accuracy"] < numbers["modular_accuracy"] <= 1
    assert numbers["retention_bits_per_byte"] > 1


def test_a_state_may_be_anchored_on_a_task():
    settings = read_settings(
        {
            "mode": "state",
            "data": {"path": "task:facts-64", "batch_size": 4, "length": 24},
            "tuning": {"anchor": 1.0, "anchor_path": "task:mixture"},
        }
    )
    tokenizer = Tokenizer.bytes()
    data = TrainingData(settings, tokenizer)
    batch = next(data.batches(start_step=5))
    sizes = {"batch_size": 4, "length": 24}
    assert (batch["tokens"] == task_batch("facts-64", 5, **sizes)["tokens"]).all()
    assert (
        batch["anchor"] == task_batch("mixture", 5, seed=1, **sizes)["tokens"]
    ).all()
