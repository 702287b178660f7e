"""Teacher completions on disk, keyed by prompt and sampling options."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from rwkv7_jax.test_time.traces import Ids, _ids, _objects


class CompletionCache:
    """Completions on disk, found by a key: each line is whole before the next prompt is drawn.

    They are kept as they were drawn, before anyone has judged them, so that neither a kill nor a
    judge that fails costs any.
    """

    def __init__(self, path: str | Path):
        """What the file holds; a last line that breaks off is cut away with a warning.

        Raises:
            ValueError: the folder does not exist, or a line is no entry.
        """
        self.path = Path(path)
        if not self.path.parent.is_dir():
            raise ValueError(f"CompletionCache: the folder of `{path}` does not exist.")
        self.path.touch()
        self._found: dict[str, list[Ids]] = {}
        for number, fields in _objects(self.path):
            if set(fields) != {"key", "prompt", "completions"}:
                raise ValueError(
                    f"{path}:{number}: an entry has key, prompt and completions; "
                    f"got {', '.join(fields) or 'none'}."
                )
            try:
                drawn = [_ids(ids, "completion") for ids in fields["completions"]]
                self._found[fields["key"]] = drawn
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path}:{number}: {error}") from None
        self._end_whole()

    def _end_whole(self) -> None:
        """The file ends with a line feed, so that a further line stands alone."""
        text = self.path.read_bytes()
        if not text or text.endswith(b"\n"):
            return
        start = text.rfind(b"\n") + 1
        try:
            json.loads(text[start:])
        except ValueError:
            os.truncate(self.path, start)
            return
        with self.path.open("ab") as file:
            file.write(b"\n")

    def get(self, key: str) -> list[Ids] | None:
        """The completions of `key`; None where there are none."""
        return self._found.get(key)

    def put(self, key: str, prompt: Sequence[int], completions: Sequence[Ids]) -> None:
        """The completions are on disk."""
        entry = {"key": key, "prompt": list(prompt), "completions": [list(c) for c in completions]}
        with self.path.open("ab") as file:
            file.write(json.dumps(entry).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._found[key] = list(completions)
