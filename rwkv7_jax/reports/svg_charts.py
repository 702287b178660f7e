"""Line charts as SVG text, without further packages or a display."""

import dataclasses
import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

Number = int | float

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

# The most pieces that a curve holds while points are added; even.
_MOST_HELD = 8 * PIECES

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


@dataclasses.dataclass(slots=True)
class _Piece:
    """Neighbouring points of a line, drawn as one point.

    Attributes:
        count: the number of points.
        x: the sum of their x.
        y: the sum of their y.
        least: the smallest y.
        most: the largest y.
    """

    count: int
    x: float
    y: float
    least: float
    most: float

    def join(self, other: "_Piece") -> None:
        """Adds the points of another piece."""
        self.count += other.count
        self.x += other.x
        self.y += other.y
        self.least = min(self.least, other.least)
        self.most = max(self.most, other.most)


class Curve:
    """A line of a chart. Its memory is limited, however many points are added.

    If there are too many pieces, each is joined with its neighbour. All pieces hold equally many
    points, except the newest.

    Attributes:
        log: whether the y axis is logarithmic; values that are not positive are then left out.
        least_x: the smallest x; infinite without points.
        most_x: the largest x.
    """

    def __init__(
        self, points: Iterable[tuple[Number, Number]] = (), *, log: bool = False
    ):
        """Adds some points (x, y)."""
        self.log = log
        self.least_x = math.inf
        self.most_x = -math.inf
        # By the x of their first points.
        self._pieces: dict[float, _Piece] = {}
        # The number of points in a piece.
        self._size = 1
        self._newest: _Piece | None = None
        for x, y in points:
            self.add(x, y)

    def add(self, x: Number, y: Number) -> None:
        """Adds a point, unless it cannot be drawn; it replaces an earlier point of the same x."""
        # Comparisons with NaN are false.
        is_inside = abs(x) <= _MOST and abs(y) <= _MOST
        if not is_inside or (self.log and y < 1 / _MOST):
            return
        self.least_x = min(self.least_x, x)
        self.most_x = max(self.most_x, x)
        point = _Piece(1, float(x), float(y), float(y), float(y))
        if self._newest is not None and self._newest.count < self._size:
            self._newest.join(point)
            return
        if len(self._pieces) == _MOST_HELD:
            self._size *= 2
            self._pieces = self._joined(2)
        self._newest = point
        self._pieces[point.x] = point

    def _joined(self, count: int) -> dict[float, _Piece]:
        """Joins each `count` neighbouring pieces to one."""
        ordered = sorted(self._pieces.items())
        joined = {}
        for start in range(0, len(ordered), count):
            piece = _Piece(0, 0.0, 0.0, math.inf, -math.inf)
            for _, other in ordered[start : start + count]:
                piece.join(other)
            joined[ordered[start][0]] = piece
        return joined

    def pieces(self) -> list[_Piece]:
        """Returns at most `PIECES` pieces in order of x."""
        # Rounded up, so that there are at most `PIECES`.
        count = math.ceil(len(self._pieces) / PIECES)
        return list(self._joined(max(count, 1)).values())


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


def _path(frame: _Frame, points: Iterable[tuple[float, float]]) -> str:
    places = [frame.to_svg(*point) for point in points]
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)


def _line(frame: _Frame, pieces: Sequence[_Piece], colour: str) -> str:
    """Draws one curve, and a band with the range of the averaged points."""
    parts = []
    means = [(piece.x / piece.count, piece.y / piece.count) for piece in pieces]
    if any(piece.count > 1 for piece in pieces):
        # Along the upper edge, then back along the lower one.
        band = [(x, piece.most) for (x, _), piece in zip(means, pieces, strict=True)]
        lower = [(x, piece.least) for (x, _), piece in zip(means, pieces, strict=True)]
        band += reversed(lower)
        parts.append(
            f'<polygon points="{_path(frame, band)}" fill="{colour}" opacity=".2"/>'
        )
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


def _legend(names: Sequence[str], title: str) -> str:
    """Writes the names at the right end of the title's line, from right to left, as many as fit."""
    right = WIDTH - _RIGHT
    # SVG cannot measure text: allow 7 units per character, and a gap.
    end_of_title = _LEFT + 7 * len(title) + 14
    parts = []
    for index, name in enumerate(names):
        width = 7 * len(name)
        if index and right - width < end_of_title:
            break
        colour = COLOURS[index % len(COLOURS)]
        parts.append(
            f'<text x="{right}" y="16" text-anchor="end" style="fill:{colour}">'
            f"{html.escape(name)}</text>"
        )
        right -= width + 14
    return "".join(parts)


def line_chart(
    title: str, curves: Mapping[str, Curve], *, marks: Sequence[Mark] = ()
) -> str:
    """Draws named curves as an SVG element; returns "" if no point can be drawn.

    Args:
        title: title of the chart.
        curves: curves by name; the y axis is logarithmic for all or for none.
        marks: events, as vertical lines; they do not widen the chart.
    """
    shown = {}
    every_x: list[float] = []
    every_y: list[float] = []
    for name, curve in curves.items():
        if pieces := curve.pieces():
            shown[name] = pieces
            every_x += (curve.least_x, curve.most_x)
            every_y += (piece.least for piece in pieces)
            every_y += (piece.most for piece in pieces)
    if not shown:
        return ""
    log = any(curve.log for curve in curves.values())
    if log:
        # The margin is a fraction of the logarithmic range.
        every_y = [math.log10(y) for y in every_y]
    frame = _Frame(_padded_range(every_x), _padded_range(every_y), log)
    lines = []
    for index, (name, pieces) in enumerate(shown.items()):
        line = _line(frame, pieces, COLOURS[index % len(COLOURS)])
        # The tooltip names lines that the legend has no room for.
        lines.append(f"<g><title>{html.escape(name)}</title>{line}</g>")
    legend = _legend(list(shown), title) if len(shown) > 1 else ""
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">'
        f'<text class="title" x="{_LEFT}" y="16">{html.escape(title)}</text>'
        f"{legend}{_axes(frame)}{_marks(frame, marks)}{''.join(lines)}</svg>"
    )
