"""An engine of a small model."""

import jax.numpy as jnp
import pytest
from engine_cases import BYTES, CONFIG, MODEL, STATES
from random_checkpoints import random_params

from rwkv7_jax.serving.engine import Engine


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG, dtype=jnp.float32, scale=0.3)


@pytest.fixture
def engine(params):
    return Engine(MODEL, params, BYTES, STATES, slots=3)
