"""Detection of models that are not plain RWKV-7, by tensor names that only they have.

Source: BlinkDL/RWKV-LM@524481d RWKV-v4neo, RWKV-v5, RWKV-v7 and RWKV-v8;
fla-org/flash-linear-attention@bc3b101 fla/layers.
"""

import re
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


# Tensors of PEFT and RWKV-PEFT that supplement or replace a matrix.
_ADAPTER = re.compile(r"\.(lora_[AB]|bone|disha|base_layer)(\.|$)")


def reject_adapters(tensors: Tensors, path: Path) -> None:
    """Raises if the file holds an adapter that is not merged into its model.

    Args:
        tensors: tensors by official name.
        path: path of the file, for the error message.

    Raises:
        ValueError: the file holds an adapter, with or without its model.
    """
    for name in tensors:
        if _ADAPTER.search(name):
            raise ValueError(
                f"`{path}` holds an adapter such as LoRA (it has {name}): merge it "
                "into its model first, for example with PEFT's `merge_and_unload` or RWKV-PEFT's "
                "scripts in `merge`."
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


def _other_architecture(tensors: Tensors) -> tuple[str, str] | None:
    """Returns the other architecture and the tensor name that identifies it; None for RWKV-7."""
    for pattern, architecture in _OTHERS:
        for name in tensors:
            if re.search(pattern, name):
                return architecture, name
    # RWKV-4 has no per-head norm; the first RWKV-5 models have it under the older names.
    has_head_norm = any(name.endswith(".att.ln_x.weight") for name in tensors)
    for name in tensors:
        if _OLDEST.search(name):
            return "an RWKV-5" if has_head_norm else "an RWKV-4", name
    return None
