"""Settings, model and data that must be the same for a run to be resumed."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.runs.resume.checksums import tree_checksum
from rwkv7_jax.runs.settings import Settings, as_config
from rwkv7_jax.runs.settings.readers import is_read, lies_in, unread_by_value
from rwkv7_jax.text.tokenizer import Tokenizer, text_digest

# Texts by name, in the groups "settings", "model" and "inputs".
Identity = Mapping[str, Mapping[str, str]]

# Settings, and groups of them, that may differ between a run and its continuation.
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


# Settings that are paths, with the input whose digest says what lies there. Where the digests are
# equal, the path does not count: a run may be moved, and so may its data.
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

# Begins the names of the texts of a stack of states.
_STATES = "tuning.states"

# Ends the name of a digest of bytes alone. The digest without this ending is in older records; it
# may contain the path.
CONTENT = " content"


def _digest_of_path(setting: str) -> str | None:
    """Names the input whose digest says what lies at a path; None for other settings."""
    # All texts of a folder, or the one text of a state.
    if setting == _STATES:
        return "data"
    if setting.startswith(f"{_STATES}."):
        return f"data {setting.removeprefix(_STATES + '.')}"
    return _DIGEST_OF_PATH.get(setting)


def json_digest(fields: Mapping[str, Any]) -> str:
    """Returns 32 hexadecimal digits that change with the fields, which are fit for JSON."""
    # Sorted: JSON that was read back need not have the order in which it was written.
    return text_digest(json.dumps(fields, sort_keys=True))


def flat_settings(settings: Settings | Mapping[str, Any]) -> dict[str, str]:
    """Returns the settings that a continuation must share, by dotted names.

    Those that the run does not read may differ: an earlier version took them in silence.
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
        return {**values[group], **settings.get(group, {})}[key]

    unread: list[str] = []
    for names, _ in unread_by_value(mode, value):
        unread += names
    shared = {}
    for name, text in _flatten(settings):
        # "evaluation" stands for all settings of its group.
        group = name.split(".")[0]
        if group in MAY_CHANGE_ON_RESUME or lies_in(name, unread):
            continue
        if is_read(name, mode, method):
            shared[name] = text
    return shared


def _flatten(fields: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in fields.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value if isinstance(value, str) else json.dumps(value)


def identity_of(
    settings: Mapping[str, str],
    config: RWKV7Config,
    tokenizer: Tokenizer,
    *,
    frozen: Any,
    read: Mapping[str, str],
) -> dict[str, dict[str, str]]:
    """Describes a run by what a continuation must share, as texts in groups, fit for JSON.

    Args:
        settings: of the run, from `flat_settings`.
        config: of the model.
        tokenizer: of the data.
        frozen: weights that the run does not train; None if it trains all.
        read: digests of the data, by name.
    """
    # As text: numbers that went through JSON must compare equal to those that did not.
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


def content_digests(paths: Mapping[str, str | None]) -> dict[str, str]:
    """Hashes the bytes of files and folders, by names that end in " content".

    Args:
        paths: by name; several with commas. A name whose path is absent, or is no file, such as a
            task, has no digest.
    """
    digests = {}
    for name, path in paths.items():
        files: list[Path] = []
        for part in (path or "").split(","):
            place = Path(part).expanduser()
            if part and place.is_dir():
                files += sorted(item for item in place.rglob("*") if item.is_file())
            elif part and place.is_file():
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


def require_same_identity(workdir: Path, was: Identity, now: Identity) -> None:
    """Checks that two identities are of the same run; content counts, and not where it lies.

    Args:
        workdir: of the run, for the message.
        was: what a checkpoint says.
        now: what the command says.

    Raises:
        ValueError: they differ; the message has the differences of the first group that differs.
    """
    inputs_were = dict(was.get("inputs", {}))
    inputs_are = dict(now.get("inputs", {}))
    equal = set()
    for name, digest in inputs_are.items():
        # Where a model is new, or all weights are trained, there is no digest of weights.
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
        require_same_run(workdir, before, fields)


def _without_equal_paths(
    before: Mapping[str, str], now: Mapping[str, str], equal: Collection[str]
) -> dict[str, str]:
    """Leaves out settings that are paths of the same content, or other spellings of one path.

    Args:
        before: settings of a checkpoint.
        now: settings of the command.
        equal: names of the digests that agree.
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
    """Tells whether two lists of paths name the same files, in whatever spelling."""
    if not was or not now:
        return False
    places = []
    for text in (was, now):
        parts = text.split(",")
        places.append([os.path.realpath(os.path.expanduser(part)) for part in parts])
    return places[0] == places[1]


def require_same_run(
    folder: Path, was: Mapping[str, str], now: Mapping[str, str]
) -> None:
    """Checks that two descriptions are of the same run.

    Names that only one of them has do not count: a setting that is new in this version must not
    keep an older run from being resumed.

    Args:
        folder: of the run, for the message.
        was: what the folder says.
        now: what the command says.

    Raises:
        ValueError: they differ; the message has every difference.
    """
    changed = [name for name in now if name in was and was[name] != now[name]]
    if not changed:
        return
    differences = "; ".join(
        f"`{name}` is {was[name]}; got {now[name]}" for name in changed
    )
    raise ValueError(
        f"`{folder}` holds a run whose {differences}. "
        "Take another --workdir, or what it was to resume."
    )
