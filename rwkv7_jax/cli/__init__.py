"""The `rwkv7` command: argument parsing and printing.

Holds no logic that a test would want to call. A command with a file of its own is named after it;
the small ones are in `commands`, with the parser of all.
"""

import sys

from rwkv7_jax.cli.output import discard_output
from rwkv7_jax.cli.summary import print_help

__all__ = ["main"]


def main() -> int:
    """Runs the command line of this process and returns the exit code."""
    # A closed stream is for `commands` to deal with.
    if sys.argv[1:] in (["-h"], ["--help"]) and sys.stdout is not None:
        try:
            print_help()
            sys.stdout.flush()
        except BrokenPipeError:
            discard_output()
        return 0
    # Late: it takes seconds.
    from rwkv7_jax.cli import commands

    return commands.main()
