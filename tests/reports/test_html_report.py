"""The report of a run: one complete page for any content of the folder."""

import base64
import html.parser
import json
import re
import weakref

import pytest

from rwkv7_jax.cli.commands import main
from rwkv7_jax.reports.html_report import _Metrics, report_page, write_report
from rwkv7_jax.reports.svg_charts import (
    HEIGHT,
    PIECES,
    WIDTH,
    Curve,
    Mark,
    line_chart,
    short,
    ticks,
)

# The smallest picture there is: one grey pixel.
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNoAAAAggCBd81ytgAAAABJRU5ErkJggg=="
)
VOID = {"meta", "img", "br"}
HOSTILE = "<script>alert('x')</script> & \"quotes\""


class Page(html.parser.HTMLParser):
    """A parser that fails at mismatched tags and collects tags, URLs and text."""

    def __init__(self, text):
        super().__init__()
        self.open = []
        self.tags = []
        self.links = []
        self.texts = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [
            value for name, value in attrs if name in ("src", "href", "xlink:href")
        ]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def run(tmp_path):
    """The folder of a resumed run, with text that breaks an unescaped page."""
    rows = [
        {"step": s, "loss_nats": 3.0 / s, "grad_norm": 1.0 / s} for s in range(1, 20)
    ]
    rows += [{"step": 20, "loss_nats": float("nan"), "grad_norm": 0.0}]
    rows += [{"step": s, "held_out_bits_per_byte": 2.0 - s / 40} for s in (0, 10, 20)]
    write_lines(tmp_path / "metrics.jsonl", rows)
    write_lines(
        tmp_path / "samples.jsonl",
        [
            {"step": s, "prompt": HOSTILE, "text": f"text {s} {HOSTILE}"}
            for s in (10, 20)
        ],
    )
    write_lines(
        tmp_path / "events.jsonl",
        [
            {"step": 0, "event": "start", "detail": ""},
            {"step": 7, "event": "resume", "detail": HOSTILE},
            {"step": 9, "event": "skipped", "detail": "loss not finite"},
            {"step": 20, "event": "stopped", "detail": None},
        ],
    )
    settings = {"mode": "state", "data": {"path": HOSTILE, "length": 64}, "model": {}}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    device = {"kind": "NVIDIA H200", "platform": "gpu", "count": 8}
    info = {
        "devices": [device],
        "versions": {"python": "3.11.2", "jax": "0.10.2"},
        "cores": 16,
    }
    (tmp_path / "system.json").write_text(json.dumps(info))
    (tmp_path / "loss.png").write_bytes(PNG)
    return tmp_path


def test_the_page_is_complete_and_self_contained(run):
    page = Page(report_page(run))
    text = "".join(page.texts)
    for words in (
        "Curves",
        "Numbers",
        "Samples",
        "Pictures",
        "Events",
        "Settings",
        "System",
    ):
        assert words in page.texts
    assert "8 x NVIDIA H200" in text and "jax" in text and "mode state" in text
    assert "data.length" in text and "last event: stopped" in text
    assert page.tags.count("svg") == 3
    assert page.links and all(
        link.startswith("data:image/png;base64,") for link in page.links
    )
    assert base64.b64decode(page.links[0].split(",")[1]) == PNG


@pytest.mark.parametrize("near", [[], [0.1], [0.1, 1.0]])
def test_a_search_shows_its_reason_and_nearly_equal_rates(tmp_path, near):
    state = {
        "rate": 0.1,
        "edge": "",
        "measure": "nats",
        "base": {"nats": 2.0},
        "curve": [{"rate": 0.1, "nats": 1.0}, {"rate": 1.0, "nats": 1.1}],
    }
    # A record of an earlier version has neither.
    if near:
        state |= {"why": "its loss is the lowest", "near": near}
    (tmp_path / "rate_search.json").write_text(json.dumps({"states": {"": state}}))
    page = " ".join(Page(report_page(tmp_path)).texts)
    assert "chosen: 0.1" in page
    assert ("chosen: 0.1: its loss is the lowest" in page) == bool(near)
    assert ("Nearly equal: 0.1, 1" in page) == (len(near) > 1)


@pytest.mark.parametrize(
    ("start", "words"),
    [
        ("", "better than no state"),
        ("poet.pth", "better than the state of config.start"),
    ],
)
def test_a_search_is_compared_with_the_start_state(tmp_path, start, words):
    curve = [{"rate": 0.1, "nats": 3.0}, {"rate": 1.0, "nats": 4.0}]
    state = {"rate": None, "edge": "", "measure": "nats", "curve": curve}
    record = {"states": {"": state | {"base": {"nats": 2.0}}}}
    (tmp_path / "rate_search.json").write_text(json.dumps(record))
    (tmp_path / "settings.json").write_text(json.dumps({"start": start}))
    page = " ".join(Page(report_page(tmp_path)).texts)
    assert f"no rate is {words}" in page
    assert ("without a state" in page) == (not start)


def test_text_of_users_and_models_is_escaped(run):
    page = Page(report_page(run))
    assert not {"script", "iframe", "object", "link"} & set(page.tags)
    assert "".join(page.texts).count("<script>") >= 5


def test_resumes_and_skipped_updates_are_marked_in_every_chart(run):
    text = report_page(run)
    assert text.count('class="mark resume"') == 3
    assert text.count('class="mark skipped"') == 3
    assert 'class="mark start"' not in text


def test_the_page_is_deterministic(run):
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first
    assert (run / "report.html").read_text() == report_page(run)


@pytest.mark.parametrize(
    ("missing", "section"),
    [
        ("metrics.jsonl", "Curves"),
        ("samples.jsonl", "Samples"),
        ("events.jsonl", "Events"),
        ("settings.json", "Settings"),
        ("system.json", "System"),
        ("loss.png", "Pictures"),
    ],
)
def test_a_missing_file_omits_its_section(run, missing, section):
    (run / missing).unlink()
    assert section not in Page(report_page(run)).texts


def test_an_empty_folder_still_gives_a_page(tmp_path):
    page = Page(report_page(tmp_path))
    assert tmp_path.name in page.texts and "h2" not in page.tags


def test_damaged_files_do_not_break_the_page(run):
    for name in ("settings.json", "system.json", "samples.jsonl", "loss.png"):
        (run / name).write_bytes(b'\xff{"step": 1, "pro')
    (run / "events.jsonl").write_text('[1]\n{"step": "x"}\n{"step": true}\nnull\n')
    page = Page(report_page(run))
    assert "Curves" in page.texts
    assert not {"Samples", "Settings", "System", "Pictures", "Events"} & set(page.texts)


def test_extreme_numbers_do_not_break_the_page(run):
    huge = 10**400
    lines = []
    for name in ("loss_nats", "grad_norm", "step_seconds", "compile_seconds"):
        for value in (huge, -huge, 1e300, -1e300, 1e-320):
            lines.append(json.dumps({"step": 3, name: value}))
    lines.append(json.dumps({"step": huge, "loss_nats": 1.0}))
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (run / "events.jsonl").write_text(
        f'{{"step": 0, "event": "start", "time": {huge}}}\n'
        f'{{"step": {huge}, "event": "resume", "time": 2}}\n'
        '{"step": 3, "event": "finished", "time": 3}\n'
    )
    for system in ('{"devices": [1]}', '{"memory_bytes": [1]}', '{"versions": 3}'):
        (run / "system.json").write_text(system)
        page = report_page(run)
        assert "Curves" in page
        assert ">System<" not in page


def test_a_missing_folder_is_rejected(tmp_path, capsys):
    with pytest.raises(ValueError, match="`folder` must be a run directory; got"):
        report_page(tmp_path / "none")
    assert main(["report", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith("rwkv7: report_page: `folder` must be")


def test_the_command_writes_the_report_and_prints_its_path(run, capsys):
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")


def test_a_page_shows_the_newest_of_many_samples(tmp_path):
    rows = [{"step": step, "prompt": "", "text": f"<{step}>"} for step in range(1000)]
    write_lines(tmp_path / "samples.jsonl", rows)
    page = Page(report_page(tmp_path))
    assert page.tags.count("pre") == 200
    assert "<999>" in page.texts and "<799>" not in page.texts
    assert "800 earlier samples hidden." in page.texts


def test_a_page_marks_the_newest_of_many_events(run):
    rows = [{"step": step, "event": "skipped"} for step in range(1, 301)]
    write_lines(run / "events.jsonl", rows)
    text = report_page(run)
    # The curves end at step 20, so none of these is in a chart.
    assert 'class="mark skipped"' not in text
    assert "100 earlier events hidden." in text
    write_lines(run / "events.jsonl", [*rows, {"step": 9, "event": "resume"}])
    assert report_page(run).count('class="mark resume"') == 3


def points_of(svg, shape):
    """Return the coordinates of the shapes' points."""
    found = re.findall(rf'<{shape} points="([^"]+)"', svg)
    return [[tuple(map(float, p.split(","))) for p in line.split()] for line in found]


def test_a_curve_keeps_its_order_and_stays_inside_the_picture():
    (line,) = points_of(
        line_chart("t", {"a": Curve([(0, 1.0), (5, 3.0), (10, 2.0)])}), "polyline"
    )
    assert [x for x, _ in line] == sorted(x for x, _ in line)
    assert line[1][1] < line[2][1] < line[0][1]
    assert all(0 < x < WIDTH and 0 < y < HEIGHT for x, y in line)


def test_a_legend_never_covers_the_title_and_every_line_is_named():
    names = [f"state {index}/loss" for index in range(40)]
    curves = {name: Curve([(0, 1.0), (1, 2.0)]) for name in names}
    svg = line_chart("loss (nats per token)", curves)
    shown = re.findall(r'<text x="(\d+)" y="16" text-anchor="end"[^>]*>([^<]+)<', svg)
    assert 1 < len(shown) < 6
    assert all(int(x) - 7 * len(name) > 62 + 7 * 21 for x, name in shown)
    assert re.findall("<title>([^<]+)</title>", svg) == names


def test_a_long_curve_is_downsampled_to_means():
    svg = line_chart("t", {"a": Curve((x, x % 2) for x in range(10 * PIECES))})
    (line,) = points_of(svg, "polyline")
    (band,) = points_of(svg, "polygon")
    assert len(line) == PIECES and len(band) == 2 * PIECES
    middle = {y for _, y in line}
    assert len(middle) == 1 and min(y for _, y in band) < middle.pop() < max(
        y for _, y in band
    )


def test_the_curve_of_a_long_run_keeps_its_picture_in_little_memory():
    def height(x):
        return x + 1000 * (x == 70_001)

    curve = Curve((x, height(x)) for x in range(100_000))
    assert len(curve._pieces) <= 8 * PIECES
    pieces = curve.pieces()
    assert PIECES // 2 < len(pieces) <= PIECES
    assert sum(piece.count for piece in pieces) == 100_000
    assert sum(piece.y for piece in pieces) == sum(map(height, range(100_000)))
    assert max(piece.most for piece in pieces) == 99_999
    first = 0
    for piece in pieces:
        part = [height(x) for x in range(first, first + piece.count)]
        first += piece.count
        assert (piece.least, piece.most) == (min(part), max(part))
        assert piece.x == sum(range(first - piece.count, first))


def test_points_are_drawn_by_x_and_the_last_of_an_x_counts():
    unsorted = Curve([(5, 3.0), (0, 9.0), (10, 2.0), (0, 1.0)])
    in_order = Curve([(0, 1.0), (5, 3.0), (10, 2.0)])
    assert unsorted.pieces() == in_order.pieces()


class _Row(dict):
    """A row of a log that can be watched."""


def test_the_report_holds_no_row_of_the_log():
    watched = []

    def rows():
        for step in range(100):
            row = _Row(step=step, loss_nats=1.0)
            watched.append(weakref.ref(row))
            yield row

    metrics = _Metrics(rows())
    assert metrics.last_step == 99
    assert not any(row() for row in watched)


@pytest.mark.parametrize("value", [0.0, 7.0, -3.0, 1e-9, 1e12])
def test_single_points_and_constants_can_be_plotted(value):
    for points in ([(3, value)], [(0, value), (1, value)]):
        svg = line_chart("t", {"a": Curve(points)})
        assert "nan" not in svg and "circle" in svg


def test_a_chart_without_finite_points_is_empty():
    assert line_chart("t", {"a": Curve([(1, float("nan"))])}) == ""
    assert line_chart("t", {"a": Curve([(1, 0.0)], log=True)}) == ""
    assert line_chart("t", {}, marks=[Mark(1, "resume", "")]) == ""


def test_ticks_are_round_and_in_range():
    assert ticks(0.0, 1.0, 5) == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(-7.0, 13.0, 4) == pytest.approx([-5.0, 0.0, 5.0, 10.0])
    assert ticks(1e-6, 9e-6, 4) == pytest.approx([2e-6, 4e-6, 6e-6, 8e-6])


def test_axis_labels_are_short():
    values = (0.0, 6e-4, 1.5, -250.0, 9500.0, 12_500.0, 3e6, 2e9, 5e12)
    expected = ["0", "0.0006", "1.5", "-250", "9500", "12.5k", "3M", "2G", "5e+12"]
    assert [short(value) for value in values] == expected
