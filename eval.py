"""Bits per byte, perplexity and loss by position of a model and its tuned state, side by side.

    python eval.py --config=configs/eval.py --config.init=model.pth --config.state=poet.pth \
        --config.data.path=poems.jsonl

Rows: the base model from its zero state; the tuned state, or several, with commas; and the base
after reading a prompt of the training text, of each size in config.evaluation.prompt_tokens (-1:
all the text that tuning could see, the prompt of equal information). The same rows on
config.evaluation.retention, other text, show the price. Of a synthetic task ("task:steer") it is
the share of right answers that is shown, of each task that retention names, too.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np

from rwkv7_jax.checkpoints.model_files import model_hash
from rwkv7_jax.checkpoints.state_files import load_state
from rwkv7_jax.data.sources import TaskSource, parse_source, parse_sources
from rwkv7_jax.evaluation.scoring import Answers, Score, score, score_answers
from rwkv7_jax.generation.prefill import prefill_state
from rwkv7_jax.model.state import RWKV7State, init_state
from rwkv7_jax.reports import plots as pictures
from rwkv7_jax.runs import compilation_cache as compile_cache
from rwkv7_jax.runs import config_flags as command_line
from rwkv7_jax.runs import datasets as job_data
from rwkv7_jax.runs import process
from rwkv7_jax.runs.modes.base import load_or_init
from rwkv7_jax.runs.settings import Settings, read_settings
from rwkv7_jax.text.tokenizer import Tokenizer


def starts(settings: Settings, model, params, tokenizer: Tokenizer) -> dict[str, RWKV7State]:
    """The start states that are compared, by the names of their rows."""
    rows = {"base": init_state(model.config)}
    paths = [path for path in settings.state.split(",") if path]
    own = model_hash(params, model.config) if paths else ""
    for path in paths:
        state = load_state(path, config=model.config, base_model=own)
        label = "tuned state" if state.upscaled is None else "upscaled state"
        rows[path if label in rows else label] = state
    if settings.evaluation.prompt_tokens:
        stream = job_data.training_stream(settings.data, tokenizer, seed=settings.seed)
        for size in settings.evaluation.prompt_tokens:
            prompt = stream[:] if size < 0 else stream[-size:]
            print(f"reading a prompt of {len(prompt):,} tokens", flush=True)
            rows[f"prompt {len(prompt):,}"] = prefill_state(model, params, prompt)
    return rows


def table(title: str, scores: dict[str, Score]) -> str:
    """The scores as lines for a terminal; percentages are against the first row."""
    first = next(iter(scores.values()))
    ranges = [f"{a}-{b - 1}" for a, b, _ in first.by_position]
    head = f"{title:<16}{'bits/byte':>10}{'change':>9}{'perplexity':>12}"
    lines = [head + "".join(f"{name:>10}" for name in ranges)]
    for name, one in scores.items():
        change = one.bits_per_byte / first.bits_per_byte - 1
        line = f"{name:<16}{one.bits_per_byte:>10.4f}{change:>+9.1%}{one.perplexity:>12.3f}"
        lines.append(line + "".join(f"{value:>10.3f}" for *_, value in one.by_position))
    return "\n".join([*lines, f"{'':16}{first.tokens:,} tokens, +-{first.standard_error:.3f}"])


def task_table(title: str, found: dict[str, Answers]) -> str:
    """The answers as lines for a terminal."""
    lines = [f"{title:<16}{'accuracy':>10}{'all right':>11}{'nats':>9}"]
    for name, one in found.items():
        lines.append(f"{name:<16}{one.accuracy:>10.4f}{one.exact:>11.4f}{one.nats:>9.3f}")
    return "\n".join(lines)


def plain(scores: dict[str, Score | Answers]) -> dict[str, dict]:
    """The numbers of a table, fit for JSON."""
    found = {name: dataclasses.asdict(one) for name, one in scores.items()}
    for numbers in found.values():
        if isinstance(places := numbers["by_position"], np.ndarray):
            numbers["by_position"] = [None if np.isnan(x) else float(x) for x in places]
    return found


def subjects(settings: Settings) -> dict[str, str]:
    """What is measured, by its title: the run's own data (an empty path), then what shall stay."""
    tasks, texts = parse_sources(settings.evaluation.retention)
    is_task = isinstance(parse_source(settings.data.path), TaskSource)
    found = {"new task" if is_task else "new text": ""}
    for task in tasks:
        found[task.name] = str(task)
    if texts.paths:
        found["own text"] = str(texts)
    return found


def evaluate(settings: Settings) -> None:
    """Measure every row on every text; print, and write to config.workdir where it is given."""
    model, params = load_or_init(
        settings.init,
        settings.model,
        seed=settings.seed,
        allow_nan=settings.allow_nan,
    )
    tokenizer = Tokenizer.for_vocabulary(model.config.vocab_size)
    rows = starts(settings, model, params, tokenizer)
    report = {}
    for title, path in subjects(settings).items():
        batch = job_data.held_out(
            settings.data,
            settings.evaluation,
            tokenizer,
            seed=settings.seed,
            path=path,
        )
        if isinstance(job_data.held_out_source(settings.data, path), TaskSource):
            found = {
                name: score_answers(model, params, start, batch) for name, start in rows.items()
            }
            print(task_table(title, found), flush=True)
        else:
            found = {n: score(model, params, start, batch, tokenizer) for n, start in rows.items()}
            print(table(title, found), flush=True)
        report[title] = found
    if settings.workdir:
        folder = Path(settings.workdir)
        folder.mkdir(parents=True, exist_ok=True)
        numbers = {title: plain(found) for title, found in report.items()}
        (folder / "eval.json").write_text(json.dumps(numbers, indent=1) + "\n")
        if "new text" in report and pictures.available():
            shown = {name: one.by_position for name, one in report["new text"].items()}
            pictures.by_position(folder / "by_position.png", shown)
        print(f"wrote {folder / 'eval.json'}")


def main(arguments: list[str]) -> None:
    """Read the flags; bad settings and bad data end in one line and exit code 2."""
    with process.program("eval.py"):
        if len(arguments) > 1:
            raise ValueError(f"unknown argument {arguments[1]!r}.")
        settings = read_settings(command_line.config_values())
        compile_cache.enable_compilation_cache(compile_cache.user_folder())
        evaluate(settings)


if __name__ == "__main__":
    command_line.run("eval.py", main)
