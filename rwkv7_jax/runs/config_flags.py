"""The command line of programs that take a config file: `--config=FILE[:ARGUMENT]`.

The file's `get_config` gives an `ml_collections.ConfigDict`, which `--config.GROUP.NAME=VALUE`
changes, also in groups that the file does not mention. Beyond this point settings are dataclasses.
"""

import functools
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from rwkv7_jax.runs.process import exit_with_code

_FILE = re.compile(r"--?config=(.*)", re.DOTALL)

_GROUPS = re.compile(r"--?(?:no)?config\.((?:\w+\.)+)\w+(?:=|$)")


def run(program: str, main: Callable[[list[str]], None]) -> None:
    """`main` has been called with the words that are no flags, and the process ends.

    A flag that does not exist or has a value of another type ends it in one line, with exit code 2.
    """
    app.run(main, flags_parser=functools.partial(_parsed, program))


def config_values() -> dict[str, Any]:
    """What the config file and the command line say.

    Raises:
        ValueError: no config file was named.
    """
    if "config" not in flags.FLAGS:
        raise ValueError("`--config` must name a file, such as configs/quickstart.py.")
    return flags.FLAGS["config"].value.to_dict()


def _parsed(program: str, words: list[str]) -> list[str]:
    """The words that are no flags; flags have been read."""
    with exit_with_code(program):
        words = _joined(words)
        rest = [word for word in words if not _FILE.fullmatch(word)]
        files = [found[1] for word in words if (found := _FILE.fullmatch(word))]
        if files:
            config = _loaded(files[-1])
            for groups in filter(None, map(_GROUPS.match, rest)):
                _make(config, groups[1].rstrip(".").split("."))
            choices = {"lock_config": False, "accept_new_attributes": True, "sys_argv": rest}
            config_flags.DEFINE_config_dict("config", config, flag_values=flags.FLAGS, **choices)
        try:
            return flags.FLAGS(rest)
        except flags.Error as error:
            raise ValueError(str(error).replace("\n", " ").strip()) from None


def _joined(words: list[str]) -> list[str]:
    """The words, values of the config in the same ones as their flags."""
    found: list[str] = []
    for word in words:
        open_ended = found and re.fullmatch(r"--?config[\w.]*", found[-1])
        if open_ended and not word.startswith("-"):
            found[-1] += f"={word}"
        else:
            found.append(word)
    return found


def _loaded(file: str) -> ConfigDict:
    path, _, argument = file.partition(":")
    if not Path(path).is_file():
        raise ValueError(f"`--config` must name a file; there is no {path!r}.")
    make = runpy.run_path(path).get("get_config")
    if make is None:
        raise ValueError(f"`--config`: {path} must define `get_config`.")
    return make(argument) if argument else make()


def _make(config: ConfigDict, groups: list[str]) -> None:
    """The groups are there, each in the one before."""
    for name in groups:
        if name not in config:
            config[name] = ConfigDict()
        config = config[name]
        if not isinstance(config, ConfigDict):
            raise ValueError(f"`--config`: `{name}` is one setting, not a group of them.")
