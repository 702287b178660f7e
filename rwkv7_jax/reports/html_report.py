"""A run's report: one HTML file that needs nothing beside itself.

It is a function of the folder's files alone: `settings.json`, `metrics.jsonl`, `samples.jsonl` (a
prompt and its text a line), `events.jsonl` (start, resume, skipped, saved, stopped), `system.json`
and pictures. What is not there makes no section.
"""

import base64
import html
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rwkv7_jax.atomic_write import atomic_write
from rwkv7_jax.data.jsonl import read_log
from rwkv7_jax.evaluation.metric import log_name
from rwkv7_jax.reports.metric_writers import JSONL, merged
from rwkv7_jax.reports.svg_charts import Mark, Points, line_chart
from rwkv7_jax.reports.system_info import lines

# Charts that hold several numbers: title, names, logarithmic. Every other number has its own.
_CHARTS = (
    ("loss (nats per token)", r"^(loss_nats|loss)$", False),
    ("bits per byte", log_name("", "bits_per_byte") + "$", False),
    ("accuracy", log_name("", "accuracy") + "$", False),
    ("gradient norm", r"^grad_norm$", True),
)

_NO_CHART = ("step", "seconds")

_MARKED = ("resume", "skipped", "stopped")

_KEY = "Upright lines: dashed where the run was resumed, red where updates were skipped."

_EVENTS = 200

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


def _json(path: Path) -> dict | None:
    """The object in a file; None where there is none to be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _stepped(path: Path) -> list[dict]:
    """The lines that have a step."""
    found = [row for row in read_log(path) if isinstance(row.get("step"), int)]
    return [row for row in found if not isinstance(row["step"], bool)]


def _section(title: str, body: str) -> str:
    return f"<h2>{_text(title)}</h2>\n{body}\n" if body else ""


def _table(rows: Iterator | Sequence, *, head: Sequence[str] = (), kind: str = "") -> str:
    """An HTML table of plain values; "" without rows."""
    body = "".join(
        "<tr>" + "".join(f"<td>{_text(x)}</td>" for x in row) + "</tr>\n" for row in rows
    )
    top = "<tr>" + "".join(f"<th>{_text(x)}</th>" for x in head) + "</tr>\n" if head else ""
    return f'<table class="{kind}">{top}{body}</table>' if body else ""


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """(step, number) of every name, in the order in which names came."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name not in _NO_CHART and isinstance(value, int | float):
                found.setdefault(name, []).append((row["step"], float(value)))
    return found


def _numbers(columns: Mapping[str, Points]) -> str:
    """First, last, least and most of every number."""
    rows = []
    for name, points in columns.items():
        values = [y for _, y in points]
        finite = [y for y in values if math.isfinite(y)]
        ends = (min(finite), max(finite)) if finite else (math.nan, math.nan)
        rows.append((name, *(f"{y:.5g}" for y in (values[0], values[-1], *ends)), points[-1][0]))
    return _table(
        rows, head=("number", "first", "last", "least", "most", "at step"), kind="numbers"
    )


def _charts(columns: Mapping[str, Points], marks: Sequence[Mark]) -> str:
    left, found = dict(columns), []
    for title, pattern, log in _CHARTS:
        own = {name: left.pop(name) for name in list(left) if re.search(pattern, name)}
        found.append(line_chart(title, own, marks=marks, log=log))
    found += [line_chart(name, {name: points}, marks=marks) for name, points in left.items()]
    body = "\n".join(f"<div>{chart}</div>" for chart in found if chart)
    note = f'<p class="note">{_KEY}</p>' if marks else ""
    return f'<div class="charts">{body}</div>{note}' if body else ""


def _event_marks(events: Sequence[Mapping[str, Any]]) -> list[Mark]:
    """Marks of what changes how curves are to be read."""
    told = [event for event in events if event.get("event") in _MARKED][:_EVENTS]
    return [
        Mark(e["step"], e["event"], f"{e['event']} at step {e['step']} {e.get('detail') or ''}")
        for e in told
    ]


def _event_table(events: Sequence[Mapping[str, Any]]) -> str:
    shown = [(e["step"], e.get("event", ""), e.get("detail") or "") for e in events[-_EVENTS:]]
    more = len(events) - len(shown)
    note = f'<p class="note">{more} earlier ones are not shown.</p>' if more else ""
    return note + _table(shown, head=("step", "event", "detail"))


def _samples(rows: Sequence[Mapping[str, Any]]) -> str:
    """Sample text by step, the newest open."""
    by_step: dict[int, list[str]] = {}
    for row in rows:
        prompt, text = _text(row.get("prompt", "")), _text(row.get("text", ""))
        block = f'<pre class="sample"><b>{prompt}</b>{text}</pre>'
        by_step.setdefault(row["step"], []).append(block)
    newest = max(by_step, default=0)
    return "\n".join(
        f"<details{' open' if step == newest else ''}><summary>step {step}</summary>"
        f"{''.join(by_step[step])}</details>"
        for step in sorted(by_step, reverse=True)
    )


def _pictures(folder: Path) -> str:
    """The folder's PNG files, inside the page."""
    found = []
    for path in sorted(folder.glob("*.png")):
        data = path.read_bytes()
        if data.startswith(b"\x89PNG"):
            name, code = _text(path.name), base64.b64encode(data).decode()
            found.append(
                f'<figure><img alt="{name}" src="data:image/png;base64,{code}">'
                f"<figcaption>{name}</figcaption></figure>"
            )
    return "\n".join(found)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Settings as `group.name` and value."""
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", json.dumps(value, ensure_ascii=False)


def report_page(folder: str | Path) -> str:
    """The report as HTML; the same folder always gives the same page.

    Raises:
        ValueError: no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"report_page: `folder` must be a run's folder; got {str(folder)!r}.")
    settings, info = _json(folder / "settings.json"), _json(folder / "system.json")
    rows, events = merged(_stepped(folder / JSONL)), _stepped(folder / "events.jsonl")
    columns, title = _columns(rows), folder.resolve().name
    mode = f"mode {settings['mode']}" if settings and "mode" in settings else ""
    last = f"step {rows[-1]['step']}" if rows else ""
    end = f"last event: {events[-1].get('event')}" if events else ""
    state = " &middot; ".join(_text(part) for part in (mode, last, end) if part)
    system = "\n".join(lines(info)) if info else ""
    body = "".join(
        (
            _section("Curves", _charts(columns, _event_marks(events))),
            _section("Numbers", _numbers(columns)),
            _section("Samples", _samples(_stepped(folder / "samples.jsonl"))),
            _section("Pictures", _pictures(folder)),
            _section("Events", _event_table(events)),
            _section("Settings", _table(_flat(settings or {}))),
            _section("System", f"<pre>{_text(system)}</pre>" if system else ""),
        )
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width"><title>'
        f"{_text(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><h1>{_text(title)}</h1><p>{state}</p>\n{body}</body></html>\n"
    )


def write_report(folder: str | Path) -> Path:
    """`report.html` is in the run's folder; gives its path.

    Raises:
        ValueError: no such folder.
    """
    page, path = report_page(folder), Path(folder) / "report.html"
    with atomic_write(path) as file:
        file.write(page.encode("utf-8", "replace"))
    return path
