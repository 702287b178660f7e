"""The tensors of start states: opened under the names in the file and stacked over layers."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rwkv7_jax.checkpoints import tensor_names
from rwkv7_jax.checkpoints.huggingface import read_hf
from rwkv7_jax.checkpoints.layouts.names import with_official_names
from rwkv7_jax.checkpoints.layouts.orientation import low_rank_of
from rwkv7_jax.checkpoints.layouts.other_architectures import reject_adapters
from rwkv7_jax.checkpoints.orbax_folder import is_orbax
from rwkv7_jax.checkpoints.pth import open_pth
from rwkv7_jax.checkpoints.tensor_files import (
    container_of,
    open_tensors,
    read_tensors,
)
from rwkv7_jax.checkpoints.tensor_names import UPSCALED, Tensor

# The axis orders of `time_state` in files.
AXES = "head, value, key"

TRANSPOSED_AXES = "head, key, value"

# The axis order of safetensors files by suffix; those of web-rwkv and Ai00 are transposed.
SAFETENSORS_AXES = {
    ".safetensors": AXES,
    ".st": TRANSPOSED_AXES,
    ".state": TRANSPOSED_AXES,
}

# A file with this tensor is a model with a state merged into it.
_MODEL_TENSOR = "emb.weight"


def stored_axes(
    path: Path, tensors: Mapping[str, Tensor], table: Mapping[str, Any]
) -> str:
    """Determines the axis order of a state in a file.

    PyTorch files are never transposed. For safetensors the suffix decides, because heads are
    square. If the file also holds a model, its low-rank matrices decide.

    Args:
        path: path of the file or folder.
        tensors: tensors of the file, under the names in it.
        table: the sidecar, which decides if nothing else does.

    Raises:
        ValueError: the axis order cannot be determined.
    """
    is_file = path.is_file()
    if is_file and container_of(path) != "safetensors":
        return AXES
    named = with_official_names(tensors, path)
    if _MODEL_TENSOR in named.tensors:
        said = open_tensors(path).low_rank if is_file else named.low_rank
        low_rank = low_rank_of(named.tensors, said, path)
        return TRANSPOSED_AXES if low_rank == "transposed" else AXES
    axes = AXES if not is_file else SAFETENSORS_AXES.get(path.suffix)
    axes = axes or table.get("axes")
    if axes is None:
        raise ValueError(
            f"`{path}` holds safetensors without a suffix that gives the order of their axes; "
            "rename it to .safetensors, or for web-rwkv and Ai00 to .st or .state."
        )
    return axes


def open_state_tensors(path: Path) -> dict[str, Tensor]:
    """Opens the tensors of a file and checks them against its checksums and digest.

    A model with a merged state is not checked, because it may have many gigabytes.
    """
    # An Orbax folder holds only a model.
    if is_orbax(path):
        return {}
    if path.is_dir():
        return read_hf(path).tensors
    if container_of(path) == "pth":
        content, _ = open_pth(path)
        if isinstance(content, list):
            open_pth(path, verify=True)
            return _session_tensors(content, path)
    tensors = read_tensors(path)
    is_model = _MODEL_TENSOR in with_official_names(tensors, path).tensors
    return tensors if is_model else read_tensors(path, verify=True)


def _session_tensors(content: list[Any], path: Path) -> dict[str, Tensor]:
    """Names the tensors of a session state, which the `rwkv` package saves as a list.

    For each layer the list has the last input of time mix, the WKV state and the last input of
    channel mix. Source: BlinkDL/ChatRWKV rwkv_pip_package/src/rwkv/model.py, `generate_zero_state`.
    """
    dims = [
        np.ndim(value) if isinstance(value, np.ndarray) else None for value in content
    ]
    layers = len(content) // 3
    if not layers or dims != [1, 3, 1] * layers:
        raise ValueError(
            f"`{path}` holds a list that is not a session state of the rwkv package: "
            "a vector, a WKV state [H, value, key] and a vector for each layer."
        )
    names = ("att.shift_state", "att.time_state", "ffn.shift_state")
    tensors = {}
    for number, array in enumerate(content):
        layer, part = divmod(number, 3)
        # The default argument binds this iteration's array.
        tensor = Tensor(array.shape, array.dtype, lambda array=array: array)
        tensors[f"blocks.{layer}.{names[part]}"] = tensor
    return tensors


def read_state_arrays(
    tensors: Mapping[str, Tensor], path: Path
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Reads the tensors of a state and, without their prefix, those of its upscaled memory.

    The tensors of a model in the same file are not read.

    Raises:
        ValueError: the file holds no state, or no model but tensors besides the state's.
    """
    upscaled = {}
    others = {}
    for name, tensor in tensors.items():
        if name.startswith(UPSCALED):
            upscaled[name.removeprefix(UPSCALED)] = tensor.read()
        else:
            others[name] = tensor
    reject_adapters(others, path)
    rest, state = tensor_names.split_states(with_official_names(others, path).tensors)
    if _MODEL_TENSOR in rest:
        if not state:
            raise ValueError(f"`{path}` is a model without a start state.")
    elif state:
        _reject_other_tensors(rest, path)
    return {name: tensor.read() for name, tensor in state.items()}, upscaled


def _reject_other_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raises if there are tensors besides a state's, which may have been tuned together with it.

    Scalars may be losses or step counts.
    """
    for name, tensor in tensors.items():
        if tensor.shape:
            raise ValueError(
                f"`{path}` holds {name} next to a start state, but not the model that it belongs "
                "to: save the state alone, or together with its model."
            )


def stack_layers(
    tensors: Mapping[str, np.ndarray], name: str, path: Path
) -> np.ndarray | None:
    """Stacks `blocks.0.{name}`, `blocks.1.{name}`, ... as float32; None if there are none."""
    by_layer: dict[int, np.ndarray] = {}
    for tensor_name, array in tensors.items():
        match = re.fullmatch(rf"blocks\.(\d+)\.{re.escape(name)}", tensor_name)
        if match:
            # A value that overflows float32 becomes Inf, which is rejected later.
            with np.errstate(over="ignore"):
                by_layer[int(match[1])] = np.asarray(array, np.float32)
    if not by_layer:
        return None
    # Layers are numbered from 0, so any gap is below their count.
    for layer in range(len(by_layer)):
        if layer not in by_layer:
            raise ValueError(f"`{path}` has no blocks.{layer}.{name}.")
    rows = [by_layer[layer] for layer in range(len(by_layer))]
    # The error of `np.stack` would lack the file and the name.
    if len({row.shape for row in rows}) > 1:
        raise ValueError(f"`{path}` has blocks whose {name} differ in shape.")
    return np.stack(rows)
