"""Named tensors to the parameter tree and back, with every fault in one table."""

import functools
import math
import re
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from rwkv7_jax.array_types import Params
from rwkv7_jax.checkpoints import tensor_names as names
from rwkv7_jax.checkpoints.tensor_files import release_pages
from rwkv7_jax.checkpoints.tensor_names import Named, Tensor
from rwkv7_jax.model.config import RWKV7Config

# Called with bytes done and bytes in all.
Progress = Callable[[int, int], None] | None

# Exponents of NaN and Inf, whose bits are all ones.
_INFINITY = {
    np.dtype(jnp.bfloat16): (np.uint16, 0x7F80),
    np.dtype(np.float16): (np.uint16, 0x7C00),
    np.dtype(np.float32): (np.uint32, 0x7F800000),
}

_PIECE = 1 << 20

_ESSENTIAL = (
    "emb.weight",
    "blocks.0.att.r_k",
    "blocks.0.att.w1",
    "blocks.0.att.a1",
    "blocks.0.att.g1",
    "blocks.0.ffn.key.weight",
)


def infer_config(named: Named, path: str, **changes) -> RWKV7Config:
    """The sizes that the tensors have; names and shapes are all that is looked at.

    Args:
        named: official names and orientation.
        path: for the message.
        **changes: further fields, such as `group_norm_eps`.

    Raises:
        ValueError: tensors without which no size can be told are missing.
    """
    missing = [name for name in _ESSENTIAL if name not in named]
    if missing:
        raise ValueError(f"load_model: `{path}` is no RWKV-7 checkpoint: it has no {missing[0]}.")
    size = {name: named[name].shape for name in _ESSENTIAL}
    flat = [name for name in _ESSENTIAL if len(size[name]) != 2 or 0 in size[name]]
    if flat:
        raise ValueError(f"load_model: `{path}` has {flat[0]} of shape {size[flat[0]]}, no matrix.")
    blocks = {int(found[1]) for n in named if (found := re.match(r"blocks\.(\d+)\.", n))}
    # A single tensor named blocks.999999999 shall not cost a table of a billion rows.
    if max(blocks) > 2 * len(blocks):
        raise ValueError(f"load_model: `{path}` has blocks.{max(blocks)} but {len(blocks)} blocks.")
    gates = [named[f"blocks.{i}.att.v1"] for i in (1, 0) if f"blocks.{i}.att.v1" in named]
    return RWKV7Config(
        vocab_size=size["emb.weight"][0],
        num_layers=1 + max(blocks),
        width=size["emb.weight"][1],
        head_size=size["blocks.0.att.r_k"][-1],
        ffn_width=size["blocks.0.ffn.key.weight"][0],
        decay_rank=size["blocks.0.att.w1"][-1],
        icl_rank=size["blocks.0.att.a1"][-1],
        gate_rank=size["blocks.0.att.g1"][-1],
        value_rank=gates[0].shape[-1] if gates and gates[0].shape else 0,
        **changes,
    )


def check_names(named: Named, config: RWKV7Config, path: str) -> None:
    """Return if exactly the model's tensors are there, each of its shape.

    Raises:
        ValueError: a table of every missing, extra and misshapen tensor.
    """
    wanted, dummies = names.shapes(config), names.unused_value_residual_shapes(config)
    rows = []
    for name, shape in (wanted | dummies).items():
        if name not in named:
            rows += [(name, shape, "missing")] if name in wanted else []
        elif np.prod(named[name].shape) != np.prod(shape) or (
            len(shape) > 1 and tuple(named[name].shape) != shape
        ):
            rows.append((name, shape, str(tuple(named[name].shape))))
        elif not jnp.issubdtype(named[name].dtype, jnp.floating):
            rows.append((name, shape, str(named[name].dtype)))
    rows += [
        (n, "-", f"extra {tuple(t.shape)}") for n, t in named.items() if n not in wanted | dummies
    ]
    if rows:
        lines = [f"  {name:<40} {shape!s:<20} {came}" for name, shape, came in rows]
        head = f"  {'tensor':<40} {'expected':<20} found"
        raise ValueError(
            f"load_model: `{path}` does not hold the tensors of its sizes "
            f"({len(rows)} differences):\n" + "\n".join([head, *lines])
        )


def _tree_path(name: str) -> tuple[str, ...]:
    """Where an official tensor lives: blocks behind the first are stacked under `layers`."""
    if name.startswith("blocks.0.ln0."):
        return ("ln0", name.rpartition(".")[2])
    found = re.match(r"blocks\.(\d+)\.(.+)", name)
    if not found:
        return tuple(name.split("."))
    return ("layer_0" if found[1] == "0" else "layers", *found[2].split("."))


def _put(tree: Params, path: tuple[str, ...], leaf) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = leaf


def is_finite(array: np.ndarray) -> bool:
    """Whether no number is NaN or Inf; by bits, 20 times faster for bfloat16 than `np.isfinite`."""
    if array.dtype not in _INFINITY:
        return bool(np.isfinite(array).all())
    bits, infinity = _INFINITY[array.dtype]
    flat = array.reshape(-1).view(bits)
    pieces = (flat[i : i + _PIECE] for i in range(0, flat.size, _PIECE))
    return all(((piece & infinity) != infinity).all() for piece in pieces)


def require_finite(array: np.ndarray, name: str, path: str) -> None:
    """Return if every number is finite.

    Raises:
        ValueError: NaN or Inf; the sentence has the tensor's official name.
    """
    if not is_finite(array):
        raise ValueError(
            f"load_model: `{path}` has NaN or Inf in {name}; "
            "load it with allow_nan=True if you must."
        )


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Memory that JAX takes over on CPU instead of copying it."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    first = -raw.ctypes.data % 64
    return raw[first : first + size].view(dtype).reshape(shape)


def _leaf(parts: list[tuple[str, Tensor]], shape, dtype, path: str, allow_nan: bool) -> np.ndarray:
    """The tensors one above the other; different dtypes are promoted without loss."""
    kinds = [tensor.dtype for _, tensor in parts]
    wanted = np.dtype(dtype or functools.reduce(jnp.promote_types, kinds))
    out = _aligned((len(parts), *shape), wanted)
    for row, (name, tensor) in zip(out, parts, strict=True):
        array = tensor.read().reshape(shape)
        if not allow_nan:
            require_finite(array, name, path)
        row[...] = array
        release_pages(array)
    return out


def build_tree(
    named: Named,
    config: RWKV7Config,
    path: str,
    *,
    dtype=None,
    allow_nan: bool = False,
    progress: Progress = None,
) -> Params:
    """The parameter tree of checked tensors, as arrays on the default device.

    Args:
        named: official names and orientation.
        config: their sizes.
        path: for messages.
        dtype: of all leaves; None keeps what the file has.
        allow_nan: take NaN and Inf as they are.
        progress: called with bytes done and bytes in all.

    Raises:
        ValueError: NaN or Inf in a tensor, which the sentence names.
    """
    extra = {n: s for n, s in names.unused_value_residual_shapes(config).items() if n in named}
    leaves: dict[tuple[str, ...], list[tuple[str, Tensor]]] = {}
    shapes = names.shapes(config) | extra
    for name in shapes:
        leaves.setdefault(_tree_path(name), []).append((name, named[name]))
    total = sum(int(np.prod(t.shape)) * t.dtype.itemsize for t in named.values())
    tree, done = {}, 0
    for place, parts in leaves.items():
        leaf = _leaf(parts, shapes[parts[0][0]], dtype, path, allow_nan)
        # Nobody else holds the buffer, so JAX may keep it; a view of the file it may not.
        leaf = jax.device_put(leaf if place[0] == "layers" else leaf[0], may_alias=True)
        _put(tree, place, leaf)
        done += sum(int(np.prod(t.shape)) * t.dtype.itemsize for _, t in parts)
        if progress:
            progress(done, total)
    return tree


def official_tensors(params: Params, config: RWKV7Config) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of a tree by official name, in the tree's shapes; views where that is possible.

    Raises:
        ValueError: the tree lacks a leaf, has one more, or one has the wrong shape.
    """
    given = {
        tuple(key.key for key in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    dummies = {
        n: s
        for n, s in names.unused_value_residual_shapes(config).items()
        if _tree_path(n) in given
    }
    wanted = names.shapes(config) | dummies
    extra = given.keys() - {_tree_path(name) for name in wanted}
    if extra:
        place = "/".join(map(str, sorted(extra)[0]))
        raise ValueError(f"save_model: `params` must hold RWKV-7's leaves alone; got {place} too.")
    for name, shape in wanted.items():
        place = _tree_path(name)
        stacked = place[0] == "layers"
        expected = (config.num_layers - 1, *shape) if stacked else shape
        came = tuple(given[place].shape) if place in given else None
        if came != expected:
            raise ValueError(
                f"save_model: `params` must hold {'/'.join(place)} of shape {expected}; got {came}."
            )
        array = np.asarray(given[place])
        yield name, array[int(name.split(".")[1]) - 1] if stacked else array
