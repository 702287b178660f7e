"""The command line of programs that take a config file: `--config=FILE[:ARGUMENT]`.

The file's `get_config` returns an `ml_collections.ConfigDict` or another mapping, and
`--config.GROUP.NAME=VALUE` overrides a setting in it. Only this module handles ConfigDicts; the
rest of the package uses dataclasses.

`ml_collections.config_flags` (1.1) is not used, because it

* infers the type of a value from the config file, so a setting that the file sets to None, such as
  `clip`, accepts no other value; here the type is that of the setting;
* ends with a traceback if a group is set after one of its settings, or if the file does not mention
  the group of a setting;
* continues with an error object in place of the config if the file does not exist;
* reads `--config.data.length 64` (a space in place of "=") as `length = true`, and takes the next
  flag as the value of a flag that has none;
* reports errors of `get_config` over many lines; here an error takes one line.
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

# The flag of a config file, or of one of its settings.
_CONFIG_FLAG = re.compile(r"--?(no)?config(?:\.([\w.]+))?(?:=(.*))?", re.DOTALL)

_HELP = ("-h", "-help", "--help")

# The beginning of a flag. A number may also begin with a minus sign.
_FLAG = re.compile(r"-(?![\d.])")

# The type of each setting, by dotted name.
_TYPES = setting_types(Settings)

_TRUE = ("true", "t", "1", "yes")
_FALSE = ("false", "f", "0", "no")

# The values of the config file with the command line's overrides; None without a file.
_config: dict[str, Any] | None = None

# The command line's overrides, by dotted name.
_changes: dict[str, Any] = {}


def run(program: str, main: Callable[[list[str]], None]) -> None:
    """Parses the flags, calls `main` with the words that are not flags, and ends the process.

    An unknown flag or a value of the wrong type prints one line and exits with code 2.

    Args:
        program: the name that messages begin with.
        main: the program.
    """
    app.run(main, flags_parser=functools.partial(_parse, program))


def config_values() -> dict[str, Any]:
    """Returns the values of the config file with the command line's overrides.

    Raises:
        ValueError: no config file was named.
    """
    if _config is None:
        raise ValueError("`--config` must name a file, such as configs/quickstart.py.")
    return _config


def changed_values() -> dict[str, Any]:
    """Returns the command line's overrides, by dotted name."""
    return _changes


def has_config() -> bool:
    """Returns whether a config file was named."""
    return _config is not None


def _parse(program: str, words: list[str]) -> list[str]:
    """Parses the flags and returns the words that are not flags."""
    global _config, _changes
    _config = None
    _changes = {}
    with exit_with_code(program):
        if any(word in _HELP for word in words[1:]):
            ignore_broken_pipe()
            print(_help(), flush=True)
            sys.exit(0)
        files, changes, rest = _sort_words(words)
        # As with other flags, the last one wins.
        if files:
            _config = _load_config(files[-1])
        elif changes:
            raise ValueError(
                f"`--config` must name a file in which to set `config.{changes[0][0]}`."
            )
        for name, value in changes:
            _change(_config, name, value)
        _changes = dict(changes)
        try:
            return flags.FLAGS(rest)
        except flags.UnrecognizedFlagError as error:
            raise ValueError(_unknown_flag(error.flagname)) from None
        except flags.Error as error:
            raise ValueError(_on_one_line(error)) from None


def _unknown_flag(name: str) -> str:
    """Returns the message for an unknown flag, usually a setting without its "config."."""
    nearest = nearest_name(name, [*_TYPES, *flags.FLAGS])
    hint = f"the nearest is `--{nearest}`" if nearest else "--help lists them"
    return f"`--{name}` is not a flag; {hint}."


def _sort_words(
    words: list[str],
) -> tuple[list[str], list[tuple[str, Any]], list[str]]:
    """Sorts the words of a command line by kind.

    Returns:
        The config files; pairs of a setting's dotted name and its new value; all other words.

    Raises:
        ValueError: a flag has no value.
    """
    files: list[str] = []
    changes: list[tuple[str, Any]] = []
    rest = [words[0]]
    # The remaining words in reverse, so that `pop` returns the next one.
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
            if name is None or text is not None:
                raise ValueError(
                    f"`{word}` must be a setting without a value, such as "
                    "--noconfig.allow_nan."
                )
            changes.append((name, False))
            continue
        if text is None and _TYPES.get(f"config.{name}") is bool:
            # The value of a boolean setting is optional.
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
    """Returns whether a word is a flag of the program whose value is the next word."""
    name = word.lstrip("-")
    if not _FLAG.match(word) or name not in flags.FLAGS:
        return False
    return not flags.FLAGS[name].boolean


def _next_value(word: str, left: list[str]) -> str:
    """Takes the next word as the value of a flag.

    Raises:
        ValueError: there is no next word, or it is a flag.
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
    """Parses a value as its setting's type; `read_settings` checks the result.

    Args:
        kind: the type of the setting; None if the setting is unknown.
        text: the value on the command line.
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
        # Perhaps a literal such as 0x10.
        pass
    try:
        with warnings.catch_warnings():
            # Python may warn about an invalid literal before it raises.
            warnings.simplefilter("ignore")
            value = ast.literal_eval(text)
    # An unhashable key or element raises TypeError; deep nesting raises one of the last two.
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        value = text
    is_tuple = any(typing.get_origin(one) is tuple for one in kinds)
    if is_tuple and not isinstance(value, tuple | list):
        # A single element needs no brackets.
        return (value,)
    return value


def _change(config: dict[str, Any] | None, name: str, value: Any) -> None:
    """Sets one setting of a config; creates the groups that the config lacks."""
    assert config is not None
    *groups, last = name.split(".")
    inner: Any = config
    for group in groups:
        inner = inner.setdefault(group, {})
        if not isinstance(inner, dict):
            raise ValueError(
                f"`--config`: `{group}` is a setting, not a group of settings."
            )
    inner[last] = value


def _load_config(file: str) -> dict[str, Any]:
    """Runs a config file and returns the values of its config.

    Args:
        file: the path, optionally with a colon and the argument of `get_config`.

    Raises:
        ValueError: the file does not exist, or it fails to return a config; the message names the
            line if it is known.
    """
    # Check the whole word first: the colon of a URL would be taken for the separator.
    local_path(file, "`--config`")
    name, _, argument = file.partition(":")
    path = Path(name).expanduser()
    if not path.is_file():
        problem = "is not one" if path.exists() else "does not exist"
        raise ValueError(f"`--config` must name a file; {name!r} {problem}.")
    arguments = [argument] if argument else []
    try:
        get_config = runpy.run_path(str(path)).get("get_config")
        values = _as_dict(get_config(*arguments)) if callable(get_config) else None
    except KeyboardInterrupt:
        raise
    # The file is the user's own program and may raise anything, even SystemExit.
    except BaseException as error:
        where = _place_of_error(error, path)
        raise ValueError(f"`--config`: {where}: {_reason(error)}") from None
    if values is None:
        raise ValueError(f"`--config`: {path} must define `get_config`.")
    return values


def _as_dict(config: Any) -> dict[str, Any]:
    """Copies a config into nested dictionaries that may be modified."""
    if isinstance(config, ConfigDict):
        return config.to_dict()
    if not isinstance(config, Mapping):
        kind = type(config).__name__
        raise ValueError(f"`get_config` must return a ConfigDict; got {kind}")
    values = {}
    for name, value in config.items():
        is_group = isinstance(value, Mapping | ConfigDict)
        # `read_settings` rejects a key that is not a string, because no setting has its name.
        values[str(name)] = _as_dict(value) if is_group else value
    return values


def _place_of_error(error: BaseException, path: Path) -> str:
    """Returns the path of the file and, if known, the line in it that raised an error."""
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
        return f"it exits the program: exit({shown(error.code)})."
    text = _on_one_line(error)
    # A message that the config itself raises, such as "the size must be one of ...".
    if isinstance(error, ValueError) and text:
        return text if text.endswith(".") else f"{text}."
    return f"{type(error).__name__}: {text}."


def _on_one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _help() -> str:
    """Returns the text of `--help`."""
    lines = [(sys.modules["__main__"].__doc__ or "").strip(), "", "Flags:"]
    lines.append("  --config=FILE[:ARGUMENT]   config file, such as configs/*.py")
    for flag in flags.FLAGS.get_flags_for_module("__main__"):
        lines.append(f"  --{flag.name}={flag.default!r}   {flag.help}")
    lines += ["", "Settings with their defaults, which the config file may override:"]
    lines += describe_settings()
    return "\n".join(lines)
