r"""Compares a model and its tuned states: bits per byte, perplexity and loss by position.

Every value has its standard error over windows or questions, and every row its difference from the
base, with the standard error over pairs.

    python eval.py --config=configs/eval.py --config.init=model.pth --config.state=poet.pth \
        --config.data.path=poems.jsonl

The rows are:

* the base model from its zero state;
* the tuned state, or several, separated by commas;
* the base after a prompt of the training text, one row for each size in
  config.evaluation.prompt_tokens. -1 is all the text that tuning could see: the prompt of equal
  information.

The same rows on other text, config.evaluation.retention, show what tuning costs there. For a
synthetic task ("task:steer"), in retention too, the accuracy is shown.

    python eval.py --config=configs/eval.py --config.init=model.pth --config.state=poet.pth \
        --config.tasks=gsm8k --config.task_data.gsm8k=train.jsonl,test.jsonl --config.limit=100

This runs tasks of lm-evaluation-harness (pip install 'rwkv7_jax[harness]'): a row for the base and
for each state, with the task's own metrics, bits per byte of the correct answers, and differences
from the base over pairs of answers to the same questions.

    python eval.py --config=configs/eval.py --config.init=model.pth --config.state=a.pth \
        --config.questions=test.jsonl --config.test_time.verifier=last_number

This answers the questions of your own files with greedy decoding and shows the accuracy. It
excludes questions on which a state was tuned, if the run's folder or config.data.path names them.
"""

import os
import signal

if __name__ == "__main__":
    # The imports take seconds. Until `main` handles it, Ctrl-C exits without a traceback.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rwkv7_jax.evaluation.task_scores import score_table, scores_as_json
from rwkv7_jax.evaluation.text_scores import answer_table, rows_as_json, text_table
from rwkv7_jax.json_files import write_json
from rwkv7_jax.local_paths import check_target
from rwkv7_jax.reports import plots
from rwkv7_jax.runs import compilation_cache, config_flags, process
from rwkv7_jax.runs.comparison import Comparison, load_comparison, read_held_out
from rwkv7_jax.runs.datasets import training_stream
from rwkv7_jax.runs.devices import check_devices
from rwkv7_jax.runs.exit_codes import warn
from rwkv7_jax.runs.monitoring.progress_bar import count_progress
from rwkv7_jax.runs.monitoring.run_plots import warn_if_not_drawn
from rwkv7_jax.runs.question_answers import AskedQuestions
from rwkv7_jax.runs.replaced_inputs import refuse_replaced_inputs
from rwkv7_jax.runs.settings import Settings, read_settings
from rwkv7_jax.runs.settings.readers import refuse_settings_without_effect
from rwkv7_jax.runs.waiting import report_wait

# The output files in `config.workdir`, apart from the descriptions of tasks.
_OUTPUTS = ("eval.json", "by_position.png", "questions.json", "tasks.json")

# Eight windows of text, or eight contexts of tasks, are read at a time.
_LESS_MEMORY = (
    "lower `config.evaluation.length` (texts), `config.shots` (tasks) or "
    "`config.test_time.at_once` (questions), set "
    '`config.model.dtype` to "bfloat16" or `config.model.weights` to "int8"'
)


def evaluate(settings: Settings) -> None:
    """Measures and prints every row, and writes to config.workdir if it is set.

    The settings select texts, questions from files and tasks of the harness.
    """
    workdir = None if settings.workdir is None else Path(settings.workdir)
    if workdir is not None:
        # Fails before the work if the folder cannot be created.
        check_target(workdir / "eval.json", "`config.workdir`")
        outputs = [workdir / name for name in _OUTPUTS]
        refuse_replaced_inputs(outputs, settings, "`config.workdir`")
        workdir.mkdir(parents=True, exist_ok=True)
    comparison = load_comparison(settings)
    with task_folder(workdir) as folder:
        # Opens everything before measuring, so that a wrong name fails early.
        tasks = None
        if settings.tasks:
            # Optional: the harness extra, which takes seconds to import.
            from rwkv7_jax.evaluation.harness_tasks import load_tasks

            tasks = load_tasks(settings.task_names, settings.task_files, folder)
            models = task_models(settings, comparison)
        questions = None
        if settings.questions:
            questions = AskedQuestions.read(settings, comparison.tokenizer)
        if settings.data.path or (tasks is None and questions is None):
            evaluate_texts(settings, comparison, workdir)
        if questions is not None:
            evaluate_questions(questions, comparison, workdir)
        if tasks is not None:
            evaluate_tasks(settings, tasks, models, workdir)


def evaluate_questions(
    questions: AskedQuestions, comparison: Comparison, workdir: Path | None
) -> None:
    """Answers the questions from every start state and prints the accuracies.

    Args:
        questions: from files.
        comparison: the start states; the first is the base.
        workdir: for `questions.json`; None to write nothing.
    """
    title = "questions"
    for note in questions.notes:
        print(note, flush=True)
    report = questions.as_json()
    scores: dict[str, Any] = {}
    for name, start in comparison.starts.items():
        print(f"{name}: answering", flush=True)
        with count_progress(name, title) as report_progress:
            answers = questions.answer(comparison, start, on_progress=report_progress)
        scores[name] = {title: answers}
        report["rows"] = scores_as_json(scores)[title]
        # Written after each row, to keep it if a later one fails.
        if workdir is not None:
            write_json(workdir / "questions.json", report)
    print(score_table(title, scores), flush=True)
    if workdir is not None:
        print(f"wrote {workdir / 'questions.json'}")


def task_models(settings: Settings, comparison: Comparison) -> dict[str, Any]:
    """Makes a model of the harness for each row."""
    from rwkv7_jax.evaluation.harness import StateLM

    models = {}
    for name, start in comparison.starts.items():
        models[name] = StateLM(
            comparison.model,
            comparison.params,
            comparison.tokenizer,
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
        tasks: from `load_tasks`.
        models: by the rows' names; the first is the base.
        workdir: for `tasks.json`; None to write nothing.
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
        with count_progress(name, "requests") as lm.on_progress:
            scores[name] = measure(
                lm, tasks, shots=settings.shots, limit=settings.limit
            )
        report["split_pairs"][name] = lm.split_pairs
        report["tasks"] = scores_as_json(scores)
        # Written after each row, to keep it if a later one fails.
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
    """Returns the folder for task descriptions: in the workdir, or a temporary one."""
    if workdir is not None:
        yield workdir / "tasks"
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def evaluate_texts(
    settings: Settings, comparison: Comparison, workdir: Path | None
) -> None:
    """Measures and prints every row on every text."""
    tokenizer = comparison.tokenizer
    # Reads everything before measuring, so that a wrong name fails early.
    texts = read_held_out(settings, tokenizer)
    sizes = settings.evaluation.prompt_tokens
    if sizes:
        seen = training_stream(settings, tokenizer)
        comparison = comparison.with_prompts(seen[:], sizes)
    report: dict[str, Any] = {}
    for title, text in texts.items():
        report[title] = comparison.measure(text)
        table = answer_table if text.is_task else text_table
        shown = table(title, report[title])
        # Written before printing, which may fail.
        if workdir is not None:
            write_report(workdir, report)
        print(shown, flush=True)
    if workdir is not None:
        print(f"wrote {workdir / 'eval.json'}")


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Writes the tables as `eval.json` and draws the loss by position."""
    folder.mkdir(parents=True, exist_ok=True)
    tables = {title: rows_as_json(rows) for title, rows in report.items()}
    write_json(folder / "eval.json", tables)
    # Answers of a task have no loss by position.
    if "new text" in report and plots.available():
        by_position = {
            name: row.by_position for name, row in report["new text"].items()
        }
        with warn_if_not_drawn("the loss by position", warn):
            plots.by_position(folder / "by_position.png", by_position)


def main(arguments: list[str]) -> None:
    """Reads the flags and evaluates; bad settings or data end with one line and exit code 2."""
    with process.program("eval.py", less_memory=_LESS_MEMORY):
        if len(arguments) > 1:
            raise ValueError(f"unknown argument {arguments[1]!r}.")
        settings = read_settings(config_flags.config_values())
        refuse_settings_without_effect(settings)
        check_devices()
        compilation_cache.enable_compilation_cache(compilation_cache.user_folder())
        with report_wait("the evaluation"):
            evaluate(settings)


if __name__ == "__main__":
    config_flags.run("eval.py", main)
