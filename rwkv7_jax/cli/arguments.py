"""Types of command-line options: numbers with ranges, paths and text, with one-line errors."""

import argparse
import functools
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from rwkv7_jax.local_paths import check_target, is_same, local_path

# Suffixes of start state files.
STATE_SUFFIXES = (".pth", ".safetensors", ".st", ".state")

# A larger number of rows, windows or tokens counts as a typing error.
MOST_ROWS = 10**6
MOST_TOKENS = 2**24

# How argparse begins a message about one option.
_ABOUT_OPTION = re.compile(r"argument ([^:]+): (.*)", re.DOTALL)

# Escape sequences, and the bytes of the simple ones.
_ESCAPE = re.compile(rb"\\(x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|.?)", re.DOTALL)

_SIMPLE_ESCAPES = {
    b"n": b"\n",
    b"t": b"\t",
    b"r": b"\r",
    b"\\": b"\\",
}


class CommandParser(argparse.ArgumentParser):
    """A parser with one-line errors, like those of the commands."""

    def __init__(self, *arguments: Any, **named: Any):
        """Takes the arguments of `ArgumentParser`."""
        super().__init__(*arguments, **named)
        # As in Python 3.14: earlier versions take values such as "-1,2" and "-1e-3" for options.
        self._negative_number_matcher = re.compile(r"-\.?\d")

    def error(self, message: str) -> NoReturn:
        """Ends the command with exit code 2.

        Raises:
            ValueError: an option's value is missing, has the wrong type or is out of range; `main`
                prints the error.
        """
        command = self.prog.removeprefix("rwkv7").strip()
        where = f"{command}: " if command else ""
        about = _ABOUT_OPTION.fullmatch(message)
        if about:
            option, reason = about.groups()
            # The messages of this module continue after the option's name.
            if reason.startswith("must "):
                raise ValueError(f"{where}`{option}` {reason.rstrip('.')}.")
            if reason == "expected one argument":
                raise ValueError(
                    f"{where}`{option}` must have a value; write `{option}=VALUE` if the value "
                    "begins with a hyphen."
                )
        reason = " ".join(message.split()).rstrip(".")
        hint = f"`{self.prog} --help` lists the options."
        self.exit(2, f"rwkv7: {where}{reason}; {hint}\n")


def integer(least: int | None = None, most: int | None = None) -> Callable[[str], int]:
    """Makes the type of an option that takes an integer from `least` to `most`."""
    return functools.partial(_read_integer, least=least, most=most)


def _read_integer(text: str, *, least: int | None, most: int | None) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be a whole number; got {text!r}"
        ) from None
    if least is not None and value < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}; got {text}")
    if most is not None and value > most:
        raise argparse.ArgumentTypeError(f"must be at most {most}; got {text}")
    return value


def integers(least: int | None = None) -> Callable[[str], tuple[int, ...]]:
    """Makes the type of an option that takes comma-separated integers."""
    return lambda text: tuple(map(integer(least), text.split(",")))


def number(
    least: float | int | None = None, most: float | int | None = None
) -> Callable[[str], float]:
    """Makes the type of an option that takes a finite number from `least` to `most`."""
    return functools.partial(_read_number, least=least, most=most)


def _read_number(
    text: str, *, least: float | int | None, most: float | int | None
) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number; got {text!r}") from None
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be finite; got {text}")
    too_small = least is not None and value < least
    too_large = most is not None and value > most
    if too_small or too_large:
        raise argparse.ArgumentTypeError(f"must be {_range(least, most)}; got {text}")
    return value


def _range(least: float | int | None, most: float | int | None) -> str:
    """Describes a range with at least one end."""
    if most is None:
        return f"at least {least}"
    if least is None:
        return f"at most {most}"
    return f"from {least} to {most}"


def _reason(error: Exception) -> str:
    """Returns a message without the space after its empty argument, and without its full stop."""
    return str(error).strip().removesuffix(".")


def path(text: str, *, target: bool = False) -> str:
    """Parses a local path; `~` is the home folder.

    Args:
        text: the path as typed.
        target: whether the path will be written to.
    """
    try:
        local_path(text, "", target=target)
    except (ValueError, TypeError) as error:
        raise argparse.ArgumentTypeError(_reason(error)) from None
    return os.path.expanduser(text)


def state_target(text: str) -> str:
    """Parses the path of a state to write."""
    target = path(text, target=True)
    if Path(target).suffix not in STATE_SUFFIXES:
        raise argparse.ArgumentTypeError(
            f"must end in {', '.join(STATE_SUFFIXES)}; got {text!r}"
        )
    return file_target(target)


def target_path(text: str) -> str:
    """Parses the path of a file or a folder to write, and checks it before minutes of work."""
    target = path(text, target=True)
    try:
        check_target(Path(target), "")
    except ValueError as error:
        raise argparse.ArgumentTypeError(_reason(error)) from None
    return target


def file_target(text: str) -> str:
    """Parses the path of a file to write; see `target_path`."""
    target = target_path(text)
    if Path(target).is_dir():
        raise argparse.ArgumentTypeError(f"must name a file; {text!r} is a folder")
    return target


def refuse_inputs(
    argument: str, target: str | Path | None, inputs: Mapping[str, Iterable[str | None]]
) -> None:
    """Rejects a target that would overwrite an input, in any spelling of the paths.

    Args:
        argument: the command and the option of the target, in backticks.
        target: the path to write to; None if nothing is written.
        inputs: input paths by option; None for an omitted option.

    Raises:
        ValueError: the target is one of the inputs, or an existing file inside one of them.
    """
    if target is None or not os.path.exists(target):
        return
    place = Path(os.path.realpath(target))
    for option, sources in inputs.items():
        for source in sources:
            if source is None or not os.path.exists(source):
                continue
            if (
                is_same(source, target)
                or Path(os.path.realpath(source)) in place.parents
            ):
                raise ValueError(
                    f"{argument} must not overwrite `{option}`; `{target}` is read from "
                    f"`{source}`."
                )


def stop_text(text: str) -> str:
    """Parses a stop sequence."""
    if not text:
        raise argparse.ArgumentTypeError(
            "must not be empty: it would end every answer immediately"
        )
    return text


def unescape(text: bytes, option: str) -> bytes:
    r"""Replaces the escapes `\n`, `\t`, `\r`, `\\`, `\xNN` and `\uNNNN`.

    Args:
        text: the text as typed.
        option: the command and the option, with which the message begins.

    Raises:
        ValueError: the text has another escape.
    """

    def replace(match: re.Match[bytes]) -> bytes:
        name = match[1]
        if name in _SIMPLE_ESCAPES:
            return _SIMPLE_ESCAPES[name]
        if len(name) > 1:
            code = int(name[1:], 16)
            if name.startswith(b"x"):
                return bytes([code])
            return chr(code).encode("utf-8", "surrogatepass")
        shown = name.decode("utf-8", "replace")
        raise ValueError(
            f"{option} must have n, t, r, xNN, uNNNN or a backslash after each backslash with "
            f"`--escape`; got {shown!r}."
        )

    return _ESCAPE.sub(replace, text)
