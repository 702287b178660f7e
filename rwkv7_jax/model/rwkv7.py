"""RWKV-7 as a thin Linen shell, which declares parameters and calls pure functions.

Parameter paths are the official checkpoint names: `emb`, `ln0`, the blocks, `ln_out`, `head`. The
first block is `layer_0`; the weights of the others are stacked under `layers` and scanned. `ln0`
belongs to the embedding. The equations are in `block`.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array

from pallas_kernels.eager import is_eager
from pallas_kernels.wkv7 import explain_forward_mode
from rwkv7_jax import sharding
from rwkv7_jax.array_types import Activations, Lengths, Logits, SegmentIds, Tokens
from rwkv7_jax.checks import (
    as_array,
    check_choice,
    check_instance,
    check_params,
    check_placed,
    is_intercepted,
    prefix_errors,
)
from rwkv7_jax.model import initializers as initial
from rwkv7_jax.model import inputs, products, time_shards
from rwkv7_jax.model.block import BY_HEADS, TRACE, Block, Norm
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.model.layer_states import state_after
from rwkv7_jax.model.remat import keep_for_backward
from rwkv7_jax.model.segments import Segments, check_packed_state, find_segments
from rwkv7_jax.model.state import RWKV7State, check_state
from rwkv7_jax.model.weights import get_weight


class RWKV7(nn.Module):
    """The model: `apply({"params": params}, tokens, state) -> (logits, state)`.

    Nothing is mutable: the memory is an argument and a result, an `RWKV7State`. Activations have
    `config.dtype`; logits and the WKV state are float32.

    Under a mesh (`sharding.use_mesh`) each device runs the model on its own rows and, with a
    `tensor` axis, its own heads. Sharded weights are gathered block by block.
    """

    config: RWKV7Config

    def __post_init__(self):
        """Checks the config: a dict, or a preset's name, would fail only inside `apply`."""
        with prefix_errors("RWKV7"):
            check_instance(self.config, RWKV7Config, "`config`")
        super().__post_init__()

    @nn.nowrap
    def apply(self, variables: Any, *arguments: Any, **named: Any) -> Any:
        """Runs a method, by default the call, with the weights `variables["params"]`.

        Raises:
            TypeError: the variables or the weights are not a dict.
            ValueError: the weights are missing or have other sizes, or the mesh does not divide the
                heads.
        """
        # Flax's own errors speak of scopes and collections.
        with prefix_errors("RWKV7"):
            if not isinstance(variables, Mapping):
                kind = type(variables).__name__
                raise TypeError(
                    f'`variables` must be a dict, {{"params": params}}; got {kind}.'
                )
            if "params" not in variables:
                names = ", ".join(map(str, variables)) or "nothing"
                raise ValueError(
                    f'`variables` must hold the weights, {{"params": params}}; got {names}.'
                )
            # Flax's transforms make subclasses, whose weights may be those of several models.
            if type(self) is RWKV7:
                check_params(variables["params"], self.config)
                check_placed(variables["params"], "`params`")
            sizes = sharding.mesh_sizes()
            parts = sizes.get(sharding.TENSOR, 1)
            sharding.check_shared_heads(self.config, parts, "the mesh of the program")
        with explain_forward_mode():
            if sizes:
                return self._apply_on_each(variables, *arguments, **named)
            return super().apply(variables, *arguments, **named)

    @nn.nowrap
    def init(self, rngs: Any, *arguments: Any, **named: Any) -> Any:
        """Draws new weights, `{"params": params}`, in one compiled program.

        Args:
            rngs: a random key.
            *arguments: of the call: tokens of any shape [B T] and a state of B rows.
            **named: as in `flax.linen.Module.init`.

        Raises:
            ValueError: vectors in place of ids, which would leave the table `emb` uninitialized.
        """
        if arguments and np.ndim(arguments[0]) == 3:
            raise ValueError("RWKV7.init: `tokens` must be ids [B T]; got vectors.")
        if named or len(arguments) != 2 or is_intercepted() or not is_eager():
            return super().init(rngs, *arguments, **named)
        tokens, state = arguments
        tokens, *_ = self._checked(tokens, state, None, None)
        return _init_compiled(self, rngs, tokens, state)

    @nn.nowrap
    def _apply_on_each(
        self,
        variables: Mapping[str, Any],
        tokens: Any,
        state: Any,
        lengths: Any = None,
        segment_ids: Any = None,
        *,
        method: str | Callable | None = None,
        **static: Any,
    ) -> Any:
        """Runs a method on each device with its own rows and sharded weights."""
        # Checked here, where shapes are the caller's and ids are concrete.
        tokens, lengths, _ = self._checked(tokens, state, lengths, segment_ids)
        apply = super().apply
        sizes = sharding.mesh_sizes()
        rows = sharding.row_axes(tokens.shape[0], sizes) or None
        length = tokens.shape[1]
        time = _token_axis(sizes, segment_ids)
        if time is not None:
            tokens, lengths = time_shards.fill_up(tokens, lengths, sizes[time])
        weights = sharding.specs(sizes, variables)
        of_rows = PartitionSpec(rows)
        of_tokens = PartitionSpec(rows, time)
        of_states = _state_specs(state, rows)
        results: list[Any] = [of_tokens, of_states]
        if getattr(method, "__name__", method) in ("trace", "hidden_with_trace"):
            results.append(_trace_specs(static.get("names", TRACE), rows, time, sizes))

        def run(variables, tokens, state, lengths, segment_ids):
            shards = sharding.as_shards(variables, weights)
            if time and lengths is not None:
                lengths = time_shards.local_lengths(lengths, tokens.shape[1], time)
            inputs = (tokens, state, lengths, segment_ids)
            with sharding.tokens_along(time):
                return apply(shards, *inputs, method=method, **static)

        outputs = sharding.on_each(
            run,
            variables,
            tokens,
            state,
            lengths,
            segment_ids,
            takes=(weights, of_tokens, of_states, of_rows, of_tokens),
            gives=tuple(results),
        )
        if tokens.shape[1] == length:
            return outputs
        return _without_padding(outputs, length)

    def __call__(
        self,
        tokens: Tokens | Activations,
        state: RWKV7State,
        lengths: Lengths | None = None,
        segment_ids: SegmentIds | None = None,
    ) -> tuple[Logits, RWKV7State]:
        """Computes the next-token logits at every position and the state after the last token.

        Args:
            tokens: ids below `config.vocab_size`; T may be 0. Concrete ids are checked. Traced ones
                are not: ids out of range are embedded as zeros. Vectors [B T D] may take the place
                of the ids' rows in the table `emb`, for example a trained prompt.
            state: the start state, with one row for each row of `tokens`.
            lengths: the number of real tokens of each row; padding is on the right. The logits of
                padding are meaningless, and the returned state is the one after the last real
                token. Traced lengths are clipped to 0 and T.
            segment_ids: the sequence of each token, where K sequences share a row, one after
                another; numbered from 0 in each row and not decreasing. The state has K rows for
                each row of tokens, one per sequence in order. Each sequence gives the same result
                as in a row of its own. All sequences must share an upscaled memory.

        Raises:
            ValueError: ids or lengths out of range, or a state or weights of other sizes.
            TypeError: ids that are not integers, or a WKV state that is not float32.
        """
        logits, state, _ = self._run(tokens, state, lengths, segment_ids)
        return logits, state

    def hidden(
        self,
        tokens: Tokens | Activations,
        state: RWKV7State,
        lengths: Lengths | None = None,
        segment_ids: SegmentIds | None = None,
    ) -> tuple[Activations, RWKV7State]:
        """Works as the call, but returns the normed input of the head instead of logits."""
        x, state, _ = self._run(tokens, state, lengths, segment_ids, project=False)
        return x, state

    def trace(
        self,
        tokens: Tokens | Activations,
        state: RWKV7State,
        lengths: Lengths | None = None,
        segment_ids: SegmentIds | None = None,
        *,
        names: Sequence[str] = TRACE,
    ) -> tuple[Logits, RWKV7State, dict[str, Array]]:
        """Works as the call, and also returns arrays of all layers, [L B T ...].

        Args:
            tokens: as in the call, as are the next three.
            state: see tokens.
            lengths: see tokens.
            segment_ids: see tokens.
            names: of the arrays, from `TRACE`.

        Raises:
            TypeError: a string in place of several, or as in the call.
            ValueError: an unknown name, or as in the call.
        """
        return self._run(tokens, state, lengths, segment_ids, names=names)

    def hidden_with_trace(
        self,
        tokens: Tokens | Activations,
        state: RWKV7State,
        lengths: Lengths | None = None,
        segment_ids: SegmentIds | None = None,
        *,
        names: Sequence[str] = TRACE,
    ) -> tuple[Activations, RWKV7State, dict[str, Array]]:
        """Works as `hidden`, and also returns the arrays `names`, as `trace` does."""
        return self._run(
            tokens, state, lengths, segment_ids, names=names, project=False
        )

    def _run(
        self,
        tokens,
        state,
        lengths,
        segment_ids,
        *,
        names=(),
        project=True,
    ):
        with prefix_errors("RWKV7"):
            if self.scope is None:
                raise ValueError(
                    'it must be called by `apply({"params": params}, tokens, state)`, because it '
                    "holds no weights."
                )
            # A single string is a common mistake, and is a sequence of letters.
            if isinstance(names, str):
                raise TypeError(
                    f'`names` must be a tuple of names, such as ("r",); got {names!r}.'
                )
            for name in names:
                check_choice(name, TRACE, "`names`")
        names = tuple(names)
        tokens, lengths, segments = self._checked(tokens, state, lengths, segment_ids)
        arguments = (tokens, state, lengths, segments)
        # A module writes variables while it is initialised or records intermediates.
        writes = self.is_initializing() or self.is_mutable_collection("intermediates")
        # A program that is kept would ignore interceptors, or keep them for later calls.
        if writes or is_intercepted() or not is_eager():
            return self._pass(*arguments, names, project)
        model = self.clone(parent=None)
        return _run_compiled(model, self.variables, arguments, names, project)

    @nn.compact
    def _pass(
        self,
        tokens,
        state,
        lengths,
        segments: Segments | None,
        names: tuple[str, ...],
        project: bool,
    ):
        config = self.config
        x = tokens if tokens.ndim == 3 else Embedding(config, name="emb")(tokens)
        x = Norm(config, name="ln0")(x.astype(config.dtype))
        x, memories, trace = self._blocks(x, state, lengths, segments, names)
        x = Norm(config, name="ln_out")(x)
        if project:
            x = _with_gathered_weights(Head, self, "head")(config, name="head")(x)
        return x, state_after(state, memories), trace

    @nn.nowrap
    def _checked(
        self, tokens: Any, state: Any, lengths: Any, segment_ids: Any
    ) -> tuple[Any, Any, Segments | None]:
        """Checks the arguments of a call; returns tokens, safe lengths and segments."""
        config = self.config
        with prefix_errors("RWKV7"):
            tokens = as_array(tokens, "`tokens`")
            inputs.check_inputs(tokens, config)
            rows_and_tokens = tokens.shape[:2]
            if lengths is not None:
                lengths = inputs.safe_lengths(lengths, rows_and_tokens)
            segments = None
            # Under tensor parallelism the whole state was checked before it was split.
            if not sharding.shares_heads():
                if segment_ids is None:
                    check_state(state, tokens.shape[0], config)
                else:
                    check_packed_state(state, config)
            sharding.refuse_checked_axes((tokens, state))
            if segment_ids is not None:
                segments = find_segments(
                    segment_ids, lengths, rows_and_tokens, state.batch
                )
        return tokens, lengths, segments

    def _blocks(
        self,
        x: Activations,
        state: RWKV7State,
        lengths,
        segments,
        names: tuple[str, ...],
    ):
        """Runs all layers: the first one, then a scan over the stacked weights of the others.

        Returns:
            The residual stream; the memories and the trace, stacked over layers.
        """
        config = self.config
        block = _with_gathered_weights(Block, self, "layer_0", "layers")

        # Layer 0 is outside the scan: it has no value residual, so its parameters differ.
        first_state = jax.tree.map(lambda leaf: leaf[0], state)
        first_block = keep_for_backward(block, config.remat, is_scanned=False)(
            config, True, names, name="layer_0"
        )
        x, (first_memories, v_first, first_trace) = first_block(
            x, first_state, 0, None, lengths, segments
        )
        # Adds an axis L of 1, to concatenate with the arrays that the scan stacks.
        stacked = jax.tree.map(lambda leaf: leaf[None], (first_memories, first_trace))
        if config.num_layers == 1:
            return x, *stacked

        # The state and the layer's index are scanned over. v_first is broadcast: as a carry it
        # would be saved once per layer.
        in_axes: Any = (0, 0, nn.broadcast, nn.broadcast, nn.broadcast)
        scanned = nn.scan(
            keep_for_backward(block, config.remat, is_scanned=True),
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=in_axes,
            length=config.num_layers - 1,
        )
        other_states = jax.tree.map(lambda leaf: leaf[1:], state)
        other_blocks = scanned(config, False, names, name="layers")
        index = jnp.arange(1, config.num_layers, dtype=jnp.int32)
        x, (other_memories, _, other_trace) = other_blocks(
            x, other_states, index, v_first, lengths, segments
        )
        memories, trace = jax.tree.map(
            lambda first, others: jnp.concatenate([first, others]),
            stacked,
            (other_memories, other_trace),
        )
        return x, memories, trace


def _token_axis(sizes: Mapping[str, int], segment_ids: Any) -> str | None:
    """Returns the mesh axis that shards the tokens of a row, or None."""
    count = sizes.get(sharding.SEQUENCE, 1)
    if count == 1:
        return None
    if segment_ids is not None:
        raise ValueError(
            "RWKV7: `segment_ids` must be None on a mesh that shards the tokens of a row; "
            f"got a mesh with sequence={count}."
        )
    return sharding.SEQUENCE


def _without_padding(outputs: tuple[Any, ...], length: int) -> tuple[Any, ...]:
    """Drops the tokens after the first `length` from a method's results."""
    x, end, *traces = outputs
    traces = jax.tree.map(lambda leaf: leaf[:, :, :length], traces)
    return x[:, :length], end, *traces


def _state_specs(state: RWKV7State, rows: Any) -> RWKV7State:
    """Returns the specs of a state's leaves; leaves with one shared row are replicated."""

    def with_rows(leaf: Any, heads: PartitionSpec) -> PartitionSpec:
        own = rows if leaf.shape[1] == state.batch else None
        return PartitionSpec(None, own, *heads[2:])

    by_heads = sharding.specs(sharding.mesh_sizes(), state)
    return jax.tree.map(with_rows, state, by_heads)


def _trace_specs(
    names: Iterable[str], rows: Any, time: Any, sizes: Mapping[str, int]
) -> dict[str, Any]:
    """Returns the specs of a trace's arrays, [L B T ...]."""
    tensor = sharding.TENSOR if sharding.TENSOR in sizes else None
    specs = {}
    for name in names:
        heads = tensor if name in BY_HEADS else None
        specs[name] = PartitionSpec(None, rows, time, heads)
    return specs


# Without `jit`, Flax would run the whole model eagerly.
@functools.partial(jax.jit, static_argnums=0)
def _init_compiled(model: RWKV7, rngs: Any, tokens: Tokens, state: RWKV7State) -> Any:
    """Draws the weights of a model in an eager call."""
    return nn.Module.init(model, rngs, tokens, state)


# Compiled once for its sizes. In an eager call the scan over layers would be compiled every time,
# because Flax makes a new body, and JAX would cache all of these programs.
@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def _run_compiled(
    model: RWKV7,
    variables: Any,
    arguments: tuple[Any, ...],
    names: tuple[str, ...],
    project: bool,
):
    """Runs a model in an eager call; the arguments were checked."""
    # Flax's `apply`, without the model's checks: a parent that never runs the head has no weights
    # for it.
    apply = functools.partial(nn.Module.apply, model, variables)
    return apply(*arguments, names, project, method="_pass")


def _with_gathered_weights(module: Callable, parent: RWKV7, *names: str) -> Callable:
    """Wraps a module class so that its sharded weights are gathered when it is called.

    Args:
        module: the class.
        parent: the module that holds the weights.
        *names: of the submodules.
    """
    weights = parent.variables.get("params", {})
    if not sharding.has_shards([weights.get(name) for name in names]):
        return module
    gather = functools.partial(
        sharding.gather_shards, dtype=jnp.dtype(parent.config.dtype)
    )
    return nn.map_variables(module, "params", trans_in_fn=gather)


class Embedding(nn.Module):
    """The table of token vectors."""

    config: RWKV7Config

    @nn.compact
    def __call__(self, tokens: Tokens) -> Activations:
        """Looks up the tokens' rows of the table; ids out of range get zeros."""
        if self.has_variable("params", "weight"):
            table = self.get_variable("params", "weight")
            if sharding.has_shards(table):
                return sharding.look_up(inputs.embed, tokens, table)
        shape = (self.config.vocab_size, self.config.width)
        table = get_weight(self, "weight", initial.uniform(1e-4), shape, 0, self.config)
        return inputs.embed(tokens, jnp.asarray(table))


class Head(nn.Module):
    """The output projection."""

    config: RWKV7Config

    @nn.compact
    def __call__(self, x: Activations) -> Logits:
        """Computes float32 logits."""
        shape = (self.config.vocab_size, self.config.width)
        matrix = get_weight(self, "weight", initial.head, shape, 0, self.config)
        return products.head_logits(x, matrix)
