"""What the tensors of RWKV-7 are called, and shaped, in each kind of checkpoint.

The official names are the language that all others are translated to and from.
Source: BlinkDL/RWKV-LM@524481d RWKV-v7 (official); fla-org/flash-linear-attention@bc3b101
utils/convert_from_rwkv7.py (HF); cryscan/web-rwkv@3c7d546 assets/scripts/convert_safetensors.py
(.st).
"""

import re
import warnings
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from rwkv7_jax.model.config import RWKV7Config

Shape = tuple[int, ...]

# The low-rank matrices, which HF and .st files hold transposed.
LOW_RANK = re.compile(r"\.att\.[wavg][12]$")

_BLOCK = re.compile(r"^blocks\.(\d+)\.(.+)$")

_HF_BLOCK = re.compile(r"^model\.layers\.(\d+)\.(.+)$")

_STATE = re.compile(r"^blocks\.\d+\.(att\.time_state|att\.shift_state|ffn\.shift_state)$")

_VARIANTS = (
    (r"ffn\.enn\.weight$", "RWKV-8 (x080)"),
    (r"qkv\.qq\.weight$", "rwkv7b (DeepEmbedAttention)"),
    (r"ffn\.s_emb\.weight$", "rwkv7a (DeepEmbed)"),
)

_HF_OUTSIDE = {
    "emb.weight": "model.embeddings.weight",
    "blocks.0.ln0.weight": "model.layers.0.pre_norm.weight",
    "blocks.0.ln0.bias": "model.layers.0.pre_norm.bias",
    "ln_out.weight": "model.norm.weight",
    "ln_out.bias": "model.norm.bias",
    "head.weight": "lm_head.weight",
}

_HF_INSIDE = {
    **{
        f"{a}.{p}": f"{b}.{p}"
        for a, b in (("ln1", "attn_norm"), ("ln2", "ffn_norm"), ("att.ln_x", "attn.g_norm"))
        for p in ("weight", "bias")
    },
    **{f"att.x_{c}": f"attn.x_{c}" for c in "rwkvag"},
    **{f"att.{c}0": f"attn.{c}_lora.lora.2.bias" for c in "wav"},
    **{f"att.{c}1": f"attn.{c}_lora.lora.0.weight" for c in "wavg"},
    **{f"att.{c}2": f"attn.{c}_lora.lora.2.weight" for c in "wavg"},
    **{f"att.{name}": f"attn.{name}" for name in ("k_k", "k_a", "r_k")},
    "att.receptance.weight": "attn.r_proj.weight",
    "att.key.weight": "attn.k_proj.weight",
    "att.value.weight": "attn.v_proj.weight",
    "att.output.weight": "attn.o_proj.weight",
    "ffn.x_k": "ffn.x_k",
    "ffn.key.weight": "ffn.key.weight",
    "ffn.value.weight": "ffn.value.weight",
}

_OFFICIAL_OUTSIDE = {hf: name for name, hf in _HF_OUTSIDE.items()}

_OFFICIAL_INSIDE = {hf: name for name, hf in _HF_INSIDE.items()}


class Tensor(NamedTuple):
    """A tensor of a file that is read when it is wanted."""

    shape: Shape
    dtype: np.dtype
    read: Callable[[], np.ndarray]


Named = Mapping[str, Tensor]


def block_shapes(config: RWKV7Config, layer: int) -> dict[str, Shape]:
    """The tensors of one block by the name behind `blocks.{layer}.`, as the tree shapes them."""
    d, f, heads = config.width, config.ffn_width, (config.num_heads, config.head_size)
    ranks = {
        "w": config.decay_rank,
        "a": config.icl_rank,
        "v": config.value_rank,
        "g": config.gate_rank,
    }
    if layer == 0:
        del ranks["v"]
    shapes: dict[str, Shape] = {}
    for norm in ("ln1", "ln2", "att.ln_x"):
        shapes |= {f"{norm}.weight": (d,), f"{norm}.bias": (d,)}
    shapes |= {f"att.x_{c}": (d,) for c in "rwkvag"}
    for letter, rank in ranks.items():
        if letter != "g":
            shapes[f"att.{letter}0"] = (d,)
        shapes |= {f"att.{letter}1": (d, rank), f"att.{letter}2": (rank, d)}
    shapes |= {"att.k_k": (d,), "att.k_a": (d,), "att.r_k": heads}
    shapes |= {f"att.{n}.weight": (d, d) for n in ("receptance", "key", "value", "output")}
    return shapes | {"ffn.x_k": (d,), "ffn.key.weight": (f, d), "ffn.value.weight": (d, f)}


def outer_shapes(config: RWKV7Config) -> dict[str, Shape]:
    """The tensors outside the blocks, by official name."""
    d, table = config.width, (config.vocab_size, config.width)
    norms = ("blocks.0.ln0", "ln_out")
    shapes = {f"{norm}.{part}": (d,) for norm in norms for part in ("weight", "bias")}
    return {"emb.weight": table, **shapes, "head.weight": table}


def unused_value_residual_shapes(config: RWKV7Config) -> dict[str, Shape]:
    """The value residual of block 0, which official trainers write and nobody reads."""
    d, rank = config.width, config.value_rank
    return {"blocks.0.att.v0": (d,), "blocks.0.att.v1": (d, rank), "blocks.0.att.v2": (rank, d)}


def shapes(config: RWKV7Config) -> dict[str, Shape]:
    """Every tensor of a model by official name, without block 0's dummies."""
    blocks = {
        f"blocks.{layer}.{name}": shape
        for layer in range(config.num_layers)
        for name, shape in block_shapes(config, layer).items()
    }
    return outer_shapes(config) | blocks


def file_shape(name: str, shape: Shape) -> Shape:
    """How official files shape a tensor: the vectors of time and channel mix are [1, 1, D]."""
    plain = name.startswith(("emb", "head", "ln_out")) or ".ln" in name
    return (1, 1, *shape) if len(shape) == 1 and not plain else shape


def hf_shape(name: str, shape: Shape) -> Shape:
    """How HF files shape a tensor: only the six lerps of time mix are [1, 1, D]."""
    return (1, 1, *shape) if ".att.x_" in name else shape


def to_hf(name: str) -> str:
    """The HF name of an official one."""
    if name in _HF_OUTSIDE:
        return _HF_OUTSIDE[name]
    layer, inside = _BLOCK.match(name).groups()
    return f"model.layers.{layer}.{_HF_INSIDE[inside]}"


def _unpack_lerps(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Old HF files hold the six lerps as one tensor, in the order r, w, k, v, a, g."""
    width = tensor.shape[-1]

    def part(index):
        return lambda: tensor.read().reshape(6, width)[index]

    stem = name.removesuffix("x_x")
    return {f"{stem}x_{c}": Tensor((width,), tensor.dtype, part(i)) for i, c in enumerate("rwkvag")}


def transposed(tensor: Tensor) -> Tensor:
    """The tensor with its last two axes swapped."""
    shape = (*tensor.shape[:-2], tensor.shape[-1], tensor.shape[-2])
    return Tensor(shape, tensor.dtype, lambda: tensor.read().swapaxes(-1, -2))


def from_hf(named: Named) -> dict[str, Tensor]:
    """Official names and orientation; names that HF files do not have stay as they are."""
    flat: dict[str, Tensor] = {}
    for name, tensor in named.items():
        if name.endswith(".attn.x_x") and tensor.shape[0] == 6:
            flat |= _unpack_lerps(name, tensor)
        else:
            flat[name] = tensor
    official = {}
    for name, tensor in flat.items():
        if name in _OFFICIAL_OUTSIDE:
            name = _OFFICIAL_OUTSIDE[name]
        elif (found := _HF_BLOCK.match(name)) and found[2] in _OFFICIAL_INSIDE:
            name = f"blocks.{found[1]}.{_OFFICIAL_INSIDE[found[2]]}"
        official[name] = transposed(tensor) if LOW_RANK.search(name) else tensor
    return official


def from_official(named: Named, *, suffix: str = "") -> dict[str, Tensor]:
    """Official names without the prefixes that trainers leave, and in official orientation.

    Args:
        named: names as a file has them.
        suffix: the file's; it decides where the shapes do not: `.st` means web-rwkv's orientation.
    """
    plain = {}
    for name, tensor in named.items():
        plain[name.removeprefix("_forward_module.").removeprefix("model.")] = tensor
    if _is_transposed(plain, suffix):
        return {n: transposed(t) if LOW_RANK.search(n) else t for n, t in plain.items()}
    return plain


def _is_transposed(named: Named, suffix: str) -> bool:
    """Whether the low-rank matrices are [rank, D], as in web-rwkv's files.

    The first that is not square tells; where all ranks equal the width, the suffix does.
    """
    width = named["emb.weight"].shape[-1:] if "emb.weight" in named else ()
    for letter in "wag":
        shape = named[f"blocks.0.att.{letter}1"].shape if f"blocks.0.att.{letter}1" in named else ()
        if len(shape) == 2 and shape[0] != shape[1] and width and width[0] in shape:
            return shape[1] == width[0]
    if suffix == ".safetensors" and "blocks.0.att.w1" in named:
        warnings.warn(
            "the low-rank matrices are square, so that their orientation cannot be told; "
            "the official one is assumed (web-rwkv's files must end in .st)",
            stacklevel=4,
        )
    return suffix == ".st"


def split_states(named: Named) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The model's tensors, and those of a tuned start state that was merged into the file."""
    states = {name: tensor for name, tensor in named.items() if _STATE.match(name)}
    return {name: t for name, t in named.items() if name not in states}, states


def reject_other_architectures(named: Named, path: str) -> None:
    """Return if this is a plain RWKV-7.

    Raises:
        ValueError: another member of the family; the sentence names it.
    """
    for pattern, variant in _VARIANTS:
        found = next((name for name in named if re.search(pattern, name)), None)
        if found:
            raise ValueError(
                f"load_model: `{path}` is a {variant} checkpoint (it has {found}); "
                "only plain RWKV-7 (x070) is supported."
            )
    old = next((n for n in named if n.endswith((".att.time_decay", ".att.time_faaaa"))), None)
    if old:
        raise ValueError(f"load_model: `{path}` is RWKV-6 or older (it has {old}), not RWKV-7.")
