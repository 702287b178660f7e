"""Lazy import of Orbax, with its log output silenced.

The import takes seconds, which a command that only reads a `.pth` file should not pay.
"""

import functools
import logging
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


def import_orbax() -> ModuleType:
    """Imports `orbax.checkpoint` on first use and disables its logging.

    Orbax logs the errors that it also raises, through absl. Its callers catch these errors or let
    them end the command, so each error is printed once, in our own wording.
    """
    # absl's log level is global to the process; no other place may set it.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    # For a damaged folder, asyncio logs every abandoned read when it is garbage-collected.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    import orbax.checkpoint

    return orbax.checkpoint


def _report(others: Callable[[Any], Any], unraisable: Any) -> None:
    """Forwards an unraisable error to the other hook unless it comes from an abandoned read."""
    if not is_abandoned_read(unraisable):
        others(unraisable)


def hide_abandoned_reads() -> None:
    """Hides the messages about coroutines and futures that a failed Orbax read abandons.

    Orbax (0.12.8) starts one asynchronous read per array and does not await the others when one
    fails. Python prints a message when each is garbage-collected or when TensorStore's threads end
    it, up to the end of the process: tens of lines about one damaged file. The error itself is
    always raised.
    """
    if getattr(sys.unraisablehook, "func", None) is not _report:
        sys.unraisablehook = functools.partial(_report, sys.unraisablehook)


def is_abandoned_read(unraisable: Any) -> bool:
    """Returns whether an unraisable error comes from a read that Orbax did not await.

    Args:
        unraisable: the argument of `sys.unraisablehook`.
    """
    code = getattr(unraisable.object, "cr_code", None)
    if code is not None and "/orbax/" in code.co_filename:
        return True
    # TensorStore's threads report to the event loop of a finished read. Nothing else in this error
    # identifies its origin.
    return str(unraisable.exc_value) == "Event loop is closed"
