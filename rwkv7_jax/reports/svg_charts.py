"""Line charts as SVG text, which needs no package and no display."""

import html
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

Number = int | float

Points = Sequence[tuple[Number, Number]]

COLOURS = ("#4053d3", "#ddb310", "#b51d14", "#00a5c8", "#c44593", "#00914a")

WIDTH, HEIGHT = 560, 220

_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 12, 26, 30

# Longer lines are drawn as the means of this many pieces, over the range that the pieces span.
PIECES = 300


class Mark(NamedTuple):
    """A vertical line at something that happened.

    Attributes:
        x: where.
        kind: CSS class, such as "resume".
        text: shown under the pointer.
    """

    x: Number
    kind: str
    text: str


class _Frame(NamedTuple):
    """The ranges that are shown; y is a logarithm to base ten if `log`."""

    x: tuple[float, float]
    y: tuple[float, float]
    log: bool

    def across(self, x: Number) -> float:
        """Where an x of the data lies in the picture."""
        share = (x - self.x[0]) / (self.x[1] - self.x[0])
        return _LEFT + share * (WIDTH - _LEFT - _RIGHT)

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Where a point of the data lies in the picture."""
        up = ((math.log10(y) if self.log else y) - self.y[0]) / (self.y[1] - self.y[0])
        return self.across(x), _TOP + (1 - up) * (HEIGHT - _TOP - _BOTTOM)


def _drawable(points: Points, log: bool) -> list[tuple[float, float]]:
    """Points that have a place in the picture."""
    finite = [(float(x), float(y)) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    return [point for point in finite if point[1] > 0 or not log]


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Their range with room around it, never empty."""
    low, high = min(values), max(values)
    room = 0.04 * (high - low) or 0.5 * abs(high) or 0.5
    return low - room, high + room


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers between `low` and `high`."""
    raw = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next((m for m in (1, 2, 2.5, 5) if m * power >= raw * 0.999), 10)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """A number of an axis: 0.0006, 1.5, 12k, 3M."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if max(unit, 1e4) <= abs(value) < 1e3 * unit:
            return f"{value / unit:.4g}{letter}"
    return f"{value:.4g}"


def _pieces(points: list[tuple[float, float]]) -> list[tuple[float, float, float, float]]:
    """(x, mean, least, most) of neighbouring points, at most `PIECES` of them."""
    size, found = -(-len(points) // PIECES), []
    for start in range(0, len(points), size):
        xs, ys = zip(*points[start : start + size], strict=True)
        found.append((sum(xs) / len(xs), sum(ys) / len(ys), min(ys), max(ys)))
    return found


def _path(frame: _Frame, points: Points) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in (frame.place(*point) for point in points))


def _line(frame: _Frame, points: list[tuple[float, float]], colour: str) -> str:
    """One curve, with the range of what was averaged behind it."""
    pieces, parts = _pieces(points), []
    if len(points) > len(pieces):
        band = [(x, most) for x, _, _, most in pieces]
        band += [(x, least) for x, _, least, _ in reversed(pieces)]
        parts.append(f'<polygon points="{_path(frame, band)}" fill="{colour}" opacity=".2"/>')
    means = [piece[:2] for piece in pieces]
    parts.append(
        f'<polyline points="{_path(frame, means)}" fill="none" stroke="{colour}" '
        'stroke-width="1.5"/>'
    )
    if len(means) <= 40:
        parts += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.4" fill="{colour}"/>'
            for x, y in (frame.place(*point) for point in means)
        ]
    return "".join(parts)


def _axes(frame: _Frame) -> str:
    """Grid, numbers, and the frame's two lines."""
    parts, bottom = [], HEIGHT - _BOTTOM
    for tick in ticks(*frame.y, 4):
        value = 10.0**tick if frame.log else tick
        _, y = frame.place(frame.x[0], value)
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{short(value)}</text>'
        )
    for tick in ticks(*frame.x, 6):
        place = f'x="{frame.across(tick):.1f}" y="{bottom + 16}"'
        parts.append(f'<text {place} text-anchor="middle">{short(tick)}</text>')
    parts.append(f'<path class="axis" d="M{_LEFT} {_TOP}V{bottom}H{WIDTH - _RIGHT}"/>')
    return "".join(parts)


def _marks(frame: _Frame, marks: Sequence[Mark]) -> str:
    found = []
    for mark in marks:
        if frame.x[0] <= mark.x <= frame.x[1]:
            x = frame.across(mark.x)
            found.append(
                f'<line class="mark {html.escape(mark.kind)}" x1="{x:.1f}" x2="{x:.1f}" '
                f'y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"><title>{html.escape(mark.text)}</title>'
                "</line>"
            )
    return "".join(found)


def _legend(names: Sequence[str]) -> str:
    """Names at the right end of the title's line, the first outermost."""
    parts, right = [], WIDTH - _RIGHT
    for index, name in enumerate(names):
        colour = COLOURS[index % len(COLOURS)]
        parts.append(
            f'<text x="{right}" y="16" text-anchor="end" style="fill:{colour}">'
            f"{html.escape(name)}</text>"
        )
        right -= 7 * len(name) + 14
    return "".join(parts)


def line_chart(
    title: str, lines: Mapping[str, Points], *, marks: Sequence[Mark] = (), log: bool = False
) -> str:
    """An SVG element of named lines; "" where no point has a place.

    Args:
        title: above the chart.
        lines: points (x, y) by name, in order of x; what is not finite is left out.
        marks: what happened, as vertical lines; the chart does not grow for them.
        log: whether y is shown by its logarithm; what is not positive is left out.
    """
    shown = {name: kept for name, points in lines.items() if (kept := _drawable(points, log))}
    if not shown:
        return ""
    ys = [math.log10(y) if log else y for points in shown.values() for _, y in points]
    xs = [x for points in shown.values() for x, _ in points]
    frame = _Frame(_range(xs), _range(ys), log)
    curves = "".join(
        _line(frame, points, COLOURS[index % len(COLOURS)])
        for index, points in enumerate(shown.values())
    )
    legend = _legend(list(shown)) if len(shown) > 1 else ""
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">'
        f'<text class="title" x="{_LEFT}" y="16">{html.escape(title)}</text>'
        f"{legend}{_axes(frame)}{_marks(frame, marks)}{curves}</svg>"
    )
