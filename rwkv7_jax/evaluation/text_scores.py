"""Tables of `Score` and `Answers` for several start states, as text and as JSON."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from rwkv7_jax.evaluation.scoring import Answers, Score


def text_table(title: str, scores: Mapping[str, Score]) -> str:
    """Formats how well a text is predicted: a line a row, changes in percent of the first.

    Args:
        title: of the text.
        scores: by the rows' names; the first is the base.
    """
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


def answer_table(title: str, answers: Mapping[str, Answers]) -> str:
    """Formats how a task's questions are answered: a line a row.

    Args:
        title: of the task.
        answers: by the rows' names.
    """
    lines = [f"{title:<16}{'accuracy':>10}{'all right':>11}{'nats':>9}"]
    for name, row in answers.items():
        lines.append(
            f"{name:<16}{row.accuracy:>10.4f}{row.exact:>11.4f}{row.nats:>9.3f}"
        )
    return "\n".join(lines)


def rows_as_json(rows: Mapping[str, Score | Answers]) -> dict[str, dict[str, Any]]:
    """Converts a table to what JSON can hold, by row and field; NaN becomes None."""
    return {name: _without_nan(dataclasses.asdict(row)) for name, row in rows.items()}


def _without_nan(value: Any) -> Any:
    """Replaces NaN by None at any depth, and arrays by lists."""
    if isinstance(value, dict):
        return {name: _without_nan(item) for name, item in value.items()}
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and np.isnan(value) else value
