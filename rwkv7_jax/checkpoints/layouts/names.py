"""Translation of the tensor names of any RWKV-7 model to the official ones.

Trainers add prefixes to the names. Hugging Face's libraries have their own names, and some hold the
low-rank matrices as linear layers (`att.w1.weight`), which implies [out, in].
Source: BlinkDL/RWKV-LM@524481d RWKV-v7 (official); fla-org/flash-linear-attention@bc3b101
utils/convert_from_rwkv7.py (fla's); huggingface/transformers#47787 and the converters named there
(`model.` or `rwkv7.` before official names; `embeddings`, `pre_ln`, `attention`, `feed_forward`;
low-rank matrices as layers); RWKV/rwkv.cpp@4358e70 python/convert_pytorch_to_ggml.py;
Joluck/RWKV-PEFT@5704c39 rwkvt/rwkv7/att.py, ffn.py (`ts_state`).
"""

import re
from pathlib import Path
from typing import Literal, NamedTuple

from rwkv7_jax.checkpoints import tensor_names
from rwkv7_jax.checkpoints.layouts.orientation import LowRank, transposed
from rwkv7_jax.checkpoints.tensor_names import LERPS, LOW_RANK, Shape, Tensor, Tensors

Family = Literal["official", "fla"]

# Wrapper modules of PyTorch, Lightning and DeepSpeed, which may occur anywhere in a name.
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

# The names of a block's parts in some transformers folders.
_PARTS = {"attention": "att", "feed_forward": "ffn", "pre_ln": "ln0"}

_BLOCK_PART = re.compile(r"^(blocks\.\d+)\.(\w+)\.(.+)$")

# A low-rank matrix as a linear layer, and its bias.
_LINEAR = re.compile(r"^(blocks\.\d+\.att\.[wavg][12])\.weight$")

_LINEAR_BIAS = re.compile(r"^(blocks\.\d+\.att\.[wav])2\.bias$")

# The last inputs of the token shifts in RWKV-PEFT, which adds them at the first token.
_SHIFT = re.compile(r"^(blocks\.\d+\.(?:att|ffn))\.ts_state$")

# Tensors that hold all six lerps, in old fla files and in rwkv.cpp.
_PACKED_LERPS = re.compile(r"^(layers\.\d+\.attn\.x_|blocks\.\d+\.att\.x_)(x|rwkvag)$")


class NamedModel(NamedTuple):
    """The tensors of a model by official name, and what their original names imply.

    Attributes:
        tensors: tensors by official name; unknown names are kept.
        family: original naming scheme; fla has another rule for the norms' epsilons.
        low_rank: orientation of the low-rank matrices, if the names determine it.
    """

    tensors: dict[str, Tensor]
    family: Family
    low_rank: LowRank | None


def with_official_names(tensors: Tensors, path: Path) -> NamedModel:
    """Renames tensors to their official names.

    Args:
        tensors: tensors under the names in the file.
        path: path of the file, for error messages.

    Raises:
        ValueError: two tensors get the same name.
    """
    official: dict[str, Tensor] = {}
    former: dict[str, str] = {}
    family: Family = "official"
    low_rank: LowRank | None = None
    for name, tensor in tensors.items():
        plain = _without_prefixes(name)
        # Prefixes come from trainers and libraries, which all keep the official orientation.
        # web-rwkv, which does not, has plain names.
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
    """Translates a name without prefixes; the flag marks a low-rank matrix as a linear layer."""
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
    shift = _SHIFT.match(name)
    if shift:
        return f"{shift[1]}.shift_state", False
    official = tensor_names.from_hf(name)
    return official, official != name and bool(LOW_RANK.search(official))


def split_lerps(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Splits a tensor that holds all six lerps of time mix; keeps any other tensor."""
    match = _PACKED_LERPS.match(name)
    # One of another shape is kept, and `check_names` reports it.
    if match is None or not _is_six_lerps(tensor.shape):
        return {name: tensor}
    width = tensor.shape[-1]
    lerps = {}
    for index, letter in enumerate(LERPS):
        # The default argument binds this iteration's index.
        lerps[f"{match[1]}{letter}"] = Tensor(
            (width,),
            tensor.dtype,
            lambda index=index: tensor.read().reshape(6, width)[index],
        )
    return lerps


def _is_six_lerps(shape: Shape) -> bool:
    """Returns whether a shape is [6, 1, 1, D], with any number of ones."""
    return len(shape) > 1 and shape[0] == 6 and all(size == 1 for size in shape[1:-1])
