"""HF folders of RWKV-7 in fla's layout: their tensors and their config.json."""

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rwkv7_jax.array_types import Params
from rwkv7_jax.checkpoints import tensor_names
from rwkv7_jax.checkpoints.model_folder import read_json, replace_folder
from rwkv7_jax.checkpoints.tensor_files import (
    read_metadata,
    read_safetensors,
    write_safetensors,
)
from rwkv7_jax.checkpoints.tensor_names import Tensor
from rwkv7_jax.checkpoints.unused_value_residual import drop_unused_value_residual
from rwkv7_jax.model.config import RWKV7Config

_CONFIG_FILE = "config.json"

_WEIGHTS_FILE = "model.safetensors"

_INDEX_FILE = "model.safetensors.index.json"

# fla's, for a config.json without one.
_DEFAULT_NORM_EPS = 1e-5

# The metadata's entry with the epsilon that the weights were saved with.
_NORM_EPS_KEY = "rwkv7_jax.norm_eps"


def _weight_files(folder: Path) -> list[Path]:
    """Lists the folder's weight files: those of its index, else the single one."""
    if not (folder / _INDEX_FILE).exists():
        single = folder / _WEIGHTS_FILE
        return [single] if single.exists() else []
    weight_map = read_json(folder / _INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(
            f"load_model: `{folder / _INDEX_FILE}` has no table `weight_map`."
        )
    shards = set()
    for shard in weight_map.values():
        # An index that points elsewhere would make us read files that the user never named.
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ValueError(
                f"load_model: `{folder / _INDEX_FILE}` names {shard!r}, which is not next to it."
            )
        if not (folder / shard).exists():
            raise ValueError(f"load_model: `{folder}` lacks the shard {shard}.")
        shards.add(shard)
    return [folder / shard for shard in sorted(shards)]


def read_hf(folder: Path) -> tuple[dict[str, Tensor], float]:
    """Opens an HF folder's tensors by official name, and reads the norms' epsilon.

    Nothing else is read from config.json: published ones have wrong head counts and token ids.

    Raises:
        ValueError: not RWKV-7, a hybrid, or files that are missing or broken.
    """
    table = read_json(folder / _CONFIG_FILE)
    if table.get("model_type") != "rwkv7":
        raise ValueError(
            f"load_model: `{folder}` must have model_type rwkv7; got {table.get('model_type')!r}."
        )
    # fla's configuration allows attention in some layers; those would come without our tensors.
    if table.get("attn"):
        raise ValueError(
            f"load_model: `{folder}` has attention layers, which RWKV-7 does not."
        )
    files = _weight_files(folder)
    if not files:
        raise ValueError(f"load_model: `{folder}` has no .safetensors file.")
    tensors = {}
    # Opening a shard reads its header alone.
    for file in files:
        tensors |= read_safetensors(file)
    norm_eps = table.get("norm_eps", _DEFAULT_NORM_EPS)
    is_number = isinstance(norm_eps, int | float) and not isinstance(norm_eps, bool)
    if not is_number or not math.isfinite(norm_eps) or norm_eps <= 0:
        raise ValueError(
            f"load_model: `{folder / _CONFIG_FILE}` has norm_eps {norm_eps!r}, which is not a "
            "positive number."
        )
    written = read_metadata(files[0]).get(_NORM_EPS_KEY, repr(norm_eps))
    if written != repr(norm_eps):
        raise ValueError(
            f"load_model: `{folder / _CONFIG_FILE}` has norm_eps {norm_eps!r}, but the weights "
            f"next to it were saved with {written}."
        )
    return tensor_names.from_hf(tensors), norm_eps


def _hf_tensors(
    tensors: Iterable[tuple[str, np.ndarray]],
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields official tensors by HF's names, in HF's orientation and shapes."""
    for name, array in drop_unused_value_residual(tensors):
        if tensor_names.LOW_RANK.search(name):
            array = array.swapaxes(-1, -2)
        yield (
            tensor_names.to_hf(name),
            array.reshape(tensor_names.hf_shape(name, array.shape)),
        )


def save_hf(
    path: Path,
    params: Params,
    config: RWKV7Config,
    tensors: Iterable[tuple[str, np.ndarray]],
) -> None:
    """Writes an HF folder completely, or leaves what was there before.

    Args:
        path: of the folder.
        params: the parameter tree; config.json tells its dtype.
        config: its sizes.
        tensors: `official_tensors` of the tree, taken one at a time.

    Raises:
        ValueError: epsilons that config.json cannot express, or a folder with other files.
    """
    # fla computes the per-head epsilon, so a different one would be lost without a word.
    if not np.isclose(config.group_norm_eps, config.head_size * config.norm_eps):
        raise ValueError(
            "save_model: an HF folder has one `norm_eps` for all norms, and the per-head norm's is "
            f"head_size times it; got {config.norm_eps} and {config.group_norm_eps}."
        )

    def fill(folder: Path) -> None:
        folder.mkdir()
        metadata = {"format": "pt", _NORM_EPS_KEY: repr(config.norm_eps)}
        write_safetensors(
            folder / _WEIGHTS_FILE, _hf_tensors(tensors), metadata=metadata
        )
        table = json.dumps(hf_config(params, config), indent=2)
        (folder / _CONFIG_FILE).write_text(table + "\n", encoding="utf-8")

    replace_folder(path.absolute(), {_CONFIG_FILE, _WEIGHTS_FILE}, fill)


def hf_config(params: Params, config: RWKV7Config) -> dict[str, Any]:
    """Makes the config.json of a model, with the dtype in both spellings."""
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
        # fla's default; RWKV itself has no longest context.
        "max_position_embeddings": 2048,
        "norm_first": True,
        "norm_bias": True,
        "norm_eps": config.norm_eps,
        "vocab_size": config.vocab_size,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "tie_word_embeddings": False,
        # transformers renamed `torch_dtype` to `dtype`; older versions know the former alone.
        "dtype": dtype,
        "torch_dtype": dtype,
    }
