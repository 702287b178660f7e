"""Named tensors to the parameter tree and back, with every fault in one table. Level 4."""

import re
from collections.abc import Callable, Iterator

import jax.numpy as jnp
import numpy as np

from . import names
from .config import RWKV7Config
from .names import Named, Tensor
from .shapes import Params

# Called with bytes done and bytes in all.
Progress = Callable[[int, int], None] | None
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
    blocks = {int(found[1]) for n in named if (found := re.match(r"blocks\.(\d+)\.", n))}
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
        value_rank=gates[0].shape[-1] if gates else 0,
        **changes,
    )


def check_names(named: Named, config: RWKV7Config, path: str) -> None:
    """Return if exactly the model's tensors are there, each of its shape.

    Raises:
        ValueError: a table of every missing, extra and misshapen tensor.
    """
    wanted, dummies = names.shapes(config), names.dummy_shapes(config)
    rows = []
    for name, shape in (wanted | dummies).items():
        if name not in named:
            rows += [(name, shape, "missing")] if name in wanted else []
        elif np.prod(named[name].shape) != np.prod(shape) or (
            len(shape) > 1 and tuple(named[name].shape) != shape
        ):
            rows.append((name, shape, str(tuple(named[name].shape))))
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


def _read(tensor: Tensor, shape, name: str, path: str, allow_nan: bool) -> np.ndarray:
    array = tensor.read().reshape(shape)
    if not allow_nan and not np.isfinite(array).all():
        raise ValueError(
            f"load_model: `{path}` has NaN or Inf in {name}; "
            "load it with allow_nan=True if you must."
        )
    return array


def _stack(parts: list[tuple[str, Tensor]], shape, dtype, path: str, allow_nan: bool) -> np.ndarray:
    """The blocks' tensors in one array; different dtypes are promoted without loss."""
    dtype = dtype or np.result_type(*(tensor.dtype for _, tensor in parts))
    out = np.empty((len(parts), *shape), dtype)
    for row, (name, tensor) in zip(out, parts, strict=True):
        row[...] = _read(tensor, shape, name, path, allow_nan)
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
    extra = {n: s for n, s in names.dummy_shapes(config).items() if n in named}
    leaves: dict[tuple[str, ...], list[tuple[str, Tensor]]] = {}
    shapes = names.shapes(config) | extra
    for name in shapes:
        leaves.setdefault(_tree_path(name), []).append((name, named[name]))
    total = sum(int(np.prod(t.shape)) * t.dtype.itemsize for t in named.values())
    tree, done = {}, 0
    for place, parts in leaves.items():
        shape = shapes[parts[0][0]]
        if place[0] == "layers":
            leaf = _stack(parts, shape, dtype, path, allow_nan)
        else:
            leaf = _read(parts[0][1], shape, parts[0][0], path, allow_nan)
        _put(tree, place, jnp.array(leaf, dtype=dtype, copy=True))
        done += sum(int(np.prod(t.shape)) * t.dtype.itemsize for _, t in parts)
        if progress:
            progress(done, total)
    return tree


def official_tensors(params: Params, config: RWKV7Config) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of a tree by official name, in the tree's shapes.

    Raises:
        ValueError: the tree lacks a leaf, or one has the wrong shape.
    """

    def leaf(path):
        node = params
        for key in path:
            if not isinstance(node, dict) or key not in node:
                return None
            node = node[key]
        return node

    dummies = {
        n: s for n, s in names.dummy_shapes(config).items() if leaf(_tree_path(n)) is not None
    }
    for name, shape in (names.shapes(config) | dummies).items():
        place = _tree_path(name)
        array = leaf(place)
        stacked = place[0] == "layers"
        wanted = (config.num_layers - 1, *shape) if stacked else shape
        came = None if array is None else tuple(array.shape)
        if came != wanted:
            raise ValueError(
                f"save_model: `params` must hold {'/'.join(place)} of shape {wanted}; got {came}."
            )
        yield name, np.asarray(array[int(name.split(".")[1]) - 1] if stacked else array)
