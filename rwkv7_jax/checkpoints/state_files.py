"""Start states as files that other RWKV tools read.

* `.pth` and `.safetensors` hold `blocks.{i}.att.time_state` as [H, value, key], the axis order of
  the model, so nothing is transposed.
* `.st` and `.state`, safetensors files for web-rwkv and Ai00, swap the last two axes.
* Non-zero token-shift states have names of our own, `blocks.{i}.att.shift_state` and
  `blocks.{i}.ffn.shift_state`. So do the logits of a session's next token, `session.logits`.
* Upscaled memories and their features need `.safetensors`, under `upscaled.{name}`.

A sidecar holds what the file itself cannot (see `state_sidecar`).
Source: JL-er/RWKV-PEFT@5b8aac9 (the names); josStorer/RWKV-Runner@64269f0
backend-python/utils/rwkv.py.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rwkv7_jax.atomic_write import atomic_write
from rwkv7_jax.checkpoints import tensor_names
from rwkv7_jax.checkpoints.huggingface import read_hf
from rwkv7_jax.checkpoints.integrity.digests import digest_of_arrays
from rwkv7_jax.checkpoints.integrity.finite_numbers import is_finite, overflows
from rwkv7_jax.checkpoints.integrity.named_errors import name_file
from rwkv7_jax.checkpoints.layouts.names import with_official_names
from rwkv7_jax.checkpoints.orbax_folder import is_orbax
from rwkv7_jax.checkpoints.param_tree import require_float_dtype
from rwkv7_jax.checkpoints.pth import dump_pth
from rwkv7_jax.checkpoints.state_sidecar import (
    DIGEST,
    ENTRIES_DIGEST,
    PREVIOUS,
    check_axes,
    check_digests,
    own_entries,
    previous_table,
    read_table,
    refuse_other_weights,
    sidecar,
)
from rwkv7_jax.checkpoints.state_tensors import (
    AXES,
    SAFETENSORS_AXES,
    TRANSPOSED_AXES,
    open_state_tensors,
    read_state_arrays,
    stack_layers,
    stored_axes,
)
from rwkv7_jax.checkpoints.tensor_files import dump_safetensors, read_tensors
from rwkv7_jax.checkpoints.tensor_names import LOGITS, UPSCALED, Tensor
from rwkv7_jax.checks import (
    as_array,
    check_instance,
    check_not_donated,
    prefix_errors,
)
from rwkv7_jax.json_files import write_json
from rwkv7_jax.local_paths import check_target, existing_path, local_path
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.model.kernel_features import Features
from rwkv7_jax.model.state import RWKV7State, check_state
from rwkv7_jax.model.upscaled_memory import Upscaled, check_form

SUFFIXES = (".pth", *SAFETENSORS_AXES)

# Leaves of `Upscaled.features` and of `Upscaled`, under their names in the file.
_FEATURE_LEAVES = ("landmarks", "widths", "mean", "map")

_MEMORY_LEAVES = ("memory", "write", "readout")

_REQUIRED_LEAVES = ("memory", "write", "landmarks", "widths", "mean")


def _written_axes(path: Path) -> str:
    """Returns the axis order in which a file with this suffix is written."""
    return SAFETENSORS_AXES.get(path.suffix, AXES)


def save_state(
    path: str | Path,
    state: RWKV7State,
    *,
    config: RWKV7Config | None = None,
    info: Mapping[str, Any] | None = None,
    dtype: Any = None,
    logits: Any = None,
) -> None:
    """Saves a start state and its sidecar; a failed write leaves the previous pair in place.

    Args:
        path: a `.pth`, `.safetensors`, `.st` or `.state` file; an upscaled state needs
            `.safetensors`.
        state: a state of batch size 1.
        config: the model's config; a state that does not fit it is rejected.
        info: extra entries for the sidecar, such as the base model's hash or a score.
        dtype: dtype of the WKV tensors; all others are float32. None selects float16 for `.state`,
            the only dtype that Ai00 reads, and float32 otherwise.
        logits: logits of the next token, [V] or [1, V], to resume without a prompt (see
            `load_logits`).

    Raises:
        ValueError: the state has several sequences, does not fit the model, is not finite or is out
            of range for `dtype`; the suffix is unknown; or `info` is not JSON.
        TypeError: `state` is not a state, or `dtype` is not floating-point.
    """
    with prefix_errors("save_state"):
        path = local_path(path, "`path`", target=True)
        if path.suffix not in SUFFIXES:
            raise ValueError(f"`path` must end in {', '.join(SUFFIXES)}; got {path}.")
        check_target(path, "`path`")
        if dtype is None:
            # web-rwkv up to 0.10 reads only float16. `.st` keeps float32, as in earlier versions.
            dtype = "float16" if path.suffix == ".state" else "float32"
        dtype = require_float_dtype(dtype)
        _check_writable(state, path, config)
        tensors = _state_tensors(state, path, dtype)
        if logits is not None:
            tensors[LOGITS] = _logits_array(logits)
        table = _sidecar_table(state, path, tensors, info or {})
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        if path.suffix == ".pth":
            dump_pth(file, tensors.items())
        else:
            dump_safetensors(file, tensors.items())
        file.flush()
        # The tensors are replaced when the block ends; until then the old sidecar is valid.
        write_json(sidecar(path), {**table, PREVIOUS: previous_table(path)})
    write_json(sidecar(path), table)


def _check_writable(state: RWKV7State, path: Path, config: RWKV7Config | None) -> None:
    """Raises unless the loader would accept the state."""
    check_instance(state, RWKV7State, "`state`")
    check_not_donated(state, "`state`")
    if np.ndim(state.wkv) != 5 or 0 in np.shape(state.wkv):
        raise ValueError(
            "`state` must have wkv of [layers, batch, heads, value, key], none of them 0; "
            f"got shape {np.shape(state.wkv)}."
        )
    if state.batch != 1:
        raise ValueError(f"`state` must hold one sequence; got {state.batch}.")
    if config is not None:
        check_instance(config, RWKV7Config, "`config`")
        _check_sizes(np.asarray(state.wkv[:, 0]), config, "state")
    for name, shift in (("att_shift", state.att_shift), ("ffn_shift", state.ffn_shift)):
        if np.ndim(shift) != 3 or np.shape(shift)[:2] != np.shape(state.wkv)[:2]:
            raise ValueError(
                f"`state` must have {name} of [layers, batch, width]; got shape {np.shape(shift)}."
            )
    if state.upscaled is None:
        return
    # Tools that read the other formats would mistake the WKV part for the whole state.
    if path.suffix != ".safetensors":
        raise ValueError(
            f"`path` of an upscaled state must end in .safetensors; got {path}."
        )
    check_form(state.upscaled.dynamics, state.upscaled.features.kind)


def _finite_array(array: Any, dtype: np.dtype, name: str) -> np.ndarray:
    """Converts an array to the file's dtype; raises unless every value stays finite."""
    wide = np.asarray(array)
    if not is_finite(wide):
        raise ValueError(f"`state` must be finite; got NaN or Inf in {name}.")
    # NumPy would warn of an overflow; the error below also names the tensor.
    with np.errstate(over="ignore"):
        narrow = np.ascontiguousarray(wide).astype(dtype)
    if overflows(wide, narrow):
        largest = float(np.abs(wide.astype(np.float32)).max())
        raise ValueError(
            f"`dtype` must hold the state's values; {dtype} cannot hold {largest:.4g} in {name}."
        )
    return narrow


def _state_tensors(
    state: RWKV7State, path: Path, dtype: np.dtype
) -> dict[str, np.ndarray]:
    """Returns a state's tensors as a file with this suffix stores them, in the file's order."""
    tensors = {}
    if state.upscaled is not None:
        tensors.update(_upscaled_tensors(state.upscaled))
    for layer, wkv in enumerate(np.asarray(state.wkv[:, 0])):
        if _written_axes(path) == TRANSPOSED_AXES:
            wkv = wkv.swapaxes(-1, -2)
        name = f"blocks.{layer}.att.time_state"
        tensors[name] = _finite_array(wkv, dtype, name)
    for part, shift in (("att", state.att_shift), ("ffn", state.ffn_shift)):
        # Other tools do not know these names, so they are written only if not all zero.
        if not np.any(shift):
            continue
        for layer, row in enumerate(np.asarray(shift[:, 0])):
            name = f"blocks.{layer}.{part}.shift_state"
            tensors[name] = _finite_array(row, np.dtype(np.float32), name)
    return tensors


def _logits_array(logits: Any) -> np.ndarray:
    """Checks the logits of one token and returns them as stored in a file, float32 [V]."""
    logits = as_array(logits, "`logits`")
    if logits.ndim not in (1, 2) or logits.size != logits.shape[-1] or not logits.size:
        raise ValueError(
            f"`logits` must be of one sequence, [V] or [1, V]; got shape {logits.shape}."
        )
    return _finite_array(np.ravel(logits), np.dtype(np.float32), "`logits`")


def _upscaled_tensors(upscaled: Upscaled) -> dict[str, np.ndarray]:
    """Returns the tensors of an upscaled memory, without the batch axis."""
    tensors = {}
    for name in (*_FEATURE_LEAVES, *_MEMORY_LEAVES):
        holder = upscaled.features if name in _FEATURE_LEAVES else upscaled
        leaf = getattr(holder, name)
        # The map and the readout are optional.
        if leaf is not None:
            name = UPSCALED + name
            tensors[name] = _finite_array(leaf[:, 0], np.dtype(np.float32), name)
    return tensors


def _sidecar_table(
    state: RWKV7State,
    path: Path,
    tensors: Mapping[str, np.ndarray],
    info: Mapping[str, Any],
) -> dict[str, Any]:
    """Builds the sidecar: the state's description, the caller's entries and the digests."""
    layers, _, heads, values, keys = state.wkv.shape
    meaning: dict[str, Any] = {
        "format": "rwkv7 start state",
        "axes": _written_axes(path),
        "layers": layers,
        "heads": heads,
        "value_size": values,
        "key_size": keys,
    }
    upscaled = state.upscaled
    if upscaled is not None:
        meaning["dynamics"] = upscaled.dynamics
        meaning["kind"] = upscaled.features.kind
        meaning["features"] = upscaled.memory.shape[-1]
    entries = own_entries(info)
    return {
        **meaning,
        **entries,
        DIGEST: digest_of_arrays(tensors.items(), meaning),
        ENTRIES_DIGEST: digest_of_arrays([], entries),
    }


def _check_sizes(wkv: np.ndarray, config: RWKV7Config, subject: str) -> None:
    """Raises unless WKV states [layers, heads, value, key] fit a model."""
    expected = (config.num_layers, config.num_heads, config.head_size, config.head_size)
    if wkv.shape != expected:
        raise ValueError(
            f"`{subject}` must have [layers, heads, value, key] = {expected} for this "
            f"model; got {wkv.shape}."
        )


def _require_finite(array: np.ndarray, name: str, path: Path) -> None:
    """Raises unless every value is finite."""
    if not is_finite(array):
        raise ValueError(f"`{path}` has NaN or Inf in {name}.")


def _load_upscaled(
    tensors: Mapping[str, np.ndarray], table: Mapping[str, Any], path: Path
) -> Upscaled | None:
    """Builds the upscaled memory of a file; returns None if there is none.

    Args:
        tensors: tensors without a batch axis, by name without the prefix.
        table: the sidecar.
        path: path of the file, for error messages.
    """
    if not tensors:
        return None
    for field in ("dynamics", "kind"):
        if field not in table:
            raise ValueError(
                f"`{sidecar(path)}` must give the upscaled state's {field}; got none."
            )
    with name_file(sidecar(path), "load_state"):
        check_form(table["dynamics"], table["kind"])
    for name in _REQUIRED_LEAVES:
        if name not in tensors:
            raise ValueError(f"`{path}` has no {UPSCALED}{name}.")
    leaves: dict[str, Any] = {}
    for name, array in tensors.items():
        _require_finite(array, UPSCALED + name, path)
        if not array.ndim:
            raise ValueError(f"`{path}` has {UPSCALED}{name} without an axis.")
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


def load_state(
    path: str | Path,
    *,
    config: RWKV7Config | None = None,
    base_model: str | None = None,
    any_base: bool = False,
) -> RWKV7State:
    """Loads a start state in float32 with batch size 1.

    Reads files of RWKV-PEFT, RWKV-Runner, State-Tuning Studio, web-rwkv and Ai00, and model
    checkpoints with a merged state. The file type is detected from the first bytes, not the name.

    Args:
        path: a PyTorch file (`.pth`, `.state`) or a safetensors file (`.safetensors`; `.st` and
            `.state`, which are transposed).
        config: the model's config; a state that does not fit it is rejected.
        base_model: `model_hash` of the model; a state whose sidecar names another hash is rejected.
        any_base: accept such a state anyway.

    Raises:
        ValueError: the file holds no state, lacks layers, is not finite, does not fit the model, or
            is transposed according to its sidecar.
    """
    with prefix_errors("load_state"):
        path = existing_path(path, "`path`")
    with name_file(path, "load_state"):
        table = read_table(path)
        if not any_base:
            refuse_other_weights(table.get("base_model"), base_model, path)
        tensors = open_state_tensors(path)
        state = _build_state(tensors, table, path, config)
        check_digests(table, tensors, path)
    return state


def _build_state(
    tensors: Mapping[str, Tensor],
    table: Mapping[str, Any],
    path: Path,
    config: RWKV7Config | None,
) -> RWKV7State:
    """Builds a state from a file's tensors and sidecar, and checks its shapes."""
    arrays, upscaled = read_state_arrays(tensors, path)
    wkv = _read_wkv(arrays, tensors, table, path)
    if config is not None:
        _check_sizes(wkv, config, str(path))
    _require_finite(wkv, "a time_state", path)
    att_shift = _read_shift(arrays, "att", wkv.shape, path)
    ffn_shift = _read_shift(arrays, "ffn", wkv.shape, path)
    # Files have no batch axis; in a state it is the second axis.
    state = RWKV7State(
        att_shift=jnp.asarray(att_shift[:, None]),
        wkv=jnp.asarray(wkv[:, None]),
        ffn_shift=jnp.asarray(ffn_shift[:, None]),
        upscaled=_load_upscaled(upscaled, table, path),
    )
    if config is not None:
        check_state(state, 1, config)
    return state


def _read_wkv(
    arrays: Mapping[str, np.ndarray],
    tensors: Mapping[str, Tensor],
    table: Mapping[str, Any],
    path: Path,
) -> np.ndarray:
    """Reads the WKV matrices as [L H Nv Nk] in either axis order of the file."""
    wkv = stack_layers(arrays, "att.time_state", path)
    if wkv is None:
        raise ValueError(f"`{path}` holds no blocks.0.att.time_state [H, value, key].")
    if wkv.ndim != 4:
        raise ValueError(
            f"`{path}` must have blocks.0.att.time_state of [H, value, key]; got shape "
            f"{wkv.shape[1:]}."
        )
    axes = stored_axes(path, tensors, table)
    check_axes(table, axes, path)
    # Heads are square, so a missing transpose would load and silently give bad answers.
    return wkv.swapaxes(-1, -2) if axes == TRANSPOSED_AXES else wkv


def _read_shift(
    arrays: Mapping[str, np.ndarray],
    part: str,
    wkv_shape: tuple[int, ...],
    path: Path,
) -> np.ndarray:
    """Reads the token shift [L D] of "att" or "ffn"; zeros if the file has none."""
    layers, heads, values, _ = wkv_shape
    shift = stack_layers(arrays, f"{part}.shift_state", path)
    if shift is None:
        return np.zeros((layers, heads * values), np.float32)
    if shift.ndim != 2 or len(shift) != layers:
        raise ValueError(
            f"`{path}` must have a vector {part}.shift_state for each of {layers} "
            f"layers; got shape {shift.shape}."
        )
    _require_finite(shift, "a shift_state", path)
    return shift


def load_logits(
    path: str | Path, *, config: RWKV7Config | None = None
) -> Float[Array, "1 V"] | None:
    """Loads the logits of the next token after a session's state; None if the file has none.

    `generate(model, params, [], state, logits=logits)` resumes exactly where the session stopped.
    The state alone does not suffice, because it has already consumed the last token.

    Args:
        path: path of a file that `load_state` reads.
        config: the model's config; logits of another vocabulary size are rejected.

    Raises:
        ValueError: the file is not a state, or its logits are misshapen or non-finite.
    """
    with prefix_errors("load_logits"):
        path = existing_path(path, "`path`")
        with name_file(path, "load_logits"):
            tensors = open_state_tensors(path)
            if LOGITS not in tensors:
                return None
            logits = _logits_array(tensors[LOGITS].read())
            if config is not None and logits.size != config.vocab_size:
                raise ValueError(
                    f"`path` must have logits of this model's {config.vocab_size} ids; "
                    f"got {logits.size}."
                )
    return jnp.asarray(logits[None])


@prefix_errors("has_merged_state")
def has_merged_state(path: str | Path) -> bool:
    """Returns whether a model checkpoint has a start state merged into it, as some trainers do."""
    path = Path(path)
    if is_orbax(path):
        return False
    tensors = read_hf(path).tensors if path.is_dir() else read_tensors(path)
    model, state = tensor_names.split_states(with_official_names(tensors, path).tensors)
    return bool(model and state)
