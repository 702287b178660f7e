"""Line charts as SVG text, without further packages or a display."""

import html
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

Number = int | float

Points = Sequence[tuple[Number, Number]]

COLOURS = ("#4053d3", "#ddb310", "#b51d14", "#00a5c8", "#c44593", "#00914a")

# Size of a chart and its margins, in the units of the SVG's view box.
WIDTH = 560
HEIGHT = 220
_LEFT = 62
_RIGHT = 12
_TOP = 26
_BOTTOM = 30

# A longer line is drawn as the means of at most this many pieces, over a band with their ranges.
PIECES = 300

# Lines with at most this many points get a dot at every point.
_DOTS = 40

# Larger numbers are not drawn: ranges would overflow.
_MOST = 1e100


class Mark(NamedTuple):
    """A vertical line that marks an event.

    Attributes:
        x: position on the x axis.
        kind: CSS class, such as "resume".
        text: tooltip.
    """

    x: Number
    kind: str
    text: str


class _Frame(NamedTuple):
    """The visible ranges; `y` is a base-10 logarithm if `log`."""

    x: tuple[float, float]
    y: tuple[float, float]
    log: bool

    def to_svg_x(self, x: Number) -> float:
        """Converts an x of the data to SVG coordinates."""
        share = (x - self.x[0]) / (self.x[1] - self.x[0])
        return _LEFT + share * (WIDTH - _LEFT - _RIGHT)

    def to_svg(self, x: float, y: float) -> tuple[float, float]:
        """Converts a point of the data to SVG coordinates, in which y points down."""
        height = math.log10(y) if self.log else y
        share = (height - self.y[0]) / (self.y[1] - self.y[0])
        return self.to_svg_x(x), _TOP + (1 - share) * (HEIGHT - _TOP - _BOTTOM)


class _Piece(NamedTuple):
    """Neighbouring points of a line, drawn as one point."""

    x: float
    mean: float
    least: float
    most: float


def _drawable(points: Points, log: bool) -> list[tuple[float, float]]:
    """Returns the points that can be drawn."""
    kept = []
    for x, y in points:
        # Comparisons with NaN are false.
        is_inside = abs(x) <= _MOST and abs(y) <= _MOST
        if is_inside and (y >= 1 / _MOST or not log):
            kept.append((float(x), float(y)))
    return kept


def _padded_range(values: Sequence[float]) -> tuple[float, float]:
    """Returns the range of the values with a margin; it is never empty."""
    low = min(values)
    high = max(values)
    # Equal values still get a range; zeros get a range of 1.
    margin = 0.04 * (high - low) or 0.5 * abs(high) or 0.5
    return low - margin, high + margin


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Returns about `count` round numbers between `low` and `high`."""
    # The exact step for `count` ticks, which is then rounded up to a round number.
    wanted = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(wanted))
    step = 10 * power
    for factor in (1, 2, 2.5, 5):
        # The tolerance accepts a step that is exact up to rounding.
        if factor * power >= wanted * 0.999:
            step = factor * power
            break
    # Multiples of the step: repeated addition would accumulate rounding errors.
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def short(value: float) -> str:
    """Formats a tick label: 0.0006, 1.5, 12k, 3M."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        # Numbers below 10,000 are short enough as they are.
        if max(unit, 1e4) <= abs(value) < 1e3 * unit:
            return f"{value / unit:.4g}{letter}"
    return f"{value:.4g}"


def _pieces(points: list[tuple[float, float]]) -> list[_Piece]:
    """Joins neighbouring points into at most `PIECES` pieces."""
    # Rounded up, so that there are at most `PIECES`.
    size = math.ceil(len(points) / PIECES)
    pieces = []
    for start in range(0, len(points), size):
        xs, ys = zip(*points[start : start + size], strict=True)
        pieces.append(_Piece(sum(xs) / len(xs), sum(ys) / len(ys), min(ys), max(ys)))
    return pieces


def _path(frame: _Frame, points: Points) -> str:
    places = [frame.to_svg(*point) for point in points]
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)


def _line(frame: _Frame, points: list[tuple[float, float]], colour: str) -> str:
    """Draws one curve, and a band with the range of the averaged points."""
    pieces = _pieces(points)
    parts = []
    if len(points) > len(pieces):
        # Along the upper edge, then back along the lower one.
        band = [(piece.x, piece.most) for piece in pieces]
        band += [(piece.x, piece.least) for piece in reversed(pieces)]
        parts.append(
            f'<polygon points="{_path(frame, band)}" fill="{colour}" opacity=".2"/>'
        )
    means = [(piece.x, piece.mean) for piece in pieces]
    parts.append(
        f'<polyline points="{_path(frame, means)}" fill="none" stroke="{colour}" '
        'stroke-width="1.5"/>'
    )
    if len(means) <= _DOTS:
        for point in means:
            x, y = frame.to_svg(*point)
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.4" fill="{colour}"/>')
    return "".join(parts)


def _axes(frame: _Frame) -> str:
    """Draws the grid, the tick labels and the two axes."""
    bottom = HEIGHT - _BOTTOM
    parts = []
    for tick in ticks(*frame.y, 4):
        # Ticks of a logarithmic axis are exponents.
        value = 10.0**tick if frame.log else tick
        _, y = frame.to_svg(frame.x[0], value)
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{short(value)}</text>'
        )
    for tick in ticks(*frame.x, 6):
        place = f'x="{frame.to_svg_x(tick):.1f}" y="{bottom + 16}"'
        parts.append(f'<text {place} text-anchor="middle">{short(tick)}</text>')
    parts.append(f'<path class="axis" d="M{_LEFT} {_TOP}V{bottom}H{WIDTH - _RIGHT}"/>')
    return "".join(parts)


def _marks(frame: _Frame, marks: Sequence[Mark]) -> str:
    parts = []
    for mark in marks:
        if not frame.x[0] <= mark.x <= frame.x[1]:
            continue
        x = frame.to_svg_x(mark.x)
        parts.append(
            f'<line class="mark {html.escape(mark.kind)}" x1="{x:.1f}" x2="{x:.1f}" '
            f'y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"><title>{html.escape(mark.text)}</title>'
            "</line>"
        )
    return "".join(parts)


def _legend(names: Sequence[str]) -> str:
    """Writes the names at the right end of the title's line, from right to left."""
    right = WIDTH - _RIGHT
    parts = []
    for index, name in enumerate(names):
        colour = COLOURS[index % len(COLOURS)]
        parts.append(
            f'<text x="{right}" y="16" text-anchor="end" style="fill:{colour}">'
            f"{html.escape(name)}</text>"
        )
        # SVG cannot measure text: allow 7 units per character, and a gap.
        right -= 7 * len(name) + 14
    return "".join(parts)


def line_chart(
    title: str,
    lines: Mapping[str, Points],
    *,
    marks: Sequence[Mark] = (),
    log: bool = False,
) -> str:
    """Draws named lines as an SVG element; returns "" if no point can be drawn.

    Args:
        title: title of the chart.
        lines: points (x, y) by name, in order of x; non-finite points are left out.
        marks: events, as vertical lines; they do not widen the chart.
        log: whether the y axis is logarithmic; values that are not positive are left out.
    """
    shown = {}
    for name, points in lines.items():
        kept = _drawable(points, log)
        if kept:
            shown[name] = kept
    if not shown:
        return ""
    every_x = [x for points in shown.values() for x, _ in points]
    every_y = [y for points in shown.values() for _, y in points]
    if log:
        # The margin is a fraction of the logarithmic range.
        every_y = [math.log10(y) for y in every_y]
    frame = _Frame(_padded_range(every_x), _padded_range(every_y), log)
    curves = []
    for index, points in enumerate(shown.values()):
        curves.append(_line(frame, points, COLOURS[index % len(COLOURS)]))
    legend = _legend(list(shown)) if len(shown) > 1 else ""
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">'
        f'<text class="title" x="{_LEFT}" y="16">{html.escape(title)}</text>'
        f"{legend}{_axes(frame)}{_marks(frame, marks)}{''.join(curves)}</svg>"
    )
