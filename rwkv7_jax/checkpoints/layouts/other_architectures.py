"""Recognition of models that are not plain RWKV-7, by names that only they have.

Source: BlinkDL/RWKV-LM@524481d RWKV-v4neo, RWKV-v5, RWKV-v7 and RWKV-v8;
fla-org/flash-linear-attention@bc3b101 fla/layers.
"""

import re
from pathlib import Path

from rwkv7_jax.checkpoints.tensor_names import Tensors

# Patterns of official names, the most telling first: a hybrid has the tensors of both its parents.
_OTHERS = (
    (r"(^|\.)rosa", "an RWKV-8 (ROSA)"),
    (r"\.ffn\.enn\.weight$", "an RWKV-8 (x080)"),
    (r"\.qkv\.qq\.weight$", "an rwkv7b (DeepEmbedAttention)"),
    (r"\.ffn\.s_emb\.weight$", "an rwkv7a (DeepEmbed)"),
    (r"\.att\.time_maa_|\.att\.time_decay_w1$|\.attn\.bonus$", "an RWKV-6"),
    (r"\.att\.time_faaaa$", "an RWKV-5"),
    # fla's configuration allows attention in some layers.
    (r"\.attn\.q_proj\.", "a hybrid (with attention layers)"),
    # Models of RWKV-LM's experiments, which number the parts of a block.
    (r"^rwkv\d+\.", "an experimental RWKV"),
)

_OLDEST = re.compile(r"\.att\.time_(decay|first)$")


# Tensors of PEFT and RWKV-PEFT that stand next to a matrix or for it.
_ADAPTER = re.compile(r"\.(lora_[AB]|bone|disha|base_layer)(\.|$)")


def reject_adapters(tensors: Tensors, path: Path) -> None:
    """Raises if there are tensors that change another model's matrices.

    Args:
        tensors: by official name.
        path: for the message.

    Raises:
        ValueError: an adapter, alone or next to the model that it was not merged into.
    """
    for name in tensors:
        if _ADAPTER.search(name):
            raise ValueError(
                f"`{path}` holds an adapter such as LoRA's (it has {name}): merge it "
                "into its model first, for example with PEFT's `merge_and_unload` or RWKV-PEFT's "
                "scripts in `merge`."
            )


def reject_other_architectures(tensors: Tensors, path: Path) -> None:
    """Raises unless this can be a plain RWKV-7.

    Args:
        tensors: by official name.
        path: for the message.

    Raises:
        ValueError: another member of the family; the message names it.
    """
    recognised = _other_architecture(tensors)
    if recognised is not None:
        architecture, name = recognised
        raise ValueError(
            f"`{path}` is {architecture} checkpoint (it has {name}); "
            "only plain RWKV-7 (x070) is supported."
        )


def _other_architecture(tensors: Tensors) -> tuple[str, str] | None:
    """Returns which other architecture this is and the name that tells; None for RWKV-7."""
    for pattern, architecture in _OTHERS:
        for name in tensors:
            if re.search(pattern, name):
                return architecture, name
    # RWKV-4 has no norm of the heads; the first RWKV-5 had it and the older names.
    has_head_norm = any(name.endswith(".att.ln_x.weight") for name in tensors)
    for name in tensors:
        if _OLDEST.search(name):
            return "an RWKV-5" if has_head_norm else "an RWKV-4", name
    return None
