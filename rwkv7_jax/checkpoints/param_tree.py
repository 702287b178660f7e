"""Conversion between named tensors and the parameter tree, with checks of both."""

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from rwkv7_jax.array_types import Params
from rwkv7_jax.checkpoints import tensor_names
from rwkv7_jax.checkpoints.integrity.finite_numbers import is_finite, overflows
from rwkv7_jax.checkpoints.tensor_names import Shape, Tensor, Tensors
from rwkv7_jax.checks import prefix_errors
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.model.int8_weights import origin_of
from rwkv7_jax.sharding import to_host

TreePath = tuple[str, ...]

# No size can be inferred without these.
_ESSENTIAL = (
    "emb.weight",
    "blocks.0.att.r_k",
    "blocks.0.att.w1",
    "blocks.0.att.a1",
    "blocks.0.att.g1",
    "blocks.0.ffn.key.weight",
)


def infer_config(
    tensors: Tensors,
    path: str,
    *,
    norm_eps: float | None = None,
    group_norm_eps: float | None = None,
    family: Literal["official", "fla"] = "official",
) -> RWKV7Config:
    """Infers the config from names and shapes without reading tensor data.

    Source: fla-org/flash-linear-attention@bc3b101 fla/layers/rwkv7.py:128 (the per-head epsilon).

    Args:
        tensors: in official names and orientation.
        path: path of the file, for the error message.
        norm_eps: epsilon of the norms, as in a folder's config.json; None for the default.
        group_norm_eps: epsilon of the per-head norm; None for that of the family.
        family: the naming scheme of the file. fla's per-head norm has the epsilon `norm_eps` times
            the head size; all others have the official one.

    Raises:
        ValueError: a tensor that determines a size is missing or misshapen.
    """
    for name in _ESSENTIAL:
        if name not in tensors:
            raise _not_rwkv7(name, tensors, path)
        shape = tensors[name].shape
        if len(shape) != 2 or 0 in shape:
            raise ValueError(f"`{path}` has {name} of shape {shape}, not a matrix.")
    vocab_size, width = tensors["emb.weight"].shape
    config = RWKV7Config(
        vocab_size=vocab_size,
        num_layers=_count_layers(tensors, path),
        width=width,
        head_size=tensors["blocks.0.att.r_k"].shape[-1],
        ffn_width=tensors["blocks.0.ffn.key.weight"].shape[0],
        decay_rank=tensors["blocks.0.att.w1"].shape[-1],
        icl_rank=tensors["blocks.0.att.a1"].shape[-1],
        gate_rank=tensors["blocks.0.att.g1"].shape[-1],
        value_rank=_infer_value_rank(tensors),
    )
    if norm_eps is not None:
        config = dataclasses.replace(config, norm_eps=norm_eps)
    if family == "fla":
        group_norm_eps = config.head_size * config.norm_eps
    if group_norm_eps is not None:
        config = dataclasses.replace(config, group_norm_eps=group_norm_eps)
    return config


def _not_rwkv7(missing: str, tensors: Tensors, path: str) -> ValueError:
    """Builds the error for a file without an essential tensor."""
    hint = ""
    for name in tensors:
        # The models of a larger program, such as a teacher and a student.
        if name.endswith(f".{missing}"):
            prefix = name.removesuffix(missing)
            hint = f", but {name}: save only the tensors under {prefix} without it"
    return ValueError(
        f"`{path}` is not an RWKV-7 checkpoint: it has no {missing}{hint}."
    )


def _count_layers(tensors: Tensors, path: str) -> int:
    """Counts the blocks by the largest block index in a name."""
    blocks = set()
    for name in tensors:
        match = re.match(r"blocks\.(\d+)\.", name)
        if match:
            blocks.add(int(match[1]))
    # A single tensor named blocks.999999999 must not cost a table of a billion rows.
    if max(blocks) > 2 * len(blocks):
        raise ValueError(f"`{path}` has blocks.{max(blocks)} but {len(blocks)} blocks.")
    return 1 + max(blocks)


def _infer_value_rank(tensors: Tensors) -> int:
    """Infers the rank of the value residual; 0 if the file has none, as with one layer."""
    # A one-layer model can only have block 0's value residual, which is unused.
    for layer in (1, 0):
        tensor = tensors.get(f"blocks.{layer}.att.v1")
        if tensor is not None:
            return tensor.shape[-1] if tensor.shape else 0
    return 0


def check_names(tensors: Tensors, config: RWKV7Config, path: str) -> None:
    """Raises unless the file holds exactly the model's tensors in their shapes.

    Raises:
        ValueError: tensors are missing, extra or misshapen; the message is a table of them all.
    """
    required = tensor_names.shapes(config)
    accepted = tensor_names.accepted_shapes(config)
    rows = []
    for name, shape in accepted.items():
        if name in tensors:
            fault = _fault(tensors[name], shape)
        else:
            fault = "missing" if name in required else None
        if fault is not None:
            rows.append((name, str(shape), fault))
    # Extra tensors are faults too: ignoring them would hide another architecture.
    for name, tensor in tensors.items():
        if name not in accepted:
            rows.append((name, "-", f"extra {tuple(tensor.shape)}"))
    if not rows:
        return
    lines = [f"  {'tensor':<40} {'expected':<20} found"]
    for name, expected, fault in rows:
        lines.append(f"  {name:<40} {expected:<20} {fault}")
    raise ValueError(
        f"`{path}` does not hold the tensors of its sizes "
        f"({len(rows)} differences):\n" + "\n".join(lines)
    )


def _fault(tensor: Tensor, shape: Shape) -> str | None:
    """Describes a tensor's fault; returns None if it has none."""
    is_misshapen = math.prod(tensor.shape) != math.prod(shape)
    # Vectors may have extra axes of size 1: official files have [1, 1, D].
    if len(shape) > 1:
        is_misshapen |= tuple(tensor.shape) != shape
    if is_misshapen:
        return str(tuple(tensor.shape))
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        return str(tensor.dtype)
    return None


def tree_path(name: str) -> TreePath:
    """Returns an official tensor's path in the tree; the blocks after the first are stacked."""
    if name.startswith("blocks.0.ln0."):
        # The norm belongs to the embedding; only its name says block 0.
        return ("ln0", name.rpartition(".")[2])
    match = re.match(r"blocks\.(\d+)\.(.+)", name)
    if not match:
        return tuple(name.split("."))
    layer, inside = match.groups()
    return ("layer_0" if layer == "0" else "layers", *inside.split("."))


def require_finite(array: np.ndarray, name: str, path: str) -> None:
    """Raises unless every value is finite.

    Raises:
        ValueError: a value is NaN or Inf; the message has the tensor's official name.
    """
    if not is_finite(array):
        raise _not_finite(name, path)


def _not_finite(name: str, path: str) -> ValueError:
    return ValueError(
        f"`{path}` has NaN or Inf in {name}; to load it anyway, pass allow_nan=True."
    )


def require_float_dtype(dtype) -> np.dtype:
    """Converts a dtype or its name to a floating-point dtype.

    Raises:
        TypeError: it is not a floating-point dtype; the message begins with `dtype`.
    """
    try:
        jax_dtype = jnp.dtype(dtype)
    except TypeError:
        raise TypeError(
            f"`dtype` must be a floating-point dtype; got {dtype!r}."
        ) from None
    if not jnp.issubdtype(jax_dtype, jnp.floating):
        raise TypeError(f"`dtype` must be a floating-point dtype; got {jax_dtype}.")
    return jax_dtype


def require_jax_dtype(dtype: np.dtype) -> np.dtype:
    """Returns the dtype if JAX supports it as it is.

    Raises:
        ValueError: JAX would replace it by float32; the message begins with `dtype`.
    """
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(
            f"`dtype` must be one that JAX keeps; {dtype} becomes float32 unless "
            "jax_enable_x64 is set."
        )
    return dtype


def require_no_overflow(
    wide: np.ndarray, narrow: np.ndarray, name: str, path: str
) -> None:
    """Raises if a value of a file is out of range for the dtype that it is loaded in."""
    if wide.dtype != narrow.dtype and overflows(wide, narrow):
        raise _overflow(name, path, narrow.dtype)


def _overflow(name: str, path: str, dtype: np.dtype) -> ValueError:
    return ValueError(
        f"`{path}` has values in {name} that {dtype} cannot hold; "
        "use bfloat16 or float32."
    )


def _faulty_tensors(
    config: RWKV7Config, is_faulty: Callable[..., jax.Array], *trees: Params
) -> Iterator[str]:
    """Yields the official names of tensors with a fault in a shard on this process's devices.

    Each shard is checked on its device; nothing is gathered.

    Args:
        config: the config of the trees.
        is_faulty: a compiled function that maps one shard of each tree, with a leading layer axis,
            to one flag per layer.
        *trees: trees with the same leaves.
    """
    flags: dict[TreePath, np.ndarray] = {}
    leaves = [_leaves(tree) for tree in trees]
    for path in leaves[0]:
        faulty = np.zeros(1, bool)
        for shards in zip(
            *(tree[path].addressable_shards for tree in leaves), strict=True
        ):
            parts = [shard.data for shard in shards]
            if path[0] != "layers":
                parts = [part[None] for part in parts]
            faulty = faulty | np.asarray(is_faulty(*parts))
        flags[path] = faulty
    for name in tensor_names.accepted_shapes(config):
        path = tree_path(name)
        row = int(name.split(".")[1]) - 1 if path[0] == "layers" else 0
        if path in flags and flags[path][row]:
            yield name


@jax.jit
def _is_not_finite(stack: jax.Array) -> jax.Array:
    return ~jnp.isfinite(stack).reshape(len(stack), -1).all(1)


@jax.jit
def _has_overflowed(wide: jax.Array, narrow: jax.Array) -> jax.Array:
    became_infinite = jnp.isfinite(wide) & ~jnp.isfinite(narrow)
    return became_infinite.reshape(len(wide), -1).any(1)


def require_finite_leaves(params: Params, config: RWKV7Config, path: str) -> None:
    """Raises unless every value on this process's devices is finite.

    Raises:
        ValueError: a value is NaN or Inf; the message has the tensor's official name.
    """
    for name in _faulty_tensors(config, _is_not_finite, params):
        raise _not_finite(name, path)


def astype_without_overflow(
    params: Params, config: RWKV7Config, dtype, path: str
) -> Params:
    """Converts all leaves of a tree to a dtype.

    Args:
        params: the tree.
        config: the config of the model.
        dtype: dtype of the result.
        path: path of the tree's file, for error messages.

    Raises:
        ValueError: a value is out of range for the dtype.
    """
    converted = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    for name in _faulty_tensors(config, _has_overflowed, params, converted):
        raise _overflow(name, path, np.dtype(dtype))
    return converted


def require_kept(dtype: np.dtype, name: str, path: str) -> None:
    """Raises if JAX would silently narrow a file's dtype, as it does with float64 without x64.

    Raises:
        ValueError: JAX does not keep `dtype`, the dtype of the tensor `name` in the file at `path`.
    """
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(
            f"`{path}` holds {dtype} ({name}), which JAX would narrow to float32; "
            "pass dtype='float32' (`rwkv7 convert --dtype float32`), or set "
            "jax_enable_x64."
        )


def _leaves(params: Params) -> dict[TreePath, jax.Array]:
    """Returns the leaves of a nested dict by path."""
    leaves = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        leaves[tuple(key.key for key in path)] = leaf
    return leaves


def check_all_leaves(params: Params, config: RWKV7Config) -> None:
    """Raises unless a tree holds exactly the model's leaves in their shapes.

    Raises:
        ValueError: a leaf is missing, extra or misshapen.
        TypeError: a leaf is not floating-point, or is float64 and x64 is off.
    """
    # No file format stores int8 weights, and dequantised ones would pass for the original.
    if origin_of(params) is not None:
        raise TypeError(
            "`params` must be floating-point; got int8 weights, which cannot be saved "
            "(`dequantize` makes a new float model of them)."
        )
    leaves = _leaves(params)
    expected = _expected_leaves(leaves, config)
    # A leaf without a tensor name would be lost silently.
    extra = leaves.keys() - expected.keys()
    if extra:
        path = "/".join(map(str, min(extra)))
        raise ValueError(f"`params` must hold only RWKV-7's leaves; got {path} too.")
    for path, shape in expected.items():
        _check_leaf("/".join(path), leaves.get(path), shape)


def _expected_leaves(
    leaves: Collection[TreePath], config: RWKV7Config
) -> dict[TreePath, Shape]:
    """Returns the shape of every leaf that a tree with these leaves must hold."""
    # Two blocks suffice, as the blocks after the first are stacked; a damaged card may claim
    # billions.
    few = dataclasses.replace(config, num_layers=min(config.num_layers, 2))
    required = tensor_names.shapes(few)
    expected: dict[TreePath, Shape] = {}
    for name, shape in tensor_names.accepted_shapes(few).items():
        path = tree_path(name)
        # An optional tensor is expected only if the tree has it.
        if name not in required and path not in leaves:
            continue
        if path[0] == "layers":
            shape = (config.num_layers - 1, *shape)
        expected[path] = shape
    return expected


def _check_leaf(name: str, leaf: Any, shape: Shape) -> None:
    """Raises unless a leaf exists with the given shape and a dtype that files and JAX support."""
    came = None if leaf is None else tuple(leaf.shape)
    if leaf is None or came != shape:
        raise ValueError(f"`params` must hold {name} of shape {shape}; got {came}.")
    # The loader would reject such a file, so the writer must not write one.
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise TypeError(f"`params` must be floating-point; got {name} {leaf.dtype}.")
    # A NumPy float64 leaf: Orbax would narrow it silently, and the loader rejects such files.
    if jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype:
        raise TypeError(
            f"`params` must be of dtypes that JAX keeps; got {name} {leaf.dtype} "
            "(set jax_enable_x64, or convert it)."
        )


def require_finite_params(params: Params, config: RWKV7Config) -> None:
    """Raises unless every value of a checked tree is finite.

    Raises:
        ValueError: a value is NaN or Inf; the message has the tensor's official name.
    """
    for _ in finite_tensors(official_tensors(params, config)):
        pass


def finite_tensors(
    tensors: Iterable[tuple[str, np.ndarray]],
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the tensors; raises at the first that is not finite.

    Raises:
        ValueError: a value is NaN or Inf; the message has the tensor's official name.
    """
    for name, array in tensors:
        if not is_finite(array):
            raise ValueError(
                f"`params` must be finite; got NaN or Inf in {name} "
                "(allow_nan=True writes them anyway)."
            )
        yield name, array


def official_tensors(
    params: Params, config: RWKV7Config
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields every tensor of a tree by official name, in the order of official files.

    The arrays have the shapes of the tree without the layer axis. They are views if the tree is in
    host memory; otherwise the host holds one array at a time. If the tree is sharded over several
    processes, every process gets every tensor and all must iterate in step.

    Raises:
        ValueError: a leaf is missing, extra or misshapen.
        TypeError: a leaf is not floating-point.
    """
    with prefix_errors("official_tensors"):
        check_all_leaves(params, config)
    leaves = _leaves(params)
    for name in tensor_names.accepted_shapes(config):
        path = tree_path(name)
        if path not in leaves:
            continue
        leaf = leaves[path]
        if path[0] == "layers":
            # Row 0 of the stack is block 1.
            row = int(name.split(".")[1]) - 1
            # JAX caches the host copy of an array. Slicing on the device first caches one layer.
            leaf = np.asarray(leaf)[row] if _is_on_host(leaf) else _row(leaf, row)
        yield name, to_host(leaf)


@jax.jit
def _row(stack: jax.Array, row: Any) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(stack, row, keepdims=False)


def _is_on_host(leaf: Any) -> bool:
    """Returns whether NumPy can read an array without a copy."""
    if not isinstance(leaf, jax.Array):
        return True
    (device, *others) = leaf.devices()
    return device.platform == "cpu" and not others
