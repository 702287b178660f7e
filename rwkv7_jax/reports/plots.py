"""Pictures of runs and states, as PNG files. Needs matplotlib (extra `plot`)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from rwkv7_jax.evaluation.advice import FADED, Diagnosis, MemoryStatistics

_COLOURS = ("#4053d3", "#ddb310", "#b51d14", "#00beff", "#fb49b0", "#00b25d")

_COLOURS += ("#7a7a7a", "#8c4f1d", "#9b6bd3", "#1d1d1d")


def _figure(columns: int, *, height: float = 3.4):
    """A figure without a display, and its axes in one row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * columns, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def available() -> bool:
    """Whether matplotlib is there."""
    import importlib.util

    return importlib.util.find_spec("matplotlib") is not None


Lines = Mapping[str, Sequence[tuple[float, float]]]


def curves(path: str | Path, lines: Lines, *, x: str, y: str, shares: Lines | None = None) -> None:
    """A PNG of named lines; each is a sequence of (x, y).

    Args:
        path: the file.
        lines: on the left axis.
        x: its label.
        y: label of the left axis.
        shares: lines from 0 to 1, such as accuracies, which get an axis on the right.
    """
    figure, (axis,) = _figure(1)
    shares = shares or {}
    places = [(axis, *line) for line in lines.items()]
    if shares:
        right = axis.twinx() if lines else axis
        right.set(ylim=(0, 1), ylabel="share")
        right.spines["top"].set_visible(False)
        places += [(right, *line) for line in shares.items()]
    for colour, (place, name, points) in zip(_COLOURS, places, strict=False):
        points = np.asarray(points, dtype=float).reshape(-1, 2)
        many = len(points) > 40
        place.plot(
            *points.T,
            color=colour,
            label=name,
            lw=1.0 if many else 1.8,
            marker="" if many else "o",
            ms=3,
        )
    axis.set_xlabel(x)
    if lines:
        axis.set_ylabel(y)
    axis.grid(alpha=0.25)
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def by_position(path: str | Path, scores: Mapping[str, Sequence[tuple[int, int, float]]]) -> None:
    """A PNG of bits per byte against the position in the text, one bar a range and name."""
    figure, (axis,) = _figure(1)
    width = 0.8 / max(len(scores), 1)
    for index, (name, ranges) in enumerate(scores.items()):
        places = np.arange(len(ranges)) + (index - (len(scores) - 1) / 2) * width
        colour = _COLOURS[index % len(_COLOURS)]
        axis.bar(places, [r[2] for r in ranges], width, label=name, color=colour)
        labels = [f"{a}-{b - 1}" for a, b, _ in ranges]
    axis.set_xticks(range(len(labels)), labels)
    axis.set_xlabel("position in the text (tokens)")
    axis.set_ylabel("bits per byte")
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def states(
    path: str | Path,
    before: Float[np.ndarray, "L H N"],
    after: Float[np.ndarray, "L H N"],
    *,
    names: tuple[str, str] = ("typical state of the base", "tuned start state"),
) -> None:
    """A PNG of two states' singular values: each head's norm, and each layer's spectrum.

    Args:
        path: the file.
        before: singular values, largest first, of a state to compare with.
        after: of the state that is shown.
        names: of the two.
    """
    figure, axes = _figure(3)
    norms = [np.sqrt(np.square(s).sum(-1)) for s in (before, after)]
    top = max(float(n.max()) for n in norms) or 1.0
    for axis, norm, name in zip(axes, norms, names, strict=False):
        image = axis.imshow(norm, vmin=0, vmax=top, cmap="viridis", aspect="auto")
        axis.set(title=f"{name}: norm", xlabel="head", ylabel="layer")
        axis.set_xticks(range(norm.shape[1]))
        axis.set_yticks(range(norm.shape[0]))
    figure.colorbar(image, ax=axes[:2])
    for layer in range(before.shape[0]):
        colour = _COLOURS[layer % len(_COLOURS)]
        axes[2].semilogy(after[layer].mean(0) + 1e-9, color=colour, label=f"layer {layer}")
        axes[2].semilogy(before[layer].mean(0) + 1e-9, color=colour, ls=":")
    axes[2].set(title="singular values (dotted: typical)", xlabel="rank", ylim=(1e-3, None))
    axes[2].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def diagnosis(path: str | Path, found: Diagnosis) -> None:
    """A PNG of a tuned state: what is still read of it and the loss by position, and spectra."""
    figure, axes = _figure(3)
    for (name, memory), style in zip(found.memories.items(), ("-", "--"), strict=False):
        _memory(axes[0], axes[2], name, memory, style)
    axes[0].axhline(FADED, color="grey", lw=0.8, ls=":")
    axes[0].set(title="what is still read (thin: single layers)", yscale="log")
    axes[0].set(xlabel="position", ylabel="mean |psi|^2, the first = 1")
    for name, nats, colour in (
        ("base", found.base_nats, _COLOURS[0]),
        ("tuned", found.tuned_nats, _COLOURS[2]),
    ):
        place = np.flatnonzero(found.counts)
        axes[1].plot(place, nats[place], color=colour, alpha=0.25, lw=0.8)
        axes[1].plot(*_smoothed(place, nats[place]), color=colour, label=name)
    axes[1].set(title="loss by position", xlabel="position", ylabel="nats per token")
    top = max(float(memory.spectrum.max()) for memory in found.memories.values()) or 1.0
    axes[2].set(title="singular values (mean of heads)", xlabel="rank", ylim=(1e-4 * top, 2 * top))
    for axis, place in zip(axes, ("lower left", "upper right", "lower left"), strict=True):
        axis.legend(frameon=False, fontsize=8, loc=place)
    figure.savefig(path, dpi=130)


def _memory(fading, spectra, name: str, memory: MemoryStatistics, style: str) -> None:
    """One memory's lines on the two axes: layers from dark to light, the outermost are named."""
    from matplotlib import colormaps

    fading.plot(memory.fading, style, color="black", lw=2, label=f"{name}, all layers")
    last = len(memory.spectrum) - 1
    for layer, (reads, values) in enumerate(zip(memory.reads, memory.spectrum, strict=True)):
        colour = colormaps["viridis"](0.9 * layer / max(last, 1))
        fading.plot(reads / (reads[0] or 1.0), style, color=colour, lw=0.7)
        label = f"{name}, layer {layer}" if layer in (0, last) else None
        spectra.semilogy(values.mean(0) + 1e-9, style, color=colour, label=label)


def _smoothed(x: np.ndarray, y: np.ndarray, pieces: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """Means of neighbours, at most `pieces` of them."""
    parts = np.array_split(np.arange(len(x)), min(pieces, len(x)))
    return tuple(np.array([one[part].mean() for part in parts]) for one in (x, y))
