"""The state, a pytree that holds everything an RWKV-7 remembers.

Every leaf is [L B ...]. Leaves that all sequences share, such as a static upscaled memory, may have
B = 1 in a larger batch.
"""

import functools
import json
import operator
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float

from rwkv7_jax.array_types import describe_fields
from rwkv7_jax.checks import (
    as_array,
    check_count,
    check_indices,
    check_instance,
    check_not_donated,
    is_traced,
    prefix_errors,
)
from rwkv7_jax.model.casts import at_least_int32
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.model.kernel_features import Features
from rwkv7_jax.model.upscaled_memory import (
    Upscaled,
    check_form,
    check_memory_types,
)


# Not checked at run time, for the reason given at `Features`; `check_state` does it instead.
@typing.no_type_check
@struct.dataclass
class RWKV7State:
    """The memory of a batch of sequences in all layers.

    One layer's part of it has the same type, without the axis L.

    Attributes:
        att_shift: the last token's first-norm output of each layer, in the activations' dtype.
        wkv: the recurrent states, float32: rows are value channels, columns are key channels.
        ffn_shift: the last token's second-norm output of each layer, in the activations' dtype.
        upscaled: an additional memory that is read through kernel features, or None.
    """

    att_shift: Float[Array, "L B D"]
    wkv: Float[Array, "L B H Nv Nk"]
    ffn_shift: Float[Array, "L B D"]
    upscaled: Upscaled | None = None

    __repr__ = describe_fields

    if typing.TYPE_CHECKING:

        def replace(self, **changes: Any) -> "RWKV7State":
            """Returns a copy with other values of some fields."""
            ...

    @property
    def batch(self) -> int:
        """The number of sequences (B)."""
        return self.wkv.shape[1]


def init_state(config: RWKV7Config, batch: int = 1) -> RWKV7State:
    """Makes the state of `batch` sequences before any token: zeros.

    Raises:
        TypeError: not an `RWKV7Config`, or a batch that is not an integer.
        ValueError: a negative batch.
    """
    with prefix_errors("init_state"):
        check_instance(config, RWKV7Config, "`config`")
        _check_batch(batch)
    shapes = _leaf_shapes(config, batch)
    return RWKV7State(
        att_shift=jnp.zeros(shapes["att_shift"], config.dtype),
        wkv=jnp.zeros(shapes["wkv"], jnp.float32),
        ffn_shift=jnp.zeros(shapes["ffn_shift"], config.dtype),
    )


def _check_batch(batch: Any) -> None:
    """Checks a number of sequences, which may be a symbolic dimension of `jax.export`."""
    if not jax.export.is_symbolic_dim(batch):
        check_count(batch, 0, "`batch`")


def _leaf_shapes(config: RWKV7Config, batch: int) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the leaves that every state has."""
    shift = (config.num_layers, batch, config.width)
    head = (config.head_size, config.head_size)
    heads = (config.num_layers, batch, config.num_heads, *head)
    return {"att_shift": shift, "wkv": heads, "ffn_shift": shift}


def _shape_of(leaf: Any, argument: str) -> tuple[int, ...]:
    """Returns the shape of an array, a tracer or a `jax.ShapeDtypeStruct`; raises for others."""
    # Tensors of PyTorch have dtypes of another kind.
    if not isinstance(getattr(leaf, "dtype", None), np.dtype):
        raise TypeError(f"{argument} must be an array; got {type(leaf).__name__}.")
    return tuple(leaf.shape)


def check_state(state: RWKV7State, batch: int, config: RWKV7Config) -> None:
    """Checks that a state matches a model and a batch; works on arrays, tracers and shapes.

    Args:
        state: the state to check.
        batch: the number of sequences it must hold.
        config: the model's configuration.

    Raises:
        TypeError: not an `RWKV7State`, or the WKV state is not float32.
        ValueError: a leaf has the wrong shape, or an upscaled memory has an unknown form.
    """
    with prefix_errors("check_state"):
        check_instance(state, RWKV7State, "`state`")
        check_not_donated(state, "`state`")
        check_instance(config, RWKV7Config, "`config`")
        _check_batch(batch)
        shapes = _leaf_shapes(config, batch)
        for name, shape in shapes.items():
            came = _shape_of(getattr(state, name), f"`state.{name}`")
            if came != shape:
                raise ValueError(
                    f"`state.{name}` must have shape {shape} "
                    f"(layers {config.num_layers}, batch {batch}, ...); got {came}."
                )
        # In bfloat16, products of thousands of decays lose all precision.
        if state.wkv.dtype != jnp.float32:
            raise TypeError(f"`state.wkv` must be float32; got {state.wkv.dtype}.")
        check_memory_types(state.upscaled, "`state.upscaled`")
        if state.upscaled is not None:
            _check_upscaled(state.upscaled, shapes["wkv"])


def _check_upscaled(upscaled: Upscaled, heads: tuple[int, ...]) -> None:
    check_form(upscaled.dynamics, upscaled.features.kind)
    form = upscaled.form
    if (upscaled.readout is not None) != form.replaces_wkv:
        needed = "given" if form.replaces_wkv else "None"
        raise ValueError(
            f"`state.upscaled.readout` must be {needed} for dynamics {upscaled.dynamics!r}."
        )

    layers, batch, count, size, _ = heads
    width = upscaled.memory.shape[-1]
    lead = (layers, batch, count)
    shapes = {
        "memory": (*lead, width if form.replaces_wkv else size, width),
        "write": lead,
        "readout": (*lead, size, width),
        "features.landmarks": (*lead, width, size),
        "features.widths": (*lead, width),
        "features.mean": (*lead, width),
        "features.map": (*lead, width, width),
    }
    for name, wanted in shapes.items():
        leaf = operator.attrgetter(name)(upscaled)
        if leaf is None:
            continue
        came = tuple(leaf.shape)
        shared = (layers, 1, *wanted[2:])
        # Sequences may share leaves that never change in context.
        may_be_shared = name != "memory" or not form.has_own_rows
        if came == wanted or (may_be_shared and came == shared):
            continue
        raise ValueError(
            f"`state.upscaled.{name}` must have shape {wanted}; got {came}."
        )


def _map_batch(change: Callable, state: RWKV7State, *others: RWKV7State) -> RWKV7State:
    """Applies `change` to every leaf with a row per sequence; shared leaves stay as they are.

    `change` takes one leaf of each state.
    """
    states = (state, *others)
    upscaled = _map_batch_upscaled(change, states)
    return _map_plain_leaves(change, states).replace(upscaled=upscaled)


def _map_plain_leaves(change: Callable, states: Sequence[RWKV7State]) -> RWKV7State:
    """Calls `change` with the leaves that every state has; the result is not upscaled."""
    return jax.tree.map(change, *[state.replace(upscaled=None) for state in states])


def _map_field(change: Callable, memories: Sequence[Upscaled], name: str) -> Array:
    """Calls `change` with one field of every upscaled memory."""
    return change(*[getattr(memory, name) for memory in memories])


def _map_batch_upscaled(
    change: Callable, states: Sequence[RWKV7State]
) -> Upscaled | None:
    state = states[0]
    if state.upscaled is None:
        return None

    # In a batch of one, the shape does not tell which leaves are shared. All count as shared, since
    # rows that are added later can share them; a memory that changes cannot be shared.
    def change_own(leaf, *more):
        is_shared = leaf.shape[1] != state.batch or state.batch == 1
        return leaf if is_shared else change(leaf, *more)

    memories = _upscaled_of(states)
    upscaled = jax.tree.map(change_own, *memories)
    if state.upscaled.form.has_own_rows:
        upscaled = upscaled.replace(memory=_map_field(change, memories, "memory"))
    return upscaled


def _upscaled_of(states: Sequence[RWKV7State]) -> list[Upscaled]:
    memories = []
    for state in states:
        assert state.upscaled is not None, (
            "All states must have an upscaled memory, or none."
        )
        memories.append(state.upscaled)
    return memories


def repeat(state: RWKV7State, batch: int) -> RWKV7State:
    """Repeats the single sequence of a state `batch` times.

    Raises:
        TypeError: not an `RWKV7State`, or a batch that is not an integer.
        ValueError: `state` does not hold exactly one sequence, or a negative batch.
    """
    with prefix_errors("repeat"):
        check_whole_state(state, "`state`")
        _check_batch(batch)
        if state.batch != 1:
            raise ValueError(f"`state` must hold one sequence; got {state.batch}.")
    return _map_batch(
        lambda x: jnp.broadcast_to(x, (x.shape[0], batch, *x.shape[2:])), state
    )


def check_whole_state(state: Any, argument: str) -> None:
    """Checks that a value is a state whose leaves agree in layers and batch, for any model.

    Args:
        state: the value to check.
        argument: the argument in backticks; the message begins with it.

    Raises:
        TypeError: not an `RWKV7State`, or a leaf that is not an array.
        ValueError: leaves that do not match each other.
    """
    check_instance(state, RWKV7State, argument)
    name = argument.strip("`")
    for field, axes in (
        ("wkv", "[L B H Nv Nk]"),
        ("att_shift", "[L B D]"),
        ("ffn_shift", "[L B D]"),
    ):
        shape = _shape_of(getattr(state, field), f"`{name}.{field}`")
        leading = tuple(state.wkv.shape[:2])
        if len(shape) != len(axes.split()) or shape[:2] != leading:
            raise ValueError(f"`{name}.{field}` must have shape {axes}; got {shape}.")
    check_memory_types(state.upscaled, f"`{name}.upscaled`")


def select(state: RWKV7State, rows: Any) -> RWKV7State:
    """Selects the sequences `rows`; keeps the axis B.

    With `stack`, this serves many tuned states at once: `select(stack(states), ids)` is a batch
    whose row i starts from state ids[i].

    Args:
        state: any batch.
        rows: an index, a slice, a list or an array of indices, or a mask of B bools; negative
            indices count from the end. Traced indices are not checked: those out of range select
            zeros.

    Raises:
        TypeError: rows that are not integers.
        ValueError: rows that are out of range or not one-dimensional.
    """
    with prefix_errors("select"):
        check_whole_state(state, "`state`")
        indices = _row_indices(rows, state.batch)
    if isinstance(indices, np.ndarray):
        return _map_batch(lambda x: x[:, indices], state)
    return _map_batch(lambda x: x.at[:, indices].get(mode="fill", fill_value=0), state)


def _row_indices(rows: Any, batch: int) -> Any:
    """Returns rows of a batch as a flat array of indices."""
    if isinstance(rows, slice):
        try:
            return np.arange(batch)[rows]
        except (TypeError, ValueError):
            raise TypeError(
                f"`rows` must be a slice of integers; got {rows}."
            ) from None
    if isinstance(rows, int | np.integer) and not isinstance(rows, bool):
        rows = np.asarray(rows)
    # NumPy makes an empty list float64.
    if isinstance(rows, list | tuple) and not len(rows):
        rows = np.zeros(0, np.int32)
    rows = as_array(rows, "`rows`")
    if len(rows.shape) > 1:
        raise ValueError(f"`rows` must have one axis; got shape {tuple(rows.shape)}.")
    if rows.dtype == bool:
        if tuple(rows.shape) != (batch,):
            raise ValueError(
                f"`rows` must be a mask of {batch} rows, or indices; got shape {rows.shape}."
            )
        if is_traced(rows):
            raise TypeError(
                "`rows` must be indices in a compiled function, where the number of rows that a "
                "mask selects is unknown; got a mask."
            )
        return np.flatnonzero(np.asarray(rows))
    check_indices(rows, batch, "`rows`")
    if is_traced(rows):
        return jnp.atleast_1d(at_least_int32(rows))
    # Indices of 8 bits may have no number for the batch.
    return np.atleast_1d(np.asarray(rows, np.int64)) % max(batch, 1)


def where_rows(
    rows: Bool[Array | np.ndarray, " B"] | Sequence[bool],
    state: RWKV7State,
    other: RWKV7State,
) -> RWKV7State:
    """Takes the sequences where `rows` is true from `state`, the rest from `other`.

    Raises:
        ValueError: not one bool for each row, only one state has an upscaled memory, or their
            memories differ in form.
    """
    with prefix_errors("where_rows"):
        mask = as_array(rows, "`rows`")
        # Indices would count as a mask of those that are not 0.
        if mask.dtype != bool or tuple(mask.shape) != (state.batch,):
            came = f"{mask.dtype}{list(mask.shape)}"
            raise ValueError(f"`rows` must be {state.batch} bools; got {came}.")
    if jax.tree.structure(state) != jax.tree.structure(other):
        forms = [one.upscaled and one.upscaled.dynamics for one in (state, other)]
        raise ValueError(
            "where_rows: `state` and `other` must have upscaled memories of one form, or none; "
            f"got {forms[0]} and {forms[1]}."
        )

    def pick(new, old):
        # Leaves that both states share stay shared.
        return new if new is old else _choose(mask, new, old)

    return jax.tree.map(pick, state, other)


def restore_rows(
    rows: Bool[Array, " B"], earlier: RWKV7State, state: RWKV7State
) -> RWKV7State:
    """Restores the sequences where `rows` is true from an earlier state of the same batch.

    Shared leaves have not changed and stay shared.
    """
    return _map_batch(functools.partial(_choose, rows), earlier, state)


def _choose(rows: Bool[Array, " B"], new: Array, old: Array) -> Array:
    # Leaves are [L B ...], or [L 1 ...] where a state's sequences share them.
    mask = rows.reshape(1, -1, *[1] * (old.ndim - 2))
    return jnp.where(mask, new, old)


def map_linear_leaves(
    change: Callable, state: RWKV7State, *others: RWKV7State
) -> RWKV7State:
    """Applies `change` to the shifts, WKV states, upscaled memories and their write strengths.

    These are the leaves that may be added and averaged. The features of an upscaled memory are
    those of `state`.
    """
    states = (state, *others)
    upscaled = state.upscaled
    if upscaled is not None:
        memories = _upscaled_of(states)
        upscaled = upscaled.replace(
            memory=_map_field(change, memories, "memory"),
            write=_map_field(change, memories, "write"),
        )
    return _map_plain_leaves(change, states).replace(upscaled=upscaled)


def stack(states: list[RWKV7State]) -> RWKV7State:
    """Makes one batch of all sequences in `states`, in order.

    If some states have an upscaled memory, the others get an empty one, which reads zeros.

    Raises:
        TypeError: not a list of states.
        ValueError: no state, states of different models, upscaled memories that differ in dynamics,
            kind or number of features, or only some states with a memory of the paper's form.
    """
    with prefix_errors("stack"):
        states = _check_states(states)
        memories = [one.upscaled for one in states if one.upscaled is not None]
        if memories:
            states = [_with_upscaled(state, memories[0]) for state in states]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=1), *states)


def _check_states(states: Any) -> list[RWKV7State]:
    """Returns states of one model as a list."""
    if isinstance(states, RWKV7State) or not isinstance(states, Iterable):
        raise TypeError(
            f"`states` must be a list of states; got {type(states).__name__}."
        )
    states = list(states)
    if not states:
        raise ValueError("`states` must hold a state; got none.")
    for index, state in enumerate(states):
        check_whole_state(state, f"`states[{index}]`")
        for name in ("att_shift", "wkv", "ffn_shift"):
            wanted = getattr(states[0], name)
            leaf = getattr(state, name)
            if leaf.shape[:1] + leaf.shape[2:] != wanted.shape[:1] + wanted.shape[2:]:
                raise ValueError(
                    f"`states[{index}].{name}` must be of the same model as that of states[0], "
                    f"of shape {tuple(wanted.shape)}; got {tuple(leaf.shape)}."
                )
    return states


def _with_upscaled(state: RWKV7State, like: Upscaled) -> RWKV7State:
    """Gives every sequence of `state` its own upscaled memory, an empty one if it has none.

    Empty memories have the features of `like`.
    """
    upscaled = state.upscaled
    if upscaled is None:
        if like.form.replaces_wkv:
            raise ValueError(
                "`states` must all have a memory of the paper's form, or none; only some have "
                f"{like.dynamics!r}."
            )
        one_row = jax.tree.map(lambda leaf: leaf[:, :1], like)
        upscaled = one_row.replace(
            memory=jnp.zeros_like(one_row.memory), write=jnp.zeros_like(one_row.write)
        )
    if _shapes_without_batch(upscaled) != _shapes_without_batch(like):
        raise ValueError(
            "`states` must have upscaled memories of the same form; got "
            f"{_description(like)} and {_description(upscaled)}."
        )

    def own_rows(leaf):
        return jnp.broadcast_to(leaf, (leaf.shape[0], state.batch, *leaf.shape[2:]))

    return state.replace(upscaled=jax.tree.map(own_rows, upscaled))


def _shapes_without_batch(upscaled: Upscaled) -> Upscaled:
    # Comparing these trees includes the static fields, dynamics and kind.
    return jax.tree.map(lambda leaf: (leaf.shape[0], leaf.shape[2:]), upscaled)


def _description(upscaled: Upscaled) -> str:
    features = upscaled.features
    kind = (
        f"{upscaled.dynamics} {features.kind} with {features.mean.shape[-1]} features"
    )
    return f"{kind} and {'no map' if features.map is None else 'a map'}"


def _serialize_static_fields(fields: Any) -> bytes:
    return json.dumps(fields).encode()


def _deserialize_static_fields(data: bytes | bytearray) -> Any:
    return tuple(json.loads(bytes(data)))


# Lets programs of `jax.export` that take or return states be serialised.
for _node in (RWKV7State, Upscaled, Features):
    jax.export.register_pytree_node_serialization(
        _node,
        # Stored in users' files: never change it.
        serialized_name=f"rwkv7_jax.{_node.__name__}",
        serialize_auxdata=_serialize_static_fields,
        deserialize_auxdata=_deserialize_static_fields,
    )
