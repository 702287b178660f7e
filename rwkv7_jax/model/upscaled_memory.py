"""The upscaled memory: M > N columns per head, read through kernel features; and its forms.

The additive forms extend the model: y = S r + S~ phi(r). An empty memory, S~ = 0, leaves the model
bit-exact. They differ in how S~ changes from token to token. The paper's form replaces the WKV
state.

Source: arXiv 2504.05097, section 3.2 (the kernel method); the additive forms are this project's.
"""

import abc
import functools
import typing
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from pallas_kernels import WKVInputs
from rwkv7_jax.array_types import Heads, describe_fields
from rwkv7_jax.checks import check_choice, check_instance
from rwkv7_jax.model.kernel_features import (
    FEATURE_MAPS,
    Features,
    apply_per_head,
    kernel_features,
    unit_features,
)

# The WKV op with its implementation and lengths bound: (inputs, state) -> (y, end state). The
# keyword `implementation` overrides the bound one.
Op = Callable[..., tuple[Array, Array]]

# The values read, and the memory after the last token; None if it never changes.
Reads = tuple[Float[Array, "B T H Nv"], Array | None]

# Centred features may be negative, but a decay must be positive: its minimum.
_SMALLEST_DECAY = 1e-30


class MemoryForm(abc.ABC):
    """The form of an upscaled memory: how it is read, and how it changes from token to token.

    The arguments `upscaled` are one layer's, without the axis L.

    Attributes:
        has_own_rows: the memory changes in context, so each sequence of a batch needs its own.
        replaces_wkv: the memory replaces the WKV state instead of adding to its reads.
        erases: writes in context remove part of the memory.
    """

    has_own_rows: bool = True
    replaces_wkv: bool = False
    erases: bool = False

    @abc.abstractmethod
    def read(
        self, upscaled: "Upscaled", inputs: WKVInputs, icl_rate: Heads, op: Op
    ) -> Reads:
        """Reads the memory at every token.

        Args:
            upscaled: the layer's memory.
            inputs: the layer's inputs of the WKV op, with N channels per head.
            icl_rate: the in-context learning rate.
            op: runs the WKV op.
        """


class StaticMemory(MemoryForm):
    """A memory that never changes and that all sequences may share: S~_t = S~_0."""

    has_own_rows = False

    def read(
        self, upscaled: "Upscaled", inputs: WKVInputs, icl_rate: Heads, op: Op
    ) -> Reads:
        """Reads S~_0 phi(r), which needs no recurrence."""
        # [B T H M]; the memory may have one row that all sequences share.
        phi = kernel_features(upscaled.features, inputs.r)
        return apply_per_head(upscaled.memory, phi), None


class RecurrentMemory(MemoryForm):
    """A memory that is the state of a separate WKV op, over features instead of channels."""

    @abc.abstractmethod
    def wkv_inputs(
        self, upscaled: "Upscaled", inputs: WKVInputs, icl_rate: Heads
    ) -> WKVInputs:
        """Computes the inputs of the WKV op whose state is the memory.

        Args:
            upscaled: the layer's memory.
            inputs: the layer's inputs, with N channels per head.
            icl_rate: the in-context learning rate.
        """

    def read(
        self, upscaled: "Upscaled", inputs: WKVInputs, icl_rate: Heads, op: Op
    ) -> Reads:
        """Reads and updates the memory with the WKV op."""
        return op(self.wkv_inputs(upscaled, inputs, icl_rate), upscaled.memory)


class DecayMemory(RecurrentMemory):
    """A memory that decays: S~_t = w S~_{t-1} + c v phi(k)^T, with the head's mean decay w.

    phi(k) are the features of the removal key, scaled to length 1; c is `Upscaled.write`.
    """

    def wkv_inputs(
        self, upscaled: "Upscaled", inputs: WKVInputs, icl_rate: Heads
    ) -> WKVInputs:
        """Computes the features of r and of the key, with one decay for all features."""
        # Both [B T H M]. With unit keys, a write of strength c adds a matrix of norm c |v|.
        r = kernel_features(upscaled.features, inputs.r)
        # `a` is the negative of the removal key.
        key = unit_features(kernel_features(upscaled.features, -inputs.a))
        # The decay is per key channel, but features are not channels, so only a scalar carries
        # over. With a scalar, the transition matrix has norm at most 1 under "delta" as well.
        log_w = jnp.log(_head_mean(jnp.exp(inputs.log_w.astype(jnp.float32))))
        return WKVInputs(
            r=r,
            log_w=jnp.broadcast_to(log_w, r.shape),
            k=key * upscaled.write[:, None, :, None],
            v=inputs.v.astype(jnp.float32),
            a=-key,
            b=key * self._removal_rate(icl_rate),
        )

    def _removal_rate(self, icl_rate: Heads) -> Float[Array, "B T H 1"] | float:
        return 0.0


class DeltaMemory(DecayMemory):
    """A memory that decays and is erased where the context writes.

    S~_t = S~_{t-1} (w I - eta phi(k) phi(k)^T) + c v phi(k)^T, with the head's mean rate eta.
    """

    erases = True

    def _removal_rate(self, icl_rate: Heads) -> Float[Array, "B T H 1"] | float:
        return _head_mean(icl_rate)


class PaperMemory(RecurrentMemory):
    """The paper's kernel method, which replaces the WKV state and every vector by its features.

        S_t = S_{t-1} (diag(phi(w)) - phi(k) (phi(a) phi(k))^T) + phi(v) phi(k)^T,
        y_t = Q S_t phi(r)

    S is [M M], a is the in-context learning rate and Q a fixed map. The removal key is the key of
    the write, as printed, whereas RWKV-7 has a separate one. Unlike the additive forms, an empty
    memory of this form changes the model: it exists for comparison with the paper.
    """

    replaces_wkv = True
    erases = True

    def __init__(self, *, unit_keys: bool):
        """Chooses whether removal keys have length 1, without which the state can diverge."""
        self.unit_keys = unit_keys

    def wkv_inputs(
        self, upscaled: "Upscaled", inputs: WKVInputs, icl_rate: Heads
    ) -> WKVInputs:
        """Replaces r, w, k, v and the in-context learning rate by their features."""
        features = upscaled.features
        r = kernel_features(features, inputs.r)
        k = kernel_features(features, inputs.k)
        v = kernel_features(features, inputs.v)
        rate = kernel_features(features, icl_rate)
        # The paper maps the decay, not its logarithm.
        w = kernel_features(features, jnp.exp(inputs.log_w.astype(jnp.float32)))
        removal_key = unit_features(k) if self.unit_keys else k
        return WKVInputs(
            r=r,
            log_w=jnp.log(jnp.maximum(w, _SMALLEST_DECAY)),
            k=k,
            v=v,
            a=-removal_key,
            b=removal_key * rate,
        )

    def read(
        self, upscaled: "Upscaled", inputs: WKVInputs, icl_rate: Heads, op: Op
    ) -> Reads:
        """Reads the memory and maps its M rows to value channels.

        It always runs token by token ("scan"): features of a decay may be zero, which would make
        the factors of a chunk infinite.
        """
        assert upscaled.readout is not None
        by_token = functools.partial(op, implementation="scan")
        y, memory = super().read(upscaled, inputs, icl_rate, by_token)
        # y is [B T H M]; the readout maps its M rows to the Nv value channels.
        return apply_per_head(upscaled.readout, y), memory


def _head_mean(x: Heads) -> Float[Array, "B T H 1"]:
    return jnp.mean(x.astype(jnp.float32), axis=-1, keepdims=True)


# Memory forms by the names of `Upscaled.dynamics`; further ones may be added. Compiled programs are
# cached by name, so a changed form needs a new name.
MEMORY_FORMS: dict[str, MemoryForm] = {
    "static": StaticMemory(),
    "decay": DecayMemory(),
    "delta": DeltaMemory(),
    "replace": PaperMemory(unit_keys=True),
    "replace_raw": PaperMemory(unit_keys=False),
}

# The memory forms of this package.
DYNAMICS = tuple(MEMORY_FORMS)


def check_form(dynamics: Any, kind: Any) -> None:
    """Raises unless an upscaled memory has a known form.

    Args:
        dynamics: of the memory.
        kind: of its features.
    """
    check_choice(dynamics, tuple(MEMORY_FORMS), "`state.upscaled.dynamics`")
    check_choice(kind, tuple(FEATURE_MAPS), "`state.upscaled.features.kind`")


# Not checked at run time, for the reason given at `Features`.
@typing.no_type_check
@struct.dataclass
class Upscaled:
    """A float32 memory besides the WKV state, read through M features instead of N channels.

    Attributes:
        memory: the trainable memory; B may be 1 if it is static and all sequences share it. In the
            paper's form its rows are features as well (M, not Nv).
        write: strength of the writes in context under "decay" and "delta"; 0 writes nothing.
        features: the features of the read vectors.
        readout: in the paper's form, the fixed map of rows to value channels; else None.
        dynamics: a name of `MEMORY_FORMS`.
    """

    memory: Float[Array, "L B H Nv M"]
    write: Float[Array, "L B H"]
    features: Features
    readout: Float[Array, "L B H Nv M"] | None = None
    dynamics: str = struct.field(pytree_node=False, default="static")
    __repr__ = describe_fields

    if typing.TYPE_CHECKING:

        def replace(self, **changes: Any) -> "Upscaled":
            """Returns a copy with other values of some fields."""
            ...

    @property
    def form(self) -> MemoryForm:
        """The form of this memory."""
        return MEMORY_FORMS[self.dynamics]


def check_memory_types(upscaled: Any, argument: str) -> None:
    """Checks that a state's memory and its features have their types, or that there is none.

    Readers of general pytrees, such as `flax.serialization`, leave a dict where their template has
    None.

    Args:
        upscaled: of the state.
        argument: the argument in backticks; the message begins with it.

    Raises:
        TypeError: another type.
    """
    if upscaled is None:
        return
    if not isinstance(upscaled, Upscaled):
        came = type(upscaled).__name__
        raise TypeError(f"{argument} must be an Upscaled or None; got {came}.")
    name = argument.strip("`")
    check_instance(upscaled.features, Features, f"`{name}.features`")
