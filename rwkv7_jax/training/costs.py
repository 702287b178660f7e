"""What a model costs by its sizes alone: arithmetic and memory, before anything compiles.

Arithmetic counts a multiplication and an addition as two, in the matrix products and in the
recurrence token by token; norms, activations and whatever is computed twice to save memory are left
out, so that the share of the peak compares with other programs'.
"""

import dataclasses
import math
import re

from rwkv7_jax.checkpoints.tensor_names import outer_shapes, shapes
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.training.losses import CHUNK

# Operations on a head's N x N state per token, in units of N^2: the recurrence (decay 1, removed 2,
# its write 2, the value's write 2, read-out 2); and the gradients of its inputs and of the state.
_RECURRENCE, _RECURRENCE_GRADIENTS = 9, 19

# Dense bfloat16 operations a second of one device, by JAX's name for its kind. A kind that is not
# here has no peak: the same chip on another board has another.
# Source: the makers' data sheets (NVIDIA without sparsity; Google Cloud per chip).
PEAKS = (
    (r"^NVIDIA H200$", 989.4e12),
    (r"^NVIDIA H100 80GB HBM3$", 989.4e12),
    (r"^NVIDIA H100 PCIe$", 756e12),
    (r"^NVIDIA A100[- ](SXM4|PCIE|PCIe)[- ](40|80)GB$", 312e12),
    (r"^TPU v4$", 275e12),
    (r"^TPU v5 ?(lite|e)$", 197e12),
    (r"^TPU v5p?$", 459e12),
    (r"^TPU v6 ?(lite|e)$", 918e12),
)

TRAINED = ("weights", "state")

# Vectors of the width that a layer keeps for the backward pass per token: in float32, in the
# activations' dtype. Counted in the traced gradient.
_KEPT = {"weights": (15, 30), "state": (12, 13)}

# The same outside the layers: embedding, the outer norms, the layers' first values.
_OUTSIDE = (4, 4)


@dataclasses.dataclass(frozen=True)
class Flops:
    """Operations per token.

    Attributes:
        forward: of reading.
        training: of a step on all weights.
        state: of a step on the start state alone: weights have no gradients.
    """

    forward: float
    training: float
    state: float


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one training step.

    Attributes:
        parameters: all weights, and the start state where that is trained.
        moments: the optimizer's.
        gradients: of what is trained.
        activations: of one micro-batch.
    """

    parameters: int
    moments: int
    gradients: int
    activations: int

    @property
    def total(self) -> int:
        """All together."""
        return self.parameters + self.moments + self.gradients + self.activations


def parameter_count(config: RWKV7Config) -> int:
    """Numbers of a model, without block 0's dummies that official files have."""
    return sum(math.prod(shape) for shape in shapes(config).values())


def state_count(config: RWKV7Config) -> int:
    """Numbers of one sequence's recurrent states."""
    return config.num_layers * config.width * config.head_size


def _inputs(config: RWKV7Config, *, first: bool) -> int:
    """Weights of the matrices that a layer's recurrence reads through."""
    ranks = config.decay_rank + config.icl_rank + config.gate_rank
    ranks += 0 if first else config.value_rank
    return 3 * config.width**2 + 2 * config.width * ranks


def flops_per_token(config: RWKV7Config) -> Flops:
    """Operations per token, whatever the implementation; an upscaled memory comes on top."""
    layers, width = config.num_layers, config.width
    first = _inputs(config, first=True)
    inside = first + (layers - 1) * _inputs(config, first=False)
    inside += layers * (width**2 + 2 * width * config.ffn_width)
    products = 2.0 * (inside + config.vocab_size * width)
    states = float(state_count(config))
    forward = products + _RECURRENCE * states
    through = products + _RECURRENCE_GRADIENTS * states
    return Flops(
        forward=forward,
        training=forward + through + products,
        # Nothing in front of the first recurrence depends on the state.
        state=forward + through - 2.0 * first,
    )


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 operations a second of a device of this kind; None where none is known."""
    return next((peak for kind, peak in PEAKS if re.search(kind, device_kind)), None)


def mfu(
    tokens_per_second: float, flops: float, *, device_kind: str, devices: int = 1
) -> float | None:
    """The share of the devices' peak that does the model's arithmetic; None without a known peak.

    Args:
        tokens_per_second: of all devices together.
        flops: per token.
        device_kind: as JAX names it.
        devices: how many.
    """
    peak = peak_flops(device_kind)
    return None if peak is None else tokens_per_second * flops / (peak * devices)


def _layer_bytes(config: RWKV7Config, trained: str, size: int, chunk: int) -> float:
    """Bytes per token that one layer keeps without rematerialisation."""
    wide, narrow = _KEPT[trained]
    ffn, low = 1, 2 * config.decay_rank + config.gate_rank
    if trained == "weights":
        ffn, low = 2, low + config.icl_rank + config.value_rank + config.gate_rank
    return (
        config.width * (4 * wide + size * narrow)
        + config.ffn_width * (size * ffn + 1)
        + size * low
        + 4 * config.width * config.head_size / chunk
    )


def _activations(config: RWKV7Config, trained: str, rows: int, length: int, chunk: int) -> int:
    """Bytes between the forward and the backward pass, and what the latter works on."""
    size = 2 if config.dtype == "bfloat16" else 4
    layer = _layer_bytes(config, trained, size, chunk)
    kept = config.width * size if config.remat == "block" else layer
    # The backward pass works on one layer at a time: on its activations, which "block" makes anew,
    # and on as many gradients.
    layers = config.num_layers * kept + layer * (2 if config.remat == "block" else 1)
    wide, narrow = _OUTSIDE
    per_token = layers + config.width * (4 * wide + size * narrow)
    logits = 2 * 4 * config.vocab_size * min(length, CHUNK)
    table = sum(math.prod(shape) for shape in outer_shapes(config).values())
    copies = size * (parameter_count(config) - table) if size == 2 else 0
    return round(rows * (length * per_token + logits)) + copies


def training_memory(
    config: RWKV7Config,
    *,
    batch: int,
    length: int,
    trained: str = "weights",
    accumulate: int = 1,
    weight_bytes: int = 4,
    chunk: int = 16,
) -> Memory:
    """An estimate of what one step needs on one device with Adam, before it is compiled.

    The compiler may need less by fusing, and more for what it works on.

    Args:
        config: sizes, dtype of activations, rematerialisation.
        batch: rows.
        length: tokens of a row.
        trained: "weights", or "state" where the weights are frozen.
        accumulate: pieces of a batch.
        weight_bytes: of a weight: 4, or 2 of frozen ones in 16 bit.
        chunk: tokens between two states that the recurrence keeps.

    Raises:
        ValueError: something else is trained.
    """
    if trained not in TRAINED:
        raise ValueError(
            f"training_memory: `trained` must be one of {', '.join(TRAINED)}; got {trained!r}."
        )
    weights, state = parameter_count(config), state_count(config)
    moving = 4 * (weights if trained == "weights" else state)
    return Memory(
        parameters=weights * weight_bytes + (moving if trained == "state" else 0),
        moments=2 * moving,
        gradients=moving * (2 if accumulate > 1 else 1),
        activations=_activations(config, trained, batch // accumulate, length, chunk),
    )
