"""What makes a run the run that it is, and how another one differs from it. Level 3."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .config import RWKV7Config
from .fingerprint import whole
from .settings import Settings
from .token_streams import TokenStream, data_hash
from .tokenizer import Tokenizer

# Settings that may differ between a run and its continuation.
FREE = (
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
    return {name: text for name, text in _flat(settings) if name.split(".")[0] not in FREE}


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
            "weights of init": "none" if frozen is None else whole(frozen),
            "tokenizer": f"{tokenizer.name} {vocabulary}",
            **read,
        },
    }


def digest_of(path: str, stream: TokenStream | None) -> str:
    """A digest of the ids that a run reads, or, where it reads none, of the file at `path`."""
    if stream is not None:
        return data_hash(stream)
    digest = hashlib.blake2b(path.encode(), digest_size=16)
    if Path(path).is_file():
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()


def refuse_other_run(folder: Path, was: Mapping[str, str], now: Mapping[str, str]) -> None:
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
