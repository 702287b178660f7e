"""The `rwkv7` command: argument parsing and printing.

Holds no logic that a test would want to call. A command with a file of its own is named after it;
the small ones are in `commands`, with the parser of all.
"""

import os
import signal
import sys

__all__ = ["main"]


def main() -> int:
    """Runs the command line of this process and returns the exit code."""
    # The imports take seconds. Until `commands` listens, Ctrl-C ends them without a traceback.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    from rwkv7_jax.cli.output import discard_output
    from rwkv7_jax.cli.summary import print_help

    # A closed stream is for `commands` to deal with.
    if sys.argv[1:] in (["-h"], ["--help"]) and sys.stdout is not None:
        try:
            print_help()
            sys.stdout.flush()
        except BrokenPipeError:
            discard_output()
        return 0
    # After the help: it is what takes the time.
    from rwkv7_jax.cli import commands

    return commands.main()
