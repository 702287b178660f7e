"""Named shapes and data that tests, benchmarks and the README's table share.

Four modes of data. "real" is what a trained model sends. The others are the edges: "fast", every
channel decays as quickly as it can; "slow", next to no decay, so errors have time to grow;
"repeated", one key over and over with full removal, where naive inverses overflow.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.reference import Inputs, State

MODES = ("real", "fast", "slow", "repeated")
# log_w is this times a sigmoid: no decay is faster than exp of it.
_LOG_W = -0.6065306597126334
_LOGIT = {"fast": 20.0, "slow": -12.0, "repeated": -8.0}


@dataclasses.dataclass(frozen=True)
class Case:
    """The sizes of one call and the kind of data in it.

    Attributes:
        batch: sequences (B).
        tokens: length of each (T).
        heads: heads (H).
        key_size: key channels of a head (Nk).
        value_size: value channels of a head (Nv).
        mode: one of `MODES`.
    """

    batch: int
    tokens: int
    heads: int
    key_size: int = 64
    value_size: int = 64
    mode: str = "real"


CASES = {
    "tiny": Case(1, 128, 2),
    "train-1k": Case(4, 1024, 4),
    "train-4k": Case(1, 4096, 8),
    "prefill-2k": Case(1, 2048, 12),
    "upscaled-1k": Case(1, 1024, 4, key_size=256),
    "decode": Case(8, 1, 12),
    "h200": Case(8, 4096, 32),
}


def _normal(key: Array, *shape: int) -> Float[Array, "..."]:
    return jax.random.normal(key, shape, jnp.float32)


def make_inputs(case: Case, dtype: str = "float32", seed: int = 0) -> tuple[Inputs, State]:
    """The six token arrays and a start state of `case`, the same for the same seed.

    Args:
        case: sizes and mode.
        dtype: of the tokens; log_w and the state stay float32, as in the model.
        seed: of all draws.

    Raises:
        ValueError: an unknown mode.
    """
    if case.mode not in MODES:
        raise ValueError(
            f"make_inputs: `case.mode` must be one of {', '.join(MODES)}; got {case.mode!r}."
        )
    tokens, heads = (case.batch, case.tokens, case.heads), (case.batch, case.heads)
    keys = iter(jax.random.split(jax.random.key(seed), 7))
    shape = (*tokens, case.key_size)
    r, k, direction = (_normal(next(keys), *shape) for _ in range(3))
    rate = jax.nn.sigmoid(1.5 * _normal(next(keys), *shape))
    logit = 2.5 * _normal(next(keys), *shape) - 0.5
    v = _normal(next(keys), *tokens, case.value_size)
    state = 0.3 * _normal(next(keys), *heads, case.value_size, case.key_size)
    if case.mode in _LOGIT:
        logit = jnp.full_like(logit, _LOGIT[case.mode])
    if case.mode == "repeated":
        k, direction = (jnp.broadcast_to(x[:, :1], x.shape) for x in (k, direction))
        rate = jnp.full_like(rate, jax.nn.sigmoid(8.0))
    direction = direction / jnp.linalg.norm(direction, axis=-1, keepdims=True)
    k = k * (0.5 + 0.5 * rate)
    r, k, v, a, b = (x.astype(dtype) for x in (r, k, v, -direction, direction * rate))
    return (r, _LOG_W * jax.nn.sigmoid(logit), k, v, a, b), state
