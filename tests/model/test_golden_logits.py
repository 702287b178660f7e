"""Logits and states that the official inference package gave (make_golden.py): no torch needed."""

import dataclasses

import jax
import numpy as np
import pytest
from run_programs import ROOT

from rwkv7_jax.checkpoints.model_files import load_model
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import init_state

GOLDEN = ROOT / "tests" / "golden"
# Absolute at a standard deviation of 1; and relative to the state's largest entry.
LOGITS, STATES = 1e-4, 1e-5


@pytest.mark.parametrize("name", ["tiny", "heads-of-64", "heads-of-128"])
def test_logits_and_states_match_the_official_package(name):
    path = ROOT / "assets" / "tiny.pth" if name == "tiny" else GOLDEN / f"{name}.pth"
    params, config = load_model(path, dtype="float32")
    golden = np.load(GOLDEN / f"{name}.npz")
    model = RWKV7(dataclasses.replace(config, dtype="float32"))
    ids = golden["tokens"][None].astype(np.int32)
    logits, state = jax.jit(model.apply)(
        {"params": params}, ids, init_state(model.config)
    )
    deviation = golden["logits"].std()
    assert np.abs(np.asarray(logits[0]) - golden["logits"]).max() <= LOGITS * max(
        deviation, 1
    )
    largest = np.abs(golden["wkv"]).max()
    assert np.abs(np.asarray(state.wkv[:, 0]) - golden["wkv"]).max() <= STATES * largest
