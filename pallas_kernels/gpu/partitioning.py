"""A guard against the compiler's partitioning of GPU kernels.

XLA cannot see into a kernel. Where a plain `jax.jit` shards its arguments, it would gather them on
every device and run the kernel on all rows there, without a word. JAX refuses this for TPU kernels
when it lowers them; the primitive here does so for CUDA. It uses inner interfaces of JAX (the
lowering context), which is why it has a file of its own.
"""

import math
from typing import Any

from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jaxtyping import Array

_unpartitioned_p = Primitive("unpartitioned")
_unpartitioned_p.def_impl(lambda x: x)
_unpartitioned_p.def_abstract_eval(lambda aval: aval)


def unpartitioned(x: Array) -> Array:
    """Returns `x`, in programs for CUDA that the compiler does not divide among devices.

    Raises:
        NotImplementedError: when such a program is lowered for several devices.
    """
    return _unpartitioned_p.bind(x)


def _divided_among(axis_context: Any) -> int:
    """Returns among how many devices the compiler divides what is lowered here."""
    manual = getattr(axis_context, "manual_axes", None)
    if manual is None:
        return getattr(axis_context, "num_devices", 1)
    # Inside `shard_map`; it may leave some of the mesh's axes to the compiler.
    mesh = axis_context.mesh
    manual = set(manual) | set(getattr(mesh, "manual_axes", ()))
    return math.prod(size for name, size in mesh.shape.items() if name not in manual)


def _lower_on_cuda(context, x):
    if _divided_among(context.module_context.axis_context) > 1:
        raise NotImplementedError(
            "wkv7: the compiler cannot divide a GPU kernel among devices; call it inside "
            "`jax.shard_map` over rows and heads, or name 'chunked'."
        )
    return [x]


mlir.register_lowering(_unpartitioned_p, lambda context, x: [x])
mlir.register_lowering(_unpartitioned_p, _lower_on_cuda, platform="cuda")
batching.defvectorized(_unpartitioned_p)
