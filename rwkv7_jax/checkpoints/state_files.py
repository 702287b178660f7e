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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from rwkv7_jax.checkpoints import tensor_names as names
from rwkv7_jax.checkpoints.pth import write_pth
from rwkv7_jax.checkpoints.tensor_files import read_named, write_safetensors
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.model.state import Features, RWKV7State, Upscaled, check_state

SUFFIXES = (".pth", ".safetensors", ".st")

_ORDERS = {".st": "head, key, value"}

_ORDER = "head, value, key"

_FEATURES = ("landmarks", "widths", "mean", "map")

_MEMORY = ("memory", "write", "readout")


def _check_suffix(path: Path, caller: str) -> None:
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{caller}: `path` must end in {', '.join(SUFFIXES)}; got {path}.")


def save_state(
    path: str | Path,
    state: RWKV7State,
    *,
    config: RWKV7Config | None = None,
    info: Mapping[str, Any] | None = None,
    dtype="float32",
) -> None:
    """The state at `path`, and its sidecar; a write that fails leaves what was there before.

    Args:
        path: `.pth`, `.safetensors` or `.st`; an upscaled state needs `.safetensors`.
        state: batch 1.
        config: of the model, to refuse a state of another one.
        info: further entries of the sidecar: the base model's hash, a score.
        dtype: of the tensors.

    Raises:
        ValueError: more than one sequence, another model's state, or an unknown suffix.
    """
    path = Path(path)
    _check_suffix(path, "save_state")
    if state.batch != 1:
        raise ValueError(f"save_state: `state` must hold one sequence; got {state.batch}.")
    if config is not None:
        _check_sizes(np.asarray(state.wkv[:, 0]), config, "save_state", "state")
    if state.upscaled is not None and path.suffix != ".safetensors":
        raise ValueError(
            f"save_state: `path` of an upscaled state must end in .safetensors; got {path}."
        )
    tensors = {} if state.upscaled is None else _upscaled_tensors(state.upscaled)
    for layer, wkv in enumerate(np.asarray(state.wkv[:, 0])):
        wkv = wkv.swapaxes(-1, -2) if path.suffix == ".st" else wkv
        tensors[f"blocks.{layer}.att.time_state"] = np.ascontiguousarray(wkv).astype(
            jnp.dtype(dtype)
        )
    for part, leaf in (("att", state.att_shift), ("ffn", state.ffn_shift)):
        if np.any(leaf):
            rows = np.asarray(leaf[:, 0]).astype(np.float32)
            tensors |= {f"blocks.{i}.{part}.shift_state": row for i, row in enumerate(rows)}
    path.parent.mkdir(parents=True, exist_ok=True)
    (write_pth if path.suffix == ".pth" else write_safetensors)(path, tensors.items())
    layers, heads, values, keys = state.wkv[:, 0].shape
    card = {
        "format": "rwkv7 start state",
        "axes": _ORDERS.get(path.suffix, _ORDER),
        "layers": layers,
        "heads": heads,
        "value_size": values,
        "key_size": keys,
        **(_upscaled_card(state.upscaled) if state.upscaled is not None else {}),
        **(info or {}),
    }
    sidecar(path).write_text(json.dumps(card, indent=1) + "\n")


def _upscaled_tensors(upscaled: Upscaled) -> dict[str, np.ndarray]:
    leaves = {name: getattr(upscaled.features, name) for name in _FEATURES}
    leaves |= {name: getattr(upscaled, name) for name in _MEMORY}
    return {
        f"upscaled.{name}": np.ascontiguousarray(leaf[:, 0], np.float32)
        for name, leaf in leaves.items()
        if leaf is not None
    }


def _upscaled_card(upscaled: Upscaled) -> dict[str, Any]:
    size = upscaled.memory.shape[-1]
    return {"dynamics": upscaled.dynamics, "kind": upscaled.features.kind, "features": size}


def sidecar(path: str | Path) -> Path:
    """Where a state's description lies."""
    return Path(f"{path}.json")


def _check_sizes(wkv: np.ndarray, config: RWKV7Config, caller: str, what: str) -> None:
    wanted = (config.num_layers, config.num_heads, config.head_size, config.head_size)
    if wkv.shape != wanted:
        raise ValueError(
            f"{caller}: `{what}` must have [layers, heads, value, key] = {wanted} for this model; "
            f"got {wkv.shape}."
        )


def _stacked(tensors: Mapping[str, np.ndarray], suffix: str, path: Path) -> np.ndarray | None:
    """Blocks 0, 1, ... of one kind of tensor, or None where there are none."""
    found = {
        int(m[1]): array
        for n, array in tensors.items()
        if (m := re.match(rf"blocks\.(\d+)\.{suffix}$", n))
    }
    if not found:
        return None
    for layer in range(max(found) + 1):
        if layer not in found:
            raise ValueError(f"load_state: `{path}` has no blocks.{layer}.{suffix}.")
    rows = [np.asarray(found[layer], np.float32) for layer in range(len(found))]
    if len({row.shape for row in rows}) > 1:
        raise ValueError(f"load_state: `{path}` has blocks whose {suffix} differ in shape.")
    return np.stack(rows)


def read_sidecar(path: str | Path) -> dict[str, Any]:
    """What a state's description says; nothing where there is none."""
    return json.loads(sidecar(path).read_text()) if sidecar(path).exists() else {}


def _load_upscaled(tensors: Mapping[str, np.ndarray], path: Path) -> Upscaled | None:
    """The upscaled memory of a file, or None where there is none."""
    leaves = {
        name.removeprefix("upscaled."): jnp.asarray(array, jnp.float32)[:, None]
        for name, array in tensors.items()
        if name.startswith("upscaled.")
    }
    if not leaves:
        return None
    card = read_sidecar(path)
    for name in ("dynamics", "kind"):
        if name not in card:
            raise ValueError(
                f"load_state: `{sidecar(path)}` must give the upscaled state's {name}; got none."
            )
    for name in ("memory", "write", "landmarks", "widths", "mean"):
        if name not in leaves:
            raise ValueError(f"load_state: `{path}` has no upscaled.{name}.")
    for name, leaf in leaves.items():
        if not np.isfinite(leaf).all():
            raise ValueError(f"load_state: `{path}` has NaN or Inf in upscaled.{name}.")
    features = {name: leaves.get(name) for name in _FEATURES}
    memory = {name: leaves.get(name) for name in _MEMORY}
    return Upscaled(
        **memory, features=Features(**features, kind=card["kind"]), dynamics=card["dynamics"]
    )


def _check_base(path: Path, base_model: str | None) -> None:
    was = read_sidecar(path).get("base_model")
    if base_model is not None and was is not None and was != base_model:
        warnings.warn(
            f"load_state: `{path}` was tuned for the model {was}; got the model {base_model}. "
            "Unless they differ in dtype alone, it means nothing there.",
            stacklevel=3,
        )


def _axes(path: Path) -> str:
    """The axis order of the file: its sidecar's, else its kind's."""
    usual = _ORDERS.get(path.suffix, _ORDER)
    axes = read_sidecar(path).get("axes", usual)
    if axes not in (_ORDER, *_ORDERS.values()):
        raise ValueError(f"load_state: `{sidecar(path)}` says axes {axes!r}, which is unknown.")
    if axes != usual:
        raise ValueError(
            f"load_state: `{path}` is transposed: its sidecar says axes {axes!r}, "
            f"but {path.suffix} files hold {usual!r}."
        )
    return axes


def load_state(
    path: str | Path, *, config: RWKV7Config | None = None, base_model: str | None = None
) -> RWKV7State:
    """The start state of a file, batch 1, float32.

    Takes files of RWKV-PEFT, RWKV-Runner, web-rwkv and Ai00, and model checkpoints with a merged
    state.

    Args:
        path: `.pth`, `.safetensors` or `.st`.
        config: of the model, to refuse a state of another one.
        base_model: `checkpoint.model_hash` of the model, to warn of a state of other weights where
            the sidecar says which they were.

    Raises:
        ValueError: no state in the file, layers missing, NaN or Inf, another model's sizes, or a
            transposed state where that can be told (by the sidecar).
    """
    path = Path(path)
    _check_suffix(path, "load_state")
    if not path.exists():
        raise ValueError(f"load_state: `{path}` does not exist.")
    _check_base(path, base_model)
    named = read_named(path)
    wide = {name: named.pop(name).read() for name in list(named) if name.startswith("upscaled.")}
    _, states = names.split_states(names.from_official(named))
    tensors = {name: tensor.read() for name, tensor in states.items()}
    wkv = _stacked(tensors, r"att\.time_state", path)
    if wkv is None or wkv.ndim != 4:
        raise ValueError(f"load_state: `{path}` holds no blocks.0.att.time_state [H, value, key].")
    if _axes(path) != _ORDER:
        wkv = wkv.swapaxes(-1, -2)
    if config is not None:
        _check_sizes(wkv, config, "load_state", str(path))
    layers, heads, values, _ = wkv.shape
    nothing = np.zeros((layers, heads * values), np.float32)
    shifts = [_stacked(tensors, rf"{part}\.shift_state", path) for part in ("att", "ffn")]
    att, ffn = (nothing if shift is None else shift for shift in shifts)
    for name, array in (("time_state", wkv), ("shift_state", att), ("shift_state", ffn)):
        if not np.isfinite(array).all():
            raise ValueError(f"load_state: `{path}` has NaN or Inf in a {name}.")
    state = RWKV7State(
        att_shift=jnp.asarray(att[:, None]),
        wkv=jnp.asarray(wkv[:, None]),
        ffn_shift=jnp.asarray(ffn[:, None]),
        upscaled=_load_upscaled(wide, path),
    )
    if config is not None:
        check_state(state, 1, config, caller="load_state")
    return state
