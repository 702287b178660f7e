"""Compiles eager calls, as in a notebook, once instead of at every call.

JAX caches a compiled loop (`jax.lax.scan`, `map`, `while_loop`) by the identity of its body. A body
that is defined inside the caller is a new function at each call, so JAX would compile every time
and keep all of these programs. Under `jax.jit` nothing changes: the caller is traced as it is.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer


def is_eager() -> bool:
    """Tells whether operations run immediately, outside of any traced program."""
    # The arguments do not tell: those of a gradient or of `vmap` are traced even in eager calls. A
    # new array is a tracer only inside a traced program. Zeros would be sent to the device, at each
    # call and also where `jax.transfer_guard` forbids it; a range is made there.
    return not isinstance(jax.lax.iota(jnp.int32, 1), Tracer)


def compiled_when_eager(
    function: Callable[..., Any], *, static_argnums: int | tuple[int, ...] = ()
) -> Callable[..., Any]:
    """Wraps a function so that eager calls compile it, once for each set of shapes.

    Args:
        function: takes pytrees of arrays and the static arguments, all by position.
        static_argnums: as of `jax.jit`.
    """
    compiled = jax.jit(function, static_argnums=static_argnums)

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        return (compiled if is_eager() else function)(*arguments)

    return call
