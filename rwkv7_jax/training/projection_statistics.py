"""How the inputs of the projections correlate, for training weights by DBP."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rwkv7_jax.array_types import Params
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import init_state
from rwkv7_jax.training.losses import Batch

# What each projection of a block acts on: its name in the model's trace.
INPUTS = {
    ("att", "receptance"): "receptance_input",
    ("att", "key"): "key_input",
    ("att", "value"): "value_input",
    ("att", "output"): "output_input",
    ("ffn", "key"): "ffn_key_input",
    ("ffn", "value"): "ffn_hidden",
}


def projections(params: Params) -> Params:
    """The tree of which weights are projections inside a block: a mask for `decorrelate`."""

    def chosen(path, _) -> bool:
        block, *inside = (key.key for key in path)
        return block in ("layer_0", "layers") and tuple(inside[:2]) in INPUTS

    return jax.tree_util.tree_map_with_path(chosen, params)


def _moment(x: Float[Array, "L B T I"]) -> Float[Array, "L I I"]:
    """E[x x^T] of every layer over rows and tokens, not centred."""
    x = x.astype(jnp.float32)
    total = jnp.einsum("lbti,lbtj->lij", x, x, precision="highest")
    return total / (x.shape[1] * x.shape[2])


def layer_statistics(model: RWKV7, *, rows: int = 8) -> Callable[[Params, Batch], Params]:
    """`statistics(params, batch)` for `decorrelate`: second moments of the projections' inputs.

    The result is a tree like the weights, with E[x x^T] for the six projections of every block and
    None elsewhere (tables, norms and low-rank maps). It costs a second forward pass over `rows`
    rows. With `decorrelate(..., mask=projections)` this is decorrelated backpropagation for
    training weights; unlike there, a new R does not change what the model computes.

    Args:
        model: the shell around the weights.
        rows: rows of the batch that are looked at.

    Source: arXiv 2405.02385.
    """

    def statistics(params: Params, batch: Batch) -> Params:
        tokens = jnp.asarray(batch["tokens"])[:rows, :-1]
        start = init_state(model.config, tokens.shape[0])
        *_, trace = model.apply({"params": params}, tokens, start, method="trace")
        found = jax.tree.map(lambda _: None, params)
        for (part, name), source in INPUTS.items():
            moment = _moment(trace[source])
            found["layer_0"][part][name] = {"weight": moment[0]}
            if "layers" in found:
                found["layers"][part][name] = {"weight": moment[1:]}
        return jax.lax.stop_gradient(found)

    return statistics
