"""What an RWKV-7 remembers between tokens: a pytree passed in and handed back.

Every leaf is [L B ...]. What all sequences share, such as a static upscaled memory, may have B = 1
in a larger batch.
"""

import functools
import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float

from rwkv7_jax.checks import prefix_errors
from rwkv7_jax.model.config import RWKV7Config

# How the memory of an upscaled state changes from token to token; see `upscaling`.
DYNAMICS = ("static", "decay", "delta", "replace", "replace_raw")

KINDS = ("gaussian", "fourier", "gaussian_raw")


# The shaped fields would be checked whenever JAX rebuilds the tree with other leaves (under `vmap`,
# `scan`, `eval_shape`), so they are documentation here and checked by `check_state` instead.
@typing.no_type_check
@struct.dataclass
class Features:
    """A frozen nonlinear map of read vectors per layer and head; float32; B is 1 or the batch.

    Attributes:
        landmarks: points in read space; of Fourier features, the frequencies.
        widths: inverse squared widths of the Gaussians; of Fourier features, the phases.
        mean: what is taken off, measured on calibration text.
        map: what is multiplied from the left then, or None.
        kind: of `KINDS`; all but "gaussian_raw" see the vector's direction alone.
    """

    landmarks: Float[Array, "L B H M N"]
    widths: Float[Array, "L B H M"]
    mean: Float[Array, "L B H M"]
    map: Float[Array, "L B H M M"] | None
    kind: str = struct.field(pytree_node=False, default="gaussian")


@typing.no_type_check
@struct.dataclass
class Upscaled:
    """A memory beside the WKV state that is read through M features instead of N channels; float32.

    Attributes:
        memory: what is tuned; B is 1 where dynamics are "static" and all sequences share it. Under
            "replace" it takes the WKV state's place and its rows are features as well (M, not Nv).
        write: strength of the writes in context under "decay" and "delta"; 0 writes nothing.
        features: of the read vectors.
        readout: under "replace", the fixed map of rows to value channels; else None.
        dynamics: of `DYNAMICS`.
    """

    memory: Float[Array, "L B H Nv M"]
    write: Float[Array, "L B H"]
    features: Features
    readout: Float[Array, "L B H Nv M"] | None = None
    dynamics: str = struct.field(pytree_node=False, default="static")


@typing.no_type_check
@struct.dataclass
class RWKV7State:
    """The memory of a batch of sequences, all layers together.

    Attributes:
        att_shift: the last token's first-norm output of each layer, in the activations' dtype.
        wkv: the recurrent states, float32: rows are value channels, columns are key channels.
        ffn_shift: the last token's second-norm output of each layer, in the activations' dtype.
        upscaled: a further memory read through kernel features, or None.
    """

    att_shift: Float[Array, "L B D"]
    wkv: Float[Array, "L B H Nv Nk"]
    ffn_shift: Float[Array, "L B D"]
    upscaled: Upscaled | None = None

    @property
    def batch(self) -> int:
        """Sequences held (B)."""
        return self.wkv.shape[1]


def init_state(config: RWKV7Config, batch: int = 1) -> RWKV7State:
    """The state of `batch` sequences that have read nothing: zeros."""
    shift = (config.num_layers, batch, config.width)
    heads = (config.num_layers, batch, config.num_heads, config.head_size, config.head_size)
    return RWKV7State(
        att_shift=jnp.zeros(shift, config.dtype),
        wkv=jnp.zeros(heads, jnp.float32),
        ffn_shift=jnp.zeros(shift, config.dtype),
    )


def check_state(
    state: RWKV7State, batch: int, config: RWKV7Config, *, caller: str | None = None
) -> None:
    """Checks that a state fits a model and a batch; works on arrays, tracers and shapes alike.

    Args:
        state: the state to check.
        batch: the number of sequences it must hold.
        config: the model's configuration.
        caller: the function whose name begins the message; by default this one, or that of the
            `prefix_errors` block around the call.

    Raises:
        TypeError: not an `RWKV7State`, or the WKV state is not float32.
        ValueError: a leaf has the wrong shape.
    """
    with prefix_errors("check_state" if caller is None else caller):
        _check_state(state, batch, config)


def _check_state(state: RWKV7State, batch: int, config: RWKV7Config) -> None:
    if not isinstance(state, RWKV7State):
        raise TypeError(f"`state` must be an RWKV7State; got {type(state).__name__}.")
    shift = (config.num_layers, batch, config.width)
    heads = (config.num_layers, batch, config.num_heads, config.head_size, config.head_size)
    for name, shape in (("att_shift", shift), ("wkv", heads), ("ffn_shift", shift)):
        came = tuple(getattr(state, name).shape)
        if came != shape:
            raise ValueError(
                f"`state.{name}` must have shape {shape} "
                f"(layers {config.num_layers}, batch {batch}, ...); got {came}."
            )
    if state.wkv.dtype != jnp.float32:
        raise TypeError(f"`state.wkv` must be float32; got {state.wkv.dtype}.")
    if state.upscaled is not None:
        _check_upscaled(state.upscaled, heads)


def _check_upscaled(upscaled: Upscaled, heads: tuple[int, ...]) -> None:
    layers, batch, count, size, _ = heads
    for name, value, known in (
        ("dynamics", upscaled.dynamics, DYNAMICS),
        ("features.kind", upscaled.features.kind, KINDS),
    ):
        if value not in known:
            raise ValueError(
                f"`state.upscaled.{name}` must be one of {', '.join(known)}; got {value!r}."
            )
    width = upscaled.memory.shape[-1]
    lead, replaced = (layers, batch, count), upscaled.readout is not None
    shapes = {
        "memory": (*lead, width if replaced else size, width),
        "write": lead,
        "readout": (*lead, size, width),
        "features.landmarks": (*lead, width, size),
        "features.widths": (*lead, width),
        "features.mean": (*lead, width),
        "features.map": (*lead, width, width),
    }
    for name, wanted in shapes.items():
        leaf = functools.reduce(getattr, name.split("."), upscaled)
        came = None if leaf is None else tuple(leaf.shape)
        own_rows = name == "memory" and upscaled.dynamics != "static"
        shared = (layers, 1, *wanted[2:])
        if came is not None and came != wanted and (own_rows or came != shared):
            raise ValueError(f"`state.upscaled.{name}` must have shape {wanted}; got {came}.")


def _map_batch(change: Callable, state: RWKV7State, *others: RWKV7State) -> RWKV7State:
    """`change` on every leaf that has a row for each sequence; what all share stays as it is."""
    parts = (state, *others)
    new = {
        name: change(*(getattr(part, name) for part in parts))
        for name in ("att_shift", "wkv", "ffn_shift")
    }
    if state.upscaled is not None:
        batch, moving = state.batch, state.upscaled.dynamics != "static"

        def own(leaf, *more):
            shared = leaf.shape[1] != batch or batch == 1
            return leaf if shared else change(leaf, *more)

        upscaled = jax.tree.map(own, *(part.upscaled for part in parts))
        if moving:
            memory = change(*(part.upscaled.memory for part in parts))
            upscaled = upscaled.replace(memory=memory)
        new["upscaled"] = upscaled
    return RWKV7State(**new)


def repeat(state: RWKV7State, batch: int) -> RWKV7State:
    """`batch` sequences that all start from the one that `state` holds.

    Raises:
        ValueError: `state` holds more than one sequence.
    """
    if state.batch != 1:
        raise ValueError(f"repeat: `state` must hold one sequence; got {state.batch}.")
    return _map_batch(lambda x: jnp.broadcast_to(x, (x.shape[0], batch, *x.shape[2:])), state)


def select(state: RWKV7State, rows) -> RWKV7State:
    """The sequences `rows` (an index, a slice or many indices) of `state`; the batch axis stays.

    With `stack`, this serves many tuned states at once: `select(stack(states), ids)` is a batch
    whose row i starts from state ids[i].
    """
    rows = jnp.atleast_1d(jnp.arange(state.batch)[rows])
    return _map_batch(lambda x: x[:, rows], state)


def where_rows(rows: Bool[Array, " B"], state: RWKV7State, other: RWKV7State) -> RWKV7State:
    """The sequences `rows` from `state`, the rest from `other`."""

    def pick(new, old):
        return jnp.where(rows.reshape(1, -1, *[1] * (old.ndim - 2)), new, old)

    return _map_batch(pick, state, other)


def map_linear_leaves(change: Callable, state: RWKV7State, *others: RWKV7State) -> RWKV7State:
    """`change` on what a state remembers: shifts, WKV states, upscaled memories, their writes.

    The features through which an upscaled memory is read are not memory and stay `state`'s.
    """
    parts = (state, *others)

    def mapped(holder, name: str):
        return change(*(getattr(part, name) for part in holder))

    new = {name: mapped(parts, name) for name in ("att_shift", "wkv", "ffn_shift")}
    if state.upscaled is None:
        return RWKV7State(**new)
    memories = [part.upscaled for part in parts]
    new_memory = {name: mapped(memories, name) for name in ("memory", "write")}
    return RWKV7State(**new, upscaled=state.upscaled.replace(**new_memory))


def _with_upscaled(state: RWKV7State, like: Upscaled) -> RWKV7State:
    """`state` with an upscaled memory of its own rows: its own, or an empty one read as `like`."""
    upscaled = state.upscaled
    if upscaled is None:
        memory, write = (jnp.zeros_like(leaf[:, :1]) for leaf in (like.memory, like.write))
        features, readout = jax.tree.map(lambda x: x[:, :1], (like.features, like.readout))
        upscaled = like.replace(memory=memory, write=write, features=features, readout=readout)
    forms = [jax.tree.map(lambda x: (x.shape[0], x.shape[2:]), u) for u in (upscaled, like)]
    if forms[0] != forms[1]:
        raise ValueError(
            "stack: `states` must have upscaled memories of one form; got "
            f"{_form(like)} and {_form(upscaled)}."
        )

    def own(x):
        return jnp.broadcast_to(x, (x.shape[0], state.batch, *x.shape[2:]))

    return state.replace(upscaled=jax.tree.map(own, upscaled))


def _form(upscaled: Upscaled) -> str:
    kind, width = upscaled.features.kind, upscaled.memory.shape[-1]
    mapped = "no map" if upscaled.features.map is None else "a map"
    return f"{upscaled.dynamics} {kind} with {width} features and {mapped}"


def stack(states: list[RWKV7State]) -> RWKV7State:
    """One batch of all the sequences in `states`, in their order.

    A state without an upscaled memory gets an empty one where others have one, which reads nothing.

    Raises:
        ValueError: upscaled memories that differ in dynamics, kind or number of features.
    """
    like = next((state.upscaled for state in states if state.upscaled is not None), None)
    if like is not None:
        states = [_with_upscaled(state, like) for state in states]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=1), *states)
