"""A small teacher, observers of it, and each row's results when it is read alone.

The functions whose arguments are named like others are made fixtures where they are used.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import tiny_models

from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.model.state import init_state, select, stack
from rwkv7_jax.observer.observer import init_observer

# The scan compiles fastest; that all implementations agree is test_wkv_laws.py's business.
REST = {
    "decay_rank": 4,
    "icl_rank": 4,
    "value_rank": 3,
    "gate_rank": 5,
    "implementation": "scan",
}
# 2 layers of 2 heads of 16 are proposed from 1 layer of 3 heads of 8.
TEACHER = RWKV7Config(vocab_size=23, num_layers=2, width=32, head_size=16, **REST)
SMALL = RWKV7Config(vocab_size=23, num_layers=1, width=24, head_size=8, **REST)
# Prompts and the parts after them have 4 and 9 inputs: two lengths for the plain model to compile.
ROWS, LENGTH = 4, 13
SPLITS = (4, 9, 9, 4)


def alive(params, seed):
    """The tree plus noise on every leaf: a new model's output matrices are zero."""
    noise = np.random.default_rng(seed)
    draw = lambda x: np.asarray(x) + np.float32(0.2) * noise.normal(size=x.shape)  # noqa: E731
    return jax.tree.map(lambda x: jnp.asarray(draw(x), jnp.float32), params)


@functools.cache
def mirror():
    """An observer that is the teacher."""
    observer, params = init_observer(TEACHER, TEACHER, jax.random.key(0))
    return observer, params | {"model": alive(params["model"], 1)}


def teacher(mirror):
    """The teacher of `mirror` and its parameters."""
    observer, params = mirror
    return observer.model, params["model"]


@functools.cache
def made():
    """An observer whose parameters are all alive."""
    bias = 0.1 * jax.random.normal(jax.random.key(4), (2, 2, 16, 16))
    observer, params = init_observer(SMALL, TEACHER, jax.random.key(3), bias=bias)
    np.testing.assert_array_equal(params["bias"], bias)
    return observer, params | {"model": alive(params["model"], 5)}


def batch():
    """Rows cut at `SPLITS`; not all targets count, but the last does."""
    noise = np.random.default_rng(6)
    mask = (noise.random((ROWS, LENGTH)) < 0.7).astype(np.float32)
    mask[:, -1] = 1
    tokens = np.array(tiny_models.tokens(ROWS, LENGTH + 1, TEACHER))
    return {"tokens": tokens, "mask": mask, "split": np.array(SPLITS, np.int32)}


@functools.partial(jax.jit, static_argnums=0)
def plain(model, params, tokens, state):
    """The model as anybody calls it."""
    return model.apply({"params": params}, tokens, state)


def prompts_alone(model, params, batch):
    """Logits and states of every row's prompt, each read alone and cut at its split."""
    start = init_state(model.config)
    rows = [batch["tokens"][i : i + 1, :split] for i, split in enumerate(SPLITS)]
    logits, ends = zip(*(plain(model, params, row, start) for row in rows), strict=True)
    return logits, stack(list(ends))


def own(teacher, batch):
    """The teacher's logits and states in the prompts."""
    return prompts_alone(*teacher, batch)


def proposed(made, batch):
    """What the observer's rows, read alone, propose by the formula; and its logits."""
    observer, params = made
    logits, end = prompts_alone(observer.model, params["model"], batch)
    left, right, sources = (
        np.asarray(x, np.float64) for x in (params["left"], params["right"], end.wkv)
    )
    wkv = np.einsum("lhjvm,bjmp,lhjkp->lbhvk", left, sources[0], right)
    wkv += np.asarray(params["bias"])[:, None]
    return logits, init_state(TEACHER, ROWS).replace(wkv=jnp.asarray(wkv, jnp.float32))


def by_rows(teacher, start, batch):
    """The loss and the accuracy after the splits, each row continued alone from its state."""
    total = np.zeros(3)
    for i, split in enumerate(SPLITS):
        inputs = batch["tokens"][i : i + 1, split:-1]
        targets = batch["tokens"][i, split + 1 :]
        logits = plain(*teacher, inputs, select(start, i))[0][0]
        mask = batch["mask"][i, split:]
        nats = -jax.nn.log_softmax(logits)[np.arange(len(targets)), targets]
        hits = np.argmax(logits, -1) == targets
        total += [np.sum(nats * mask), np.sum(hits * mask), mask.sum()]
    return total[0] / total[2], total[1] / total[2]
