"""The `rwkv7` command: argument parsing and printing.

Holds no logic that a test would want to call. A command with a file of its own is named after it;
the small ones are in `commands`, with the parser of all.
"""

from rwkv7_jax.cli.commands import main

__all__ = ["main"]
