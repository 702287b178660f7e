"""The list of commands, which `rwkv7 --help` prints without importing them."""

import argparse

from rwkv7_jax.cli.arguments import CommandParser

# The purpose of each command, in the order of the help.
COMMANDS = {
    "convert": "convert a checkpoint to another format",
    "inspect": "list shapes, dtypes and norms of a file's tensors",
    "doctor": "list versions, devices and available kernels",
    "report": "write report.html into a run directory",
    "data": "tokenize text into a cache, or show rows of a text or a cache",
    "generate": "continue a text or answer a message",
    "chat": "chat with a model, whose state remembers the conversation",
    "serve": "serve over HTTP; each request names its start state",
    "observe": "propose a start state for a prompt, or measure the proposal's error",
    "state": "inspect, convert, mix, scale and diagnose start states",
}


def top_parser(version: str) -> CommandParser:
    """Makes the parser of `rwkv7` itself.

    Args:
        version: output of `--version`.
    """
    parser = CommandParser(prog="rwkv7", description="RWKV-7 checkpoints and states.")
    parser.add_argument("--version", action="version", version=version)
    return parser


def add_commands(parser: CommandParser) -> argparse._SubParsersAction:
    """Adds the subparsers of all commands to the parser of `rwkv7`."""
    return parser.add_subparsers(required=True, metavar="command")


def print_help() -> None:
    """Prints the output of `rwkv7 --help`."""
    parser = top_parser("")
    commands = add_commands(parser)
    for name, purpose in COMMANDS.items():
        commands.add_parser(name, help=purpose)
    parser.print_help()
