"""The choice of results that a block keeps for its backward pass; the others are computed again."""

from collections.abc import Callable

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from pallas_kernels import RESULTS
from rwkv7_jax.model.time_shards import RECEIVED

# The name of matrix products' results. By JAX's own policy for products, the sums over heads would
# be kept too, which are products on TPU alone and cheap there.
_PRODUCT = "rwkv7 product"

# What other devices sent is small, and to send it again would take longer.
_OP = jax.checkpoint_policies.save_only_these_names(RESULTS, RECEIVED)
_PRODUCTS = jax.checkpoint_policies.save_only_these_names(_PRODUCT, RESULTS, RECEIVED)

# By the names of `RWKV7Config.remat`. Weights that were gathered from shards are never kept.
_KEPT = {"none": _PRODUCTS, "op": _OP, "block": None}

CHOICES = tuple(_KEPT)


def name_product(x: Array) -> Array:
    """Names the result of a matrix product, so that "none" keeps it."""
    return checkpoint_name(x, _PRODUCT)


def keep_for_backward(block: Callable, remat: str, *, is_scanned: bool) -> Callable:
    """Wraps a class of modules so that it keeps, of what it computes, what `remat` says.

    Its inputs are always kept.

    Args:
        block: the class.
        remat: "none" keeps the results of matrix products and of the WKV op; "op", those of the WKV
            op; "block", nothing.
        is_scanned: whether the block is inside of a scan over layers. XLA cannot merge its two
            passes then; elsewhere it would, and keep the first pass's results until the last
            gradient, unless a barrier is between the two.
    """
    return nn.remat(block, prevent_cse=not is_scanned, policy=_KEPT[remat])
