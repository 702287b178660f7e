"""Which runs read a setting: the others refuse it, for it would silently do nothing there.

The kind of a run is its mode or, in mode "test_time", its method.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from rwkv7_jax.runs.settings.fields import shown

TEST_TIME = "test_time"

_WEIGHTS = ("pretrain", "observer")
_TEXT_STATES = ("state", "upscaled_state")
# The methods of mode "test_time".
_QUESTIONS = ("grpo", "expert", "distil")
_METHODS = (*_QUESTIONS, "context")
_STATES = (*_TEXT_STATES, *_METHODS)
_TEXT = (*_WEIGHTS, *_TEXT_STATES, "context")

# Which kinds of runs read a setting; one without an entry is read by all. The entry of a group is
# for all of its settings that have none of their own.
_READERS: dict[str, tuple[str, ...]] = {
    "start": _STATES,
    # Questions are lines of JSON, each read by itself.
    "data.on_bad": _TEXT,
    "data.packing": _TEXT,
    "data.order": _TEXT,
    "data.as_bytes": _TEXT,
    "data.encoding": _TEXT,
    # No leaf of a state decays, and none is a matrix for Muon.
    "optimizer.kind": _WEIGHTS,
    "optimizer.weight_decay": _WEIGHTS,
    "optimizer.l2wrap": ("pretrain", *_TEXT_STATES),
    "tuning": _STATES,
    "tuning.leaves": ("state", *_METHODS),
    "tuning.anchor": _TEXT_STATES,
    "tuning.anchor_path": _TEXT_STATES,
    "tuning.rates": _TEXT_STATES,
    "tuning.search_share": _TEXT_STATES,
    "tuning.states": _TEXT_STATES,
    "upscaling": ("upscaled_state",),
    # The observer's first proposal is fitted to as many rows.
    "upscaling.rows": ("upscaled_state", "observer"),
    "decorrelation": ("pretrain", *_STATES),
    "observer": ("observer",),
    "test_time": ("grpo",),
    "test_time.method": _METHODS,
    "test_time.verifier": _QUESTIONS,
    "test_time.group": ("grpo", "expert"),
    "test_time.tokens": _QUESTIONS,
    "test_time.temperature": _QUESTIONS,
    "test_time.stop": _QUESTIONS,
    "test_time.prompts": ("grpo", "expert"),
    "test_time.context": ("context",),
    "test_time.guide": ("distil",),
    "test_time.keep": ("distil",),
    "test_time.substitute": ("distil",),
    "test_time.hint": ("distil",),
    "test_time.traces": ("distil",),
    "test_time.chains": ("distil",),
    "test_time.at_once": ("distil",),
    "test_time.vote_margin": ("distil",),
}

# What eval.py alone reads, a program with the same settings.
_EVALUATION_ALONE = (
    "state",
    "questions",
    "tasks",
    "task_data",
    "shots",
    "limit",
    "bos",
    "workdir",
    "evaluation.prompt_tokens",
)


# How eval.py answers the files of `questions`, whatever the mode.
_READ_FOR_QUESTIONS = (
    "test_time.verifier",
    "test_time.tokens",
    "test_time.stop",
    "test_time.at_once",
)


class _Unread(NamedTuple):
    """Values of a setting under which others are not read.

    Attributes:
        setting: the name of the one that decides.
        holds: tells whether it has such a value.
        when: the end of the sentence that refuses the others.
        names: of the others.
    """

    setting: str
    holds: Callable[[Any], bool]
    when: str
    names: tuple[str, ...]


_UNREAD = (
    _Unread(
        "tuning.anchor",
        lambda anchor: anchor == 0,
        "`config.tuning.anchor` is 0",
        ("tuning.anchor_path",),
    ),
    _Unread(
        "test_time.guide",
        lambda guide: (guide or "").endswith(".jsonl"),
        "`config.test_time.guide` is a file of traces",
        (
            "test_time.hint",
            "test_time.substitute",
            "test_time.traces",
            "test_time.chains",
            "test_time.at_once",
            "test_time.vote_margin",
        ),
    ),
    _Unread(
        "test_time.keep",
        lambda keep: keep != "majority",
        '`config.test_time.keep` is not "majority"',
        ("test_time.vote_margin",),
    ),
    # The ratio that they clip is 1 in the first update.
    _Unread(
        "test_time.updates",
        lambda updates: updates == 1,
        "`config.test_time.updates` is 1",
        ("test_time.epsilon_low", "test_time.epsilon_high"),
    ),
)

# Numbers of the online rule, which whitening once does not follow.
_ONLINE = ("rate", "balance", "iterations", "average", "clip")

# Groups and the setting that switches them on, by the kind of the run.
_SWITCHES = {
    "pretrain": "optimizer.decorrelate",
    "state": "tuning.decorrelate",
    "upscaled_state": "tuning.decorrelate",
    TEST_TIME: "tuning.decorrelate",
}


def is_read(name: str, mode: str, method: str) -> bool:
    """Tells whether a run reads a setting.

    Args:
        name: of the setting, such as "tuning.anchor", or of one inside of it.
        mode: `config.mode`.
        method: `config.test_time.method`.
    """
    kind = method if mode == TEST_TIME else mode
    readers = _readers_of(name)
    return readers is None or kind in readers


def _readers_of(name: str) -> tuple[str, ...] | None:
    """Returns the kinds of runs that read a setting; None where all do."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        readers = _READERS.get(".".join(parts[:length]))
        if readers is not None:
            return readers
    return None


def refuse_unread_settings(settings: Any) -> None:
    """Raises if a setting is set that the run does not read; a value at its default never is.

    Args:
        settings: of the run, a `Settings`.

    Raises:
        ValueError: there is one; the message names it, and the mode or the method.
    """
    mode = settings.mode
    method = settings.test_time.method
    for name, value in _set_values(settings):
        if settings.questions and name in _READ_FOR_QUESTIONS:
            continue
        if not is_read(name, mode, method):
            where = _where(name, mode, method)
            raise ValueError(
                f"`config.{name}` must be left out {where}; got {shown(value)}."
            )
    for names, when in unread_by_value(mode, lambda name: _value(settings, name)):
        _refuse(settings, names, when)


def unread_by_value(
    mode: str, value: Callable[[str], Any]
) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yields settings that the values of others leave unread, and the end of a sentence on them.

    Args:
        mode: `config.mode`.
        value: from the name of a setting to its value.
    """
    for unread in _UNREAD:
        if unread.holds(value(unread.setting)):
            yield unread.names, unread.when
    switch = _SWITCHES.get(mode)
    if switch is None:
        return
    method = value(switch)
    when = f'`config.{switch}` is "{method}"'
    if method == "none":
        yield ("decorrelation",), when
    if method == "whiten":
        yield tuple(f"decorrelation.{one}" for one in _ONLINE), when


def _value(settings: Any, name: str) -> Any:
    """Returns the value of a setting by its dotted name."""
    for part in name.split("."):
        settings = getattr(settings, part)
    return settings


def refuse_settings_of_evaluation(settings: Any) -> None:
    """Raises if a setting is set that eval.py alone reads.

    Args:
        settings: of a run of train.py, a `Settings`.

    Raises:
        ValueError: there is one; the message names it.
    """
    _refuse(settings, _EVALUATION_ALONE, "train.py runs, since eval.py alone reads it")


def _refuse(settings: Any, names: tuple[str, ...], when: str) -> None:
    """Raises if one of these settings, or one inside of them, is set."""
    for name, value in _set_values(settings):
        if lies_in(name, names):
            raise ValueError(
                f"`config.{name}` must be left out where {when}; got {shown(value)}."
            )


def lies_in(name: str, groups: Iterable[str]) -> bool:
    """Tells whether a setting is one of these, or inside of one."""
    return any(name == group or name.startswith(f"{group}.") for group in groups)


def _where(name: str, mode: str, method: str) -> str:
    """Returns the end of the sentence: the mode has no such setting, or its method has not."""
    readers = _readers_of(name) or ()
    modes = dict.fromkeys(TEST_TIME if one in _METHODS else one for one in readers)
    if mode == TEST_TIME and mode in modes:
        return f"where `config.test_time.method` is {method!r}"
    listed = ", ".join(modes)
    return f"in mode {mode!r}, where it has no effect (modes that read it: {listed})"


def _set_values(settings: Any) -> Iterator[tuple[str, Any]]:
    """Returns the settings that are not at their defaults, by their dotted names."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            for name, found in _set_values(value):
                yield f"{field.name}.{name}", found
            continue
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if value != default:
            yield field.name, value
