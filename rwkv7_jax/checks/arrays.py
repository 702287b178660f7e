"""Checks of arrays, concrete or traced."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType

from pallas_kernels.eager import is_eager


def is_traced(value: Any) -> bool:
    """Tells whether a value is a tracer, whose numbers cannot be read."""
    return isinstance(value, Tracer)


def is_known(value: Any) -> bool:
    """Tells whether an array can be read here: it is not traced, and all of it is on this host."""
    if is_traced(value) or isinstance(value, jax.ShapeDtypeStruct):
        return False
    return getattr(value, "is_fully_addressable", True)


def as_array(value: Any, argument: str) -> Any:
    """Returns an array as it is, and a list of numbers as a NumPy array.

    Args:
        value: an array, a tracer, or a rectangular list of numbers.
        argument: the argument in backticks; the message begins with it.

    Raises:
        TypeError: the value is not an array of numbers.
        ValueError: a ragged list.
    """
    if isinstance(value, jax.Array | np.ndarray):
        return value
    # A `jax.ShapeDtypeStruct` passes, as in `jax.eval_shape`. PyTorch's tensors have other dtypes.
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
    # JAX would convert a list of Python floats to float32.
    if array.dtype == np.float64:
        return array.astype(np.float32)
    return array


def check_placed(arrays: Any, argument: str, mesh: Any = None) -> None:
    """Checks that arrays are placed on the devices of a mesh.

    An abstract mesh knows only the number of its devices. If no array were placed on them, JAX
    would compile the program for one device, and XLA would fail.

    Args:
        arrays: a tree; it passes if a leaf is traced or abstract.
        argument: the argument in backticks; the message begins with it.
        mesh: None is that of `sharding.use_mesh`.

    Raises:
        ValueError: all arrays are on one device, or on the host, but the mesh has several devices.
    """
    if mesh is None:
        mesh = jax.sharding.get_abstract_mesh()
        if AxisType.Manual in mesh.axis_types:
            return
    # An empty mesh has 0 devices.
    if mesh.size <= 1 or not is_eager():
        return
    # JAX knows the devices of a mesh from `jax.set_mesh`, and places arrays on them.
    if not jax.sharding.get_mesh().empty:
        return
    for leaf in jax.tree.leaves(arrays):
        if is_traced(leaf) or not isinstance(leaf, jax.Array | np.ndarray):
            return
        if isinstance(leaf, jax.Array) and leaf.sharding.num_devices > 1:
            return
    raise ValueError(
        f"{argument} must be placed on the {mesh.size} devices of the mesh by sharding.place; they "
        "are on one device."
    )


def check_not_donated(tree: Any, argument: str) -> None:
    """Checks that no array of a tree was donated or deleted.

    Args:
        tree: of arrays, tracers or shapes.
        argument: the argument in backticks; the message begins with it.

    Raises:
        ValueError: an array was donated or deleted.
    """
    for leaf in jax.tree.leaves(tree):
        is_concrete = isinstance(leaf, jax.Array) and not is_traced(leaf)
        if is_concrete and leaf.is_deleted():
            raise ValueError(
                f"{argument} must not hold deleted arrays; they were donated to an earlier call, "
                "such as a step from `make_train_step` without `donate=False`, or deleted."
            )


def check_indices(indices: Any, count: int, argument: str) -> None:
    """Checks that integer indices are inside an axis; negative ones count from its end.

    Args:
        indices: an integer or an array of integers; the values of traced ones are not checked.
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
