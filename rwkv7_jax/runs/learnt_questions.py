"""The questions that start states were tuned on, so that an evaluation can leave them out.

A run directory holds the run's settings next to its states. The settings name the data files and
their split, so the training questions can be computed again.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rwkv7_jax.data.documents import held_out_threshold
from rwkv7_jax.data.jsonl import read_jsonl
from rwkv7_jax.data.records.record import parse_record
from rwkv7_jax.data.sources import TextSource, parse_source
from rwkv7_jax.json_files import number_of, read_object
from rwkv7_jax.runs.modes.stack import state_sources
from rwkv7_jax.runs.run_folder import SETTINGS
from rwkv7_jax.runs.settings import Settings, as_config
from rwkv7_jax.test_time.questions import Prompt, QuestionSet, read_questions
from rwkv7_jax.text.tokenizer import Tokenizer


class TuningRecord(NamedTuple):
    """What a run was tuned on.

    Attributes:
        name: the name of the run directory or of the setting, for messages.
        state: the name of the state, if the run tuned several.
        values: the run's settings, as config files spell them.
    """

    name: str
    state: str
    values: Mapping[str, Any]

    @property
    def _asks_questions(self) -> bool:
        """Whether the run split its data as questions rather than as texts."""
        method = self.values["test_time"]["method"]
        return self.values["mode"] == "test_time" and method != "context"

    def learnt_prompts(self, tokenizer: Tokenizer) -> set[Prompt]:
        """Returns the prompts of the run's training questions.

        Raises:
            OSError, ValueError: a file cannot be read, does not hold questions, or is unknown.
        """
        if self._asks_questions:
            return self._prompts_by_questions(tokenizer)
        return self._prompts_by_texts(tokenizer)

    def _prompts_by_questions(self, tokenizer: Tokenizer) -> set[Prompt]:
        data = self.values["data"]
        with warnings.catch_warnings():
            # The run itself has already warned about the questions that it leaves out.
            warnings.simplefilter("ignore")
            questions = QuestionSet(
                data["path"],
                tokenizer,
                seed=self.values["seed"],
                held_out=data["held_out"],
                verifier=None,
                evaluation=data["evaluation"] or None,
            )
        return questions.training_prompts

    def _prompts_by_texts(self, tokenizer: Tokenizer) -> set[Prompt]:
        threshold = held_out_threshold(self.values["data"]["held_out"])
        learnt = set()
        for path in self._texts():
            hashes = read_jsonl(path, _content_hash)
            questions = read_questions(path, tokenizer)
            for (prompt, _), content_hash in zip(questions, hashes, strict=True):
                if content_hash >= threshold:
                    learnt.add(tuple(prompt))
        return learnt

    def _texts(self) -> tuple[str, ...]:
        """Returns the data files of the state; a synthetic task has none."""
        path = self.values["data"]["path"]
        if not path:
            sources = state_sources(self.values["tuning"]["states"])
            if self.state not in sources:
                raise ValueError(f"it names no text of the state {self.state}")
            path = sources[self.state]
        source = parse_source(path)
        return source.paths if isinstance(source, TextSource) else ()


def _content_hash(record: Any) -> int:
    return parse_record(record).content_hash()


def tuning_records(settings: Settings) -> dict[str, TuningRecord | None]:
    """Finds what each state was tuned on.

    If `config.data.path` is set, its data is one of the records, split as the settings say. A state
    outside a run directory is then assumed to be tuned on it.

    Args:
        settings: of eval.py.

    Returns:
        The records by the path of the state or the name of the setting. The record of a state
        outside a run directory is None, or absent if `config.data.path` is set.
    """
    records = {}
    for path in settings.state_paths:
        record = _record_of_state(Path(path))
        if record is not None or not settings.data.path:
            records[path] = record
    if settings.data.path:
        records["config.data.path"] = TuningRecord(
            "`config.data.path`", "", as_config(settings)
        )
    return records


def _record_of_state(path: Path) -> TuningRecord | None:
    """Reads the settings of the run that wrote a state; None outside a run directory."""
    # A run that tunes several states saves them in a folder inside the run directory.
    for folder in (path.parent, path.parent.parent):
        values = _read_settings(folder / SETTINGS)
        if values is not None:
            return TuningRecord(f"`{folder}`", path.stem, values)
    return None


def _read_settings(path: Path) -> dict[str, Any] | None:
    """Reads the settings of a run, with defaults for those that an older run lacks."""
    values = read_object(path)
    # Other programs also write files of this name.
    if values is None or not isinstance(values.get("data"), dict):
        return None
    defaults = as_config(Settings())
    groups = {}
    for group in ("data", "tuning", "test_time"):
        own = values.get(group, {})
        if not isinstance(own, dict):
            return None
        groups[group] = {**defaults[group], **own}
    values = {**defaults, **values, **groups}
    return values if _are_settings(values) else None


def _are_settings(values: Mapping[str, Any]) -> bool:
    """Returns whether the settings that this module reads have the types that runs write."""
    data = values["data"]
    states = values["tuning"]["states"]
    named = states.values() if isinstance(states, dict) else [states]
    texts = [data["path"], data["evaluation"] or "", values["mode"], *named]
    texts.append(values["test_time"]["method"])
    held_out = number_of(data["held_out"])
    is_share = held_out is not None and 0 <= held_out <= 1
    is_seed = type(values["seed"]) is int and values["seed"] >= 0
    return is_share and is_seed and all(isinstance(text, str) for text in texts)
