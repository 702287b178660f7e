"""Compares a model and its tuned states: bits per byte, perplexity and loss by position.

    python eval.py --config=configs/eval.py --config.init=model.pth --config.state=poet.pth \
        --config.data.path=poems.jsonl

Rows: the base model from its zero state; the tuned state, or several, separated by commas; and the
base after it has read a prompt of the training text, one row for each size in
config.evaluation.prompt_tokens (-1: all the text that tuning could see, the prompt of equal
information). The same rows on config.evaluation.retention, other text, show what tuning costs
there. Of a synthetic task ("task:steer") the share of right answers is shown, also of each task
that retention names.

    python eval.py --config=configs/eval.py --config.init=model.pth --config.state=poet.pth \
        --config.tasks=gsm8k --config.task_data.gsm8k=train.jsonl,test.jsonl --config.limit=100

Tasks of lm-evaluation-harness (pip install 'rwkv7_jax[harness]'): a row for the base and for each
state, bits per byte of the right answers besides the task's own metrics, and differences from the
base over pairs of answers to the same questions.
"""

import os
import signal

if __name__ == "__main__":
    # The imports take seconds. Until `main` listens, Ctrl-C ends the program without a traceback.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rwkv7_jax.array_types import Params
from rwkv7_jax.atomic_write import atomic_write
from rwkv7_jax.checkpoints.model_files import model_hash
from rwkv7_jax.checkpoints.state_files import load_state
from rwkv7_jax.data.batch import Batch
from rwkv7_jax.data.sources import TaskSource, parse_source, parse_sources
from rwkv7_jax.evaluation.scoring import Answers, Score, score, score_answers
from rwkv7_jax.evaluation.task_scores import score_table, scores_as_json
from rwkv7_jax.generation.prefill import prefill_state
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import RWKV7State, init_state
from rwkv7_jax.reports import plots
from rwkv7_jax.runs import compilation_cache, config_flags, process
from rwkv7_jax.runs.datasets import held_out, held_out_source, training_stream
from rwkv7_jax.runs.modes.model_setup import load_or_init, tokenizer_of
from rwkv7_jax.runs.settings import Settings, read_settings
from rwkv7_jax.text.tokenizer import Tokenizer

# Of texts eight windows are read at a time, of tasks eight contexts.
_LESS_MEMORY = (
    "lower `config.evaluation.length` (texts) or `config.shots` (tasks), set "
    '`config.model.dtype` to "bfloat16" or `config.model.weights` to "int8"'
)


@dataclasses.dataclass(frozen=True)
class Compared:
    """A model with the start states that are compared.

    Attributes:
        model: the shell around `params`.
        params: all weights.
        tokenizer: of the model's vocabulary.
        rows: start states by the names of their rows; the first is the base.
    """

    model: RWKV7
    params: Params
    tokenizer: Tokenizer
    rows: dict[str, RWKV7State]


def tuned_states(
    paths: list[str], model: RWKV7, params: Params, *, any_base: bool
) -> dict[str, RWKV7State]:
    """Loads the tuned states, by the names of their rows."""
    rows: dict[str, RWKV7State] = {}
    if not paths:
        return rows
    # By it, `load_state` refuses states that were tuned on other weights.
    base_model = model_hash(params, model.config)
    for path in paths:
        state = load_state(
            path,
            config=model.config,
            base_model=base_model,
            any_base=any_base,
        )
        label = "tuned state" if state.upscaled is None else "upscaled state"
        # Of several states of a kind, all but the first are named by their files.
        rows[path if label in rows else label] = state
    return rows


def prompt_states(
    text: np.ndarray, sizes: tuple[int, ...], model: RWKV7, params: Params
) -> dict[str, RWKV7State]:
    """Reads the end of the text as prompts of several sizes; -1 reads all of it."""
    rows: dict[str, RWKV7State] = {}
    for size in sizes:
        prompt = text if size < 0 else text[-size:]
        print(f"reading a prompt of {len(prompt):,} tokens", flush=True)
        rows[f"prompt {len(prompt):,}"] = prefill_state(model, params, prompt)
    return rows


def subjects(data_path: str, retention: str) -> dict[str, str | None]:
    """Lists what the rows are measured on: paths by title, None for the run's own data."""
    own_is_task = isinstance(parse_source(data_path, "`config.data.path`"), TaskSource)
    paths: dict[str, str | None] = {"new task" if own_is_task else "new text": None}
    tasks, texts = parse_sources(retention, "`config.evaluation.retention`")
    for task in tasks:
        paths[task.name] = str(task)
    if texts.paths:
        paths["own text"] = str(texts)
    return paths


def text_table(title: str, scores: Mapping[str, Score]) -> str:
    """Formats the scores as lines; percentages are against the first row."""
    base = next(iter(scores.values()))
    head = f"{title:<16}{'bits/byte':>10}{'change':>9}{'perplexity':>12}"
    for first, end, _ in base.by_position:
        head += f"{f'{first}-{end - 1}':>10}"
    lines = [head]
    for name, row in scores.items():
        # A base that is certain of everything leaves nothing to compare with.
        change = row.bits_per_byte / (base.bits_per_byte or np.nan) - 1
        line = f"{name:<16}{row.bits_per_byte:>10.4f}{change:>+9.1%}{row.perplexity:>12.3f}"
        for _, _, value in row.by_position:
            line += f"{value:>10.3f}"
        lines.append(line)
    lines.append(f"{'':16}{base.tokens:,} tokens, +-{base.standard_error:.3f}")
    return "\n".join(lines)


def task_table(title: str, answers: Mapping[str, Answers]) -> str:
    """Formats the answers as lines."""
    lines = [f"{title:<16}{'accuracy':>10}{'all right':>11}{'nats':>9}"]
    for name, row in answers.items():
        lines.append(
            f"{name:<16}{row.accuracy:>10.4f}{row.exact:>11.4f}{row.nats:>9.3f}"
        )
    return "\n".join(lines)


def as_json(
    scores: Mapping[str, Score] | Mapping[str, Answers],
) -> dict[str, dict[str, Any]]:
    """Converts the rows of a table to what JSON can hold."""
    rows: dict[str, dict[str, Any]] = {}
    for name, row in scores.items():
        fields = dataclasses.asdict(row)
        places = fields["by_position"]
        if isinstance(places, np.ndarray):
            fields["by_position"] = places.tolist()
        rows[name] = without_nan(fields)
    return rows


def without_nan(value: Any) -> Any:
    """Replaces NaN by None at any depth: JSON has no NaN."""
    if isinstance(value, dict):
        return {name: without_nan(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and np.isnan(value) else value


def evaluate(settings: Settings) -> None:
    """Measures and prints every row, and writes to config.workdir if it is given.

    Rows are measured on the run's texts, on the harness's tasks, or on both where both are named.
    """
    workdir = None if settings.workdir is None else Path(settings.workdir)
    if workdir is not None:
        # Before the work: a folder that cannot be made should not cost an hour.
        workdir.mkdir(parents=True, exist_ok=True)
    model, params = load_or_init(
        settings.init,
        settings.model,
        seed=settings.seed,
        allow_nan=settings.allow_nan,
    )
    tokenizer = tokenizer_of(settings, model.config)
    rows = {"base": init_state(model.config)}
    rows |= tuned_states(
        settings.state_paths, model, params, any_base=settings.any_base
    )
    compared = Compared(model, params, tokenizer, rows)
    with task_folder(workdir) as folder:
        # All is opened before anything is measured: a slip in a name should not cost an hour.
        tasks = None
        if settings.tasks:
            tasks = open_tasks(settings, folder)
            models = task_models(settings, compared)
        if settings.data.path or tasks is None:
            evaluate_texts(settings, compared, workdir)
        if tasks is not None:
            evaluate_tasks(settings, tasks, models, workdir)


def open_tasks(settings: Settings, folder: Path) -> Any:
    """Loads the tasks of lm-evaluation-harness that the settings name."""
    # The package takes seconds to import, and many have it not.
    from rwkv7_jax.evaluation.harness_tasks import load_tasks

    return load_tasks(settings.task_names, settings.task_files, folder)


def task_models(settings: Settings, compared: Compared) -> dict[str, Any]:
    """Makes a model of the harness for each row."""
    from rwkv7_jax.evaluation.harness import StateLM

    models = {}
    for name, start in compared.rows.items():
        models[name] = StateLM(
            compared.model,
            compared.params,
            compared.tokenizer,
            start,
            bos=settings.bos,
        )
    return models


def evaluate_tasks(
    settings: Settings, tasks: Any, models: Mapping[str, Any], workdir: Path | None
) -> None:
    """Measures and prints every row on the tasks of lm-evaluation-harness.

    Args:
        settings: of the run.
        tasks: from `open_tasks`.
        models: by the rows' names; the first is the base.
        workdir: for `tasks.json`; None where nothing is written.
    """
    from rwkv7_jax.evaluation.harness_tasks import measure

    report: dict[str, Any] = {
        "bos": list(settings.bos),
        "shots": settings.shots,
        "limit": settings.limit,
        "split_pairs": {},
    }
    scores: dict[str, Any] = {}
    for name, lm in models.items():
        print(f"{name}: answering {settings.tasks}", flush=True)
        scores[name] = measure(lm, tasks, shots=settings.shots, limit=settings.limit)
        report["split_pairs"][name] = lm.split_pairs
        report["tasks"] = scores_as_json(scores)
        # After each row: a later one that fails must not cost it.
        if workdir is not None:
            write_json(workdir / "tasks.json", report)
    for task in next(iter(scores.values())):
        print(score_table(task, scores), flush=True)
    before = f"the ids {settings.bos}" if settings.bos else "nothing"
    print(f"between a state and a context: {before}")
    if workdir is not None:
        print(f"wrote {workdir / 'tasks.json'}")


@contextlib.contextmanager
def task_folder(workdir: Path | None) -> Iterator[Path]:
    """Returns the folder for descriptions of tasks: in the workdir, or one that is removed."""
    if workdir is not None:
        yield workdir / "tasks"
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def evaluate_texts(
    settings: Settings, compared: Compared, workdir: Path | None
) -> None:
    """Measures and prints every row on every text."""
    data = settings.data
    tokenizer = compared.tokenizer
    titles = subjects(data.path, settings.evaluation.retention)
    # All is read before anything is measured: a slip in the last name should not cost an hour.
    # Every row is measured on the same batch, so that differences are the states' own.
    batches = {}
    for title, path in titles.items():
        batches[title] = held_out(
            data, settings.evaluation, tokenizer, seed=settings.seed, path=path
        )
    sizes = settings.evaluation.prompt_tokens
    if sizes:
        text = training_stream(data, tokenizer, seed=settings.seed)[:]
        prompts = prompt_states(text, sizes, compared.model, compared.params)
        compared = dataclasses.replace(compared, rows=compared.rows | prompts)
    report: dict[str, Any] = {}
    for title, batch in batches.items():
        is_task = isinstance(held_out_source(data, titles[title]), TaskSource)
        scores = score_rows(compared, batch, is_task=is_task)
        table = task_table(title, scores) if is_task else text_table(title, scores)
        report[title] = scores
        # Written first: what is only shown must not cost a result.
        if workdir is not None:
            write_report(workdir, report)
        print(table, flush=True)
    if workdir is not None:
        print(f"wrote {workdir / 'eval.json'}")


def score_rows(compared: Compared, batch: Batch, *, is_task: bool) -> dict[str, Any]:
    """Measures every row on one batch: its answers to a task, or its loss on text."""
    model = compared.model
    params = compared.params
    scores: dict[str, Any] = {}
    for name, start in compared.rows.items():
        if is_task:
            scores[name] = score_answers(model, params, start, batch)
        else:
            scores[name] = score(model, params, start, batch, compared.tokenizer)
    return scores


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Writes the tables as `eval.json` and draws the loss by position."""
    folder.mkdir(parents=True, exist_ok=True)
    tables = {title: as_json(scores) for title, scores in report.items()}
    write_json(folder / "eval.json", tables)
    # Answers of a task have no loss by position.
    if "new text" in report and plots.available():
        by_position = {
            name: row.by_position for name, row in report["new text"].items()
        }
        plots.by_position(folder / "by_position.png", by_position)


def write_json(path: Path, value: Any) -> None:
    """Writes a value as JSON."""
    text = json.dumps(value, indent=1) + "\n"
    with atomic_write(path) as file:
        file.write(text.encode())


def main(arguments: list[str]) -> None:
    """Reads the flags and evaluates; bad settings and data end in one line and exit code 2."""
    with process.program("eval.py", less_memory=_LESS_MEMORY):
        if len(arguments) > 1:
            raise ValueError(f"unknown argument {arguments[1]!r}.")
        settings = read_settings(config_flags.config_values())
        compilation_cache.enable_compilation_cache(compilation_cache.user_folder())
        evaluate(settings)


if __name__ == "__main__":
    config_flags.run("eval.py", main)
