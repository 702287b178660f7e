"""Calls outside of any program, as in a notebook: compiled once, not anew at each call.

JAX compiles a loop (`jax.lax.scan`, `map`, `while_loop`) by the function that is its body. One that
is made inside the caller is another one at each call, so JAX would compile each time, and keep
all of these programs. Inside a program nothing changes: the caller is traced as it stands.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer


def is_eager() -> bool:
    """Tells whether operations run as they are called: no program around them is being traced."""
    # Not by arguments: those of a gradient or of `vmap` are traced without a program, too. A new
    # array is traced only where all that is computed goes into one.
    return not isinstance(jnp.zeros(1), Tracer)


def compiled_when_eager(
    function: Callable[..., Any], *, static_argnums: int | tuple[int, ...] = ()
) -> Callable[..., Any]:
    """Wraps a function so that calls outside of any program compile it, once for their shapes.

    Args:
        function: takes arrays and trees of them by position, besides the static arguments.
        static_argnums: places of arguments that are hashed and no arrays.
    """
    compiled = jax.jit(function, static_argnums=static_argnums)

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        return (compiled if is_eager() else function)(*arguments)

    return call
