"""Kernels of one platform inside programs that are lowered for several.

`jax.lax.platform_dependent` lowers every branch for every platform, and a Pallas call refuses those
that it is not made for. `only` closes that gap: elsewhere its call becomes zeros that nobody reads.
"""

import contextlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import batching, mlir
from jaxtyping import Array

PLATFORMS = ("tpu", "cuda", "rocm")


def target():
    """The device that a program is made for: the abstract mesh's if one is set, else the default.

    It has a `platform` and a `device_kind`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.abstract_device is not None:
        return mesh.abstract_device
    default = jax.config.jax_default_device
    if isinstance(default, jax.Device):
        return default
    return jax.devices(default)[0]


def output_like(
    shape: tuple[int, ...], dtype: jax.typing.DTypeLike, *arrays: Array
) -> jax.ShapeDtypeStruct:
    """A kernel's output that varies over the mesh axes over which any of its arrays does."""
    varying = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in arrays))
    axes = jax.sharding.ManualAxisType(varying=varying)
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=axes)


def zeros(kind: jax.ShapeDtypeStruct) -> Array:
    """Zeros of this shape and dtype that vary over the same mesh axes."""
    axes = tuple(kind.manual_axis_type.varying) if kind.manual_axis_type else ()
    found = jnp.zeros(kind.shape, kind.dtype)
    return jax.lax.pcast(found, axes, to="varying") if axes else found


def _described(platform: str) -> contextlib.AbstractContextManager:
    """Where a kernel is made for CUDA without any GPU, given or described: an H200.

    Newer versions of Pallas ask for one at lowering, though hardly anything depends on it.
    """
    given = not jax.sharding.get_abstract_mesh().empty or target().platform == "gpu"
    if given or platform != "cuda":
        return contextlib.nullcontext()
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


_only = Primitive("only")
_only.multiple_results = True


def lower_only_on(platform: str, function: Callable, *arguments):
    """`function(*arguments)` in programs for `platform`; zeros of the same shapes elsewhere.

    To be used in that platform's branch of `jax.lax.platform_dependent`.

    Args:
        platform: one of `PLATFORMS`.
        function: of pytrees of arrays; not differentiable.
        *arguments: its arguments.
    """
    with _described(platform):
        traced, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
    leaves = jax.tree.leaves(arguments)
    found = _only.bind(*leaves, traced=traced, platform=platform)
    return jax.tree.unflatten(jax.tree.structure(shapes), found)


def _evaluate(*leaves, traced: ClosedJaxpr, platform: str):
    return jaxpr_as_fun(traced)(*leaves)


@_only.def_abstract_eval
def _shapes(*leaves, traced: ClosedJaxpr, platform: str):
    return traced.out_avals


def _zeros(*leaves, traced: ClosedJaxpr, platform: str):
    return [jnp.zeros(aval.shape, aval.dtype) for aval in traced.out_avals]


def _lowering(here: str) -> Callable:
    """How the call is lowered for `here`: with that as the only platform there is."""

    def rule(context, *leaves, traced: ClosedJaxpr, platform: str):
        if platform != here:
            return _nothing(context, *leaves, traced=traced, platform=platform)
        narrow = context.module_context.replace(platforms=(here,))
        lower = mlir.lower_fun(_evaluate, multiple_results=True)
        return lower(context.replace(module_context=narrow), *leaves, traced=traced, platform=here)

    return rule


def _batch(leaves, axes, *, traced: ClosedJaxpr, platform: str):
    """A batch of calls is one call of the batched function."""
    batched = jax.vmap(jaxpr_as_fun(traced), in_axes=axes)
    found = lower_only_on(platform, batched, *leaves)
    return found, [0] * len(found)


_only.def_impl(_evaluate)
_nothing = mlir.lower_fun(_zeros, multiple_results=True)
mlir.register_lowering(_only, _nothing)
for _platform in PLATFORMS:
    mlir.register_lowering(_only, _lowering(_platform), platform=_platform)
batching.primitive_batchers[_only] = _batch
