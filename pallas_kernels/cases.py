"""Named shapes and data for tests and benchmarks.

There are four modes of data:

* "real" resembles the inputs that a trained model computes.
* "fast": every channel decays as fast as possible.
* "slow": there is almost no decay, so errors have time to grow.
* "repeated": one key repeats with full removal, where naive inverses overflow.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.reference import State, WKVInputs

MODES = ("real", "fast", "slow", "repeated")
# -exp(-0.5). log_w is this times a sigmoid, as in the model.
_LOG_W = -0.6065306597126334
# Logits of that sigmoid in the modes with a constant decay.
_LOGIT = {"fast": 20.0, "slow": -12.0, "repeated": -8.0}


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of one call and the kind of data in it.

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


def _make_logits(
    case: Case, noise: Float[Array, "B T H Nk"]
) -> Float[Array, "B T H Nk"]:
    """Makes the decay's logits: constant, or in "real" spread as in a trained model."""
    if case.mode in _LOGIT:
        return jnp.full_like(noise, _LOGIT[case.mode])
    return 2.5 * noise - 0.5


def make_inputs(
    case: Case, dtype: str = "float32", seed: int = 0
) -> tuple[WKVInputs, State]:
    """Makes the six token arrays and a start state of `case`, deterministically.

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
    keys = jax.random.split(jax.random.key(seed), 7)
    shape = (case.batch, case.tokens, case.heads, case.key_size)
    v_shape = (case.batch, case.tokens, case.heads, case.value_size)
    state_shape = (case.batch, case.heads, case.value_size, case.key_size)
    r = jax.random.normal(keys[0], shape, jnp.float32)
    k = jax.random.normal(keys[1], shape, jnp.float32)
    direction = jax.random.normal(keys[2], shape, jnp.float32)
    rate = jax.nn.sigmoid(1.5 * jax.random.normal(keys[3], shape, jnp.float32))
    logit = _make_logits(case, jax.random.normal(keys[4], shape, jnp.float32))
    v = jax.random.normal(keys[5], v_shape, jnp.float32)
    # Not zeros: a wrong read of the start state must show.
    state = 0.3 * jax.random.normal(keys[6], state_shape, jnp.float32)
    if case.mode == "repeated":
        k = jnp.broadcast_to(k[:, :1], shape)
        # All tokens remove along one direction, so the powers of Aab grow.
        direction = jnp.broadcast_to(direction[:, :1], shape)
        rate = jnp.full_like(rate, jax.nn.sigmoid(8.0))
    direction = direction / jnp.linalg.norm(direction, axis=-1, keepdims=True)
    # As in the model: the replacement key is shorter where the removal is weak.
    k = k * (0.5 + 0.5 * rate)
    inputs = WKVInputs(
        r=r.astype(dtype),
        log_w=_LOG_W * jax.nn.sigmoid(logit),
        k=k.astype(dtype),
        v=v.astype(dtype),
        a=(-direction).astype(dtype),
        b=(direction * rate).astype(dtype),
    )
    return inputs, state


def describe(arrays: Any, sharding: jax.sharding.Sharding | None = None) -> Any:
    """Describes a tree of arrays or descriptions, placed by a sharding."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arrays
    )


def describe_inputs(
    case: Case, dtype: str, sharding: jax.sharding.Sharding | None = None
) -> tuple[WKVInputs, Any]:
    """Describes the arrays of `make_inputs`, placed by a sharding."""
    arrays = jax.eval_shape(functools.partial(make_inputs, case, dtype))
    return describe(arrays, sharding)
