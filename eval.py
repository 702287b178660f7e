"""Bits per byte, perplexity and loss by position of a model and its tuned state, side by side.

    python eval.py --config=configs/eval.py --config.init=model.pth --config.state=poet.pth \
        --config.data.path=poems.jsonl

Rows: the base model from its zero state; the tuned state, or several, with commas; and the base
after reading a prompt of the training text, of each size in config.evaluation.prompt_tokens (-1:
all the text that tuning could see, the prompt of equal information). The same rows on
config.evaluation.retention, other text, show the price.
"""

import dataclasses
import json
import sys
from pathlib import Path

from absl import app, logging
from ml_collections import config_flags

from rwkv7_jax import job, job_data, pictures
from rwkv7_jax.checkpoint import model_hash
from rwkv7_jax.evaluation import Score, score, state_after
from rwkv7_jax.settings import Settings, read_settings
from rwkv7_jax.state import RWKV7State, init_state
from rwkv7_jax.state_files import load_state
from rwkv7_jax.tokenizer import Tokenizer

_CONFIG = config_flags.DEFINE_config_file("config", lock_config=False, accept_new_attributes=True)


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
        stream = job_data.training_stream(settings, tokenizer)
        for size in settings.evaluation.prompt_tokens:
            prompt = stream[:] if size < 0 else stream[-size:]
            print(f"reading a prompt of {len(prompt):,} tokens", flush=True)
            rows[f"prompt {len(prompt):,}"] = state_after(model, params, prompt)
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


def evaluate(settings: Settings) -> None:
    """Measure every row on every text; print, and write to config.workdir where it is given."""
    model, params = job.load(settings)
    tokenizer = Tokenizer.for_vocabulary(model.config.vocab_size)
    rows = starts(settings, model, params, tokenizer)
    texts = {"new text": job_data.held_out(settings, tokenizer)}
    if settings.evaluation.retention:
        path = settings.evaluation.retention
        texts["own text"] = job_data.held_out(settings, tokenizer, path=path)
    report = {}
    for title, text in texts.items():
        scores = {
            name: score(model, params, start, text, tokenizer) for name, start in rows.items()
        }
        print(table(title, scores), flush=True)
        report[title] = scores
    if settings.workdir:
        folder = Path(settings.workdir)
        folder.mkdir(parents=True, exist_ok=True)
        plain = {t: {n: dataclasses.asdict(s) for n, s in r.items()} for t, r in report.items()}
        (folder / "eval.json").write_text(json.dumps(plain, indent=1) + "\n")
        if pictures.available():
            shown = {name: one.by_position for name, one in report["new text"].items()}
            pictures.by_position(folder / "by_position.png", shown)
        print(f"wrote {folder / 'eval.json'}")


def main(arguments: list[str]) -> None:
    """Read the flags; bad settings and bad data end in one line and exit code 2."""
    logging.set_verbosity(logging.ERROR)
    if len(arguments) > 1:
        sys.exit(f"eval.py: unknown argument {arguments[1]!r}.")
    try:
        evaluate(read_settings(_CONFIG.value.to_dict()))
    except (ValueError, TypeError, OSError) as error:
        print(f"eval.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    app.run(main)
