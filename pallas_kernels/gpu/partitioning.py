"""A guard against the compiler's partitioning of GPU kernels.

XLA cannot partition a kernel. If a plain `jax.jit` shards its arguments, XLA silently gathers them
on every device and runs the kernel on all rows there. JAX rejects this for TPU kernels when it
lowers them; the primitive here rejects it for CUDA. It uses internal APIs of JAX (the lowering
context) and is therefore kept in a separate module.
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
    """Returns `x`, and keeps the compiler from partitioning a CUDA program.

    Raises:
        NotImplementedError: when a program is lowered that the compiler would partition.
    """
    return _unpartitioned_p.bind(x)


def _divided_among(axis_context: Any) -> int:
    """Returns the number of devices over which the compiler partitions the program."""
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
            "wkv7: the compiler cannot partition a GPU kernel over devices; call it inside "
            "`jax.shard_map` over rows and heads, or name 'chunked'."
        )
    return [x]


mlir.register_lowering(_unpartitioned_p, lambda context, x: [x])
mlir.register_lowering(_unpartitioned_p, _lower_on_cuda, platform="cuda")
batching.defvectorized(_unpartitioned_p)
