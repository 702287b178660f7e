"""One exported program with the kernels of several platforms (opt-in).

A call of `wkv7` without `implementation` runs the kernel of the target platform. This is enough
wherever a program is lowered for one platform at a time. `jax.export` can lower one program for
several platforms. It then lowers each platform's kernel for all of them, which Pallas rejects.
Inside `kernels_of_all_platforms` each kernel is wrapped in a primitive, which is lowered to unused
zeros on every other platform:

    export = jax.export.export(jax.jit(function), platforms=("cpu", "tpu", "cuda"))
    with kernels_of_all_platforms():
        exported = export(*arguments)

The primitive uses internal APIs of JAX (`mlir.lower_fun`, the lowering context). It is therefore
kept in a separate module, which nothing in the packages imports.
"""

import contextlib
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import batching, mlir

from pallas_kernels.platforms import kernel_wrapper, target_platform

_PLATFORMS = ("tpu", "cuda", "rocm")


@contextlib.contextmanager
def kernels_of_all_platforms() -> Iterator[None]:
    """Makes `wkv7` without `implementation` include every platform's kernel inside the context.

    JAX's trace cache ignores this context. Export a function that was not traced before (a new
    `jax.jit`), or call `jax.clear_caches()` first. With an older trace the export fails; it never
    gives wrong numbers. Gradients include only the target's kernel.
    """
    token = kernel_wrapper.set(_lower_only_on)
    try:
        yield
    finally:
        kernel_wrapper.reset(token)


def _describe_gpu(platform: str) -> contextlib.AbstractContextManager:
    """Describes an H200 if a CUDA kernel is traced without a GPU.

    Newer versions of Pallas require a device for lowering, though hardly anything depends on it.
    """
    is_known = not jax.sharding.get_abstract_mesh().empty or target_platform() == "cuda"
    if is_known or platform != "cuda":
        return contextlib.nullcontext()
    device = jax.sharding.AbstractDevice(
        device_kind="NVIDIA H200",
        num_cores=132,
        platform="gpu",
    )
    mesh = jax.sharding.AbstractMesh(
        (1,), ("x",), (jax.sharding.AxisType.Auto,), abstract_device=device
    )
    return jax.sharding.use_abstract_mesh(mesh)


_only_on_p = Primitive("lower_only_on")
_only_on_p.multiple_results = True


def _lower_only_on(platform: str, function: Callable, *arguments):
    """Calls `function` in programs for `platform`; elsewhere returns zeros of the same shapes.

    Args:
        platform: one of `_PLATFORMS`; the call is in its `jax.lax.platform_dependent` branch.
        function: takes pytrees of arrays; not differentiable.
        *arguments: its arguments.
    """
    with _describe_gpu(platform):
        traced, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
    leaves = jax.tree.leaves(arguments)
    outputs = _only_on_p.bind(*leaves, traced=traced, platform=platform)
    return jax.tree.unflatten(jax.tree.structure(shapes), outputs)


def _evaluate(*leaves, traced: ClosedJaxpr, platform: str):
    return jaxpr_as_fun(traced)(*leaves)


@_only_on_p.def_abstract_eval
def _shapes(*leaves, traced: ClosedJaxpr, platform: str):
    return traced.out_avals


def _zeros(*leaves, traced: ClosedJaxpr, platform: str):
    return [jnp.zeros(aval.shape, aval.dtype) for aval in traced.out_avals]


_lower_zeros = mlir.lower_fun(_zeros, multiple_results=True)


def _make_lowering(lowered_for: str) -> Callable:
    """Makes the rule for one platform, which lowers a kernel as if for that platform alone."""

    def rule(context, *leaves, traced: ClosedJaxpr, platform: str):
        if platform != lowered_for:
            return _lower_zeros(context, *leaves, traced=traced, platform=platform)
        # Pallas rejects a context with several platforms, so the kernel gets one with its own.
        narrow = context.module_context.replace(platforms=(lowered_for,))
        lower = mlir.lower_fun(_evaluate, multiple_results=True)
        return lower(
            context.replace(module_context=narrow),
            *leaves,
            traced=traced,
            platform=platform,
        )

    return rule


def _batch(leaves, axes, *, traced: ClosedJaxpr, platform: str):
    """Turns a batch of calls into one call of the batched function."""
    batched = jax.vmap(jaxpr_as_fun(traced), in_axes=axes)
    outputs = _lower_only_on(platform, batched, *leaves)
    # `jax.vmap` puts the batch first in all results.
    return outputs, [0] * len(outputs)


# Outside of `jit` the primitive runs the kernel as if it were not wrapped.
_only_on_p.def_impl(_evaluate)
mlir.register_lowering(_only_on_p, _lower_zeros)
for _platform in _PLATFORMS:
    mlir.register_lowering(_only_on_p, _make_lowering(_platform), platform=_platform)
batching.primitive_batchers[_only_on_p] = _batch
