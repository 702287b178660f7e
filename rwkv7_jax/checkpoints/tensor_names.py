"""Names and shapes of RWKV-7's tensors: the official ones and those of fla's HF files.

All other names are translated to and from the official ones; `layouts` does so for files of any
origin.
Source: BlinkDL/RWKV-LM@524481d RWKV-v7 (official); fla-org/flash-linear-attention@bc3b101
utils/convert_from_rwkv7.py (HF).
"""

import functools
import mmap
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from rwkv7_jax.checkpoints.unused_value_residual import unused_value_residual_shapes
from rwkv7_jax.model.config import RWKV7Config

Shape = tuple[int, ...]

# The low-rank matrices, which some files hold transposed.
LOW_RANK = re.compile(r"\.att\.[wavg][12]$")

# The order of the six lerps of time mix, also in a tensor that holds all of them.
LERPS = "rwkvag"

# The prefix of an upscaled memory's tensors.
UPSCALED = "upscaled."

# The logits of a session's next token, from which it resumes without a prompt.
LOGITS = "session.logits"

_STATE = re.compile(
    r"^blocks\.\d+\.(att\.time_state|att\.shift_state|ffn\.shift_state)$"
    rf"|^{re.escape(UPSCALED)}|^{re.escape(LOGITS)}$"
)


class NameTable:
    """The names that another program gives to the official tensors."""

    def __init__(self, outside: dict[str, str], inside: dict[str, str], *, block: str):
        """Builds the table.

        Args:
            outside: their names outside the blocks, by official name.
            inside: their names inside a block, by official name, both without the block.
            block: what they call a block, before its number.
        """
        self._outside = outside
        self._inside = inside
        self._block = block
        self._in_block = re.compile(rf"{block}\.(\d+)\.(.+)")
        self._official_outside = {name: official for official, name in outside.items()}
        self._official_inside = {name: official for official, name in inside.items()}

    def from_official(self, name: str) -> str:
        """Translates an official name to theirs."""
        if name in self._outside:
            return self._outside[name]
        _, number, inside = name.split(".", 2)
        return f"{self._block}.{number}.{self._inside[inside]}"

    def to_official(self, name: str) -> str:
        """Translates their name to the official one; keeps an unknown name."""
        if name in self._official_outside:
            return self._official_outside[name]
        match = self._in_block.fullmatch(name)
        if match is None or match[2] not in self._official_inside:
            return name
        return f"blocks.{match[1]}.{self._official_inside[match[2]]}"


_HF_OUTSIDE = {
    "emb.weight": "embeddings.weight",
    "blocks.0.ln0.weight": "layers.0.pre_norm.weight",
    "blocks.0.ln0.bias": "layers.0.pre_norm.bias",
    "ln_out.weight": "norm.weight",
    "ln_out.bias": "norm.bias",
    "head.weight": "lm_head.weight",
}

_HF_INSIDE = {
    "ln1.weight": "attn_norm.weight",
    "ln1.bias": "attn_norm.bias",
    "ln2.weight": "ffn_norm.weight",
    "ln2.bias": "ffn_norm.bias",
    "att.ln_x.weight": "attn.g_norm.weight",
    "att.ln_x.bias": "attn.g_norm.bias",
    "att.x_r": "attn.x_r",
    "att.x_w": "attn.x_w",
    "att.x_k": "attn.x_k",
    "att.x_v": "attn.x_v",
    "att.x_a": "attn.x_a",
    "att.x_g": "attn.x_g",
    "att.w0": "attn.w_lora.lora.2.bias",
    "att.w1": "attn.w_lora.lora.0.weight",
    "att.w2": "attn.w_lora.lora.2.weight",
    "att.a0": "attn.a_lora.lora.2.bias",
    "att.a1": "attn.a_lora.lora.0.weight",
    "att.a2": "attn.a_lora.lora.2.weight",
    "att.v0": "attn.v_lora.lora.2.bias",
    "att.v1": "attn.v_lora.lora.0.weight",
    "att.v2": "attn.v_lora.lora.2.weight",
    "att.g1": "attn.g_lora.lora.0.weight",
    "att.g2": "attn.g_lora.lora.2.weight",
    "att.k_k": "attn.k_k",
    "att.k_a": "attn.k_a",
    "att.r_k": "attn.r_k",
    "att.receptance.weight": "attn.r_proj.weight",
    "att.key.weight": "attn.k_proj.weight",
    "att.value.weight": "attn.v_proj.weight",
    "att.output.weight": "attn.o_proj.weight",
    "ffn.x_k": "ffn.x_k",
    "ffn.key.weight": "ffn.key.weight",
    "ffn.value.weight": "ffn.value.weight",
}

# Without the prefix `model.`, which HF files put on every name except the head's.
_HF_NAMES = NameTable(_HF_OUTSIDE, _HF_INSIDE, block="layers")


# One slice per axis.
Index = tuple[slice, ...]


class Tensor(NamedTuple):
    """A tensor in a file, whose data is read when `read` is called.

    Attributes:
        shape: shape of the whole tensor.
        dtype: dtype of the tensor.
        read: reads the whole tensor; a view if the file is memory-mapped.
        read_part: reads only a part; None if slicing the result of `read` costs no more.
    """

    shape: Shape
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    read_part: Callable[[Index], np.ndarray] | None = None

    @classmethod
    def mapped(
        cls, data: mmap.mmap, shape: Shape, dtype: np.dtype, start: int
    ) -> "Tensor":
        """Builds a tensor that views a mapped file and keeps it alive."""
        return cls(
            shape, dtype, functools.partial(np.ndarray, shape, dtype, data, start)
        )

    def part(self, index: Index) -> np.ndarray:
        """Reads a part; the whole tensor is read through `read`, with its checks."""
        sizes = zip(index, self.shape, strict=True)
        is_all = all(range(size)[one] == range(size) for one, size in sizes)
        if is_all or self.read_part is None:
            return self.read()[index]
        return self.read_part(index)


Tensors = Mapping[str, Tensor]


# `jax.eval_shape` of the model's `init` gives the same shapes, but takes 0.2 to 0.5 s per file
# instead of 1 ms and loses the order of the official files. A test checks that the two agree.
def block_shapes(config: RWKV7Config, layer: int) -> dict[str, Shape]:
    """Returns the parameter tree shapes of one block's tensors, in the order of official files.

    The names lack the prefix `blocks.{layer}.`.
    """
    width = config.width
    ffn_width = config.ffn_width
    shapes: dict[str, Shape] = {}
    for norm in ("ln1", "ln2", "att.ln_x"):
        shapes[f"{norm}.weight"] = (width,)
        shapes[f"{norm}.bias"] = (width,)
    for letter in LERPS:
        shapes[f"att.x_{letter}"] = (width,)
    ranks = {
        "w": config.decay_rank,
        "a": config.icl_rank,
        "v": config.value_rank,
        "g": config.gate_rank,
    }
    if layer == 0:
        # All other blocks mix their values with those of block 0.
        del ranks["v"]
    for letter, rank in ranks.items():
        if letter != "g":
            # The gate has no bias.
            shapes[f"att.{letter}0"] = (width,)
        shapes[f"att.{letter}1"] = (width, rank)
        shapes[f"att.{letter}2"] = (rank, width)
    shapes["att.k_k"] = (width,)
    shapes["att.k_a"] = (width,)
    shapes["att.r_k"] = (config.num_heads, config.head_size)
    for projection in ("receptance", "key", "value", "output"):
        shapes[f"att.{projection}.weight"] = (width, width)
    shapes["ffn.x_k"] = (width,)
    shapes["ffn.key.weight"] = (ffn_width, width)
    shapes["ffn.value.weight"] = (width, ffn_width)
    return shapes


def outer_shapes(config: RWKV7Config) -> dict[str, Shape]:
    """Returns the shapes of the tensors outside the blocks, by official name."""
    width = config.width
    return {
        "emb.weight": (config.vocab_size, width),
        "blocks.0.ln0.weight": (width,),
        "blocks.0.ln0.bias": (width,),
        "ln_out.weight": (width,),
        "ln_out.bias": (width,),
        "head.weight": (config.vocab_size, width),
    }


def shapes(config: RWKV7Config) -> dict[str, Shape]:
    """Returns the shapes of all required tensors, by official name."""
    required = outer_shapes(config)
    for layer in range(config.num_layers):
        for name, shape in block_shapes(config, layer).items():
            required[f"blocks.{layer}.{name}"] = shape
    return required


def accepted_shapes(config: RWKV7Config) -> dict[str, Shape]:
    """Returns `shapes` plus the shapes of optional tensors that the model does not use."""
    return shapes(config) | unused_value_residual_shapes(config)


def file_shape(name: str, shape: Shape) -> Shape:
    """Returns a tensor's shape in official files: vectors of time and channel mix are [1, 1, D]."""
    is_plain = name.startswith(("emb", "head", "ln_out")) or ".ln" in name
    if len(shape) == 1 and not is_plain:
        return (1, 1, *shape)
    return shape


def hf_shape(name: str, shape: Shape) -> Shape:
    """Returns a tensor's shape in HF files: only the six lerps of time mix are [1, 1, D]."""
    if ".att.x_" in name:
        return (1, 1, *shape)
    return shape


def to_hf(name: str) -> str:
    """Translates an official name to HF's."""
    theirs = _HF_NAMES.from_official(name)
    return theirs if name == "head.weight" else f"model.{theirs}"


def from_hf(name: str) -> str:
    """Translates an HF name without its prefix to the official one; keeps an unknown name."""
    return _HF_NAMES.to_official(name)


def split_states(tensors: Tensors) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Separates the model's tensors from those of a start state merged into the file."""
    model = {}
    state = {}
    for name, tensor in tensors.items():
        part = state if _STATE.match(name) else model
        part[name] = tensor
    return model, state
