"""The command line of programs that take a config file: `--config=FILE[:ARGUMENT]`.

The file's `get_config` gives an `ml_collections.ConfigDict`, which `--config.GROUP.NAME=VALUE`
changes. Beyond this module settings are dataclasses.

The flags are defined by `config_flags.DEFINE_config_dict`, not by `DEFINE_config_file`, which would
read the file itself. That one was tried (ml_collections 1.1) and
* ends with a traceback where a group is set that the file does not mention, such as
  `--config.sample.tokens=3`; here the group is made;
* goes on with an error object in place of the config where there is no such file;
* takes `--config.data.length 64` (a space in place of "=") as `length = true`;
* reports errors of `get_config` over many lines, where users of this program get one.
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

# The file, in one word with its flag.
_CONFIG_FILE = re.compile(r"--?config=(.*)", re.DOTALL)

# The groups that a setting is in, such as "observer.model." of `--config.observer.model.width=8`.
_GROUPS = re.compile(r"--?(?:no)?config\.((?:\w+\.)+)\w+(?:=|$)")

# A flag of the config whose value is the next word, if that is no flag.
_FLAG_WITHOUT_VALUE = re.compile(r"--?config[\w.]*")


def run(program: str, main: Callable[[list[str]], None]) -> None:
    """Parses the flags, calls `main` with the words that are no flags, and ends the process.

    A flag that does not exist or has a value of another type ends it in one line, with exit code 2.

    Args:
        program: the name that messages begin with.
        main: the program.
    """
    app.run(main, flags_parser=functools.partial(_parse, program))


def config_values() -> dict[str, Any]:
    """Gives the values of the config file, as the command line changed them.

    Raises:
        ValueError: no config file was named.
    """
    if "config" not in flags.FLAGS:
        raise ValueError("`--config` must name a file, such as configs/quickstart.py.")
    config = flags.FLAGS["config"].value
    assert isinstance(config, ConfigDict)
    return config.to_dict()


def _parse(program: str, words: list[str]) -> list[str]:
    """Parses the flags and gives the words that are none."""
    with exit_with_code(program):
        files = []
        rest = []
        for word in _join_values(words):
            file = _CONFIG_FILE.fullmatch(word)
            if file:
                files.append(file[1])
            else:
                rest.append(word)
        # As with other flags, the last one counts.
        if files:
            _define_config(files[-1], rest)
        try:
            return flags.FLAGS(rest)
        except flags.Error as error:
            raise ValueError(str(error).replace("\n", " ").strip()) from None


def _define_config(file: str, words: list[str]) -> None:
    """Loads the config and defines a flag for each of its settings and of those in `words`."""
    config = _load_config(file)
    for word in words:
        groups = _GROUPS.match(word)
        if groups:
            _make_groups(config, groups[1].rstrip(".").split("."))
    # `sys_argv` are the words without `--config=FILE`, which this module reads itself.
    config_flags.DEFINE_config_dict(
        "config",
        config,
        flag_values=flags.FLAGS,
        lock_config=False,
        accept_new_attributes=True,
        sys_argv=words,
    )


def _join_values(words: list[str]) -> list[str]:
    """Joins flags of the config with values that are words of their own, by "="."""
    joined: list[str] = []
    for word in words:
        is_value = not word.startswith("-")
        if is_value and joined and _FLAG_WITHOUT_VALUE.fullmatch(joined[-1]):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def _load_config(file: str) -> ConfigDict:
    path, _, argument = file.partition(":")
    if not Path(path).is_file():
        raise ValueError(f"`--config` must name a file; there is no {path!r}.")
    get_config = runpy.run_path(path).get("get_config")
    if get_config is None:
        raise ValueError(f"`--config`: {path} must define `get_config`.")
    # A file whose `get_config` takes no argument stays callable without one.
    return get_config(argument) if argument else get_config()


def _make_groups(config: ConfigDict, names: list[str]) -> None:
    """Makes the groups that the config does not have, each in the one before."""
    group = config
    for name in names:
        if name not in group:
            group[name] = ConfigDict()
        inner = group[name]
        if not isinstance(inner, ConfigDict):
            raise ValueError(
                f"`--config`: `{name}` is one setting, not a group of them."
            )
        group = inner
