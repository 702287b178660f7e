"""Formats text tables for the terminal."""

import itertools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import Float


def format_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Formats right-aligned columns, each as wide as its widest entry, two spaces apart."""
    rows = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells))
    return "\n".join(lines)


def format_heads(columns: Mapping[str, Float[np.ndarray, "L H"]]) -> str:
    """Formats one row per layer and head, with one column per array."""
    layers, heads = next(iter(columns.values())).shape
    rows = []
    for layer, head in itertools.product(range(layers), range(heads)):
        cells = [f"{values[layer, head]:.3g}" for values in columns.values()]
        rows.append([str(layer), str(head), *cells])
    return format_table(["layer", "head", *columns], rows)
