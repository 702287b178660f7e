"""`rwkv7 state doctor`: diagnoses a tuned state and gives advice."""

import argparse
import itertools
from collections.abc import Iterable

import numpy as np

from rwkv7_jax.cli.arguments import (
    MOST_ROWS,
    MOST_TOKENS,
    file_target,
    integer,
    number,
    path,
    refuse_inputs,
)
from rwkv7_jax.cli.inputs import (
    MODEL_HELP,
    add_any_base_option,
    add_vocabulary_option,
    read_model,
)
from rwkv7_jax.cli.tables import format_heads, format_table
from rwkv7_jax.data.batch import Batch
from rwkv7_jax.data.loading import token_stream, windows
from rwkv7_jax.data.sources import TaskSource, parse_source
from rwkv7_jax.data.tasks.synthetic_tasks import task_batch
from rwkv7_jax.evaluation.advice import Diagnosis, RetentionScore
from rwkv7_jax.evaluation.state_diagnosis import diagnose
from rwkv7_jax.reports import plots
from rwkv7_jax.text.tokenizer import Tokenizer

_TEXT_HELP = "a file, a folder, a built-in text, or task:NAME"


def add_doctor_command(subparsers) -> None:
    """Adds the parser of `doctor` to those of `rwkv7 state`."""
    parser = subparsers.add_parser(
        "doctor", help="diagnose a state: its effect, its cost, and advice"
    )
    add = parser.add_argument
    add("state", type=path, help=".pth, .safetensors, .st or .state")
    add("--model", required=True, type=path, help=MODEL_HELP)
    add_any_base_option(parser)
    add("--data", required=True, help=f"text that it was tuned for: {_TEXT_HELP}")
    add("--generic", help=f"text on which the model should not change: {_TEXT_HELP}")
    add(
        "--length",
        type=integer(1, MOST_TOKENS),
        default=256,
        help="tokens per window (%(default)s)",
    )
    add(
        "--windows",
        type=integer(1, MOST_ROWS),
        default=16,
        help="windows of each text (%(default)s)",
    )
    add(
        "--held-out",
        type=number(0, 1),
        default=0.0,
        help="read only held-out documents: the run's held-out fraction",
    )
    add(
        "--seed",
        type=integer(0),
        default=0,
        help="the run's seed, which selects a task's facts",
    )
    add(
        "--picture",
        type=file_target,
        help="write a PNG of fading, loss by position and spectra",
    )
    add_vocabulary_option(parser, "the model's")
    parser.set_defaults(run=_doctor, computes=True)


def _doctor(options: argparse.Namespace) -> str:
    """Diagnoses a state and returns the report."""
    # Check before minutes of work.
    if options.picture and not plots.available():
        raise ValueError(
            "state doctor: `--picture` needs matplotlib (the extra `plot`)."
        )
    inputs: dict[str, Iterable[str]] = {
        "state": [options.state],
        "--model": [options.model],
    }
    for option in ("data", "generic"):
        text = getattr(options, option)
        if text is None:
            continue
        source = parse_source(text, _argument(option))
        if not str(source):
            raise ValueError(f"{_argument(option)} must name a text; got none.")
        if not isinstance(source, TaskSource):
            inputs[f"--{option}"] = source.paths
    refuse_inputs("state doctor: `--picture`", options.picture, inputs)
    if options.picture:
        plots.check_format(options.picture, "state doctor: `--picture`")
    model = read_model(options.model)
    state = model.load_state(options.state, any_base=options.any_base)
    tokenizer = model.tokenizer(options.vocabulary)
    batch = _batch(options, "data", tokenizer)
    generic = None
    if options.generic:
        generic = _batch(options, "generic", tokenizer)
    diagnosis = diagnose(model.module, model.params, state, batch, generic=generic)
    report = _report(options, diagnosis)
    if not options.picture:
        return report
    plots.diagnosis(options.picture, diagnosis)
    return f"{report}\nwrote {options.picture}"


def _argument(option: str) -> str:
    """Returns the name of an option for messages."""
    return f"state doctor: `--{option}`"


def _batch(options: argparse.Namespace, option: str, tokenizer: Tokenizer) -> Batch:
    """Reads windows of an option's text, or rows of its task."""
    source = parse_source(getattr(options, option), _argument(option))
    if isinstance(source, TaskSource):
        # Held-out examples of the run's facts, not those that it was tuned on.
        return task_batch(
            source.name,
            0,
            batch_size=options.windows,
            length=options.length,
            seed=options.seed,
            held_out=True,
        )
    # Without `--held-out`, all of the text is read, including what a run was tuned on.
    if options.held_out:
        stream = token_stream(
            source.paths,
            tokenizer,
            split="held_out",
            held_out=options.held_out,
        )
    else:
        stream = token_stream(source.paths, tokenizer)
    # A start state stands where a question begins, so no row may begin within one.
    packing = "documents" if stream.masked else "stream"
    return windows(stream, options.length, options.windows, packing=packing)


def _report(options: argparse.Namespace, diagnosis: Diagnosis) -> str:
    """Formats losses, memories head by head, losses by position, and advice."""
    rows = [_text_row(options.data, diagnosis.own)]
    if diagnosis.generic is not None:
        rows.append(_text_row(options.generic, diagnosis.generic))
    head = [
        "text",
        "base nats",
        "tuned nats",
        "base right",
        "tuned right",
        "KL",
        "tokens",
    ]
    parts = [format_table(head, rows)]
    for name, memory in diagnosis.memories.items():
        columns = {
            "norm": memory.norms,
            "rank": memory.rank,
            "read rank": memory.read_rank,
        }
        # The base model has no upscaled memory, so no typical norm.
        if memory.reference_norm is not None:
            columns["typical norm"] = memory.reference_norm
        title = "WKV state"
        if name != "wkv":
            title = f"upscaled memory ({memory.dynamics})"
        title = f"{title}, {memory.channels} channels per head"
        parts.append(f"{title}\n{format_heads(columns)}")
    parts.append(_positions(diagnosis))
    advice = [f"- {line}" for line in diagnosis.advice]
    parts.append("\n".join(advice or ["No advice."]))
    return "\n\n".join(parts)


def _text_row(name: str, score: RetentionScore) -> list[str]:
    """Formats the numbers of one text."""
    numbers = (
        score.base_nats,
        score.tuned_nats,
        score.base_accuracy,
        score.tuned_accuracy,
        score.divergence,
    )
    return [name, *(f"{number:.4f}" for number in numbers), f"{score.tokens:,}"]


def _positions(diagnosis: Diagnosis) -> str:
    """Formats losses, and how much of each memory is still read, by ranges of positions."""
    head = ["position", "base nats", "tuned nats"]
    for name in diagnosis.memories:
        head.append(f"{name} read")
    rows = []
    for start, stop in itertools.pairwise(_range_borders(len(diagnosis.counts))):
        part = slice(start, stop)
        # Weights are the numbers of targets that count at a position.
        count = diagnosis.counts[part]
        row = [str(start) if stop == start + 1 else f"{start}-{stop - 1}"]
        for nats in (diagnosis.base_nats, diagnosis.tuned_nats):
            # The loss is NaN at a position where no target counts; elsewhere NaN is the loss.
            total = np.where(count > 0, nats[part], 0.0) @ count
            row.append(f"{total / count.sum():.4f}" if count.any() else "-")
        for memory in diagnosis.memories.values():
            # All rows may end before a position.
            fading = memory.fading[part]
            fading = fading[np.isfinite(fading)]
            row.append(f"{fading.mean():.1%}" if len(fading) else "-")
        rows.append(row)
    lines = [format_table(head, rows)]
    for name, memory in diagnosis.memories.items():
        place = "nowhere" if memory.faded is None else f"at position {memory.faded}"
        lines.append(f"{name}: below 10 % of the first read {place}")
    return "\n".join(lines)


def _range_borders(length: int) -> list[int]:
    """Returns the borders of ranges that double in size: a state fades by factors."""
    borders = [0]
    border = 1
    while border < length:
        borders.append(border)
        border *= 2
    borders.append(length)
    return borders
