"""The pointwise and per-head operations between the products and the recurrence.

Their results are never saved for the backward pass: they are cheap next to the products, and many
are float32. The equations are in `block`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rwkv7_jax.array_types import Activations, Heads
from rwkv7_jax.model import norms
from rwkv7_jax.model.casts import per_channel, widened
from rwkv7_jax.model.head_sums import (
    spread_over_heads,
    sum_heads,
    view_heads,
)

# The largest decay rate: w = exp(-DECAY_RATE * sigmoid(z)) stays above 0.5452.
DECAY_RATE = 0.6065306597126334  # exp(-1/2)

Vector = Float[Array, " D"]


def log_decay(raw: Activations, bias: Vector) -> Float[Array, "B T D"]:
    """Computes log w from the raw decay and its bias, float32, in (-0.6066, 0).

    Source: BlinkDL/RWKV-LM@524481d RWKV-v7/train_temp/cuda/rwkv7_clampw.cu:16,42.
    """
    # In bfloat16, with its 8 bits, errors of log w would add up over thousands of tokens.
    return -DECAY_RATE * jax.nn.sigmoid(_with_bias(raw, bias))


def mix_values(
    v: Activations, v_first: Activations, raw: Activations, bias: Vector
) -> Activations:
    """Interpolates from the values to layer 0's by nu = sigmoid(raw + bias)."""
    # Only the gate is computed in float32; the values stay in the activations' dtype.
    return v + (v_first - v) * jax.nn.sigmoid(_with_bias(raw, bias)).astype(v.dtype)


def removal_and_replacement(
    k: Activations,
    raw: Activations,
    bias: Vector,
    xi: Float[Array, "H N"],
    alpha: Vector,
) -> tuple[Heads, Heads, Heads, Heads]:
    """Computes k~, -kappa^ and a * kappa^ of all heads, and the in-context learning rate a.

    Args:
        k: the keys, all channels.
        raw: the learning rate's logits without the bias.
        bias: of the learning rate.
        xi: scale of the removal key; its shape [H N] splits the channels into heads.
        alpha: strength of the replacement.
    """
    head_size = xi.shape[1]
    icl_rate = jax.nn.sigmoid(_with_bias(raw, bias)).astype(k.dtype)
    # -kappa^ = -(k * xi) / |k * xi| for each head, the removal key, with k before the replacement.
    # The sign comes first: on TPU, a negation at the end would be a pass over all channels.
    scaled = view_heads(k * -per_channel(xi.ravel(), k), head_size)
    negative_key = norms.unit_heads(scaled, head_size)
    removal = -negative_key * view_heads(icl_rate, head_size)
    # k~ = k * lerp(1, a, alpha), the replacement key
    k = k * (1 + (icl_rate - 1) * per_channel(alpha, k))
    heads = (*k.shape[:2], *xi.shape)
    return (
        k.reshape(heads),
        negative_key.reshape(heads),
        removal.reshape(heads),
        icl_rate.reshape(heads),
    )


def read_out(
    y: Heads,
    r_k_v: tuple[Heads, Heads, Heads],
    gate: Activations,
    rho: Float[Array, "H N"],
    norm: tuple[Vector, Vector],
    eps: float,
) -> Activations:
    """Computes g * (norm(y) + u), with the bonus u = (r . (rho * k~)) v of the current token.

    Args:
        y: the recurrence's result.
        r_k_v: the recurrence's inputs r, k~ and v.
        gate: g, all channels.
        rho: weight of the bonus.
        norm: weight and bias of the norm of each head.
        eps: of the norm.
    """
    head_size = rho.shape[1]
    r, k, v = r_k_v
    r = view_heads(r, head_size)
    k = view_heads(k, head_size)
    v = view_heads(v, head_size)
    # The bonus is added after the norm, so y's magnitude does not affect it.
    normed = norms.group_norm(view_heads(y, head_size), *norm, eps, head_size=head_size)
    agreement = r * k * per_channel(rho.reshape(r.shape[2:]), r)
    strength = sum_heads(agreement, head_size, r.dtype)
    bonus = spread_over_heads(strength, head_size, r.dtype) * v
    return (normed + bonus).reshape(gate.shape) * gate


@jax.custom_jvp
def squared_relu(x: Float[Array, "... F"]) -> Float[Array, "... F"]:
    """Computes relu(x)^2."""
    return jnp.square(jax.nn.relu(x))


@squared_relu.defjvp
def _squared_relu_jvp(primals, tangents):
    (x,) = primals
    (change,) = tangents
    positive = jax.nn.relu(x)
    # By the rule of relu, XLA for TPU would also compute and store where x is positive.
    return jnp.square(positive), 2 * positive * change


def _with_bias(raw: Activations, bias: Vector) -> Float[Array, "B T D"]:
    """Adds a bias in float32."""
    wide = widened(raw)
    return wide + per_channel(bias, wide)
