"""Settings, model and data that must be the same for a run to be resumed."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.runs.resume.checksums import tree_checksum
from rwkv7_jax.runs.settings import Settings, as_config
from rwkv7_jax.text.tokenizer import Tokenizer

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
    "allow_nan",
    "profile_steps",
    "trackers",
    "evaluation",
    "sample",
    "workdir",
)


def flat_settings(settings: Settings | Mapping[str, Any]) -> dict[str, str]:
    """Returns the settings that a continuation must share, by dotted names."""
    if isinstance(settings, Settings):
        settings = as_config(settings)
    shared = {}
    for name, text in _flatten(settings):
        # "evaluation" stands for all settings of its group.
        group = name.split(".")[0]
        if group not in MAY_CHANGE_ON_RESUME:
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
            "tokenizer": f"{tokenizer.name} {_vocabulary_digest(tokenizer)}",
            **read,
        },
    }


def _vocabulary_digest(tokenizer: Tokenizer) -> str:
    entries = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
    # Of the printed list and not of the bytes: the digest is in the checkpoints of older runs.
    return hashlib.blake2b(repr(entries).encode(), digest_size=16).hexdigest()


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
