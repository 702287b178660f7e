"""The identity of a run: the settings, model and data that must not change on resume."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from rwkv7_jax.json_files import flat_items
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.runs.resume.checksums import tree_checksum
from rwkv7_jax.runs.settings import Settings, as_config
from rwkv7_jax.runs.settings.readers import is_read, lies_in, unread_by_value
from rwkv7_jax.text.tokenizer import Tokenizer, text_digest

# Text values by name, in the groups "settings", "model" and "inputs".
Identity = Mapping[str, Mapping[str, str]]

# Settings, and groups of settings, that may change on resume.
MAY_CHANGE_ON_RESUME = (
    "steps",
    "log_every",
    "save_every",
    "keep",
    "keep_every",
    "keep_best",
    "stop_after_bad",
    "mesh",
    "allow_nan",
    "any_base",
    "profile_steps",
    "trackers",
    "evaluation",
    "sample",
    "workdir",
    "backup",
)


# Settings that are paths, with the input that holds the digest of their content. If the digests are
# equal, the paths may differ: a run and its data may be moved.
_DIGEST_OF_PATH = {
    "init": "weights of init",
    "start": "start content",
    "data.path": "data",
    "data.vocabulary": "tokenizer",
    "data.evaluation": "evaluation content",
    "tuning.anchor_path": "anchor",
    "test_time.context": "context content",
    "test_time.guide": "guide content",
}

# The setting that names the texts of a stack of states.
_STATES = "tuning.states"

# The suffix in the name of a digest over bytes only. Older records have a digest without the
# suffix, which may depend on the path.
CONTENT = " content"


def _digest_of_path(setting: str) -> str | None:
    """Returns the input that holds the digest of a path's content; None if not a path."""
    # A folder with the texts of all states, or the text of one state.
    if setting == _STATES:
        return "data"
    if setting.startswith(f"{_STATES}."):
        return f"data {setting.removeprefix(_STATES + '.')}"
    return _DIGEST_OF_PATH.get(setting)


def json_digest(fields: Mapping[str, Any]) -> str:
    """Returns the digest, 32 hexadecimal digits, of fields that JSON can represent."""
    # Sorted, because the order of keys may change in a round-trip through JSON.
    return text_digest(json.dumps(fields, sort_keys=True))


def flat_settings(settings: Settings | Mapping[str, Any]) -> dict[str, str]:
    """Returns the settings that must not change on resume, by dotted names.

    Settings that the run does not read may change: an earlier version accepted them silently.
    """
    if isinstance(settings, Settings):
        settings = as_config(settings)
    defaults = Settings()
    mode = settings.get("mode", defaults.mode)
    at_test_time = settings.get("test_time")
    method = defaults.test_time.method
    if isinstance(at_test_time, Mapping):
        method = at_test_time.get("method", method)
    values = as_config(defaults)

    def value(name: str) -> Any:
        group, _, key = name.partition(".")
        given = settings.get(group)
        # The file of an earlier start may be damaged.
        own = given if isinstance(given, Mapping) else {}
        return {**values[group], **own}[key]

    unread: list[str] = []
    for names, _ in unread_by_value(mode, value):
        unread += names
    shared = {}
    for name, value in flat_items(settings):
        if value == {}:
            continue
        # MAY_CHANGE_ON_RESUME also names groups, such as "evaluation".
        group = name.split(".")[0]
        if group in MAY_CHANGE_ON_RESUME or lies_in(name, unread):
            continue
        if is_read(name, mode, method):
            shared[name] = _text(value)
    return shared


def all_settings(settings: Settings) -> dict[str, str]:
    """Returns all settings by dotted names, also those that may change on resume."""
    return {name: _text(value) for name, value in flat_items(as_config(settings))}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def identity_of(
    settings: Mapping[str, str],
    config: RWKV7Config,
    tokenizer: Tokenizer,
    *,
    frozen: Any,
    read: Mapping[str, str],
) -> dict[str, dict[str, str]]:
    """Returns the identity of a run: text values in groups, serialisable as JSON.

    Args:
        settings: the settings of the run, from `flat_settings`.
        config: the config of the model.
        tokenizer: the tokenizer of the data.
        frozen: weights that the run does not train; None if it trains all.
        read: digests of the data, by name.
    """
    # As text, so that values compare equal after a round-trip through JSON.
    model = {name: str(value) for name, value in dataclasses.asdict(config).items()}
    return {
        "settings": dict(settings),
        "model": model,
        "inputs": {
            "weights of init": "none" if frozen is None else tree_checksum(frozen),
            "tokenizer": f"{tokenizer.kind} {tokenizer.digest}",
            **read,
        },
    }


def places_of(text: str) -> list[str]:
    """Splits a setting's comma-separated paths, and expands `~` in each.

    Like the readers of paths, it takes a text that names a file for that file, even with commas.
    """
    whole = os.path.expanduser(text)
    if os.path.exists(whole):
        return [whole]
    return [os.path.expanduser(part) for part in text.split(",")]


def content_digests(paths: Mapping[str, str | None]) -> dict[str, str]:
    """Returns digests of the bytes of files and folders, by names that end in " content".

    Args:
        paths: one path or several, separated by commas, by name. A name has no digest if its path
            is absent or is not a file, such as the name of a task.
    """
    digests = {}
    for name, path in paths.items():
        files: list[Path] = []
        for part in places_of(path or ""):
            place = Path(part)
            # `os.path` takes a text that cannot be a path; `Path` raises.
            if part and os.path.isdir(place):
                files += sorted(item for item in place.rglob("*") if item.is_file())
            elif part and os.path.isfile(place):
                files.append(place)
        if not files:
            continue
        digest = hashlib.blake2b(digest_size=16)
        for file in files:
            with file.open("rb") as stream:
                one = hashlib.file_digest(stream, hashlib.blake2b).digest()
            digest.update(one)
        digests[name + CONTENT] = digest.hexdigest()
    return digests


def without_paths(settings: Mapping[str, str]) -> dict[str, str]:
    """Returns the settings that are not paths."""
    return {
        name: text for name, text in settings.items() if _digest_of_path(name) is None
    }


def path_settings(settings: Mapping[str, str]) -> dict[str, str]:
    """Returns the settings that are paths."""
    others = without_paths(settings)
    return {name: text for name, text in settings.items() if name not in others}


def require_same_identity(workdir: Path, was: Identity, now: Identity) -> None:
    """Checks that two identities belong to the same run.

    Args:
        workdir: the run directory, for the message.
        was: the identity in a checkpoint.
        now: the identity from the command.

    Raises:
        ValueError: they differ; the message has their `identity_differences`.
    """
    if found := identity_differences(was, now):
        raise _other_run(workdir, found)


def identity_differences(was: Identity, now: Identity) -> str:
    """Lists all differences in the first group that differs; "" if the run is the same.

    If a path differs but its content does not, the run is the same.

    Args:
        was: the identity in a checkpoint.
        now: the identity from the command, or in another checkpoint.
    """
    inputs_were = dict(was.get("inputs", {}))
    inputs_are = dict(now.get("inputs", {}))
    equal = set()
    for name, digest in inputs_are.items():
        # "none": the model is new or all weights are trained, so the weights have no digest.
        if digest != "none" and inputs_were.get(name) == digest:
            equal.add(name)
    for name in list(equal):
        if name.endswith(CONTENT):
            equal.add(name.removesuffix(CONTENT))
            inputs_were.pop(name.removesuffix(CONTENT), None)
    for group, fields in now.items():
        before = dict(was.get(group, {}))
        if group == "inputs":
            before = inputs_were
        if group == "settings":
            before = _without_equal_paths(before, fields, equal)
        if found := _differences(before, fields):
            return found
    return ""


def _without_equal_paths(
    before: Mapping[str, str], now: Mapping[str, str], equal: Collection[str]
) -> dict[str, str]:
    """Removes paths whose content is equal, or that name the same files.

    Args:
        before: the settings in a checkpoint.
        now: the settings of the command.
        equal: the names of the digests that agree.
    """
    kept = {}
    for name, text in before.items():
        digest = _digest_of_path(name)
        is_path = digest is not None
        if is_path and (digest in equal or _is_same_place(text, now.get(name))):
            continue
        kept[name] = text
    return kept


def _is_same_place(was: str | None, now: str | None) -> bool:
    """Returns whether two lists of paths resolve to the same files."""
    if not was or not now:
        return False
    places = []
    for text in (was, now):
        places.append([os.path.realpath(place) for place in places_of(text)])
    return places[0] == places[1]


def require_same_run(
    folder: Path, was: Mapping[str, str], now: Mapping[str, str]
) -> None:
    """Checks that two descriptions belong to the same run.

    Names that only one of them has are ignored, so that an older run can resume after a version
    has added a setting.

    Args:
        folder: the run directory, for the message.
        was: the description in the run directory.
        now: the description from the command.

    Raises:
        ValueError: they differ; the message lists every difference.
    """
    if found := _differences(was, now):
        raise _other_run(folder, found)


def _differences(was: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Lists the names whose texts differ, without those that only one side has."""
    changed = [name for name in now if name in was and was[name] != now[name]]
    return "; ".join(f"`{name}` is {was[name]}; got {now[name]}" for name in changed)


def _other_run(folder: Path, differences: str) -> ValueError:
    return ValueError(
        f"`{folder}` holds a run whose {differences}. "
        "Use another --workdir, or the original value to resume."
    )
