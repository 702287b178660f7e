"""Orbax, imported in one place and kept quiet.

The import takes seconds, which a command that only reads a `.pth` file should not have to pay.
"""

import logging
from types import ModuleType


def import_orbax() -> ModuleType:
    """Imports `orbax.checkpoint` when it is first needed, with its log switched off.

    Orbax logs through absl, also the errors that it raises. Whoever calls Orbax here catches these
    errors or lets them end the command, so that each of them is printed once and in our words.
    """
    # absl's level is global to the process: this is the only place that may set it.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    # Of a damaged folder, every array that is not read is reported once more when it is collected.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    # Slow to import (seconds), and most commands never need it.
    import orbax.checkpoint

    return orbax.checkpoint
