"""HF folders of RWKV-7 (fla's layout): what is in one, and the card that goes in."""

import json
from pathlib import Path
from typing import Any

from rwkv7_jax.array_types import Params
from rwkv7_jax.checkpoints import tensor_names as names
from rwkv7_jax.checkpoints.tensor_files import read_safetensors
from rwkv7_jax.checkpoints.tensor_names import Tensor
from rwkv7_jax.model.config import RWKV7Config

CARD, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


def read_json(path: Path) -> dict[str, Any]:
    """The table in a JSON file.

    Raises:
        ValueError: the file is no JSON, or holds no table.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise ValueError(f"load_model: `{path}` is no JSON.") from None
    if not isinstance(table, dict):
        raise ValueError(f"load_model: `{path}` holds no table.")
    return table


def _files(folder: Path) -> list[Path]:
    """The folder's weight files: those of its index, else the one."""
    if not (folder / INDEX).exists():
        return [folder / WEIGHTS] if (folder / WEIGHTS).exists() else []
    shards = read_json(folder / INDEX).get("weight_map")
    found = set(shards.values()) if isinstance(shards, dict) else set()
    for shard in found:
        # An index that points elsewhere would make us read files that nobody named.
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ValueError(f"load_model: `{folder / INDEX}` names {shard!r}, no file beside it.")
        if not (folder / shard).exists():
            raise ValueError(f"load_model: `{folder}` lacks the shard {shard}.")
    return [folder / shard for shard in sorted(found)]


def read_hf(folder: Path) -> tuple[dict[str, Tensor], dict[str, float]]:
    """An HF folder's tensors by official name, and what only its config.json tells.

    Its head count and its token ids are not read: published ones are wrong.
    Source: fla-org/flash-linear-attention@bc3b101 fla/layers/rwkv7.py:128 (the norm's epsilon).

    Raises:
        ValueError: not RWKV-7, a hybrid, or files that are missing or broken.
    """
    card = read_json(folder / CARD)
    if card.get("model_type") != "rwkv7":
        raise ValueError(
            f"load_model: `{folder}` must have model_type rwkv7; got {card.get('model_type')!r}."
        )
    if card.get("attn"):
        raise ValueError(f"load_model: `{folder}` mixes attention layers in, which RWKV-7 has not.")
    files = _files(folder)
    if not files:
        raise ValueError(f"load_model: `{folder}` has no .safetensors file.")
    named = {n: tensor for file in files for n, tensor in read_safetensors(file).items()}
    official = names.from_hf(named)
    norm_eps = card.get("norm_eps", 1e-5)
    if not isinstance(norm_eps, float):
        raise ValueError(f"load_model: `{folder}` has norm_eps {norm_eps!r}, no number.")
    heads = official["blocks.0.att.r_k"].shape if "blocks.0.att.r_k" in official else ()
    head_size = heads[-1] if heads else 64
    return official, {"norm_eps": norm_eps, "group_norm_eps": head_size * norm_eps}


def hf_config(params: Params, config: RWKV7Config) -> dict[str, Any]:
    """The config.json of a model, in both spellings of the dtype."""
    dtype = str(params["emb"]["weight"].dtype)
    return {
        "architectures": ["RWKV7ForCausalLM"],
        "model_type": "rwkv7",
        "attn": None,
        "attn_mode": "chunk",
        "hidden_size": config.width,
        "hidden_ratio": config.ffn_width / config.width,
        "intermediate_size": config.ffn_width,
        "num_hidden_layers": config.num_layers,
        "head_dim": config.head_size,
        "num_heads": config.num_heads,
        "decay_low_rank_dim": config.decay_rank,
        "gate_low_rank_dim": config.gate_rank,
        "a_low_rank_dim": config.icl_rank,
        "v_low_rank_dim": config.value_rank,
        "hidden_act": "sqrelu",
        "max_position_embeddings": 2048,
        "norm_first": True,
        "norm_bias": True,
        "norm_eps": config.norm_eps,
        "vocab_size": config.vocab_size,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "tie_word_embeddings": False,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
