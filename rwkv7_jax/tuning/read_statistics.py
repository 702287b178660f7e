"""How tuned memories are read: effective read vectors and their second moments."""

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float

from rwkv7_jax.array_types import Params
from rwkv7_jax.model.kernel_features import kernel_features
from rwkv7_jax.model.recurrence import Parts, _features_inputs, _paper_inputs, _wkv7
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import RWKV7State, Upscaled, repeat
from rwkv7_jax.training.losses import Batch, loss_weights
from rwkv7_jax.tuning.state_tuning import check_leaves


def initial_state_read_vectors(
    parts: Parts, *, implementation: str | None = None
) -> Float[Array, "B T H Nk"]:
    """psi, with which a WKV start state is read at every token: y_t = S_0 psi_t + what is not S_0.

    psi_t is the product of all transitions up to t, times r_t: what the op reads from the unit
    matrix when nothing is written.
    """
    rows, _, heads, size = parts["r"].shape
    start = jnp.broadcast_to(jnp.eye(size), (rows, heads, size, size))
    nothing = jnp.zeros_like(parts["r"])
    inputs = (parts["r"], parts["log_w"], nothing, nothing, parts["a"], parts["b"])
    return _wkv7(inputs, start, implementation=implementation)[0]


def memory_read_vectors(
    upscaled: Upscaled, parts: Parts, *, implementation: str | None = None
) -> Float[Array, "B T H M"]:
    """psi of the upscaled memory: phi(r) where it is static, faded and erased elsewhere."""
    if upscaled.dynamics == "static":
        return kernel_features(upscaled.features, parts["r"])
    make = _features_inputs if upscaled.readout is None else _paper_inputs
    return initial_state_read_vectors(make(upscaled, parts), implementation=implementation)


def second_moment(
    psi: Float[Array, "B T H M"], weights: Float[Array, "B T"]
) -> Float[Array, "1 H M M"]:
    """E[psi psi^T] per head over tokens weighted by `weights`, not centred."""
    psi = psi.astype(jnp.float32)
    total = jnp.einsum("bthm,bthn,bt->hmn", psi, psi, weights, precision="highest")
    return (total / jnp.maximum(jnp.sum(weights), 1e-9))[None]


def state_statistics(
    model: RWKV7, params: Params, *, leaves: tuple[str, ...] = ("wkv",), rows: int = 8
) -> Partial:
    """`statistics(state, batch)` for `decorrelate`: how the tuned memories are read.

    A memory is read linearly, y_t = S_0 psi_t + what does not depend on S_0 in this layer, so that
    E[psi psi^T] over the targets that count is what makes its tuning well or badly conditioned. The
    result is a state whose "wkv" [L 1 H Nk Nk] and "memory" [L 1 H M M] hold it where they are
    tuned, and None elsewhere.

    Args:
        model: the shell around `params`.
        params: all weights.
        leaves: what is tuned, of `LEAVES`.
        rows: rows of the batch that are looked at.

    Raises:
        ValueError: an unknown leaf.
    """
    check_leaves(leaves, caller="state_statistics")
    implementation = model.config.implementation

    def statistics(params: Params, state: RWKV7State, batch: Batch) -> RWKV7State:
        tokens = jnp.asarray(batch["tokens"])[:rows, :-1]
        weights = loss_weights(batch)[:rows]
        start = repeat(state, tokens.shape[0])
        *_, trace = model.apply({"params": params}, tokens, start, method="trace")

        def plain(parts, upscaled):
            reads = initial_state_read_vectors(parts, implementation=implementation)
            return second_moment(reads, weights)

        def wide(parts, upscaled):
            reads = memory_read_vectors(upscaled, parts, implementation=implementation)
            return second_moment(reads, weights)

        def by_layer(one):
            return jax.lax.map(lambda layer: one(*layer), (trace, state.upscaled))

        found = jax.tree.map(lambda _: None, state)
        if "wkv" in leaves:
            found = found.replace(wkv=by_layer(plain))
        if "memory" in leaves:
            found = found.replace(upscaled=found.upscaled.replace(memory=by_layer(wide)))
        return jax.lax.stop_gradient(found)

    return Partial(statistics, params)
