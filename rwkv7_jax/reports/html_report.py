"""The report of a run: one self-contained HTML file.

It reads only files of the run directory: `settings.json`, `metrics.jsonl`, `samples.jsonl` (one
prompt and its text per line), `events.jsonl` (start, resume, skipped, stopped, finished),
`rate_search.json`, `system.json` and PNG files. A section whose file is missing is left out.
"""

import base64
import collections
import html
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rwkv7_jax.atomic_write import atomic_write
from rwkv7_jax.evaluation.metric import log_name
from rwkv7_jax.json_files import flat_items, number_of, read_object
from rwkv7_jax.reports.goodput import PAUSES, STEPS, TimeSpent
from rwkv7_jax.reports.metric_writers import JSONL, iterate_steps
from rwkv7_jax.reports.svg_charts import Curve, Mark, line_chart
from rwkv7_jax.reports.system_info import lines

_GRADIENT_NORM = "gradient norm"

# Charts of several metrics: title and pattern of their names. Every other metric gets a separate
# chart.
_SHARED_CHARTS = {
    "loss (nats per token)": r"(^|/)(loss_nats|loss)$",
    "bits per byte": log_name("", "bits_per_byte") + "$",
    "accuracy": log_name("", "accuracy") + "$",
    _GRADIENT_NORM: r"(^|/)grad_norm$",
}

# Charts whose y axis is logarithmic.
_LOGARITHMIC = (_GRADIENT_NORM,)

_NO_CHART = ("step", "seconds", STEPS, PAUSES)

# Events that explain a change in a curve.
_MARKED = ("resume", "skipped", "stopped")

_KEY = "Vertical lines: dashed where the run resumed, red where updates were skipped."

# Many resumptions or samples must not make the page too large for a browser.
_EVENTS_SHOWN = 200
_SAMPLES_SHOWN = 200

# Errors from a record whose entries do not have the expected types.
_DAMAGE = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)

_STYLE = """
:root{color-scheme:light dark}
body{font:15px/1.45 system-ui,sans-serif;max-width:1180px;margin:2em auto;padding:0 1em}
h1{font-size:1.5em;margin:0}h2{font-size:1.1em;margin:1.8em 0 .5em}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
td,th{padding:.1em .9em .1em 0;text-align:left;vertical-align:top}
.numbers td+td,.numbers th+th{text-align:right}
pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:.3em 0;font-size:13px}
.sample{border-left:3px solid #8888;padding-left:.8em;margin:.6em 0}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,480px),1fr));gap:1em}
svg{width:100%;height:auto}svg text{font-size:11px;fill:currentColor}
svg .title{font-size:13px;font-weight:600}
.grid{stroke:currentColor;opacity:.13}.axis{fill:none;stroke:currentColor;opacity:.6}
.mark{stroke:#888;stroke-width:1.5;stroke-dasharray:4 3}.skipped{stroke:#b51d14}
.stopped{stroke-dasharray:1 3}img{max-width:100%;background:#fff}.note{opacity:.7}
"""


def _text(value: Any) -> str:
    return html.escape(str(value))


def _section(title: str, body: str) -> str:
    return f"<h2>{_text(title)}</h2>\n{body}\n" if body else ""


def _cells(values: Iterable[Any], tag: str) -> str:
    return "".join(f"<{tag}>{_text(value)}</{tag}>" for value in values)


def _table(
    rows: Iterable[Sequence[Any]], *, head: Sequence[str] = (), css_class: str = ""
) -> str:
    """Makes an HTML table of plain values; "" without rows."""
    body = "".join(f"<tr>{_cells(row, 'td')}</tr>\n" for row in rows)
    if not body:
        return ""
    top = f"<tr>{_cells(head, 'th')}</tr>\n" if head else ""
    return f'<table class="{css_class}">{top}{body}</table>'


class _Column:
    """All numbers of one metric, in limited memory.

    Attributes:
        title: title of its chart.
        curve: its curve.
    """

    def __init__(self, name: str, first: float):
        """Takes the name of the metric and its first number, which `add` adds."""
        self.title = _title_of(name)
        self.curve = Curve(log=self.title in _LOGARITHMIC)
        self._first = first
        self._last = first
        self._last_step = 0
        self._least = math.inf
        self._most = -math.inf

    def add(self, step: int, number: float) -> None:
        """Adds the number of a step."""
        self.curve.add(step, number)
        self._last = number
        self._last_step = step
        if math.isfinite(number):
            self._least = min(self._least, number)
            self._most = max(self._most, number)

    def row(self) -> list[str]:
        """Returns the first, last, least and largest number, and the last step."""
        ends = [self._least, self._most]
        if self._least > self._most:
            ends = [math.nan, math.nan]
        numbers = [f"{y:.5g}" for y in (self._first, self._last, *ends)]
        return [*numbers, str(self._last_step)]


def _title_of(name: str) -> str:
    """Returns the title of a metric's chart."""
    for title, pattern in _SHARED_CHARTS.items():
        if re.search(pattern, name):
            return title
    return name


class _Metrics:
    """What the report shows of the metrics, of which memory holds a part.

    Attributes:
        last_step: the last step; None without any row.
        columns: by metric, in the order in which the names appear.
        spent: how the time was spent.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]]):
        """Reads the rows, one at a time."""
        self.last_step: int | None = None
        self.columns: dict[str, _Column] = {}
        self.spent = TimeSpent()
        for row in rows:
            step = row["step"]
            self.last_step = max(step, self.last_step or 0)
            self.spent.add(row)
            for name, value in row.items():
                number = number_of(value)
                # NaN counts as a number, so a diverged run keeps its column.
                if name in _NO_CHART or number is None:
                    continue
                if name not in self.columns:
                    self.columns[name] = _Column(name, number)
                self.columns[name].add(step, number)

    def table(self) -> str:
        """Makes a table with some numbers of each metric."""
        rows = [(name, *column.row()) for name, column in self.columns.items()]
        head = ("number", "first", "last", "least", "most", "at step")
        return _table(rows, head=head, css_class="numbers")

    def charts(self, marks: Sequence[Mark]) -> str:
        """Draws all metrics, those of `_SHARED_CHARTS` first."""
        curves: dict[str, dict[str, Curve]] = {title: {} for title in _SHARED_CHARTS}
        for name, column in self.columns.items():
            curves.setdefault(column.title, {})[name] = column.curve
        charts = []
        for title, shared in curves.items():
            if chart := line_chart(title, shared, marks=marks):
                charts.append(f"<div>{chart}</div>")
        if not charts:
            return ""
        body = "\n".join(charts)
        note = f'<p class="note">{_KEY}</p>' if marks else ""
        return f'<div class="charts">{body}</div>{note}'


def _event_marks(events: Sequence[Mapping[str, Any]]) -> list[Mark]:
    """Makes marks for the newest events that explain a change in a curve."""
    marks = []
    for event in events:
        kind = event.get("event")
        if kind in _MARKED:
            text = f"{kind} at step {event['step']} {event.get('detail') or ''}"
            marks.append(Mark(event["step"], kind, text))
    return marks[-_EVENTS_SHOWN:]


def _event_table(events: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for event in events[-_EVENTS_SHOWN:]:
        rows.append((event["step"], event.get("event", ""), event.get("detail") or ""))
    hidden = len(events) - len(rows)
    note = f'<p class="note">{hidden} earlier events hidden.</p>' if hidden else ""
    return note + _table(rows, head=("step", "event", "detail"))


def _samples(rows: Iterable[Mapping[str, Any]]) -> str:
    """Lists the newest samples by step, the newest step first and expanded."""
    newest_rows: collections.deque[Mapping[str, Any]]
    newest_rows = collections.deque(maxlen=_SAMPLES_SHOWN)
    count = 0
    for row in rows:
        newest_rows.append(row)
        count += 1
    by_step: dict[int, list[str]] = {}
    for row in newest_rows:
        prompt = _text(row.get("prompt", ""))
        text = _text(row.get("text", ""))
        block = f'<pre class="sample"><b>{prompt}</b>{text}</pre>'
        by_step.setdefault(row["step"], []).append(block)
    newest = max(by_step, default=0)
    parts = []
    for step in sorted(by_step, reverse=True):
        opened = " open" if step == newest else ""
        blocks = "".join(by_step[step])
        parts.append(
            f"<details{opened}><summary>step {step}</summary>{blocks}</details>"
        )
    if hidden := count - len(newest_rows):
        parts.append(f'<p class="note">{hidden:,} earlier samples hidden.</p>')
    return "\n".join(parts)


def _rate_search(record: Mapping[str, Any] | None, start: str) -> str:
    """Draws the measurements of a learning rate search, and reports its choice."""
    states = (record or {}).get("states")
    if not isinstance(states, Mapping):
        return ""
    try:
        return "\n".join(
            _search_of(name, search, start) for name, search in states.items()
        )
    # A record that is damaged or of another version costs only this section.
    except _DAMAGE:
        return ""


def _search_of(name: str, search: Mapping[str, Any], start: str) -> str:
    """Shows the search for one state: the choice, all numbers and the curve.

    Args:
        name: name of the state; "" for a run's only state.
        search: record of its search.
        start: `config.start`, the state that tuning starts from; "" for none.
    """
    untuned = "the state of config.start" if start else "no state"
    before = untuned if start else "without a state"
    measure = search["measure"]
    curve = sorted(search["curve"], key=lambda point: point["rate"])
    points = [(math.log10(point["rate"]), point[measure]) for point in curve]
    base = search["base"][measure]
    chart = line_chart(
        f"{name} {measure} by log10 of the learning rate".strip(),
        {
            "after the search": Curve(points),
            before: Curve([(points[0][0], base), (points[-1][0], base)]),
        },
    )
    rows = []
    for point in ({"rate": "none", **search["base"]}, *curve):
        rows.append([_shown_number(value) for value in point.values()])
    table = _table(rows, head=list(curve[0]), css_class="numbers")
    chosen = search["rate"]
    choice = f"no rate is better than {untuned}" if chosen is None else f"{chosen:g}"
    edge = f", the {search['edge']} that was tried" if search["edge"] else ""
    # Records of earlier versions lack `why` and `near`.
    why = f": {search['why']}" if search.get("why") else ""
    near = search.get("near", ())
    equal = ""
    if len(near) > 1:
        equal = ". Nearly equal: " + ", ".join(f"{rate:g}" for rate in near)
    sentence = _text(f"{name} chosen: {choice}{edge}{why}{equal}".strip())
    return f'<p>{sentence}</p>{table}<div class="charts">{chart}</div>'


def _shown_number(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, int | float) else str(value)


def _system(info: Mapping[str, Any] | None) -> str:
    """Lists the devices, the machine and the package versions."""
    try:
        listed = _text("\n".join(lines(info))) if info else ""
    # As in `_rate_search`.
    except _DAMAGE:
        return ""
    return f"<pre>{listed}</pre>" if listed else ""


def _pictures(folder: Path) -> str:
    """Embeds the PNG files of the directory."""
    parts = []
    for path in sorted(folder.glob("*.png")):
        if not path.is_file():
            continue
        data = path.read_bytes()
        # A killed process may have left an incomplete file.
        if not data.startswith(b"\x89PNG"):
            continue
        name = _text(path.name)
        code = base64.b64encode(data).decode()
        parts.append(
            f'<figure><img alt="{name}" src="data:image/png;base64,{code}">'
            f"<figcaption>{name}</figcaption></figure>"
        )
    return "\n".join(parts)


def _setting_table(settings: Mapping[str, Any]) -> str:
    rows = []
    for name, value in flat_items(settings):
        rows.append((name, json.dumps(value, ensure_ascii=False)))
    return _table(rows)


def _subtitle(
    settings: Mapping[str, Any] | None,
    last_step: int | None,
    events: Sequence[Mapping[str, Any]],
) -> str:
    parts = []
    if settings and "mode" in settings:
        parts.append(f"mode {settings['mode']}")
    if last_step is not None:
        parts.append(f"step {last_step}")
    if events:
        parts.append(f"last event: {events[-1].get('event')}")
    return " &middot; ".join(_text(part) for part in parts)


def report_page(folder: str | Path) -> str:
    """Returns the report as HTML; equal files give equal pages.

    Args:
        folder: the run directory.

    Raises:
        ValueError: there is no such directory.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(
            f"report_page: `folder` must be a run directory; got {str(folder)!r}."
        )
    settings = read_object(folder / "settings.json")
    # Any file may be missing or damaged: the report is also for runs that failed.
    info = read_object(folder / "system.json")
    search = read_object(folder / "rate_search.json")
    start = str((settings or {}).get("start") or "")
    metrics = _Metrics(iterate_steps(folder / JSONL))
    events = list(iterate_steps(folder / "events.jsonl"))
    samples = iterate_steps(folder / "samples.jsonl")
    title = _text(folder.resolve().name)
    subtitle = _subtitle(settings, metrics.last_step, events)
    body = "".join(
        (
            _section("Curves", metrics.charts(_event_marks(events))),
            _section("Numbers", metrics.table()),
            _section("Goodput", _text(metrics.spent.goodput(events))),
            _section("Learning rate", _rate_search(search, start)),
            _section("Samples", _samples(samples)),
            _section("Pictures", _pictures(folder)),
            _section("Events", _event_table(events)),
            _section("Settings", _setting_table(settings or {})),
            _section("System", _system(info)),
        )
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width"><title>'
        f"{title}</title><style>{_STYLE}</style></head>\n"
        f"<body><h1>{title}</h1><p>{subtitle}</p>\n{body}</body></html>\n"
    )


def write_report(folder: str | Path) -> Path:
    """Writes `report.html` into the run directory and returns its path.

    Args:
        folder: the run directory.

    Raises:
        ValueError: there is no such directory.
    """
    page = report_page(folder)
    path = Path(folder) / "report.html"
    with atomic_write(path) as file:
        # A sample may hold an unpaired surrogate, which UTF-8 cannot encode.
        file.write(page.encode("utf-8", "replace"))
    return path
