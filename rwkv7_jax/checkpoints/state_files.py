"""Start states as files that other RWKV tools read.

`.pth` and `.safetensors` hold `blocks.{i}.att.time_state` as [H, value, key], which for RWKV-7 is
the runtime's own order: nothing is transposed. `.st`, for web-rwkv and Ai00, swaps the last two
axes. Token-shift states that are not zero go under names of our own, `blocks.{i}.att.shift_state`
and `blocks.{i}.ffn.shift_state`. A sidecar `<file>.json` says what the file alone cannot. Upscaled
memories, with all that is needed to read them, go into `.safetensors` files as `upscaled.{name}`.
Source: JL-er/RWKV-PEFT@5b8aac9 (the names); josStorer/RWKV-Runner@64269f0
backend-python/utils/rwkv.py.
"""

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from rwkv7_jax.checkpoints import tensor_names
from rwkv7_jax.checkpoints.pth import write_pth
from rwkv7_jax.checkpoints.tensor_files import read_tensors, write_safetensors
from rwkv7_jax.checks import prefix_errors
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.model.state import Features, RWKV7State, Upscaled, check_state

SUFFIXES = (".pth", ".safetensors", ".st")

# What a sidecar says of the axes of `time_state`.
_AXES = "head, value, key"

_TRANSPOSED_AXES = "head, key, value"

_UPSCALED = "upscaled."

# Leaves of `Upscaled.features` and of `Upscaled`, by their names in the file.
_FEATURE_LEAVES = ("landmarks", "widths", "mean", "map")

_MEMORY_LEAVES = ("memory", "write", "readout")

_REQUIRED_LEAVES = ("memory", "write", "landmarks", "widths", "mean")


def _check_suffix(path: Path) -> None:
    """Raises unless the path names a format that can hold a state."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"`path` must end in {', '.join(SUFFIXES)}; got {path}.")


def _usual_axes(path: Path) -> str:
    """Returns the axes that files of this suffix hold."""
    return _TRANSPOSED_AXES if path.suffix == ".st" else _AXES


def save_state(
    path: str | Path,
    state: RWKV7State,
    *,
    config: RWKV7Config | None = None,
    info: Mapping[str, Any] | None = None,
    dtype="float32",
) -> None:
    """Saves a start state and its sidecar; a write that fails leaves what was there before.

    Args:
        path: `.pth`, `.safetensors` or `.st`; an upscaled state needs `.safetensors`.
        state: batch 1.
        config: of the model, to refuse a state of another one.
        info: further entries of the sidecar: the base model's hash, a score.
        dtype: of the WKV tensors; the others are float32.

    Raises:
        ValueError: more than one sequence, another model's state, or an unknown suffix.
    """
    path = Path(path)
    with prefix_errors("save_state"):
        _check_suffix(path)
        if state.batch != 1:
            raise ValueError(f"`state` must hold one sequence; got {state.batch}.")
        if config is not None:
            _check_sizes(np.asarray(state.wkv[:, 0]), config, "state")
        # Tools that read the other formats would take the WKV part for all of the state.
        if state.upscaled is not None and path.suffix != ".safetensors":
            raise ValueError(
                f"`path` of an upscaled state must end in .safetensors; got {path}."
            )
    tensors = _state_tensors(state, path, jnp.dtype(dtype))
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".pth":
        write_pth(path, tensors.items())
    else:
        write_safetensors(path, tensors.items())
    table = _sidecar_table(state, path)
    table.update(info or {})
    sidecar(path).write_text(json.dumps(table, indent=1) + "\n")


def _state_tensors(
    state: RWKV7State, path: Path, dtype: np.dtype
) -> dict[str, np.ndarray]:
    """Returns a state's tensors as a file of this suffix has them, in the file's order."""
    tensors = {}
    if state.upscaled is not None:
        tensors.update(_upscaled_tensors(state.upscaled))
    for layer, wkv in enumerate(np.asarray(state.wkv[:, 0])):
        if _usual_axes(path) == _TRANSPOSED_AXES:
            wkv = wkv.swapaxes(-1, -2)
        tensors[f"blocks.{layer}.att.time_state"] = np.ascontiguousarray(wkv).astype(
            dtype
        )
    for part, shift in (("att", state.att_shift), ("ffn", state.ffn_shift)):
        # Other tools do not know these names: a file has them only where they matter.
        if not np.any(shift):
            continue
        rows = np.asarray(shift[:, 0]).astype(np.float32)
        for layer, row in enumerate(rows):
            tensors[f"blocks.{layer}.{part}.shift_state"] = row
    return tensors


def _upscaled_leaves(upscaled: Upscaled) -> dict[str, Any]:
    """Returns all leaves of an upscaled memory by their names in a file; some are None."""
    leaves = {}
    for name in _FEATURE_LEAVES:
        leaves[name] = getattr(upscaled.features, name)
    for name in _MEMORY_LEAVES:
        leaves[name] = getattr(upscaled, name)
    return leaves


def _upscaled_tensors(upscaled: Upscaled) -> dict[str, np.ndarray]:
    """Returns the tensors of an upscaled memory, without the batch axis."""
    tensors = {}
    for name, leaf in _upscaled_leaves(upscaled).items():
        if leaf is not None:
            tensors[_UPSCALED + name] = np.ascontiguousarray(leaf[:, 0], np.float32)
    return tensors


def _sidecar_table(state: RWKV7State, path: Path) -> dict[str, Any]:
    """Describes a state for its sidecar."""
    layers, _, heads, values, keys = state.wkv.shape
    table: dict[str, Any] = {
        "format": "rwkv7 start state",
        "axes": _usual_axes(path),
        "layers": layers,
        "heads": heads,
        "value_size": values,
        "key_size": keys,
    }
    upscaled = state.upscaled
    if upscaled is not None:
        table["dynamics"] = upscaled.dynamics
        table["kind"] = upscaled.features.kind
        table["features"] = upscaled.memory.shape[-1]
    return table


def sidecar(path: str | Path) -> Path:
    """Returns the path of a state's sidecar."""
    return Path(f"{path}.json")


def read_sidecar(path: str | Path) -> dict[str, Any]:
    """Reads a state's sidecar; empty where there is none.

    Raises:
        ValueError: the sidecar is not JSON, or holds no object.
    """
    place = sidecar(path)
    if not place.exists():
        return {}
    try:
        table = json.loads(place.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise ValueError(f"read_sidecar: `{place}` is not JSON.") from None
    if not isinstance(table, dict):
        raise ValueError(f"read_sidecar: `{place}` holds no JSON object.")
    return table


def common_base_model(paths: Sequence[str | Path]) -> str | None:
    """Returns the base model that states were tuned for, by their sidecars; None if none says.

    Raises:
        ValueError: the sidecars name different models.
    """
    first_path: dict[str, str | Path] = {}
    for path in paths:
        base = read_sidecar(path).get("base_model")
        if base is not None:
            first_path.setdefault(base, path)
    if len(first_path) > 1:
        (one, one_path), (two, two_path) = list(first_path.items())[:2]
        with prefix_errors("common_base_model"):
            raise ValueError(
                f"states must be of one base model; `{one_path}` was tuned for {one}, "
                f"`{two_path}` for {two}."
            )
    return next(iter(first_path), None)


def _check_sizes(wkv: np.ndarray, config: RWKV7Config, subject: str) -> None:
    """Raises unless WKV states [layers, heads, value, key] have a model's sizes."""
    expected = (config.num_layers, config.num_heads, config.head_size, config.head_size)
    if wkv.shape != expected:
        raise ValueError(
            f"`{subject}` must have [layers, heads, value, key] = {expected} for this "
            f"model; got {wkv.shape}."
        )


def _stack_layers(
    tensors: Mapping[str, np.ndarray], name: str, path: Path
) -> np.ndarray | None:
    """Stacks `blocks.0.{name}`, `blocks.1.{name}`, ... as float32; None where there are none."""
    by_layer: dict[int, np.ndarray] = {}
    for tensor_name, array in tensors.items():
        match = re.fullmatch(rf"blocks\.(\d+)\.{re.escape(name)}", tensor_name)
        if match:
            by_layer[int(match[1])] = np.asarray(array, np.float32)
    if not by_layer:
        return None
    # Layers count up from 0: with as many numbers as layers, the first gap is below their count.
    for layer in range(len(by_layer)):
        if layer not in by_layer:
            raise ValueError(f"load_state: `{path}` has no blocks.{layer}.{name}.")
    rows = [by_layer[layer] for layer in range(len(by_layer))]
    # `np.stack` would say so too, but without the file and the name.
    if len({row.shape for row in rows}) > 1:
        raise ValueError(
            f"load_state: `{path}` has blocks whose {name} differ in shape."
        )
    return np.stack(rows)


def _require_finite(array: np.ndarray, name: str, path: Path) -> None:
    """Raises unless every number is finite."""
    if not np.isfinite(array).all():
        raise ValueError(f"load_state: `{path}` has NaN or Inf in a {name}.")


def _load_upscaled(tensors: Mapping[str, np.ndarray], path: Path) -> Upscaled | None:
    """Builds the upscaled memory of a file; None where there is none.

    Args:
        tensors: by name without the prefix, without a batch axis.
        path: of the file, for its sidecar and for messages.
    """
    if not tensors:
        return None
    table = read_sidecar(path)
    for field in ("dynamics", "kind"):
        if field not in table:
            raise ValueError(
                f"load_state: `{sidecar(path)}` must give the upscaled state's {field}; got none."
            )
    for name in _REQUIRED_LEAVES:
        if name not in tensors:
            raise ValueError(f"load_state: `{path}` has no {_UPSCALED}{name}.")
    leaves: dict[str, Any] = {}
    for name, array in tensors.items():
        if not np.isfinite(array).all():
            raise ValueError(
                f"load_state: `{path}` has NaN or Inf in {_UPSCALED}{name}."
            )
        leaves[name] = jnp.asarray(array, jnp.float32)[:, None]
    features = Features(
        landmarks=leaves["landmarks"],
        widths=leaves["widths"],
        mean=leaves["mean"],
        map=leaves.get("map"),
        kind=table["kind"],
    )
    return Upscaled(
        memory=leaves["memory"],
        write=leaves["write"],
        readout=leaves.get("readout"),
        features=features,
        dynamics=table["dynamics"],
    )


def _warn_of_other_weights(path: Path, base_model: str | None) -> None:
    """Warns if the sidecar says that the state was tuned for another model."""
    stored = read_sidecar(path).get("base_model")
    if base_model is None or stored is None or stored == base_model:
        return
    # No error: the same weights in another dtype have another hash.
    warnings.warn(
        f"load_state: `{path}` was tuned for the model {stored}; got the model {base_model}. "
        "Unless they differ in dtype alone, it means nothing there.",
        stacklevel=3,
    )


def _check_axes(path: Path) -> None:
    """Raises if the sidecar says that the file's axes are not those of its suffix."""
    usual = _usual_axes(path)
    axes = read_sidecar(path).get("axes", usual)
    if axes not in (_AXES, _TRANSPOSED_AXES):
        raise ValueError(
            f"load_state: `{sidecar(path)}` says axes {axes!r}, which is unknown."
        )
    if axes != usual:
        raise ValueError(
            f"load_state: `{path}` is transposed: its sidecar says axes {axes!r}, "
            f"but {path.suffix} files hold {usual!r}."
        )


def load_state(
    path: str | Path,
    *,
    config: RWKV7Config | None = None,
    base_model: str | None = None,
) -> RWKV7State:
    """Loads a start state, batch 1, float32.

    Takes files of RWKV-PEFT, RWKV-Runner, web-rwkv and Ai00, and model checkpoints with a merged
    state.

    Args:
        path: `.pth`, `.safetensors` or `.st`.
        config: of the model, to refuse a state of another one.
        base_model: `model_hash` of the model, to warn of a state of other weights where the sidecar
            says which they were.

    Raises:
        ValueError: no state in the file, layers missing, NaN or Inf, another model's sizes, or a
            transposed state where that can be told (by the sidecar).
    """
    path = Path(path)
    with prefix_errors("load_state"):
        _check_suffix(path)
        if not path.exists():
            raise ValueError(f"`{path}` does not exist.")
    _warn_of_other_weights(path, base_model)
    tensors, upscaled = _read_state_tensors(path)
    wkv = _stack_layers(tensors, "att.time_state", path)
    if wkv is None or wkv.ndim != 4:
        raise ValueError(
            f"load_state: `{path}` holds no blocks.0.att.time_state [H, value, key]."
        )
    _check_axes(path)
    # Heads are square, so a forgotten swap would load, and only answer badly.
    if _usual_axes(path) == _TRANSPOSED_AXES:
        wkv = wkv.swapaxes(-1, -2)
    if config is not None:
        with prefix_errors("load_state"):
            _check_sizes(wkv, config, str(path))
    _require_finite(wkv, "time_state", path)
    layers, heads, values, _ = wkv.shape
    shifts = {}
    for part in ("att", "ffn"):
        shift = _stack_layers(tensors, f"{part}.shift_state", path)
        if shift is None:
            shift = np.zeros((layers, heads * values), np.float32)
        shifts[part] = shift
        _require_finite(shift, "shift_state", path)
    # Files hold no batch axis; the state's is the second.
    state = RWKV7State(
        att_shift=jnp.asarray(shifts["att"][:, None]),
        wkv=jnp.asarray(wkv[:, None]),
        ffn_shift=jnp.asarray(shifts["ffn"][:, None]),
        upscaled=_load_upscaled(upscaled, path),
    )
    if config is not None:
        with prefix_errors("load_state"):
            check_state(state, 1, config)
    return state


def _read_state_tensors(
    path: Path,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Reads the tensors of a state, and those of its upscaled memory without their prefix.

    A model's own tensors in the same file are not read.
    """
    upscaled = {}
    others = {}
    for name, tensor in read_tensors(path).items():
        if name.startswith(_UPSCALED):
            upscaled[name.removeprefix(_UPSCALED)] = tensor.read()
        else:
            others[name] = tensor
    _, state = tensor_names.split_states(tensor_names.from_official(others))
    return {name: tensor.read() for name, tensor in state.items()}, upscaled
