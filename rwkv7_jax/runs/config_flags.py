"""The command line of programs that take a config file: `--config=FILE[:ARGUMENT]`.

The file's `get_config` gives an `ml_collections.ConfigDict` or another mapping, which
`--config.GROUP.NAME=VALUE` changes. Beyond this module settings are dataclasses.

The changes are read here and not by `ml_collections.config_flags`, which was tried (1.1) and
* takes the type of a value from the config file, so that a setting which a file sets to None, such
  as `clip`, can be set to nothing else; here the type is the setting's own;
* ends with a traceback where a group is set after one of its settings, or a setting of a group that
  the file does not mention;
* goes on with an error object in place of the config where there is no such file;
* takes `--config.data.length 64` (a space in place of "=") as `length = true`, and the next flag as
  the value of one that has none;
* reports errors of `get_config` over many lines, where users of this program get one.
"""

import ast
import functools
import re
import runpy
import sys
import traceback
import typing
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from absl import app, flags
from ml_collections import ConfigDict

from rwkv7_jax.local_paths import local_path
from rwkv7_jax.runs.process import exit_with_code, ignore_broken_pipe
from rwkv7_jax.runs.settings import Settings
from rwkv7_jax.runs.settings.fields import shown
from rwkv7_jax.runs.settings.help import describe_settings
from rwkv7_jax.runs.settings.names import nearest_name, setting_types

# A flag of a config file, or of one of its settings.
_CONFIG_FLAG = re.compile(r"--?(no)?config(?:\.([\w.]+))?(?:=(.*))?", re.DOTALL)

_HELP = ("-h", "-help", "--help")

# A word that is a flag; a number may begin with a minus.
_FLAG = re.compile(r"-(?![\d.])")

# The type of each setting by its dotted name.
_TYPES = setting_types(Settings)

_TRUE = ("true", "t", "1", "yes")
_FALSE = ("false", "f", "0", "no")

# The values of the config file as the command line changed them; None without a file.
_config: dict[str, Any] | None = None


def run(program: str, main: Callable[[list[str]], None]) -> None:
    """Parses the flags, calls `main` with the words that are no flags, and ends the process.

    A flag that does not exist or has a value of another type ends it in one line, with exit code 2.

    Args:
        program: the name that messages begin with.
        main: the program.
    """
    app.run(main, flags_parser=functools.partial(_parse, program))


def config_values() -> dict[str, Any]:
    """Returns the values of the config file, as the command line changed them.

    Raises:
        ValueError: no config file was named.
    """
    if _config is None:
        raise ValueError("`--config` must name a file, such as configs/quickstart.py.")
    return _config


def has_config() -> bool:
    """Tells whether a config file was named."""
    return _config is not None


def _parse(program: str, words: list[str]) -> list[str]:
    """Parses the flags and returns the words that are none."""
    global _config
    _config = None
    with exit_with_code(program):
        if any(word in _HELP for word in words[1:]):
            ignore_broken_pipe()
            print(_help(), flush=True)
            sys.exit(0)
        files, changes, rest = _sort_words(words)
        # As with other flags, the last one counts.
        if files:
            _config = _load_config(files[-1])
        elif changes:
            raise ValueError(
                f"`--config` must name a file whose `config.{changes[0][0]}` is changed."
            )
        for name, value in changes:
            _change(_config, name, value)
        try:
            return flags.FLAGS(rest)
        except flags.UnrecognizedFlagError as error:
            raise ValueError(_unknown_flag(error.flagname)) from None
        except flags.Error as error:
            raise ValueError(_on_one_line(error)) from None


def _unknown_flag(name: str) -> str:
    """Says that a word is no flag; a setting without its "config." is the usual case."""
    nearest = nearest_name(name, [*_TYPES, *flags.FLAGS])
    hint = f"the nearest is `--{nearest}`" if nearest else "--help lists them"
    return f"`--{name}` is no flag; {hint}."


def _sort_words(
    words: list[str],
) -> tuple[list[str], list[tuple[str, Any]], list[str]]:
    """Sorts the words of a command line.

    Returns:
        The config files; pairs of a setting's dotted name and its new value; all other words.

    Raises:
        ValueError: a flag has no value.
    """
    files: list[str] = []
    changes: list[tuple[str, Any]] = []
    rest = [words[0]]
    # The words that are left, the next one last.
    left = words[:0:-1]
    while left:
        word = left.pop()
        match = _CONFIG_FLAG.fullmatch(word)
        if not match:
            rest.append(word)
            if _needs_value(word):
                rest.append(_next_value(word, left))
            continue
        negated, name, text = match.groups()
        if negated:
            changes.append((name or "", False))
            continue
        if text is None and _TYPES.get(f"config.{name}") is bool:
            # The value of a switch may be left out.
            is_value = left and left[-1].lower() in _TRUE + _FALSE
            text = left.pop() if is_value else "true"
        if text is None:
            text = _next_value(word, left)
        if name is None:
            files.append(text)
        else:
            kind = _TYPES.get(f"config.{name}")
            changes.append((name, _read_value(kind, text)))
    return files, changes, rest


def _needs_value(word: str) -> bool:
    """Tells whether a word is a flag of the program, without "=", whose value is the next word."""
    name = word.lstrip("-")
    if not _FLAG.match(word) or name not in flags.FLAGS:
        return False
    return not flags.FLAGS[name].boolean


def _next_value(word: str, left: list[str]) -> str:
    """Takes the next word as the value of a flag.

    Raises:
        ValueError: there is none, or it is a flag itself.
    """
    if not left:
        raise ValueError(
            f"`{word}` must have a value: {word}=...; it is the last word."
        )
    if _FLAG.match(left[-1]):
        raise ValueError(
            f"`{word}` must have a value: {word}=...; the next word is {left[-1]}."
        )
    return left.pop()


def _read_value(kind: Any, text: str) -> Any:
    """Reads a value as its setting's type; whether it is one, `read_settings` checks.

    Args:
        kind: of the setting; None of an unknown one.
        text: from the command line.
    """
    kinds = (kind,)
    if typing.get_origin(kind) is None or type(None) in typing.get_args(kind):
        kinds = typing.get_args(kind) or (kind,)
    if type(None) in kinds and text in ("None", "none"):
        return None
    if str in kinds or typing.get_origin(kind) is typing.Literal:
        return text
    if bool in kinds and text.lower() in _TRUE + _FALSE:
        return text.lower() in _TRUE
    try:
        if int in kinds:
            return int(text)
        if float in kinds:
            return float(text)
    except ValueError:
        # Something like 0x10, or no number.
        pass
    try:
        with warnings.catch_warnings():
            # Of what is no value, Python warns before it says so.
            warnings.simplefilter("ignore")
            value = ast.literal_eval(text)
    # A set or a key that cannot be hashed is a TypeError; deep nesting ends in one of the last two.
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        value = text
    is_tuple = any(typing.get_origin(one) is tuple for one in kinds)
    if is_tuple and not isinstance(value, tuple | list):
        # A single element needs no brackets.
        return (value,)
    return value


def _change(config: dict[str, Any] | None, name: str, value: Any) -> None:
    """Changes one setting of a config; groups that it does not have are made."""
    assert config is not None
    *groups, last = name.split(".")
    inner: Any = config
    for group in groups:
        inner = inner.setdefault(group, {})
        if not isinstance(inner, dict):
            raise ValueError(
                f"`--config`: `{group}` is one setting, not a group of them."
            )
    inner[last] = value


def _load_config(file: str) -> dict[str, Any]:
    """Runs a config file and returns the values of its config.

    Args:
        file: its path, and after a colon the argument of `get_config`.

    Raises:
        ValueError: there is no such file, or it gives no config; the message has the line.
    """
    # The whole word first: an address would be cut at its colon.
    local_path(file, "`--config`")
    name, _, argument = file.partition(":")
    path = Path(name).expanduser()
    if not path.is_file():
        raise ValueError(f"`--config` must name a file; there is no {name!r}.")
    arguments = [argument] if argument else []
    try:
        get_config = runpy.run_path(str(path)).get("get_config")
        values = _as_dict(get_config(*arguments)) if callable(get_config) else None
    except KeyboardInterrupt:
        raise
    # The file is the user's own program. It may end in any way, also with `sys.exit`.
    except BaseException as error:
        where = _place_of_error(error, path)
        raise ValueError(f"`--config`: {where}: {_reason(error)}") from None
    if values is None:
        raise ValueError(f"`--config`: {path} must define `get_config`.")
    return values


def _as_dict(config: Any) -> dict[str, Any]:
    """Copies a config into dictionaries, which may be changed."""
    if isinstance(config, ConfigDict):
        return config.to_dict()
    if not isinstance(config, Mapping):
        kind = type(config).__name__
        raise ValueError(f"`get_config` must return a ConfigDict; got {kind}")
    values = {}
    for name, value in config.items():
        is_group = isinstance(value, Mapping | ConfigDict)
        # A key that is no text names no setting, which `read_settings` says.
        values[str(name)] = _as_dict(value) if is_group else value
    return values


def _place_of_error(error: BaseException, path: Path) -> str:
    """Names the file and, where it is known, the line in it that an error comes from."""
    line = None
    if isinstance(error, SyntaxError):
        line = error.lineno
    else:
        for frame in traceback.extract_tb(error.__traceback__):
            if frame.filename == str(path):
                line = frame.lineno
    return f"{path}, line {line}" if line else str(path)


def _reason(error: BaseException) -> str:
    """Describes an error of a config file in one line."""
    if isinstance(error, SyntaxError):
        return f"syntax error: {error.msg}."
    if isinstance(error, SystemExit):
        return f"it ends the program: exit({shown(error.code)})."
    text = _on_one_line(error)
    # A sentence of the config's own, such as "the size must be one of ...".
    if isinstance(error, ValueError) and text:
        return text if text.endswith(".") else f"{text}."
    return f"{type(error).__name__}: {text}."


def _on_one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _help() -> str:
    """Makes the text of `--help`."""
    lines = [(sys.modules["__main__"].__doc__ or "").strip(), "", "Flags:"]
    lines.append("  --config=FILE[:ARGUMENT]   file of settings, such as configs/*.py")
    for flag in flags.FLAGS.get_flags_for_module("__main__"):
        lines.append(f"  --{flag.name}={flag.default!r}   {flag.help}")
    lines += ["", "Settings and their defaults, which the config file may change:"]
    lines += describe_settings()
    return "\n".join(lines)
