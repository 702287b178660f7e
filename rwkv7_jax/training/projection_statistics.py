"""Second moments of the projections' inputs, for training weights by DBP."""

import dataclasses
import typing
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from rwkv7_jax.array_types import Params
from rwkv7_jax.checks import check_choice, check_count, check_model, prefix_errors
from rwkv7_jax.data.batch import Batch, BatchLike
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import init_state
from rwkv7_jax.optim.decorrelation import METHODS, Decorrelator, Method, decorrelate
from rwkv7_jax.training.shared_pass import hidden_of_batch

# For each projection of a block, the name of its input in the model's trace.
INPUTS = {
    ("att", "receptance"): "receptance_input",
    ("att", "key"): "key_input",
    ("att", "value"): "value_input",
    ("att", "output"): "output_input",
    ("ffn", "key"): "ffn_key_input",
    ("ffn", "value"): "ffn_hidden",
}


def projections(params: Params) -> Params:
    """Builds the mask of the blocks' projections, for `decorrelate`."""

    def is_projection(path, _) -> bool:
        block, *inside = (key.key for key in path)
        return block in ("layer_0", "layers") and tuple(inside[:2]) in INPUTS

    return jax.tree_util.tree_map_with_path(is_projection, params)


def _second_moment(x: Float[Array, "L B T I"]) -> Float[Array, "L I I"]:
    """Averages x x^T of every layer over rows and tokens, without centring."""
    x = x.astype(jnp.float32)
    total = jnp.einsum("lbti,lbtj->lij", x, x, precision="highest")
    return total / (x.shape[1] * x.shape[2])


@dataclasses.dataclass(frozen=True)
class _LayerStatistics:
    """The function that `layer_statistics` makes.

    Attributes:
        model: the shell around the weights.
        rows: rows of the batch that are read.
        names: of arrays in the model's trace.
    """

    model: RWKV7
    rows: int
    names: tuple[str, ...] = tuple(INPUTS.values())

    def __call__(self, params: Params, batch: BatchLike) -> Params:
        """Measures the moments in a separate forward pass."""
        with prefix_errors("layer_statistics"):
            batch = Batch.of(batch, packed=True).select_rows(slice(self.rows))
            if not batch.inputs.size:
                raise ValueError(
                    "`batch.tokens` must hold at least one input token; got shape "
                    f"{tuple(batch.tokens.shape)}."
                )
        start = init_state(self.model.config, batch.sequences)
        _, trace = hidden_of_batch(self.model, params, start, batch, self.names)
        return self.of_trace(params, batch, trace)

    def of_trace(
        self, params: Params, batch: BatchLike, trace: dict[str, Array]
    ) -> Params:
        """Measures the moments in the trace of a batch, at all positions."""
        del batch
        moments: Any = jax.tree.map(lambda _: None, params)
        for (part, name), source in INPUTS.items():
            moment = _second_moment(trace[source][:, : self.rows])
            moments["layer_0"][part][name] = {"weight": moment[0]}
            if "layers" in moments:
                moments["layers"][part][name] = {"weight": moment[1:]}
        return jax.lax.stop_gradient(moments)


def layer_statistics(
    model: RWKV7, *, rows: int = 8
) -> Callable[[Params, BatchLike], Params]:
    """Makes the function that measures the second moments of the projections' inputs.

    The function is called as `statistics(params, batch)` and returns a tree like the weights, with
    E[x x^T] for the six projections of every block and None elsewhere (tables, norms and low-rank
    maps). Alone it costs a forward pass over `rows` rows; in a train step of the same model's
    `pretrain_loss` it uses the loss's forward pass if it reads at least half as many rows as a
    device computes. With `decorrelate(..., mask=projections)` this is decorrelated backpropagation
    for training weights. Unlike in the paper, updating R does not change the outputs of the model.

    Args:
        model: the shell around the weights.
        rows: rows of the batch that are read.

    Raises:
        TypeError: not a model, or rows that are not an integer.
        ValueError: rows below 1; from the function, a batch without an input token.

    Source: arXiv 2405.02385.
    """
    with prefix_errors("layer_statistics"):
        check_model(model)
        check_count(rows, 1, "`rows`")
    return _LayerStatistics(model, rows)


def weight_decorrelator(
    model: RWKV7, *, method: str = "dbp", rows: int = 8, **numbers: Any
) -> Decorrelator:
    """Prepares decorrelated training of all weights: the optimizer's wrapper and its statistics.

    The projections of the blocks are decorrelated; the updates of all other weights do not change.
    The wrapped optimizer may contain weight decay, which acts on the weights themselves.

    Args:
        model: the shell around the weights.
        method: "none", "dbp" (learned online) or "whiten" (once, from the first batch).
        rows: rows of the batch that are read.
        **numbers: further settings of `decorrelate`, such as `rate` and `damping`.

    Raises:
        ValueError: an unknown method; from `wrap`, a number out of its range.
    """
    with prefix_errors("weight_decorrelator"):
        check_choice(method, METHODS, "`method`")
        check_count(rows, 1, "`rows`")
    mode = METHODS[typing.cast(Method, method)]
    if mode is None:
        return Decorrelator(wrap=lambda tx: tx)

    def wrap(tx: optax.GradientTransformation) -> optax.GradientTransformation:
        return decorrelate(tx, mode=mode, mask=projections, turn_params=True, **numbers)

    return Decorrelator(wrap, layer_statistics(model, rows=rows))
