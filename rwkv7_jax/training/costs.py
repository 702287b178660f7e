"""The FLOPs and memory of a model, estimated from its sizes before anything compiles.

A multiplication and an addition count as two operations. The matrix products and the recurrence,
token by token, are counted. Norms, activations and rematerialisation are not, so that the MFU can
be compared with that of other programs.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax

from rwkv7_jax.checkpoints import tensor_names
from rwkv7_jax.checks import check_choice
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.training.token_chunks import CHUNK

# Tokens between two states that the recurrence saves.
_SAVED_EVERY = 16

# Operations on a head's N x N state per token, in units of N^2: decay 1, removal 2 and its write 2,
# the value's write 2, read-out 2.
_RECURRENCE = 9

# The same for the gradients of the recurrence's inputs and state.
_RECURRENCE_GRADIENTS = 19

# Peak dense bfloat16 FLOP/s of one device, by JAX's device kind. Other boards with the same chip
# have no entry, because their peaks differ.
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


@dataclasses.dataclass(frozen=True)
class _Stored:
    """The number of vectors of `width` channels that are saved per token for the backward pass.

    Attributes:
        wide: in float32.
        narrow: in the activations' dtype.
    """

    wide: int
    narrow: int

    def bytes(self, config: RWKV7Config) -> int:
        """Computes the bytes per token."""
        return config.width * (4 * self.wide + _activation_bytes(config) * self.narrow)


# Vectors that are live while one layer's gradients are computed, by what is trained. Counted in the
# traced gradient.
_MADE_BY_LAYER = {"weights": _Stored(1, 26), "state": _Stored(1, 17)}

# Vectors that each layer saves for its backward pass, by `config.remat`. "block": its input. "op":
# also the result of the recurrence. "none": also the results of products, except those of the
# feed-forward part and the inner ones of low-rank maps.
_KEPT_VECTORS = {"block": 1, "op": 2, "none": 10}

# Outside the layers: embedding, the outer norms, the first layer's values.
_STORED_OUTSIDE = _Stored(4, 4)


@dataclasses.dataclass(frozen=True)
class _Compiler:
    """Factors for the peak memory of a step as a platform's compiler schedules it.

    Attributes:
        block: multiple of one layer's activations that is live while the layer is recomputed and
            its gradients are computed.
        logits: float32 copies of a chunk's logits that are live.
    """

    block: float
    logits: float


# The compilers for accelerators fuse more of a layer than the one for CPUs, and gradients of logits
# have 16 bits there. The numbers are fitted to the peaks of state tuning and pre-training of the
# six published sizes (benchmarks/results/tpu-plan.json). TPUs keep small arrays in fast memory, so
# a step of 0.4B needs a tenth less than the estimate.
_CPU = _Compiler(block=2.0, logits=2.0)
_ACCELERATOR = _Compiler(block=1.15, logits=1.5)


@dataclasses.dataclass(frozen=True)
class Flops:
    """Operations per token.

    Attributes:
        forward: of the forward pass.
        training: of a step that trains all weights.
        state: of a step that trains only the start state, without gradients of the weights.
    """

    forward: float
    training: float
    state: float


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one training step.

    Attributes:
        parameters: all weights, and the start state if that is trained.
        moments: the optimizer's.
        gradients: of the trained numbers.
        activations: of one microbatch.
    """

    parameters: int
    moments: int
    gradients: int
    activations: int

    @property
    def total(self) -> int:
        """The sum of all."""
        return self.parameters + self.moments + self.gradients + self.activations


def _activation_bytes(config: RWKV7Config) -> int:
    return 2 if config.dtype == "bfloat16" else 4


def tree_size(tree: Any) -> int:
    """Counts the elements in a tree of arrays, or of their shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def tree_bytes(tree: Any) -> int:
    """Counts the bytes of a tree of arrays, or of their shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _parameter_counts(config: RWKV7Config) -> tuple[int, int]:
    """Counts the parameters of a model: all, and those outside the layers."""

    def count(shapes: Mapping[str, tuple[int, ...]]) -> int:
        return sum(math.prod(shape) for shape in shapes.values())

    return count(tensor_names.shapes(config)), count(tensor_names.outer_shapes(config))


def parameter_count(config: RWKV7Config) -> int:
    """Counts the parameters, without block 0's unused value residual in official files."""
    total, _ = _parameter_counts(config)
    return total


def state_count(config: RWKV7Config) -> int:
    """Counts the numbers of one sequence's recurrent states."""
    return config.num_layers * config.width * config.head_size


def _time_mix_inputs(config: RWKV7Config, *, first: bool) -> int:
    """Counts the weights of the matrices that compute the inputs of a layer's recurrence."""
    ranks = config.decay_rank + config.icl_rank + config.gate_rank
    if not first:
        ranks += config.value_rank
    return 3 * config.width**2 + 2 * config.width * ranks


def flops_per_token(config: RWKV7Config) -> Flops:
    """Counts operations per token, for any implementation and without an upscaled memory."""
    layers = config.num_layers
    width = config.width
    first = _time_mix_inputs(config, first=True)
    inside = first + (layers - 1) * _time_mix_inputs(config, first=False)
    inside += layers * (width**2 + 2 * width * config.ffn_width)
    products = 2.0 * (inside + config.vocab_size * width)
    states = float(state_count(config))
    forward = products + _RECURRENCE * states
    # The gradients of a product's input and of its weights each cost as much as the product.
    input_gradients = products + _RECURRENCE_GRADIENTS * states
    return Flops(
        forward=forward,
        training=forward + input_gradients + products,
        # The inputs of the first recurrence do not depend on the state.
        state=forward + input_gradients - 2.0 * first,
    )


def peak_flops(device_kind: str) -> float | None:
    """Looks up a device's peak dense bfloat16 FLOP/s; None if it is unknown."""
    for pattern, peak in PEAKS:
        if re.search(pattern, device_kind):
            return peak
    return None


def mfu(
    tokens_per_second: float, flops: float, *, device_kind: str, devices: int = 1
) -> float | None:
    """Computes the model FLOPs utilisation (MFU); None if the peak is unknown.

    Args:
        tokens_per_second: of all devices together.
        flops: per token.
        device_kind: JAX's device kind.
        devices: number of devices.
    """
    peak = peak_flops(device_kind)
    if peak is None:
        return None
    return tokens_per_second * flops / (peak * devices)


def _state_bytes(config: RWKV7Config) -> float:
    """Computes the bytes per token of the states that one layer's recurrence saves."""
    return 4 * config.width * config.head_size / _SAVED_EVERY


def _made_bytes(config: RWKV7Config, trained: str) -> float:
    """Estimates the bytes per token that are live while one layer's gradients are computed."""
    size = _activation_bytes(config)
    ffn = 1
    ranks = 2 * config.decay_rank + config.gate_rank
    if trained == "weights":
        ffn = 2
        ranks += config.icl_rank + config.value_rank + config.gate_rank
    vectors = _MADE_BY_LAYER[trained].bytes(config)
    narrow = size * (config.ffn_width * ffn + ranks)
    return vectors + narrow + _state_bytes(config)


def _kept_bytes(config: RWKV7Config, trained: str) -> float:
    """Computes the bytes per token that one layer saves for the backward pass."""
    channels = _KEPT_VECTORS[config.remat] * config.width
    if config.remat == "none":
        channels += config.ffn_width + config.decay_rank + config.gate_rank
        if trained == "weights":
            channels += config.icl_rank + config.value_rank
    states = 0.0 if config.remat == "block" else _state_bytes(config)
    return _activation_bytes(config) * channels + states


def _cast_bytes(config: RWKV7Config, weight_bytes: float | int) -> int:
    """Estimates the bytes of the layers' weights in the activations' dtype."""
    size = _activation_bytes(config)
    total, outside = _parameter_counts(config)
    copies = size * (total - outside)
    # Integers are cast layer by layer; wider floats, once for all layers.
    if weight_bytes < size:
        return copies // config.num_layers
    return copies if weight_bytes > size else 0


def _gathered_bytes(config: RWKV7Config, trained: str) -> int:
    """Estimates the bytes of gathered weights that are live at a time: a block, or the head.

    If weights are trained, their unsharded gradients are live as well.
    """
    total, outside = _parameter_counts(config)
    block = (total - outside) // config.num_layers
    largest = max(block, config.vocab_size * config.width)
    return _activation_bytes(config) * largest * (2 if trained == "weights" else 1)


def _activations(
    config: RWKV7Config,
    trained: str,
    rows: int,
    length: int,
    *,
    compiler: _Compiler,
) -> int:
    """Estimates the bytes that are saved for the backward pass, and its working memory."""
    # The backward pass computes one layer at a time, and recomputes what the layer did not save.
    layers = config.num_layers * _kept_bytes(config, trained)
    layers += compiler.block * _made_bytes(config, trained)
    if compiler is _CPU:
        layers += _STORED_OUTSIDE.bytes(config)
    # The logits of a chunk and their gradient.
    logits = compiler.logits * 4 * config.vocab_size * min(rows * length, CHUNK)
    return round(rows * length * layers + logits)


def mean_weight_bytes(frozen: Any, config: RWKV7Config) -> float | int:
    """Returns the mean bytes of a weight: 4 for trained ones, as stored for frozen ones.

    Args:
        frozen: the weights; None if they are trained.
        config: of their model.
    """
    if frozen is None:
        return 4
    return tree_bytes(frozen) / parameter_count(config)


def training_memory(
    config: RWKV7Config,
    *,
    batch: int,
    length: int,
    trained: str = "weights",
    accumulate: int = 1,
    weight_bytes: float | int = 4,
    platform: str = "cpu",
    shards: int = 1,
) -> Memory:
    """Estimates the memory of one step on one device with Adam, before it is compiled.

    The compiler may need less memory by fusing, and more for intermediate results.

    Args:
        config: sizes, dtype of activations, rematerialisation.
        batch: rows.
        length: tokens of a row.
        trained: "weights", or "state" if the weights are frozen.
        accumulate: microbatches of a batch.
        weight_bytes: of a weight: 4, or 2 for frozen 16-bit weights, or the mean of a mixture.
        platform: of the device, "cpu" or another one.
        shards: of each weight and its moments; the device holds one of them.

    Raises:
        ValueError: an unknown value of `trained`.
    """
    check_choice(trained, _MADE_BY_LAYER, "training_memory: `trained`")
    weights = parameter_count(config) // shards
    parameters = round(weights * weight_bytes)
    if trained == "weights":
        trained_bytes = 4 * weights
    else:
        # Start states are replicated.
        trained_bytes = 4 * state_count(config)
        parameters += trained_bytes
    return Memory(
        parameters=parameters,
        moments=2 * trained_bytes,
        # Gradient accumulation also holds a running sum.
        gradients=trained_bytes * (2 if accumulate > 1 else 1),
        activations=_activations(
            config,
            trained,
            batch // accumulate,
            length,
            compiler=_CPU if platform == "cpu" else _ACCELERATOR,
        )
        + _cast_bytes(config, weight_bytes) // shards
        + (_gathered_bytes(config, trained) if shards > 1 else 0),
    )
