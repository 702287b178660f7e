"""The benchmark of arbitrary checkpoints, on a model of one layer."""

import json
import sys

import jax
import numpy as np
import pytest
from tiny_models import lively

from benchmarks import real_models
from benchmarks.rate_search import COMMA, copy_rows
from rwkv7_jax.checkpoints.model_files import save_model
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.model.rwkv7 import RWKV7

# The vocabulary is that of digits. A head of 16, as the model that reverses them has.
CONFIG = RWKV7Config(vocab_size=12, num_layers=1, width=32, head_size=16)


def test_reversal_rows_are_copy_rows_read_backwards():
    copies = copy_rows(0, 6)
    backwards = real_models.reversed_rows(copies)
    for one, other in zip(copies.tokens, backwards.tokens, strict=True):
        comma = int(np.argmax(np.asarray(one) == COMMA))
        answer = slice(comma + 1, 2 * comma + 1)
        assert (one[:comma] == other[:comma]).all()
        assert (other[answer] == one[:comma][::-1]).all()
        assert (one[2 * comma + 1 :] == other[2 * comma + 1 :]).all()
    np.testing.assert_array_equal(copies.mask, backwards.mask)


@pytest.mark.slow
def test_lora_has_as_many_parameters_as_the_start_state():
    model = RWKV7(CONFIG)
    params = lively(CONFIG)
    data = real_models.digits(model, 2)
    counts = {}
    for kind in ("start state", "LoRA"):
        start = real_models.start_of(kind, model, params, data, 0)
        tree = start.wkv if kind == "start state" else start
        leaves = jax.tree.leaves(tree)
        counts[kind] = sum(leaf.size for leaf in leaves)
    assert counts["LoRA"] == counts["start state"]


@pytest.mark.slow
def test_the_program_writes_its_results(tmp_path, monkeypatch):
    save_model(tmp_path / "m.pth", lively(CONFIG), CONFIG)
    words = [str(tmp_path / "m.pth"), "--data", "digits", "--steps", "2", "--rows", "2"]
    words += ["--kinds", "start state", "LoRA", "--json", str(tmp_path / "r.json")]
    words += ["--cells", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["real_models", *words])
    real_models.main()
    report = json.loads((tmp_path / "r.json").read_text())
    assert set(report["tuned"]) == {"start state", "LoRA"}
    assert report["untuned"]["int8 logits"]["relative_rms"] < 0.1
    for runs in report["tuned"].values():
        rates = runs[0]["by_rate"]
        assert str(runs[0]["best_rate"]) in rates and len(rates) > 1
        first, second = runs[0]["halved"]["rounds"]
        assert set(second["losses"]) < set(first["losses"])
        assert str(runs[0]["halved"]["rate"]) in second["losses"]
