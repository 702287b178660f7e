"""What makes a run the run that it is, and how another one differs from it."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.runs.resume.checksums import tree_checksum
from rwkv7_jax.runs.settings import Settings
from rwkv7_jax.text.tokenizer import Tokenizer

# Settings that may differ between a run and its continuation.
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
    """The settings that a continuation must share, by dotted names."""
    if isinstance(settings, Settings):
        settings = dataclasses.asdict(settings)
    return {
        name: text
        for name, text in _flat(settings)
        if name.split(".")[0] not in MAY_CHANGE_ON_RESUME
    }


def _flat(fields: Mapping[str, Any], before: str = ""):
    for name, value in fields.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}.")
        else:
            yield before + name, value if isinstance(value, str) else json.dumps(value)


def identity_of(
    settings: Settings,
    config: RWKV7Config,
    tokenizer: Tokenizer,
    *,
    frozen: Any,
    read: Mapping[str, str],
) -> dict[str, dict[str, str]]:
    """What a run is, as flat texts in groups; can be JSON.

    Args:
        settings: of the run.
        config: of the model.
        tokenizer: of the data.
        frozen: weights that the run does not train; None where there are none.
        read: digests of what it reads, by name.
    """
    model = {name: str(value) for name, value in dataclasses.asdict(config).items()}
    entries = (tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size))
    vocabulary = hashlib.blake2b(repr(list(entries)).encode(), digest_size=16).hexdigest()
    return {
        "settings": flat_settings(settings),
        "model": model,
        "inputs": {
            "weights of init": "none" if frozen is None else tree_checksum(frozen),
            "tokenizer": f"{tokenizer.name} {vocabulary}",
            **read,
        },
    }


def require_same_run(folder: Path, was: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Return if both describe the same run.

    Raises:
        ValueError: they do not; the message has every difference. What only one of them knows does
            not count, so that new settings do not part a run from its past.
    """
    names = [name for name in now if name in was and was[name] != now[name]]
    if not names:
        return
    said = "; ".join(f"`{name}` is {was[name]}; got {now[name]}" for name in names)
    raise ValueError(
        f"`{folder}` holds a run whose {said}. Take another --workdir, or what it was to resume."
    )
