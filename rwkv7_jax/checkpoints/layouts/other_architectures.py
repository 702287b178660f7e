"""Detection of models that are not plain RWKV-7, by tensor names that only they have.

Source: BlinkDL/RWKV-LM@524481d RWKV-v4neo, RWKV-v5, RWKV-v7 and RWKV-v8;
fla-org/flash-linear-attention@bc3b101 fla/layers; Joluck/RWKV-PEFT@5704c39 and
JL-er/RWKV-PEFT@5b8aac9 (adapters); cryscan/web-rwkv@3c7d546 assets/scripts/convert_safetensors.py
(`lora.0`).
"""

import re
from collections.abc import Iterable
from pathlib import Path

from rwkv7_jax.checkpoints.tensor_names import Tensors

# Patterns of tensor names, the most specific first: a hybrid has the tensors of both its parents.
_OTHERS = (
    (r"(^|\.)rosa", "an RWKV-8 (ROSA)"),
    (r"\.ffn\.enn\.weight$", "an RWKV-8 (x080)"),
    (r"\.qkv\.qq\.weight$", "an rwkv7b (DeepEmbedAttention)"),
    (r"\.ffn\.s_emb\.weight$", "an rwkv7a (DeepEmbed)"),
    (r"\.att\.time_maa_|\.att\.time_decay_w1$|\.attn\.bonus$", "an RWKV-6"),
    (r"\.att\.time_faaaa$", "an RWKV-5"),
    # fla's config allows attention in some layers.
    (r"\.attn\.q_proj\.", "a hybrid (with attention layers)"),
    # Experimental models of RWKV-LM, which number the parts of a block.
    (r"^rwkv\d+\.", "an experimental RWKV"),
)

_OLDEST = re.compile(r"\.att\.time_(decay|first)$")


# Tensors of PEFT, RWKV-PEFT and web-rwkv that supplement or replace a matrix.
_ADAPTER = re.compile(
    r"\.(lora_\w+|init_lora_[AB]|(bone|miss)(_block)?|disha|base_layer)(\.|$)"
    r"|\.lora\.[01]$"
)

# PEFT's outermost module, which is in the names of adapters of every kind.
_PEFT = "base_model."

# The last parts of names that every model or every start state has.
_ESSENTIAL = ("emb.weight", "embeddings.weight", ".time_state")

# Patterns of tensor names that only quantised models have, the most specific first.
_QUANTIZED = (
    (r"\.(SCB|absmax|quant_map)$", "bitsandbytes"),
    (r"\.(qweight|qzeros|g_idx)$", "GPTQ or AWQ"),
    (r"\.(weight_packed|weight_scale|weight_scale_inv)$", "compressed-tensors or FP8"),
    (r"\.weight\._(data|scale)$", "Quanto"),
    (r"\.W_q$", "HQQ"),
    (r"\.scales$", "MLX"),
)


def reject_adapters(tensors: Tensors, path: Path) -> None:
    """Raises if the file holds an adapter that is not merged into its model.

    Args:
        tensors: tensors under the names in the file.
        path: path of the file, for the error message.

    Raises:
        ValueError: the file holds an adapter, with or without its model.
    """
    is_part = not any(name.endswith(_ESSENTIAL) for name in tensors)
    for name in tensors:
        if _ADAPTER.search(name) or (is_part and name.startswith(_PEFT)):
            raise ValueError(
                f"`{path}` holds an adapter such as LoRA (it has {name}): merge it into its model "
                "first, with PEFT's `merge_and_unload`, or with RWKV-PEFT's `--merge 1` (older "
                "versions have scripts in `merge`)."
            )


def reject_split(tensors: Tensors, path: Path) -> None:
    """Raises if tensors have no values, because a trainer left them to other processes.

    Args:
        tensors: tensors by official name.
        path: path of the file, for the error message.

    Raises:
        ValueError: a tensor has no values.
    """
    for name, tensor in tensors.items():
        if tensor.shape == (0,):
            raise ValueError(
                f"`{path}` has {name} without values, as in a checkpoint that DeepSpeed's stage 3 "
                "or FSDP split over processes: merge its shards, with DeepSpeed's zero_to_fp32.py."
            )


def reject_quantized(tensors: Tensors, path: Path) -> None:
    """Raises if the file holds a quantised model.

    Args:
        tensors: tensors by official name.
        path: path of the file, for the error message.

    Raises:
        ValueError: the model is quantised; the message names the program.
    """
    recognised = _first_match(_QUANTIZED, tensors)
    if recognised is not None:
        program, name = recognised
        raise ValueError(
            f"`{path}` is quantised by {program} (it has {name}): use the float model that it was "
            "made from; of quantised files only GGUF is read."
        )


def reject_other_architectures(tensors: Tensors, path: Path) -> None:
    """Raises if the tensor names are those of another architecture than plain RWKV-7.

    Args:
        tensors: tensors by official name.
        path: path of the file, for the error message.

    Raises:
        ValueError: the model has another architecture; the message names it.
    """
    recognised = _other_architecture(tensors)
    if recognised is not None:
        architecture, name = recognised
        raise ValueError(
            f"`{path}` is {architecture} checkpoint (it has {name}); "
            "only plain RWKV-7 (x070) is supported."
        )


def _first_match(
    kinds: Iterable[tuple[str, str]], tensors: Tensors
) -> tuple[str, str] | None:
    """Returns the first kind whose pattern matches a tensor name, and that name."""
    for pattern, kind in kinds:
        for name in tensors:
            if re.search(pattern, name):
                return kind, name
    return None


def _other_architecture(tensors: Tensors) -> tuple[str, str] | None:
    """Returns the other architecture and the tensor name that identifies it; None for RWKV-7."""
    recognised = _first_match(_OTHERS, tensors)
    if recognised is not None:
        return recognised
    # RWKV-4 has no per-head norm; the first RWKV-5 models have it under the older names.
    has_head_norm = any(name.endswith(".att.ln_x.weight") for name in tensors)
    for name in tensors:
        if _OLDEST.search(name):
            return "an RWKV-5" if has_head_norm else "an RWKV-4", name
    return None
