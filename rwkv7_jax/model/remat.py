"""The choice of results that a block saves for its backward pass; the others are recomputed."""

from collections.abc import Callable

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from pallas_kernels import RESULTS
from rwkv7_jax.model.time_shards import RECEIVED

# The name of the results of matrix products. JAX's own policy for products would also save the sums
# over heads, which are products on TPU and cheap.
_PRODUCT = "rwkv7 product"

# Data received from other devices is small, and sending it again would take longer.
_OP = jax.checkpoint_policies.save_only_these_names(RESULTS, RECEIVED)
_PRODUCTS = jax.checkpoint_policies.save_only_these_names(_PRODUCT, RESULTS, RECEIVED)

# By the names of `RWKV7Config.remat`. Weights that were gathered from shards are never saved.
_KEPT = {"none": _PRODUCTS, "op": _OP, "block": None}

CHOICES = tuple(_KEPT)


def name_product(x: Array) -> Array:
    """Names the result of a matrix product, so that "none" saves it."""
    return checkpoint_name(x, _PRODUCT)


def keep_for_backward(block: Callable, remat: str, *, is_scanned: bool) -> Callable:
    """Wraps a module class so that it saves the results that `remat` names.

    Its inputs are always saved.

    Args:
        block: the class.
        remat: "none" saves the results of matrix products and of the WKV op; "op", those of the WKV
            op; "block", nothing.
        is_scanned: whether the block is inside a scan over layers. Outside of one a barrier is
            needed: XLA would merge the recomputation with the forward pass, and keep its results
            until the last gradient.
    """
    return nn.remat(block, prevent_cse=not is_scanned, policy=_KEPT[remat])
