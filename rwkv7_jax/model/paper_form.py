"""The paper's kernel method, which replaces the WKV state: every vector becomes its features.

    S_t = S_{t-1} (diag(phi(w)) - phi(k) (phi(a) phi(k))^T) + phi(v) phi(k)^T,   y_t = Q S_t phi(r)

S is [M M], a the in-context learning rate and Q a fixed map. The removal key is that of the write,
as printed, where RWKV-7 has one of its own.

The additive forms in `upscaled_memory` leave the model as it was while their memory is empty. This
form does not: it is kept for comparison with the paper.

Source: arXiv 2504.05097, section 3.2.
"""

import jax.numpy as jnp

from pallas_kernels import WKVInputs
from rwkv7_jax.array_types import Heads
from rwkv7_jax.model.kernel_features import (
    Features,
    kernel_features,
    unit_features,
)

# Centred features may be negative, a decay may not: its logarithm is taken of at least this.
_SMALLEST_DECAY = 1e-30


def paper_inputs(
    features: Features,
    inputs: WKVInputs,
    icl_rate: Heads,
    *,
    unit_keys: bool,
) -> WKVInputs:
    """Replaces r, w, k, v and the in-context learning rate by features of themselves.

    Args:
        features: the layer's features, without the axis L.
        inputs: the layer's inputs, with N channels a head.
        icl_rate: the in-context learning rate.
        unit_keys: scale the removal keys to length 1, without which the state can diverge.

    Returns:
        Inputs with M channels a head.
    """
    r = kernel_features(features, inputs.r)
    k = kernel_features(features, inputs.k)
    v = kernel_features(features, inputs.v)
    rate = kernel_features(features, icl_rate)
    # The paper maps the decay itself, so it is taken out of the logarithm and put back below.
    w = kernel_features(features, jnp.exp(inputs.log_w.astype(jnp.float32)))
    removal_key = unit_features(k) if unit_keys else k
    return WKVInputs(
        r=r,
        log_w=jnp.log(jnp.maximum(w, _SMALLEST_DECAY)),
        k=k,
        v=v,
        a=-removal_key,
        b=removal_key * rate,
    )
