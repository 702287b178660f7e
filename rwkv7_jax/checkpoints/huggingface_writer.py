"""Hugging Face folders: weights, config.json, generation config, tokenizer and chat template.

A model can be written in two layouts:

* "hf": the names of flash-linear-attention, which `fla` and `rwkv7-hf` read.
* "transformers": official names with the prefix `rwkv7.`, as in the RWKV project's own repositories
  since August 2026 and in the model that is proposed for transformers.

Source: fla-org/flash-linear-attention@bc3b101 utils/convert_from_rwkv7.py; huggingface/transformers
issue 47787; aabbdev/rwkv-publisher@67f4b55 src/rwkv_publisher/conversion.py (contents of the
project's repositories).
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rwkv7_jax.array_types import Params
from rwkv7_jax.checkpoints import tensor_names
from rwkv7_jax.checkpoints.huggingface import CONFIG_FILE, WEIGHTS_FILE
from rwkv7_jax.checkpoints.model_folder import replace_folder
from rwkv7_jax.checkpoints.tensor_files import (
    NORM_EPS_KEY,
    VOCABULARY_KEY,
    write_safetensors,
)
from rwkv7_jax.checkpoints.unused_value_residual import (
    add_unused_value_residual,
    drop_unused_value_residual,
)
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.text.fast_tokenizer import fast_tokenizer, tokenizer_config
from rwkv7_jax.text.id_tokenizer import IdTokenizer
from rwkv7_jax.text.jinja_template import chat_template_jinja
from rwkv7_jax.text.json_tokenizer import JsonTokenizer
from rwkv7_jax.text.tokenizer import END_OF_TEXT, Tokenizer
from rwkv7_jax.text.vocabulary_entries import (
    END_OF_TEXT_NAME,
    fitting_vocabulary,
    vocabulary_entries,
)

Layout = Literal["hf", "transformers"]

_GENERATION_FILE = "generation_config.json"

_TOKENIZER_FILE = "tokenizer.json"

_TOKENIZER_CONFIG_FILE = "tokenizer_config.json"

_CHAT_FILE = "chat_template.jinja"

# The only files that a folder may hold if a new one is to replace it.
HF_CONTENT = {
    CONFIG_FILE,
    WEIGHTS_FILE,
    _GENERATION_FILE,
    _TOKENIZER_FILE,
    _TOKENIZER_CONFIG_FILE,
    _CHAT_FILE,
}

# The epsilon of the per-head norm. Readers of official names assume it and ignore config.json.
_OFFICIAL_GROUP_NORM_EPS = 64e-5

_TRANSFORMERS_PREFIX = "rwkv7."


def save_hf(
    path: Path,
    params: Params,
    config: RWKV7Config,
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    layout: Layout,
    tokenizer: Tokenizer | None,
) -> None:
    """Writes a folder atomically.

    Args:
        path: path of the folder.
        params: the parameter tree, whose dtype goes into config.json.
        config: the config of the model.
        tensors: `official_tensors` of the tree, consumed one at a time.
        layout: the naming scheme of the tensors.
        tokenizer: the vocabulary; None selects the built-in one of the model's size, if any.

    Raises:
        ValueError: config.json cannot express the epsilons, the vocabulary does not fit the model,
            or the folder holds other files.
    """
    _check_epsilons(config, layout)
    vocabulary = fitting_vocabulary(tokenizer, config.vocab_size)
    end_of_text = END_OF_TEXT if vocabulary is None else vocabulary.end_of_text
    texts = _vocabulary_files(vocabulary, config.vocab_size)
    # RWKV uses one id for BOS, EOS and padding. No sampling settings are written.
    ids = {"bos_token_id": end_of_text, "eos_token_id": end_of_text}
    filling = {"pad_token_id": end_of_text}
    texts[_GENERATION_FILE] = _indented_json(ids | filling | {"use_cache": True})
    dtype = str(params["emb"]["weight"].dtype)
    if layout == "hf":
        # fla gives the embedding row of the padding id no gradient, so the end of text could not
        # be learnt. The published folders with official names have a padding id.
        table = _fla_config(config, dtype)
    else:
        table = _transformers_config(config, dtype) | filling
    texts[CONFIG_FILE] = _indented_json(table | ids)

    def fill(folder: Path) -> None:
        folder.mkdir()
        if layout == "hf":
            named = _fla_tensors(tensors)
        else:
            named = _transformers_tensors(tensors, config)
        metadata = {"format": "pt", NORM_EPS_KEY: repr(config.norm_eps)}
        if isinstance(vocabulary, IdTokenizer):
            metadata[VOCABULARY_KEY] = vocabulary.kind
        write_safetensors(folder / WEIGHTS_FILE, named, metadata=metadata)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8", newline="\n")

    replace_folder(path.absolute(), HF_CONTENT, fill)


def _check_epsilons(config: RWKV7Config, layout: Layout) -> None:
    """Raises unless a reader of the layout uses the model's epsilons."""
    # Readers derive the per-head epsilon, so a different one would be lost silently.
    if not np.isclose(config.group_norm_eps, config.head_size * config.norm_eps):
        raise ValueError(
            "`config.group_norm_eps` of an HF folder must be head_size times `norm_eps`, the only "
            f"epsilon in config.json; got {config.group_norm_eps} and {config.norm_eps}."
        )
    is_official = np.isclose(config.group_norm_eps, _OFFICIAL_GROUP_NORM_EPS)
    if layout == "transformers" and not is_official:
        raise ValueError(
            "`config.group_norm_eps` of a folder with official names must be "
            f"{_OFFICIAL_GROUP_NORM_EPS}, which its readers assume; got {config.group_norm_eps}."
        )


def _indented_json(table: dict[str, Any]) -> str:
    """Formats a table as indented JSON."""
    return json.dumps(table, indent=2, ensure_ascii=False) + "\n"


def _vocabulary_files(vocabulary: Tokenizer | None, vocab_size: int) -> dict[str, str]:
    """Returns the contents of the vocabulary and chat template files, by file name.

    The result is empty if no vocabulary is known or the ids stand for no text.
    """
    if vocabulary is None or isinstance(vocabulary, IdTokenizer):
        return {}
    if isinstance(vocabulary, JsonTokenizer):
        content = vocabulary.file_text()
        end_of_text = vocabulary.end_token()
    else:
        entries = vocabulary_entries(vocabulary, vocab_size)
        content = json.dumps(fast_tokenizer(entries), ensure_ascii=False)
        end_of_text = None if vocabulary.end_of_text is None else END_OF_TEXT_NAME
    return {
        _TOKENIZER_FILE: content,
        _TOKENIZER_CONFIG_FILE: _indented_json(tokenizer_config(end_of_text)),
        _CHAT_FILE: chat_template_jinja(),
    }


def _fla_tensors(
    tensors: Iterable[tuple[str, np.ndarray]],
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields official tensors under fla's names, in its orientation and shapes."""
    for name, array in drop_unused_value_residual(tensors):
        if tensor_names.LOW_RANK.search(name):
            array = array.swapaxes(-1, -2)
        yield (
            tensor_names.to_hf(name),
            array.reshape(tensor_names.hf_shape(name, array.shape)),
        )


def _transformers_tensors(
    tensors: Iterable[tuple[str, np.ndarray]], config: RWKV7Config
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields tensors as official files have them, with a prefix on every name but the head's."""
    for name, array in add_unused_value_residual(tensors, config):
        array = array.reshape(tensor_names.file_shape(name, array.shape))
        is_head = name.startswith("head.")
        yield name if is_head else f"{_TRANSFORMERS_PREFIX}{name}", array


def _sizes(config: RWKV7Config, dtype: str) -> dict[str, Any]:
    """Returns the entries that config.json has in both layouts."""
    return {
        "model_type": "rwkv7",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.ffn_width,
        "num_hidden_layers": config.num_layers,
        "head_dim": config.head_size,
        "num_heads": config.num_heads,
        "decay_low_rank_dim": config.decay_rank,
        "gate_low_rank_dim": config.gate_rank,
        "a_low_rank_dim": config.icl_rank,
        "v_low_rank_dim": config.value_rank,
        "norm_eps": config.norm_eps,
        "norm_bias": True,
        "tie_word_embeddings": False,
        # transformers renamed `torch_dtype` to `dtype`; older versions only know the former.
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def _fla_config(config: RWKV7Config, dtype: str) -> dict[str, Any]:
    """Builds the config.json that fla and rwkv7-hf read."""
    return {
        "architectures": ["RWKV7ForCausalLM"],
        **_sizes(config, dtype),
        "attn": None,
        "attn_mode": "chunk",
        "hidden_act": "sqrelu",
        "hidden_ratio": config.ffn_width / config.width,
        # fla's default; RWKV itself has no maximum context length.
        "max_position_embeddings": 2048,
        "norm_first": True,
    }


def _transformers_config(config: RWKV7Config, dtype: str) -> dict[str, Any]:
    """Builds the config.json of the model that is proposed for transformers."""
    return {
        "architectures": ["Rwkv7ForCausalLM"],
        **_sizes(config, dtype),
        "use_cache": True,
        "wkv_state_dtype": "float32",
        # Token by token, like the reference.
        "wkv_implementation": "eager",
    }
