"""An engine of a small model."""

import pytest
from engine_cases import BYTES, CONFIG, MODEL, STATES
from tiny_models import lively

from rwkv7_jax.serving.engine import Engine


@pytest.fixture(scope="module")
def params():
    return lively(CONFIG)


@pytest.fixture
def engine(params):
    return Engine(MODEL, params, BYTES, STATES, slots=3)
