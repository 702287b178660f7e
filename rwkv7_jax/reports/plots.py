"""Plots of runs and states, as PNG files. Needs matplotlib (extra `plot`)."""

import importlib.util
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float

from rwkv7_jax.atomic_write import atomic_write
from rwkv7_jax.evaluation.advice import FADED, Diagnosis, MemoryStatistics

_COLOURS = (
    "#4053d3",
    "#ddb310",
    "#b51d14",
    "#00beff",
    "#fb49b0",
    "#00b25d",
    "#7a7a7a",
    "#8c4f1d",
    "#9b6bd3",
    "#1d1d1d",
)

# The points of each line, by name.
Lines = Mapping[str, Sequence[tuple[float, float]]]

_Part = TypeVar("_Part")

# Lines with more points are thin and have no markers.
_MARKERS = 40

# Most points of a smoothed line.
_PIECES = 32

# Added to singular values: a logarithmic axis cannot show 0.
_TINY = 1e-9


def available() -> bool:
    """Returns whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def check_format(path: str | Path, argument: str) -> None:
    """Checks that matplotlib can write the format of a picture; it imports matplotlib.

    Args:
        path: path of the picture; without a suffix it is a PNG file.
        argument: the option in backticks; the message begins with it.

    Raises:
        ValueError: the suffix is no format.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    known = sorted(FigureCanvasAgg.get_supported_filetypes())
    suffix = Path(path).suffix[1:]
    if suffix and suffix.lower() not in known:
        raise ValueError(f"{argument} must end in .{', .'.join(known)}; got {path}.")


def _figure(
    columns: int, *, height: float = 3.4, width: float = 4.6
) -> tuple[Any, Any]:
    """Makes a figure that needs no display, and its axes in one row."""
    # matplotlib is optional and slow to import.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height), layout="constrained")
    # Not pyplot, which picks a backend for the process and keeps every figure alive.
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, path: str | Path, *, legend: bool = False) -> None:
    if legend:
        figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    with atomic_write(Path(path)) as file:
        figure.savefig(file, dpi=130, format=Path(path).suffix[1:] or None)


def _coloured(parts: Mapping[str, _Part]) -> Iterator[tuple[str, tuple[str, _Part]]]:
    """Yields each named part of a picture with its colour; after the last, colours repeat."""
    return zip(itertools.cycle(_COLOURS), parts.items(), strict=False)


def curves(path: str | Path, lines: Lines, *, x: str, y: str) -> None:
    """Draws named lines as a PNG file.

    Args:
        path: path of the PNG file.
        lines: points of each line.
        x: label of the x axis.
        y: label of the y axis.
    """
    figure, (axis,) = _figure(1)
    for colour, (name, points) in _coloured(lines):
        points = np.asarray(points, dtype=float).reshape(-1, 2)
        long = len(points) > _MARKERS
        axis.plot(
            *points.T,
            color=colour,
            label=name,
            lw=1.0 if long else 1.8,
            marker="" if long else "o",
            ms=3,
        )
    axis.set(xlabel=x, ylabel=y)
    axis.grid(alpha=0.25)
    _save(figure, path, legend=True)


# Named points by group.
Points = Mapping[str, Sequence[tuple[float, float, str]]]

# Candidate positions of a point's name: alignment, and offset from the point.
_PLACES = (
    ("left", (4, 4)),
    ("left", (4, -9)),
    ("right", (-4, 4)),
    ("right", (-4, -9)),
    ("center", (0, 9)),
    ("center", (0, -15)),
    ("left", (4, 13)),
    ("left", (4, -18)),
    ("right", (-4, 13)),
    ("right", (-4, -18)),
)


def scatter(
    path: str | Path, groups: Points, *, x: str, y: str, front: bool = False
) -> None:
    """Draws named points, coloured by group; the x axis is logarithmic if all x are above 1.

    Args:
        path: path of the PNG file.
        groups: (x, y, name) of the points of each group.
        x: label of the x axis.
        y: label of the y axis.
        front: whether to draw the Pareto front, too.
    """
    figure, (axis,) = _figure(1, height=4.2, width=6.4)
    for colour, (group, points) in _coloured(groups):
        axis.scatter(
            [point[0] for point in points],
            [point[1] for point in points],
            color=colour,
            label=group,
            s=28,
            zorder=3,
        )
    points = [point for group in groups.values() for point in group]
    if front:
        axis.step(
            *zip(*front_of(points), strict=True),
            where="post",
            color="#b0b0b0",
            lw=1,
            ls="--",
            label="front",
            zorder=1,
        )
    if all(point[0] > 1 for point in points):
        axis.set_xscale("log")
    if all(point[1] >= 1000 for point in points):
        axis.set_ylim(bottom=0)
        axis.yaxis.set_major_formatter("{x:,.0f}")
    axis.set(xlabel=x, ylabel=y)
    axis.grid(alpha=0.25)
    _label(axis, groups)
    _save(figure, path, legend=True)


def _label(axis: Any, groups: Points) -> None:
    """Writes each point's name next to it, where it overlaps the fewest names and points."""
    from matplotlib.patheffects import withStroke
    from matplotlib.transforms import Bbox

    middles = [point[:2] for points in groups.values() for point in points]
    taken = [
        Bbox.from_extents(across - 4, up - 4, across + 4, up + 4)
        for across, up in axis.transData.transform(middles)
    ]
    for colour, (_, points) in _coloured(groups):
        for across, up, name in points:
            text = axis.annotate(
                name,
                (across, up),
                xytext=(0, 0),
                textcoords="offset points",
                fontsize=6.5,
                color=colour,
                # A white outline separates the name from lines that cross it.
                path_effects=[withStroke(linewidth=2, foreground="white")],
            )
            covered = [
                sum(_place(text, *at).overlaps(other) for other in taken)
                for at in _PLACES
            ]
            # Of equal positions the first, which is closest to the point.
            best = covered.index(min(covered))
            taken.append(_place(text, *_PLACES[best]))


def _place(text: Any, side: str, shift: tuple[int, int]) -> Any:
    """Moves a name to a position next to its point; returns its bounding box."""
    text.set_horizontalalignment(side)
    text.set_position(shift)
    return text.get_window_extent()


def front_of(points: Sequence[tuple[float, float, str]]) -> list[tuple[float, float]]:
    """Returns the Pareto front by x: the points whose y no point at a smaller or equal x reaches.

    A last point extends it to the largest x.
    """
    front: list[tuple[float, float]] = []
    for x, y, _ in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return [*front, (max(point[0] for point in points), front[-1][1])]


def by_position(
    path: str | Path, scores: Mapping[str, Sequence[tuple[int, int, float]]]
) -> None:
    """Draws bits per byte by position in the text, one bar for each range and name.

    Args:
        path: path of the PNG file.
        scores: (first, end, bits per byte) of the ranges, by name; all have the same ranges.
    """
    figure, (axis,) = _figure(1)
    width = 0.8 / max(len(scores), 1)
    labels: list[str] = []
    for index, (name, ranges) in enumerate(scores.items()):
        offset = (index - (len(scores) - 1) / 2) * width
        heights = [bits for _, _, bits in ranges]
        colour = _COLOURS[index % len(_COLOURS)]
        axis.bar(
            np.arange(len(ranges)) + offset, heights, width, label=name, color=colour
        )
        labels = [f"{first}-{end - 1}" for first, end, _ in ranges]
    axis.set_xticks(range(len(labels)), labels)
    axis.set_xlabel("position in the text (tokens)")
    axis.set_ylabel("bits per byte")
    _save(figure, path, legend=True)


def states(
    path: str | Path,
    before: Float[np.ndarray, "L H N"],
    after: Float[np.ndarray, "L H N"],
) -> None:
    """Draws the norm of each head of two states, and the singular values of each layer.

    Args:
        path: path of the PNG file.
        before: singular values, largest first, of a typical state of the base.
        after: singular values of the tuned start state.
    """
    figure, axes = _figure(3)
    norms = [np.sqrt(np.square(values).sum(-1)) for values in (before, after)]
    # One scale makes the colours of both comparable.
    top = max(float(norm.max()) for norm in norms) or 1.0
    names = ("typical state of the base", "tuned start state")
    image = None
    for axis, norm, name in zip(axes, norms, names, strict=False):
        image = axis.imshow(norm, vmin=0, vmax=top, cmap="viridis", aspect="auto")
        axis.set(title=f"{name}: norm", xlabel="head", ylabel="layer")
        axis.set_xticks(range(norm.shape[1]))
        axis.set_yticks(range(norm.shape[0]))
    figure.colorbar(image, ax=axes[:2])
    spectra = axes[2]
    for layer in range(before.shape[0]):
        colour = _COLOURS[layer % len(_COLOURS)]
        spectra.semilogy(
            after[layer].mean(0) + _TINY, color=colour, label=f"layer {layer}"
        )
        spectra.semilogy(before[layer].mean(0) + _TINY, color=colour, ls=":")
    spectra.set(
        title="singular values (dotted: typical)", xlabel="rank", ylim=(1e-3, None)
    )
    spectra.legend(frameon=False, fontsize=8)
    _save(figure, path)


def diagnosis(path: str | Path, measured: Diagnosis) -> None:
    """Draws how much of a tuned state is still read, the loss by position, and spectra.

    Args:
        path: path of the PNG file.
        measured: the result of `state_diagnosis.diagnose`.
    """
    figure, (fading, losses, spectra) = _figure(3)
    for (name, memory), style in zip(
        measured.memories.items(), ("-", "--"), strict=False
    ):
        _draw_memory(fading, spectra, name, memory, style)
    fading.axhline(FADED, color="grey", lw=0.8, ls=":")
    fading.set(title="what is still read (thin: single layers)", yscale="log")
    fading.set(xlabel="position", ylabel="mean |psi|^2, the first = 1")
    positions = np.flatnonzero(measured.counts)
    curves = (
        ("base", measured.base_nats, _COLOURS[0]),
        ("tuned", measured.tuned_nats, _COLOURS[2]),
    )
    for name, nats, colour in curves:
        # Positions without a target are NaN and are left out.
        losses.plot(positions, nats[positions], color=colour, alpha=0.25, lw=0.8)
        losses.plot(*_smoothed(positions, nats[positions]), color=colour, label=name)
    losses.set(title="loss by position", xlabel="position", ylabel="nats per token")
    # An empty state has only zeros, but the axis needs a positive range.
    top = (
        max(float(memory.spectrum.max()) for memory in measured.memories.values())
        or 1.0
    )
    spectra.set(
        title="singular values (mean of heads)",
        xlabel="rank",
        ylim=(1e-4 * top, 2 * top),
    )
    fading.legend(frameon=False, fontsize=8, loc="lower left")
    losses.legend(frameon=False, fontsize=8, loc="upper right")
    spectra.legend(frameon=False, fontsize=8, loc="lower left")
    _save(figure, path)


def _draw_memory(
    fading: Any, spectra: Any, name: str, memory: MemoryStatistics, style: str
):
    """Draws the lines of one memory: layers from dark to light; the legend names two of them."""
    from matplotlib import colormaps

    fading.plot(memory.fading, style, color="black", lw=2, label=f"{name}, all layers")
    last = len(memory.spectrum) - 1
    for layer, (reads, values) in enumerate(
        zip(memory.reads, memory.spectrum, strict=True)
    ):
        colour = colormaps["viridis"](0.9 * layer / max(last, 1))
        fading.plot(reads / (reads[0] or 1.0), style, color=colour, lw=0.7)
        label = f"{name}, layer {layer}" if layer in (0, last) else None
        spectra.semilogy(values.mean(0) + _TINY, style, color=colour, label=label)


def _smoothed(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Averages neighbouring points; returns at most `_PIECES` points."""
    parts = np.array_split(np.arange(len(x)), min(_PIECES, len(x)))
    means_x = np.array([x[part].mean() for part in parts])
    means_y = np.array([y[part].mean() for part in parts])
    return means_x, means_y
