"""Beartype for jaxtyping's import hook, applied once to each signature.

The hook decorates functions inside of functions too, each time the outer one runs. Making the
check of a signature takes a millisecond: it was most of what reading a file cost in these tests.
"""

from collections.abc import Callable

import beartype

_made: dict[tuple, Callable] = {}


def check(function: Callable) -> Callable:
    """Gives the check of a signature.

    Args:
        function: jaxtyping's empty function of that signature, new each time. It does nothing, so
            that another one with the same names and annotations is as good.
    """
    # As text: jaxtyping makes a new class of each annotation, equal to no other.
    annotations = repr(function.__annotations__)
    key = (function.__module__, function.__qualname__, function.__code__, annotations)
    # Classes that are local to a function differ from call to call under one name.
    if "<locals>" in annotations:
        return beartype.beartype(function)
    if key not in _made:
        _made[key] = beartype.beartype(function)
    return _made[key]
