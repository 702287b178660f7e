"""Each of several processes makes its own rows: together all rows of a batch, and none twice."""

import itertools

import jax
import numpy as np
import pytest
from smallest_runs import mode_settings, save_base_model

from rwkv7_jax.data.batch import Batch
from rwkv7_jax.runs.datasets import TrainingData
from rwkv7_jax.runs.input_pipeline import BatchSource
from rwkv7_jax.runs.modes.rate_stack import RateStackMode
from rwkv7_jax.runs.modes.registry import make_mode
from rwkv7_jax.test_time.prompt_share import PromptShare

TEXTS = {"poet": "task:mapping", "cook": "task:facts-8", "judge": "task:dictionary"}
PLAIN = {"tuning__anchor": 0.0, "tuning__anchor_path": None}
STEPS = 2


class Made(BatchSource):
    """The batches that a mode asks for, made at once and left on the host."""

    def __init__(self, batches, mesh, *, rows=None):
        del mesh
        self.batches = list(itertools.islice(batches, STEPS))
        self.rows = rows

    def batch(self, step, params):
        raise AssertionError("no run asks for a batch here")

    def close(self):
        """Does nothing: no thread makes batches."""


@pytest.fixture
def make_rows(monkeypatch):
    """Makes the batches of a mode as a process with some of the rows does."""
    for module in ("base", "stack"):
        path = f"rwkv7_jax.runs.modes.{module}.PrefetchedBatches"
        monkeypatch.setattr(path, Made)
    counted = []
    original = TrainingData.batches

    def count(self, **choices):
        for batch in original(self, **choices):
            counted.append(len(batch.tokens))
            yield batch

    monkeypatch.setattr(TrainingData, "batches", count)

    def make(mode, rows=slice(None)):
        def own_rows(mesh, count):
            del mesh, count
            return rows

        monkeypatch.setattr("rwkv7_jax.runs.modes.base.own_rows", own_rows)
        monkeypatch.setattr("rwkv7_jax.runs.modes.stack.own_rows", own_rows)
        counted.clear()
        made = mode.batches(3, None)
        return made, sum(counted)

    return make


def modes(folder):
    """The modes whose rows come from data, by name, and the rows of a step."""
    base = folder / "base.pth"
    save_base_model(base)
    several = {"data__path": "", "tuning__states": TEXTS, **PLAIN}
    search = {"optimizer__learning_rate": None, "tuning__rates": (0.01, 0.1), **PLAIN}
    settings = {
        "state": mode_settings("state", base, data__batch_size=4),
        "observer": mode_settings("observer", base, data__batch_size=4),
        "states": mode_settings("state", base, data__batch_size=4, **several),
        "search": mode_settings("state", base, data__batch_size=8, **search),
    }
    made = {name: make_mode(one, folder) for name, one in settings.items()}
    made["search"] = RateStackMode(made["search"])
    # Of the search: four for each rate.
    return {name: (mode, 12 if name == "states" else 4) for name, mode in made.items()}


def test_each_process_makes_its_own_rows_of_the_batch(tmp_path, make_rows):
    for name, (mode, _) in modes(tmp_path).items():
        whole, counted = make_rows(mode)
        rows = len(whole.batches[0].tokens)
        parts = [slice(0, rows // 2), slice(rows // 2, rows)]
        found = [make_rows(mode, part) for part in parts]
        for step, batch in enumerate(whole.batches):
            joined = jax.tree.map(
                lambda *rows: np.concatenate(rows),
                *(made.batches[step] for made, _ in found),
            )
            assert_same(joined, batch, name)
        for made, count in found:
            assert made.rows == whole.rows == rows
            # A text of which a process has some rows is read for all of them.
            assert count <= {"states": 2 / 3, "search": 1}.get(name, 0.5) * counted, (
                name
            )


@pytest.mark.parametrize(("prompts", "own"), [(3, slice(0, 6)), (2, slice(None))])
def test_test_time_prompts_that_do_not_divide_among_processes_are_rejected(
    tmp_path, monkeypatch, prompts, own
):
    base = tmp_path / "base.pth"
    save_base_model(base)
    mode = make_mode(mode_settings("grpo", base, test_time__prompts=prompts), tmp_path)
    monkeypatch.setattr(mode, "_share", PromptShare(0, 2))
    monkeypatch.setattr("rwkv7_jax.sharding.own_rows", lambda mesh, rows: own)
    sentence = (
        "`config.test_time.prompts` must give each of 2 processes equally many prompts"
    )
    with pytest.raises(ValueError, match=f"{sentence}.*got {prompts} prompts of 4"):
        mode.batches(0, None)


def assert_same(actual: Batch, expected: Batch, name: str):
    for field, values in expected.items():
        np.testing.assert_array_equal(actual[field], values, f"{name}: {field}")
