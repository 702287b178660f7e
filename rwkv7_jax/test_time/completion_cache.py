"""A cache of teacher completions on disk, keyed by prompt and sampling options."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rwkv7_jax.atomic_write import flush_to_disk
from rwkv7_jax.checks import prefix_errors
from rwkv7_jax.data.jsonl import read_jsonl
from rwkv7_jax.data.records.fields import check_object
from rwkv7_jax.json_files import parse_json
from rwkv7_jax.local_paths import local_path
from rwkv7_jax.test_time.traces import Ids, check_trace_ids


def _entry(record: Any) -> tuple[str, list[Ids]]:
    """Parses a line of the file: a key and its completions."""
    fields = check_object(record)
    if set(fields) != {"key", "prompt", "completions"}:
        raise ValueError(
            "an entry must have the fields key, prompt and completions; got "
            f"{', '.join(fields) or 'none'}."
        )
    if not isinstance(fields["key"], str):
        raise ValueError(f"`key` must be a string; got {fields['key']!r:.60}.")
    if not isinstance(fields["completions"], list) or not fields["completions"]:
        raise ValueError("`completions` must be a list of at least one completion.")
    try:
        completions = [
            check_trace_ids(ids, "completion") for ids in fields["completions"]
        ]
    except TypeError as error:
        raise ValueError(str(error)) from None
    return fields["key"], completions


class CompletionCache:
    """A file of completions by key; each line is complete before the next prompt is sampled.

    The file holds completions before a verifier or a vote filters them, so neither a kill nor a
    failing verifier loses any.
    """

    def __init__(self, path: str | Path):
        """Reads the file, if it exists; removes an incomplete last line with a warning.

        Raises:
            ValueError: the folder does not exist, or a line is not an entry.
        """
        with prefix_errors("CompletionCache"):
            self.path = local_path(path, "`path`")
        if not self.path.parent.is_dir():
            raise ValueError(f"CompletionCache: the folder of `{path}` does not exist.")
        # A read-only folder must fail before the first completion is sampled.
        self.path.touch()
        entries = read_jsonl(self.path, _entry, drop_torn_end=True, allow_nan=True)
        self._completions = dict(entries)
        self._end_last_line()

    def _end_last_line(self) -> None:
        """Makes the file end with a line feed, so that the next entry starts a new line."""
        text = self.path.read_bytes()
        if not text or text.endswith(b"\n"):
            return
        start = text.rfind(b"\n") + 1
        try:
            parse_json(text[start:])
        except ValueError:
            # A killed writer left an incomplete entry; its completions are sampled again.
            os.truncate(self.path, start)
            return
        with self.path.open("ab") as file:
            file.write(b"\n")

    def get(self, key: str) -> list[Ids] | None:
        """Returns the completions of `key`; None if there are none."""
        return self._completions.get(key)

    def put(
        self,
        key: str,
        prompt: Sequence[int],
        completions: Sequence[Ids],
    ) -> None:
        """Appends completions; they are on disk when the method returns."""
        entry = {
            "key": key,
            "prompt": list(prompt),
            "completions": [list(completion) for completion in completions],
        }
        with self.path.open("ab") as file:
            file.write(json.dumps(entry).encode() + b"\n")
            # Completions of a large teacher are expensive, so they must survive a power failure.
            flush_to_disk(file)
        self._completions[key] = list(completions)
