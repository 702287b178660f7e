"""The device that a program targets, and the types of kernels' outputs on it."""

import contextvars
from collections.abc import Callable, Iterable

import jax
from jaxtyping import Array

# Wraps a kernel, given its platform, so that other platforms can lower it too. Only
# `multi_platform_export` sets it. With None a program contains only the kernels of its target.
kernel_wrapper: contextvars.ContextVar[Callable | None] = contextvars.ContextVar(
    "kernel_wrapper", default=None
)


def target():
    """Returns the device that a program targets.

    Returns:
        The abstract mesh's device if one is set, else the default device. It has a `platform` and
        a `device_kind`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.abstract_device is not None:
        return mesh.abstract_device
    default = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(default, jax.Device):
        return default
    return jax.devices(default)[0]


def target_platform() -> str:
    """Returns the target's platform by the name that lowering uses ("cuda", not "gpu")."""
    platform = target().platform
    return "cuda" if platform == "gpu" else platform


def output_like(
    shape: tuple[int, ...], dtype: jax.typing.DTypeLike, *arrays: Array
) -> jax.ShapeDtypeStruct:
    """Describes a kernel's output, which varies over the mesh axes that any of `arrays` does."""
    # JAX checks this inside `shard_map` and cannot infer it for a kernel.
    axes = jax.sharding.ManualAxisType(varying=_varying(arrays))
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=axes)


def _varying(arrays: Iterable[Array]) -> frozenset[str]:
    """Collects the mesh axes of a `jax.shard_map` that arrays vary over."""
    return frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in arrays))


def varying_as(x: Array, arrays: Iterable[Array]) -> Array:
    """Makes x vary over all mesh axes of a `jax.shard_map` that `arrays` vary over.

    A loop's initial carry must vary over the same axes as its results.
    """
    missing = _varying(arrays) - _varying([x])
    return jax.lax.pcast(x, tuple(sorted(missing)), to="varying") if missing else x
