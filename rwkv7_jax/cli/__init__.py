"""The `rwkv7` command: argument parsing and printing, without other logic.

A larger command has its own module, with its name. `commands` has the small commands and the
top-level parser.
"""

import os
import signal
import sys

__all__ = ["main"]


def main() -> int:
    """Runs the command line of this process and returns the exit code."""
    # The imports take seconds. Until `commands` handles signals, Ctrl-C exits without a traceback.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    from rwkv7_jax.cli.output import discard_output
    from rwkv7_jax.cli.summary import print_help

    # `commands` handles a closed stream.
    if sys.argv[1:] in (["-h"], ["--help"]) and sys.stdout is not None:
        try:
            print_help()
            sys.stdout.flush()
        except BrokenPipeError:
            discard_output()
        return 0
    # This import is slow; the help does not need it.
    from rwkv7_jax.cli import commands

    return commands.main()
