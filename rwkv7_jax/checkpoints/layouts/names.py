"""Official names for the tensors of any RWKV-7 model, whoever wrote it.

Trainers put prefixes before the names, Hugging Face's libraries have names of their own, and some
hold the low-rank matrices as layers (`att.w1.weight`), which means [out, in].
Source: BlinkDL/RWKV-LM@524481d RWKV-v7 (official); fla-org/flash-linear-attention@bc3b101
utils/convert_from_rwkv7.py (fla's); huggingface/transformers#47787 and the converters named there
(`model.` or `rwkv7.` before official names; `embeddings`, `pre_ln`, `attention`, `feed_forward`;
low-rank matrices as layers); RWKV/rwkv.cpp@4358e70 python/convert_pytorch_to_ggml.py.
"""

import re
from pathlib import Path
from typing import Literal, NamedTuple

from rwkv7_jax.checkpoints import tensor_names
from rwkv7_jax.checkpoints.layouts.orientation import LowRank, transposed
from rwkv7_jax.checkpoints.tensor_names import LERPS, LOW_RANK, Shape, Tensor, Tensors

Family = Literal["official", "fla"]

# Modules that PyTorch, Lightning and DeepSpeed wrap around others, anywhere in a name.
_WRAPPERS = frozenset(
    {
        "_orig_mod",
        "_forward_module",
        "_fsdp_wrapped_module",
        "_checkpoint_wrapped_module",
    }
)

# The outermost modules of trainers, of PEFT and of Hugging Face's libraries.
_PREFIXES = frozenset({"module", "base_model", "model", "rwkv", "rwkv7"})

# What parts of a block are called in some folders of transformers.
_PARTS = {"attention": "att", "feed_forward": "ffn", "pre_ln": "ln0"}

_BLOCK_PART = re.compile(r"^(blocks\.\d+)\.(\w+)\.(.+)$")

# A low-rank matrix as a layer, and its bias.
_LINEAR = re.compile(r"^(blocks\.\d+\.att\.[wavg][12])\.weight$")

_LINEAR_BIAS = re.compile(r"^(blocks\.\d+\.att\.[wav])2\.bias$")

# Tensors that hold all six lerps: those of old fla files and of rwkv.cpp.
_PACKED_LERPS = re.compile(r"^(layers\.\d+\.attn\.x_|blocks\.\d+\.att\.x_)(x|rwkvag)$")


class NamedModel(NamedTuple):
    """The tensors of a model by official name, and what their former names said.

    Attributes:
        tensors: by official name; names that no layout has stay as they are.
        family: whose names they had; fla's norms have another rule for their epsilons.
        low_rank: how the low-rank matrices lie now, where the names say so.
    """

    tensors: dict[str, Tensor]
    family: Family
    low_rank: LowRank | None


def with_official_names(tensors: Tensors, path: Path) -> NamedModel:
    """Gives tensors their official names.

    Args:
        tensors: by the names in the file.
        path: for messages.

    Raises:
        ValueError: two tensors get the same name.
    """
    official: dict[str, Tensor] = {}
    former: dict[str, str] = {}
    family: Family = "official"
    low_rank: LowRank | None = None
    for name, tensor in tensors.items():
        plain = _without_prefixes(name)
        # Names with a prefix are a trainer's or a library's, all of which keep the official
        # orientation; web-rwkv's files, which do not, have plain names.
        if plain != name:
            low_rank = "official"
        if plain.startswith("layers."):
            family = "fla"
        for part_name, part in split_lerps(plain, tensor).items():
            new, is_layer = _official_name(part_name)
            if new in official:
                raise ValueError(
                    f"`{path}` holds {new} twice, as {former[new]} and as {name}."
                )
            if is_layer:
                part = transposed(part)
                low_rank = "official"
            official[new] = part
            former[new] = name
    return NamedModel(official, family, low_rank)


def _without_prefixes(name: str) -> str:
    """Removes the wrappers and the outermost modules from a name."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while len(parts) > 1 and parts[0] in _PREFIXES:
        del parts[0]
    return ".".join(parts)


def _official_name(name: str) -> tuple[str, bool]:
    """Translates a name without prefixes, and says whether it is a low-rank matrix as a layer."""
    inside_block = _BLOCK_PART.match(name)
    if inside_block:
        block, part, rest = inside_block.groups()
        name = f"{block}.{_PARTS.get(part, part)}.{rest}"
    layer = _LINEAR.match(name)
    if layer:
        return layer[1], True
    bias = _LINEAR_BIAS.match(name)
    if bias:
        return f"{bias[1]}0", False
    official = tensor_names.from_hf(name)
    return official, official != name and bool(LOW_RANK.search(official))


def split_lerps(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Splits a tensor that holds all six lerps of time mix; others stay as they are."""
    match = _PACKED_LERPS.match(name)
    # Of another shape it stays as it is, and the check of names reports it.
    if match is None or not _is_six_lerps(tensor.shape):
        return {name: tensor}
    width = tensor.shape[-1]
    lerps = {}
    for index, letter in enumerate(LERPS):
        # The default binds this loop's number.
        lerps[f"{match[1]}{letter}"] = Tensor(
            (width,),
            tensor.dtype,
            lambda index=index: tensor.read().reshape(6, width)[index],
        )
    return lerps


def _is_six_lerps(shape: Shape) -> bool:
    """Returns whether a shape is [6, 1, 1, D], with any number of ones."""
    return len(shape) > 1 and shape[0] == 6 and all(size == 1 for size in shape[1:-1])
