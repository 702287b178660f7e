"""The list of commands, which `rwkv7 --help` prints without loading any of them."""

import argparse

from rwkv7_jax.cli.arguments import CommandParser

# What each command is for, in the order of the help.
COMMANDS = {
    "convert": "change a checkpoint's format",
    "inspect": "sizes, dtypes and norms of a file's tensors",
    "doctor": "versions, devices and what can run here",
    "report": "write report.html into a run's folder",
    "data": "turn text into ids on the disk, or show rows of either",
    "generate": "continue a text or answer a message",
    "chat": "talk with a model, which remembers what was said",
    "serve": "answer over HTTP, each request from the state that it names",
    "observe": "propose a start state for a prompt, or judge the proposal",
    "state": "look at, convert, mix, scale and examine start states",
}


def top_parser(version: str) -> CommandParser:
    """Makes the parser of `rwkv7` itself.

    Args:
        version: what `--version` prints.
    """
    parser = CommandParser(prog="rwkv7", description="RWKV-7 checkpoints and states.")
    parser.add_argument("--version", action="version", version=version)
    return parser


def add_commands(parser: CommandParser) -> argparse._SubParsersAction:
    """Adds the subparsers of all commands to the parser of `rwkv7`."""
    return parser.add_subparsers(required=True, metavar="command")


def print_help() -> None:
    """Prints what `rwkv7 --help` prints."""
    parser = top_parser("")
    commands = add_commands(parser)
    for name, purpose in COMMANDS.items():
        commands.add_parser(name, help=purpose)
    parser.print_help()
