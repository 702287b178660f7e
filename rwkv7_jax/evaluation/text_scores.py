"""Formats `Score` and `Answers` of several start states as tables and as JSON."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from rwkv7_jax.evaluation.ratio import (
    Ratio,
    difference_as_json,
    estimate_columns,
    estimate_head,
    known,
)
from rwkv7_jax.evaluation.scoring import Answers, Score

# Least width of the column of row names.
_NAME_WIDTH = 16


def text_table(title: str, scores: Mapping[str, Score]) -> str:
    """Formats scores on a text: one line per row, with its change from the first.

    Args:
        title: title of the text.
        scores: scores by the names of the rows; the first is the base.
    """
    base = next(iter(scores.values()))
    width = _name_width(scores)
    head = (
        f"{title:<{width}}{estimate_head('bits/byte')}{'change':>8}{'perplexity':>11}"
    )
    for first, end, _ in base.by_position:
        head += _position_head(first, end)
    lines = [head]
    for name, row in scores.items():
        line = f"{name:<{width}}{estimate_columns(row.bits_per_byte, row, base)}"
        # A base of 0 bits per byte has no relative change.
        change = row.bits_per_byte / (base.bits_per_byte or np.nan) - 1
        line += f"{change:>+8.1%}{row.perplexity:>11.3f}"
        for first, end, value in row.by_position:
            line += f"{value:>{len(_position_head(first, end))}.3f}"
        lines.append(line)
    lines.append(f"{base.tokens:,} tokens, {_footnote(base.by_window, 'window')}")
    return "\n".join(lines)


def answer_table(title: str, answers: Mapping[str, Answers]) -> str:
    """Formats the answers to a task's questions: one line per row.

    Args:
        title: title of the task.
        answers: answers by the names of the rows; the first is the base.
    """
    base = next(iter(answers.values()))
    width = _name_width(answers)
    head = f"{title:<{width}}{estimate_head('accuracy')}{'all right':>11}{'nats':>9}"
    lines = [head]
    for name, row in answers.items():
        line = f"{name:<{width}}{estimate_columns(row.accuracy, row, base)}"
        lines.append(f"{line}{row.exact:>11.4f}{row.nats:>9.3f}")
    lines.append(_footnote(base.by_row, "row"))
    return "\n".join(lines)


def _name_width(rows: Mapping[str, Any]) -> int:
    return max(_NAME_WIDTH, *(len(name) for name in rows))


def _position_head(first: int, end: int) -> str:
    """Formats the head of the column for a range of positions."""
    label = f"{first}-{end - 1}"
    return f"{label:>{max(8, len(label) + 1)}}"


def _footnote(parts: Ratio, name: str) -> str:
    """Formats the number of measured parts and the meaning of +-."""
    count = len(parts.weights)
    if count < 2:
        return f"{count} {name}: too few for a standard error"
    return f"{count:,} {name}s; +- is the standard error over {name}s, for differences over pairs"


def rows_as_json(rows: Mapping[str, Score | Answers]) -> dict[str, dict[str, Any]]:
    """Converts a table for JSON, by row and field; NaN and infinities become None.

    Every row but the first has its difference from the first, in bits per byte or accuracy, and the
    standard error of the difference over pairs.
    """
    base = next(iter(rows.values()))
    table = {}
    for name, row in rows.items():
        table[name] = _finite(dataclasses.asdict(row))
        table[name]["standard_error"] = known(row.standard_error)
        table[name] |= difference_as_json(row, base)
    return table


def _finite(value: Any) -> Any:
    """Replaces NaN and infinities by None at any depth, and arrays by lists."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return known(value) if isinstance(value, float) else value
