"""Orbax, imported in one place and kept quiet.

The import takes seconds, which a command that only reads a `.pth` file should not have to pay.
"""

import logging
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


def import_orbax() -> ModuleType:
    """Imports `orbax.checkpoint` when it is first needed, with its log switched off.

    Orbax logs through absl, also the errors that it raises. A caller of Orbax catches these
    errors or lets them end the command, so that each of them is printed once and in our words.
    """
    # absl's level is global to the process: this is the only place that may set it.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    # Of a damaged folder, every array that is not read is reported once more when it is collected.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    # Slow to import (seconds), and most commands never need it.
    import orbax.checkpoint

    return orbax.checkpoint


class _Filter:
    """A `sys.unraisablehook` that drops the complaints that a failed Orbax read causes."""

    def __init__(self, others: Callable[[Any], Any]):
        """Takes the hook that gets everything else."""
        self._others = others

    def __call__(self, unraisable: Any) -> None:
        """Passes on what comes from elsewhere."""
        if not is_abandoned_read(unraisable):
            self._others(unraisable)


def hide_abandoned_reads() -> None:
    """Hides the complaints about coroutines and futures that a failed Orbax read leaves.

    Orbax (0.12.8) starts one asynchronous read per array and does not await the others when one
    fails. They complain whenever they are collected, or when TensorStore's threads end them, up to
    the end of the process: tens of lines about one damaged file. The error itself is always raised.
    """
    if not isinstance(sys.unraisablehook, _Filter):
        sys.unraisablehook = _Filter(sys.unraisablehook)


def is_abandoned_read(unraisable: Any) -> bool:
    """Tells whether an unraisable error comes from what Orbax did not await.

    Args:
        unraisable: as `sys.unraisablehook` gets it.
    """
    code = getattr(unraisable.object, "cr_code", None)
    if code is not None and "/orbax/" in code.co_filename:
        return True
    # TensorStore's threads report to the event loop of a read that has ended. Nothing in this error
    # names its origin.
    return str(unraisable.exc_value) == "Event loop is closed"
