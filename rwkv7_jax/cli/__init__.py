"""The `rwkv7` command: argument parsing and printing.

Holds no logic that a test would want to call.
"""

from rwkv7_jax.cli.main import main

__all__ = ["main"]
