"""Which runs read a setting; the others reject it, because it would silently have no effect.

The kind of a run is its mode or, in mode "test_time", its method.
"""

import dataclasses
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from rwkv7_jax.data.sources import TASK_PREFIX
from rwkv7_jax.runs.settings.fields import shown
from rwkv7_jax.runs.settings.test_time import is_trace_file

TEST_TIME = "test_time"

_WEIGHTS = ("pretrain", "observer")
# The modes that tune a state on text.
TEXT_STATES = ("state", "upscaled_state")
# The methods of mode "test_time".
_QUESTIONS = ("grpo", "expert", "distil")
_METHODS = (*_QUESTIONS, "context")
_STATES = (*TEXT_STATES, *_METHODS)
_TEXT = (*_WEIGHTS, *TEXT_STATES, "context")

# How a guide writes traces, and which of them are kept.
_TRACES = (
    "test_time.keep",
    "test_time.substitute",
    "test_time.hint",
    "test_time.traces",
    "test_time.chains",
    "test_time.at_once",
    "test_time.vote_margin",
)

# The kinds of runs that read a setting. All runs read a setting without an entry. The entry of a
# group applies to its settings without an entry.
_READERS: dict[str, tuple[str, ...]] = {
    "start": _STATES,
    # Questions are always lines of JSON.
    "data.on_bad": _TEXT,
    "data.packing": _TEXT,
    "data.order": _TEXT,
    "data.as_bytes": _TEXT,
    "data.encoding": _TEXT,
    # A state has neither weight decay nor matrices for Muon.
    "optimizer.kind": _WEIGHTS,
    "optimizer.weight_decay": _WEIGHTS,
    "optimizer.l2wrap": ("pretrain", *TEXT_STATES),
    "optimizer.decorrelate": ("pretrain",),
    "tuning": _STATES,
    "tuning.leaves": ("state", *_METHODS),
    "tuning.anchor": TEXT_STATES,
    "tuning.anchor_path": TEXT_STATES,
    "tuning.rates": TEXT_STATES,
    "tuning.search_share": TEXT_STATES,
    "tuning.states": TEXT_STATES,
    "upscaling": ("upscaled_state",),
    # The observer's initial proposal, the teacher's mean state, is measured on these rows.
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
    **dict.fromkeys(_TRACES, ("distil",)),
}

# Settings that only eval.py reads.
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

# Settings that eval.py reads in every mode to answer the files of `questions`.
_READ_FOR_QUESTIONS = (
    "test_time.verifier",
    "test_time.tokens",
    "test_time.stop",
    "test_time.at_once",
)


# Settings of sample texts, which only prompts ask for.
_OF_SAMPLES = ("sample.tokens", "sample.temperature", "sample.top_p")

# Settings of how texts are read and split.
_OF_TEXTS = (
    "data.held_out",
    "data.on_bad",
    "data.packing",
    "data.order",
    "data.as_bytes",
    "data.encoding",
)

# Numbers of the online rule, which "whiten" does not use.
_ONLINE = ("rate", "balance", "iterations", "average", "clip")


def is_read(name: str, mode: str, method: str) -> bool:
    """Tells whether a run reads a setting.

    Args:
        name: name of a setting, such as "tuning.anchor", or of an entry inside it.
        mode: `config.mode`.
        method: `config.test_time.method`.
    """
    kind = method if mode == TEST_TIME else mode
    readers = _readers_of(name)
    return readers is None or kind in readers


def _readers_of(name: str) -> tuple[str, ...] | None:
    """Returns the kinds of runs that read a setting; None if all do."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        readers = _READERS.get(".".join(parts[:length]))
        if readers is not None:
            return readers
    return None


def refuse_unread_settings(settings: Any) -> None:
    """Raises if a setting that the run does not read differs from its default.

    Args:
        settings: `Settings` of the run.

    Raises:
        ValueError: there is such a setting; the message names it, and the mode or the method.
    """
    mode = settings.mode
    method = settings.test_time.method
    given = dict(_set_values(settings))
    if settings.questions:
        for name in _READ_FOR_QUESTIONS:
            given.pop(name, None)
    for name, value in given.items():
        if not is_read(name, mode, method):
            where = _where(name, mode, method)
            raise ValueError(
                f"`config.{name}` must be left out {where}; got {shown(value)}."
            )
    for names, when in unread_by_value(
        mode, lambda name: operator.attrgetter(name)(settings)
    ):
        _refuse(given, names, when)


def unread_by_value(
    mode: str, value: Callable[[str], Any]
) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yields settings that are not read because of another setting's value, and the condition.

    Args:
        mode: `config.mode`.
        value: maps the name of a setting in a group to its value.
    """
    if value("tuning.anchor") == 0:
        yield ("tuning.anchor_path",), "`config.tuning.anchor` is 0"
    if value("optimizer.learning_rate") is not None:
        names = ("tuning.rates", "tuning.search_share")
        yield names, "`config.optimizer.learning_rate` is set"
    if is_trace_file(value("test_time.guide")):
        names = ("test_time.temperature", *_TRACES)
        yield names, "`config.test_time.guide` is a file of traces"
    if value("test_time.keep") != "majority":
        yield ("test_time.vote_margin",), '`config.test_time.keep` is not "majority"'
    # In the first update the ratio is 1, so there is nothing to clip.
    if value("test_time.updates") == 1:
        names = ("test_time.epsilon_low", "test_time.epsilon_high")
        yield names, "`config.test_time.updates` is 1"
    switch = "tuning.decorrelate"
    if mode == "pretrain":
        switch = "optimizer.decorrelate"
    method = value(switch)
    when = f'`config.{switch}` is "{method}"'
    # An upscaled state is whitened when its features are calibrated.
    if method == "none" or (method == "whiten" and mode == "upscaled_state"):
        yield ("decorrelation",), when
    elif method == "whiten":
        yield tuple(f"decorrelation.{one}" for one in _ONLINE), when


def refuse_settings_of_evaluation(settings: Any) -> None:
    """Raises if a setting that only eval.py reads differs from its default.

    Args:
        settings: `Settings` of a run of train.py.

    Raises:
        ValueError: there is such a setting; the message names it.
    """
    when = "train.py runs, because only eval.py reads it"
    _refuse(dict(_set_values(settings)), _EVALUATION_ALONE, when)


def refuse_flags_without_effect(settings: Any, flags: Mapping[str, Any]) -> None:
    """Raises if the command line of train.py sets a setting that has no effect on the run.

    A config file may hold these settings: one file serves several methods and kinds of data.

    Args:
        settings: `Settings` of the run.
        flags: the settings on the command line, by dotted names.

    Raises:
        ValueError: there is such a setting; the message names it.
    """
    for names, when in _without_effect(settings):
        _refuse(flags, names, when)


def _without_effect(settings: Any) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yields settings that a run of train.py accepts but ignores, and the condition."""
    method = settings.test_time.method
    if settings.mode == TEST_TIME and method in _QUESTIONS:
        when = f"`config.test_time.method` is {method!r}"
        # The lengths of completions decide; only a plan needs a length.
        yield ("data.length",), when
        if method != "distil":
            yield ("data.batch_size",), when
        if not settings.evaluation.retention:
            yield (
                ("evaluation.length",),
                f"{when} and `config.evaluation.retention` is empty",
            )
    if settings.optimizer.schedule == "constant":
        names = ("optimizer.final_learning_rate",)
        yield names, '`config.optimizer.schedule` is "constant"'
    if not settings.sample.prompts:
        yield _OF_SAMPLES, "`config.sample.prompts` is empty"
    if _reads_only_tasks(settings):
        yield _OF_TEXTS, "all data are synthetic tasks"


def _reads_only_tasks(settings: Any) -> bool:
    """Tells whether the data of a run, if there are any, are generated by synthetic tasks."""
    states = settings.tuning.states or ""
    if isinstance(states, Mapping):
        states = ",".join(map(str, states.values()))
    data = settings.data
    anchor = settings.tuning.anchor_path
    retention = settings.evaluation.retention
    named = (data.path, data.evaluation, states, anchor, retention)
    # Not `parse_sources`: a name that is wrong is rejected where it is read.
    parts = ",".join(filter(None, named)).split(",")
    return all(part.strip().startswith(TASK_PREFIX) for part in parts)


def refuse_settings_without_effect(settings: Any) -> None:
    """Raises if eval.py has no tasks, questions or texts that a setting is for.

    Args:
        settings: `Settings` of a run of eval.py.

    Raises:
        ValueError: there is such a setting; the message names it.
    """
    given = dict(_set_values(settings))
    if not settings.tasks:
        _refuse(given, ("shots", "bos"), "`config.tasks` is empty")
    if not settings.tasks and not settings.questions:
        when = "`config.tasks` and `config.questions` are empty"
        _refuse(given, ("limit",), when)
    elif not settings.data.path:
        # Texts are measured only if they are named, next to tasks or questions.
        _refuse(given, ("evaluation.retention",), "`config.data.path` is empty")


def _refuse(given: Mapping[str, Any], names: tuple[str, ...], when: str) -> None:
    """Raises if one of these settings, or an entry inside one, is given."""
    for name, value in given.items():
        if lies_in(name, names):
            raise ValueError(
                f"`config.{name}` must be left out if {when}; got {shown(value)}."
            )


def lies_in(name: str, groups: Iterable[str]) -> bool:
    """Tells whether a setting is one of these, or inside one."""
    return any(name == group or name.startswith(f"{group}.") for group in groups)


def _where(name: str, mode: str, method: str) -> str:
    """Returns the condition under which a setting is not read, for the error message."""
    readers = _readers_of(name) or ()
    modes = dict.fromkeys(TEST_TIME if one in _METHODS else one for one in readers)
    if mode == TEST_TIME and mode in modes:
        return f"if `config.test_time.method` is {method!r}"
    listed = ", ".join(modes)
    return f"in mode {mode!r}, where it has no effect (modes that read it: {listed})"


def _set_values(settings: Any) -> Iterator[tuple[str, Any]]:
    """Yields the dotted names and values of settings that differ from their defaults."""
    defaults = type(settings)()
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            for name, found in _set_values(value):
                yield f"{field.name}.{name}", found
        elif value != getattr(defaults, field.name):
            yield field.name, value
