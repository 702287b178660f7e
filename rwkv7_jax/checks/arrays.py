"""Checks of arrays, and what can be known of one that is traced."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType

from pallas_kernels.eager import is_eager


def is_traced(value: Any) -> bool:
    """Tells whether a value is only known inside a compiled program, so that it cannot be read."""
    return isinstance(value, Tracer)


def is_known(value: Any) -> bool:
    """Tells whether an array's numbers can be read here: not traced, and all of it on this host."""
    if is_traced(value) or isinstance(value, jax.ShapeDtypeStruct):
        return False
    return getattr(value, "is_fully_addressable", True)


def as_array(value: Any, argument: str) -> Any:
    """Returns an array as it is, and a list of numbers as a NumPy array.

    Args:
        value: an array, a tracer, or lists of numbers of one length.
        argument: the argument in backticks; the message begins with it.

    Raises:
        TypeError: the value is no array of numbers.
        ValueError: lists of different lengths.
    """
    if isinstance(value, jax.Array | np.ndarray):
        return value
    # Shapes without numbers, as in `jax.eval_shape`.
    # Tensors of PyTorch have dtypes of another kind.
    if hasattr(value, "shape") and isinstance(getattr(value, "dtype", None), np.dtype):
        return value
    if not isinstance(value, list | tuple | range):
        raise TypeError(f"{argument} must be an array; got {type(value).__name__}.")
    try:
        array = np.asarray(value)
    except ValueError:
        raise ValueError(
            f"{argument} must be rows of one length; got a ragged list."
        ) from None
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{argument} must hold numbers; got a list of {array.dtype}.")
    # NumPy's float64 and int64 are not what JAX would make of such a list.
    if array.dtype == np.float64:
        return array.astype(np.float32)
    return array


def check_placed(arrays: Any, argument: str, mesh: Any = None) -> None:
    """Checks that arrays lie on the devices of a mesh, of which a program knows the number alone.

    Without any array there the program would be compiled for one device, and XLA fail.

    Args:
        arrays: a tree; where it has some that are traced or described, nothing is known.
        argument: the argument in backticks; the message begins with it.
        mesh: None is that of `sharding.use_mesh`.

    Raises:
        ValueError: all arrays lie on one device, or on the host, and the mesh has several.
    """
    if mesh is None:
        mesh = jax.sharding.get_abstract_mesh()
        if AxisType.Manual in mesh.axis_types:
            return
    # Without a mesh there are 0 devices in it.
    if mesh.size <= 1 or not is_eager():
        return
    # Of one from `jax.set_mesh` JAX knows the devices, and places arrays there.
    if not jax.sharding.get_mesh().empty:
        return
    for leaf in jax.tree.leaves(arrays):
        if is_traced(leaf) or not isinstance(leaf, jax.Array | np.ndarray):
            return
        if isinstance(leaf, jax.Array) and leaf.sharding.num_devices > 1:
            return
    raise ValueError(
        f"{argument} must lie on the {mesh.size} devices of the mesh, as sharding.place puts "
        "them; they lie on one device."
    )


def check_not_donated(tree: Any, argument: str) -> None:
    """Checks that the arrays of a tree are still there.

    Args:
        tree: of arrays, tracers or shapes.
        argument: the argument in backticks; the message begins with it.

    Raises:
        ValueError: the memory of an array was given away.
    """
    for leaf in jax.tree.leaves(tree):
        is_concrete = isinstance(leaf, jax.Array) and not is_traced(leaf)
        if is_concrete and leaf.is_deleted():
            raise ValueError(
                f"{argument} must hold arrays that are still there; they were donated to an "
                "earlier call, as to a step that `make_train_step` makes without `donate=False`, "
                "or deleted."
            )


def check_indices(indices: Any, count: int, argument: str) -> None:
    """Checks that integer indices lie inside an axis, counted from its end where negative.

    Args:
        indices: an integer or an array of them; those that are traced are not known, and pass.
        count: the length of the axis.
        argument: the argument in backticks; the message begins with it.

    Raises:
        TypeError: the indices are not integers.
        ValueError: an index is outside the axis.
    """
    dtype = np.result_type(indices) if np.ndim(indices) == 0 else indices.dtype
    if not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(f"{argument} must be integers; got {dtype}.")
    if not is_known(indices):
        return
    values = np.asarray(indices)
    wrong = (values < -count) | (values >= count)
    if wrong.any():
        raise ValueError(
            f"{argument} must lie between {-count} and {count - 1}, because there are {count}; "
            f"got {values[wrong][0]}."
        )
