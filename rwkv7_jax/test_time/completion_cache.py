"""Teacher completions on disk, keyed by prompt and sampling options."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
            f"an entry has key, prompt and completions; got {', '.join(fields) or 'none'}."
        )
    if not isinstance(fields["key"], str):
        raise ValueError(f"`key` must be a string; got {fields['key']!r:.60}.")
    try:
        completions = [
            check_trace_ids(ids, "completion") for ids in fields["completions"]
        ]
    except TypeError as error:
        raise ValueError(str(error)) from None
    return fields["key"], completions


class CompletionCache:
    """Completions on disk, found by a key; each line is complete before the next prompt is drawn.

    They are kept as they were drawn, before a verifier or a vote, so that neither a kill nor a
    verifier that fails loses any.
    """

    def __init__(self, path: str | Path):
        """Reads the file, if there is one; a last line that breaks off is removed with a warning.

        Raises:
            ValueError: the folder does not exist, or a line is not an entry.
        """
        with prefix_errors("CompletionCache"):
            self.path = local_path(path, "`path`")
        if not self.path.parent.is_dir():
            raise ValueError(f"CompletionCache: the folder of `{path}` does not exist.")
        # A folder that cannot be written to is noticed before the first completion is drawn.
        self.path.touch()
        self._completions: dict[str, list[Ids]] = {}
        entries = read_jsonl(self.path, _entry, drop_torn_end=True, allow_nan=True)
        self._completions.update(entries)
        self._end_last_line()

    def _end_last_line(self) -> None:
        """Makes the file end with a line feed, so that the next entry gets a line of its own."""
        text = self.path.read_bytes()
        if not text or text.endswith(b"\n"):
            return
        start = text.rfind(b"\n") + 1
        try:
            parse_json(text[start:])
        except ValueError:
            # A killed writer left half an entry; its completions will be drawn again.
            os.truncate(self.path, start)
            return
        with self.path.open("ab") as file:
            file.write(b"\n")

    def get(self, key: str) -> list[Ids] | None:
        """Returns the completions of `key`; None where there are none."""
        return self._completions.get(key)

    def put(
        self,
        key: str,
        prompt: Sequence[int],
        completions: Sequence[Ids],
    ) -> None:
        """Appends completions; they are on disk when it returns."""
        entry = {
            "key": key,
            "prompt": list(prompt),
            "completions": [list(completion) for completion in completions],
        }
        with self.path.open("ab") as file:
            file.write(json.dumps(entry).encode() + b"\n")
            # Completions of a large teacher are expensive: they must survive a power cut.
            file.flush()
            os.fsync(file.fileno())
        self._completions[key] = list(completions)
