"""Loads tasks of lm-evaluation-harness, also from local files, and measures a model on them."""

import dataclasses
import difflib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rwkv7_jax.evaluation.harness import StateLM, split_pair
from rwkv7_jax.evaluation.task_scores import BITS_PER_BYTE, QuestionScores, pooled
from rwkv7_jax.json_files import parse_json

# The harness's default. A fixed seed gives every row of the table the same few-shot examples.
_SEED = 1234

# Suffixes of the files in the folder of a group of tasks.
_RECORD_SUFFIXES = (".json", ".jsonl")


@dataclasses.dataclass(frozen=True)
class LoadedTasks:
    """Tasks and groups of the harness.

    Attributes:
        manager: the harness's index of tasks.
        items: the loaded tasks and groups.
        tasks: the tasks by name, including those of groups.
    """

    manager: Any
    items: list[Any]
    tasks: dict[str, Any]


class _Answer(NamedTuple):
    """The log-probability of a correct answer, and its size in bytes."""

    value: float
    size: int


def load_tasks(
    names: Sequence[str],
    data: Mapping[str, Sequence[str]],
    folder: Path,
    *,
    manager: Any = None,
) -> LoadedTasks:
    """Loads tasks with their data.

    Args:
        names: tasks, groups or tags of the harness.
        data: local files by task: the test questions, or the training and the test questions. For
            a group: the folder with its tasks' test questions. The package datasets downloads, or
            has in its cache, the data of other tasks.
        folder: folder for the descriptions of tasks with local files.
        manager: a `TaskManager`; by default one of the harness's own tasks, which reads some
            thousand files.

    Raises:
        ValueError: a task does not exist, or its data cannot be read.
    """
    from lm_eval.tasks import TaskManager

    if manager is None:
        manager = TaskManager()
    for name in (*names, *data):
        if name not in manager.task_index:
            nearest = difflib.get_close_matches(name, manager.all_tasks, 1, 0.0)
            hint = f"; the nearest is {nearest[0]}" if nearest else ""
            raise ValueError(
                f"`config.tasks` must name tasks of lm-evaluation-harness; got {name!r}{hint}."
            )
    items: list[Any] = []
    tasks: dict[str, Any] = {}
    for name in names:
        spec = name
        if name in data:
            spec = _local_spec(folder, name, data[name], manager)
        loaded = _load(manager, spec, name)
        groups = loaded.get("groups", {})
        items += [groups[name]] if name in groups else list(loaded["tasks"].values())
        tasks |= loaded["tasks"]
    return LoadedTasks(manager, items, tasks)


def _load(manager: Any, spec: Any, name: str) -> Any:
    try:
        return manager.load(spec)
    # Loading runs code of the task and of the package datasets, which fails in many ways: no
    # network, a file that is not JSON, a column that a prompt names and the file lacks.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"`config.tasks`: {name} could not be loaded, {type(error).__name__}: {reason}. "
            f"To use local data, set config.task_data.{name}=train.jsonl,test.jsonl "
            "(for a group: a folder)"
        ) from error


def _local_spec(folder: Path, name: str, files: Sequence[str], manager: Any) -> Any:
    """Describes a task or a group of the harness with local data in place of its own.

    Raises:
        ValueError: the group contains groups, or a file does not exist.
    """
    argument = f"`config.task_data.{name}`"
    entry = manager.task_index[name]
    if name in manager.all_groups:
        return _local_group(folder, name, files, manager, argument)
    if name not in manager.all_subtasks or entry.yaml_path is None:
        raise ValueError(
            f"{argument} must belong to a task with a YAML description, or to a group of such "
            f"tasks; got {name}."
        )
    paths = _local_files(files, argument)
    settings = {
        "include": str(Path(entry.yaml_path).resolve()),
        "task": name,
        **_local_settings(folder, paths),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.yaml"
    # The harness reads YAML, of which JSON is a subset.
    path.write_text(json.dumps(settings, indent=1), encoding="utf-8")
    return str(path)


def _local_group(
    folder: Path, name: str, files: Sequence[str], manager: Any, argument: str
) -> dict[str, Any]:
    """Describes a group whose tasks' questions are in one local folder."""
    source = Path(files[0]).expanduser()
    if len(files) != 1 or not source.is_dir():
        raise ValueError(
            f"{argument} must be the folder with the files of the group {name}; got "
            f"{','.join(files)!r}."
        )
    parts = []
    for part in manager.task_index[name].cfg["task"]:
        file = _file_of_part(part, source, manager, argument)
        parts.append({"task": part, **_local_settings(folder, [file])})
    # The group's aggregation is left out: `measure` pools all questions.
    return {"group": name, "task": parts}


def _local_files(files: Sequence[str], argument: str) -> list[Path]:
    """Returns the paths of the training and test questions of a task, or of the test questions."""
    paths = []
    for file in files:
        path = Path(file).expanduser()
        if not path.is_file():
            raise ValueError(f"{argument} must name existing files; got {file!r}.")
        paths.append(path.resolve())
    if not 1 <= len(paths) <= 2:
        raise ValueError(
            f"{argument} must be train.jsonl,test.jsonl or test.jsonl; got {len(paths)} files."
        )
    return paths


def _file_of_part(part: Any, folder: Path, manager: Any, argument: str) -> Path:
    """Finds the file of one task of a group; its name is the task's subset of the data set.

    Raises:
        ValueError: the folder has no such file, or the part is itself a group.
    """
    if not isinstance(part, str) or part not in manager.all_subtasks:
        raise ValueError(
            f"{argument} must belong to a group that contains only tasks; got one that contains "
            f"the group {part!r}, whose tasks can be named instead."
        )
    name = manager.task_index[part].cfg.get("dataset_name") or part
    for suffix in _RECORD_SUFFIXES:
        path = folder / f"{name}{suffix}"
        if path.is_file():
            return path.resolve()
    raise ValueError(
        f"{argument} must have a file for each task of the group; `{folder}` has no {name}.json."
    )


def _local_settings(folder: Path, paths: Sequence[Path]) -> dict[str, Any]:
    """Returns the data settings of a task's description for local files.

    Args:
        folder: folder for the cache of the package datasets.
        paths: files of the training and test questions, or of the test questions only.
    """
    files = [str(path) for path in paths]
    splits = dict(zip(("test", "train"), reversed(files), strict=False))
    examples = "train" if "train" in splits else None
    reading: dict[str, Any] = {
        "data_files": splits,
        "cache_dir": str(folder.resolve() / "cache"),
    }
    if field := _field_of_records(paths[-1]):
        reading["field"] = field
    return {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": reading,
        "training_split": examples,
        "validation_split": None,
        "test_split": "test",
        "fewshot_split": examples or "test",
    }


def _field_of_records(path: Path) -> str | None:
    """Returns the key under which a .json file holds its records; None for a list or for lines.

    For instance, BIG-Bench Hard has "examples" next to its "canary".
    """
    if path.suffix != ".json":
        return None
    try:
        content = parse_json(path.read_bytes())
    # JSON lines, or not JSON at all: the package datasets reads or rejects the file.
    except ValueError:
        return None
    if not isinstance(content, dict):
        return None
    names = [
        name
        for name, value in content.items()
        if isinstance(value, list) and value and isinstance(value[0], dict)
    ]
    return names[0] if len(names) == 1 else None


def measure(
    lm: StateLM,
    loaded: LoadedTasks,
    *,
    shots: int | None = None,
    limit: int | None = None,
) -> dict[str, dict[str, QuestionScores]]:
    """Measures a model on tasks.

    Args:
        lm: the model with its start state.
        loaded: the result of `load_tasks`.
        shots: examples before each question; None for the task's own number. A task that sets 0
            keeps 0, as everywhere in the harness.
        limit: use only this many first questions of each task; None for all.

    Returns:
        Scores by task or group and by metric. The metrics are those of the harness that are means
        over questions, and bits per byte of the correct answers, or of the text. A group's scores
        are over all its questions.
    """
    from lm_eval.evaluator import simple_evaluate

    results: Any = simple_evaluate(
        model=lm,
        tasks=loaded.items,
        task_manager=loaded.manager,
        num_fewshot=shots,
        limit=limit,
        # The harness's bootstrapped errors are not used.
        bootstrap_iters=0,
        fewshot_random_seed=_SEED,
    )
    scores: dict[str, dict[str, QuestionScores]] = {}
    for name, task in loaded.tasks.items():
        samples = results["samples"][name]
        scores[name] = _own_metrics(samples, results["results"][name])
        bits = _bits_per_byte(lm, task, samples)
        if bits is not None:
            scores[name][BITS_PER_BYTE] = bits
    for item in loaded.items:
        # Only groups have this method.
        if hasattr(item, "get_all_tasks"):
            parts = [scores[task.task_name] for task in item.get_all_tasks()]
            scores[item.name] = _pool_parts(parts)
    return scores


def _pool_parts(
    parts: Sequence[Mapping[str, QuestionScores]],
) -> dict[str, QuestionScores]:
    """Joins the questions of a group's tasks, for the metrics that all of them have."""
    metrics = {}
    for metric in parts[0]:
        if all(metric in part for part in parts):
            metrics[metric] = pooled([part[metric] for part in parts])
    return metrics


def _own_metrics(
    samples: Sequence[Mapping[str, Any]], aggregated: Mapping[str, Any]
) -> dict[str, QuestionScores]:
    """Collects the task's metrics that are means over questions, by metric and filter."""
    columns: dict[str, list[Any]] = {}
    questions: dict[str, list[str]] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            name = f"{metric},{sample['filter']}"
            columns.setdefault(name, []).append(sample[metric])
            questions.setdefault(name, []).append(sample["prompt_hash"])
    metrics = {}
    for name, values in columns.items():
        # Metrics such as perplexity have a pair per question, or are not a mean of their values.
        if not all(isinstance(value, int | float | np.number) for value in values):
            continue
        totals = np.array(values, np.float64)
        scores = QuestionScores(totals, np.ones(len(totals)), tuple(questions[name]))
        if math.isclose(scores.value, aggregated.get(name, math.nan), abs_tol=1e-9):
            metrics[name.removesuffix(",none")] = scores
    return metrics


def _bits_per_byte(
    lm: StateLM, task: Any, samples: Sequence[Mapping[str, Any]]
) -> QuestionScores | None:
    """Measures the correct answers, or the texts; None if a question has no single answer."""
    # A sample repeats for each filter; filters change the extracted answer, not the question.
    first_filter = samples[0]["filter"]
    samples = [sample for sample in samples if sample["filter"] == first_filter]
    if task.OUTPUT_TYPE == "generate_until":
        answers = _generated_references(lm, task, samples)
    else:
        answers = [_scored_answer(task, sample) for sample in samples]
    totals = []
    weights = []
    for answer in answers or [None]:
        if answer is None or not answer.size:
            return None
        totals.append(-answer.value / math.log(2))
        weights.append(answer.size)
    questions = tuple(sample["prompt_hash"] for sample in samples)
    return QuestionScores(np.array(totals), np.array(weights, np.float64), questions)


def _scored_answer(task: Any, sample: Mapping[str, Any]) -> _Answer | None:
    """Returns the correct answer, or the text, from the harness's requests."""
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        # A task may count the bytes of the text before its markup was removed.
        if BITS_PER_BYTE in sample["metrics"]:
            return _Answer(*sample[BITS_PER_BYTE])
        return _Answer(sample["resps"][0][0], len(sample["arguments"][0][0].encode()))
    index = 0
    if task.OUTPUT_TYPE == "multiple_choice":
        # If the contexts differ and not the answer (WinoGrande), `doc_to_text` is the correct one.
        one_answer = getattr(task, "multiple_input", 0)
        gold = task.doc_to_text(sample["doc"]) if one_answer else sample["target"]
        choices = task.doc_to_choice(sample["doc"])
        if isinstance(gold, str) and gold in choices:
            gold = choices.index(gold)
        if not isinstance(gold, int) or not 0 <= gold < len(choices):
            return None
        index = gold
    value, _ = sample["resps"][index][0]
    return _Answer(value, _size_of(*sample["arguments"][index]))


def _size_of(context: str, continuation: str) -> int:
    """Counts the bytes that the score of a continuation covers."""
    _, scored = split_pair(context, continuation)
    return len(scored.encode())


def _generated_references(
    lm: StateLM, task: Any, samples: Sequence[Mapping[str, Any]]
) -> list[_Answer] | None:
    """Scores the reference answers of a generation task; None if they are not strings."""
    pairs = []
    for sample in samples:
        target = sample["target"]
        if not isinstance(target, str) or not target:
            return None
        context = sample["arguments"][0][0]
        pairs.append((context, task.config.target_delimiter + target))
    answers = []
    for pair, (value, _) in zip(pairs, lm.score_pairs(pairs), strict=True):
        answers.append(_Answer(value, _size_of(*pair)))
    return answers
