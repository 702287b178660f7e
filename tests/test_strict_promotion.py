"""What counts tokens works where JAX has 64 bits and mixes no dtypes, with narrow integers too.

Traced only: promotion is decided there.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_models import QUICK

import pallas_kernels as kernels
from rwkv7_jax.data.batch import Batch
from rwkv7_jax.generation.sampling import log_probabilities
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import init_state
from rwkv7_jax.observer import evaluation
from rwkv7_jax.observer.prompt_splits import after_split, continuations
from rwkv7_jax.optim.decorrelation import MODES, decorrelate
from rwkv7_jax.training.head_loss import token_statistics

ROWS, T = 2, 5
IDS = np.zeros((ROWS, T), np.int32)
SPLIT = np.array([1, 3], np.int8)


def recurrence():
    x = jnp.ones((ROWS, T, 2, 4))
    state = jnp.ones((ROWS, 2, 4, 4))
    inputs = (x, -x, x, x, x, x)
    lengths = jnp.asarray(SPLIT)
    kernels.wkv7(*inputs, state, lengths=lengths)
    many = jnp.concatenate([state, state])
    kernels.wkv7(*inputs, many, lengths=lengths, segment_ids=jnp.asarray(IDS))


def model():
    call = functools.partial(RWKV7(QUICK).init_with_output, jax.random.key(0), IDS)
    call(init_state(QUICK, ROWS), SPLIT)
    call(init_state(QUICK, 2 * ROWS), SPLIT, IDS)


def packed_rows():
    starts = np.array([[0, 2], [0, 3]], np.int8)
    ids = Batch(tokens=IDS, mask=np.ones((ROWS, T - 1)), segments=starts).segment_ids
    assert ids.shape == (ROWS, T - 1)


def prompts():
    after_split(SPLIT, T)
    continuations(IDS, SPLIT, jnp.ones((ROWS, T - 1), jnp.float32))


def handover():
    batch = Batch(tokens=IDS, mask=np.ones((ROWS, T - 1), np.float32), split=SPLIT)
    state = init_state(QUICK, ROWS)
    teacher = RWKV7(QUICK)
    params = teacher.init(jax.random.key(0), IDS, state)["params"]
    evaluation._score_answers(teacher, params, state, batch)


def sampling():
    options = {"temperature": np.float32(0.7), "top_p": np.float32(0.9)}
    log_probabilities(jnp.ones((ROWS, 9), jnp.float32), **options, top_k=np.int32(3))


def temperatures():
    hidden = jnp.ones((ROWS, T, 4), jnp.float32)
    head = jnp.ones((9, 4), jnp.float32)
    for number in (2, np.int64(2), np.float64(0.7), jnp.float32(0.7)):
        found = token_statistics(hidden, head, IDS, temperature=number)
        assert found.nats.dtype == np.float32


def decorrelated_updates():
    for dtype in (np.float16, jnp.bfloat16, np.float32):
        leaf = jnp.ones((3, 4), dtype)
        for mode in MODES:
            tx = decorrelate(optax.sgd(0.1), mode=mode, turn_params=True)
            moment = jnp.eye(4, dtype=dtype)
            move, _ = tx.update(leaf, tx.init(leaf), leaf, stats=moment)
            assert move.dtype == dtype


@pytest.mark.parametrize(
    "call",
    [
        recurrence,
        model,
        packed_rows,
        prompts,
        handover,
        sampling,
        temperatures,
        decorrelated_updates,
    ],
)
def test_no_dtypes_are_mixed_where_jax_has_64_bits(call):
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        jax.eval_shape(call)
