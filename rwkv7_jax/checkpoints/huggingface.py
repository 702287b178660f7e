"""Hugging Face folders: their tensors and their config.json.

Folders of any layout are read; the tensor names determine the layout. `huggingface_writer` writes
two of them.
"""

import math
import re
from pathlib import Path
from typing import Any

from rwkv7_jax.checkpoints.layouts.orientation import LowRank
from rwkv7_jax.checkpoints.model_folder import read_json
from rwkv7_jax.checkpoints.tensor_files import TensorFile, open_tensors
from rwkv7_jax.checkpoints.tensor_names import Tensor

CONFIG_FILE = "config.json"

WEIGHTS_FILE = "model.safetensors"

# The names that transformers gives to weight files, in its order of preference. The name of an
# index appends ".index.json".
_STEMS = (WEIGHTS_FILE, "pytorch_model.bin")

_SHARD = re.compile(r"-\d+-of-(\d+)\.")

# The names of the square of a ReLU in fla and in transformers.
_SQUARED_RELU = ("sqrelu", "relu2")

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".st", ".gguf")


def read_hf(folder: Path, *, verify: bool = False) -> TensorFile:
    """Opens the tensors of a folder under their stored names and reads the norms' epsilon.

    Sizes, token ids and the model type are not read from config.json: published ones have wrong
    ones.

    Args:
        folder: a folder with one model.
        verify: check the files against the checksums and digests in them.

    Raises:
        ValueError: a file is missing or damaged, two files hold the same tensor, or the epsilons
            differ.
    """
    tensors: dict[str, Tensor] = {}
    orientations: set[LowRank] = set()
    norm_eps = None
    group_norm_eps = None
    # Without `verify`, opening a shard reads only its header.
    for file in _weight_files(folder):
        shard = open_tensors(file, verify=verify)
        twice = tensors.keys() & shard.tensors.keys()
        if twice:
            raise ValueError(
                f"`{folder}` holds {min(twice)} in two files; one is {file.name}."
            )
        tensors |= shard.tensors
        if shard.low_rank is not None:
            orientations.add(shard.low_rank)
        norm_eps = norm_eps or shard.norm_eps
        group_norm_eps = group_norm_eps or shard.group_norm_eps
    low_rank = orientations.pop() if len(orientations) == 1 else None
    configured = read_norm_eps(folder)
    if configured is not None and norm_eps not in (None, configured):
        raise ValueError(
            f"`{folder / CONFIG_FILE}` has norm_eps {configured!r}, but the weights "
            f"next to it were saved with {norm_eps!r}."
        )
    return TensorFile(tensors, low_rank, norm_eps or configured, group_norm_eps)


def _weight_files(folder: Path) -> list[Path]:
    """Lists the folder's weight files: those in its index, else the shards, else the only file."""
    for stem in _STEMS:
        index = folder / f"{stem}.index.json"
        if index.exists():
            return _indexed_files(index)
        if (folder / stem).exists():
            return [folder / stem]
    files = files_of_weights(folder)
    if not files:
        _reject_trainer_shards(folder)
        inner = [one for one in _folders(folder) if files_of_weights(one)]
        # Trainers put each saved step into a folder of its own.
        hint = f"; name a folder in it, such as {inner[-1].name}" if inner else ""
        raise ValueError(
            f"`{folder}` is not a checkpoint: it holds neither rwkv7_jax.json nor a "
            f"file of weights ({', '.join(_WEIGHT_SUFFIXES)}){hint}."
        )
    shards = [file for file in files if _SHARD.search(file.name)]
    if len(shards) == len(files):
        _require_all_shards(folder, shards)
        return files
    if len(files) > 1:
        names = " and ".join(file.name for file in files[:2])
        raise ValueError(
            f"`{folder}` holds several checkpoints, {names} among them; name one."
        )
    return files


def _reject_trainer_shards(folder: Path) -> None:
    """Rejects a trainer's sharded checkpoint and names the tool that consolidates it.

    Raises:
        ValueError: the folder is DeepSpeed's, or a PyTorch distributed checkpoint.
    """
    # The folder of a checkpoint holds one folder for each saved step.
    states = [*folder.glob("*_states.pt"), *folder.glob("*/*_states.pt")]
    if states or (folder / "zero_to_fp32.py").exists():
        raise ValueError(
            f"`{folder}` is a DeepSpeed checkpoint: merge its shards into one weight "
            "file with its zero_to_fp32.py, and name that file; below stage 3, its "
            "mp_rank_00_model_states.pt holds all weights too."
        )
    if any(folder.glob("*.distcp")) or any(folder.glob("*/*.distcp")):
        raise ValueError(
            f"`{folder}` is a PyTorch distributed checkpoint: merge its shards with "
            "`python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER model.pth`."
        )


def _folders(folder: Path) -> list[Path]:
    """Lists the folders in a folder."""
    return [one for one in sorted(folder.iterdir()) if one.is_dir()]


def files_of_weights(folder: Path) -> list[Path]:
    """Lists the files in a folder whose suffix is that of a weight file."""
    files = []
    for file in sorted(folder.iterdir()):
        if file.suffix in _WEIGHT_SUFFIXES and file.is_file():
            files.append(file)
    return files


def _indexed_files(index: Path) -> list[Path]:
    """Lists the shards that an index names."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"`{index}` has no table `weight_map`.")
    folder = index.parent
    shards = set()
    for shard in weight_map.values():
        # An index that points elsewhere would make us open files that the user never named.
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ValueError(f"`{index}` names {shard!r}, which is not next to it.")
        if not (folder / shard).exists():
            raise ValueError(f"`{folder}` lacks the shard {shard}.")
        shards.add(shard)
    if not shards:
        raise ValueError(f"`{index}` names no files.")
    return [folder / shard for shard in sorted(shards)]


def _require_all_shards(folder: Path, shards: list[Path]) -> None:
    """Raises unless the number of shards is the one in their names."""
    for shard in shards:
        match = _SHARD.search(shard.name)
        assert match is not None
        if int(match[1]) != len(shards):
            raise ValueError(
                f"`{folder}` holds {len(shards)} of the {int(match[1])} shards that "
                f"{shard.name} is one of."
            )


def read_norm_eps(folder: Path) -> float | None:
    """Reads the norms' epsilon from a folder's config.json; returns None if it has none.

    Raises:
        ValueError: the epsilon is not a positive number.
    """
    table = _read_config(folder)
    # Models in transformers use either name.
    norm_eps = table.get("norm_eps", table.get("layer_norm_epsilon"))
    if norm_eps is None:
        return None
    is_number = isinstance(norm_eps, int | float) and not isinstance(norm_eps, bool)
    if not is_number or not math.isfinite(norm_eps) or norm_eps <= 0:
        raise ValueError(
            f"`{folder / CONFIG_FILE}` has norm_eps {norm_eps!r}, which is not a positive number."
        )
    return norm_eps


def require_squared_relu(folder: Path) -> None:
    """Raises unless the channel mix of a folder's config.json has RWKV-7's activation.

    Raises:
        ValueError: it has another activation.
    """
    activation = _read_config(folder).get("hidden_act")
    if activation is not None and activation not in _SQUARED_RELU:
        raise ValueError(
            f"`{folder / CONFIG_FILE}` has hidden_act {activation!r}; the channel mix of RWKV-7 "
            "has the square of a ReLU (sqrelu), and no other activation is supported."
        )


def has_tied_head(folder: Path) -> bool:
    """Returns whether a folder's config.json says that the head is the embedding."""
    return _read_config(folder).get("tie_word_embeddings") is True


def _read_config(folder: Path) -> dict[str, Any]:
    """Reads a folder's config.json; returns an empty table if it has none."""
    config = folder / CONFIG_FILE
    return read_json(config) if config.exists() else {}
