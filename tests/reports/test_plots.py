"""Scatter plots and their Pareto front."""

import pytest

from rwkv7_jax.reports import plots


def test_the_front_is_the_pareto_front():
    points = [(4.0, 0.9, "d"), (1.0, 0.2, "a"), (2.0, 0.5, "b"), (3.0, 0.4, "c")]
    points += [(2.0, 0.3, "worse at the same size"), (9.0, 0.9, "no better")]
    front = plots.front_of(points)
    assert front == [(1.0, 0.2), (2.0, 0.5), (4.0, 0.9), (9.0, 0.9)]


def test_points_are_drawn_with_and_without_a_front(tmp_path):
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    groups = {"one": [(256.0, 0.1, "small")], "two": [(4096.0, 0.9, "large")]}
    for name, with_front in (("a.png", False), ("b.png", True)):
        plots.scatter(tmp_path / name, groups, x="bytes", y="share", front=with_front)
        assert (tmp_path / name).stat().st_size > 5000


@pytest.mark.parametrize("name", ["a", "a.png", "a.PNG", "a.svg", ".hidden"])
def test_a_format_that_can_be_drawn_is_accepted(name):
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    plots.check_format(name, "`--picture`")


@pytest.mark.parametrize("name", ["a.txt", "a.pn", "a.png.gz"])
def test_a_format_that_cannot_be_drawn_is_rejected(name):
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    with pytest.raises(ValueError, match=rf"`--picture` must end in .*\.png, .*{name}"):
        plots.check_format(name, "`--picture`")


@pytest.mark.parametrize("count", [1, 10, 23])
def test_every_line_and_every_group_is_drawn(tmp_path, monkeypatch, count):
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, *_, **__: figures.append(figure))
    lines = {
        f"line {index}": [(0.0, float(index)), (1.0, 2.0)] for index in range(count)
    }
    plots.curves(tmp_path / "a.png", lines, x="x", y="y")
    assert len(figures[0].axes[0].lines) == count
    groups = {f"group {index}": [(2.0, float(index), "a")] for index in range(count)}
    plots.scatter(tmp_path / "b.png", groups, x="x", y="y")
    assert len(figures[1].axes[0].collections) == count
    assert len(figures[1].axes[0].texts) == count
