"""Profiles of some steps of a run."""

import jax
import jax.numpy as jnp
import pytest

from rwkv7_jax.runs.monitoring.profiler import ProfileWindow


@pytest.mark.parametrize(
    ("first", "traced"),
    [(2, [2, "start", 3, 4, "stop", 5]), (4, ["start", 4, "stop", 5]), (5, [5])],
)
def test_a_run_resumed_in_the_window_traces_the_rest(
    tmp_path, monkeypatch, first, traced
):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda _: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    window = ProfileWindow((3, 4), tmp_path)
    for step in range(first, 6):
        window.before(step)
        calls.append(step)
        window.after(step, jnp.zeros(()))
    window.close()
    assert calls == traced


@pytest.mark.parametrize("process", [0, 1])
def test_only_process_0_traces_and_only_the_chosen_steps(
    tmp_path, monkeypatch, capsys, process
):
    monkeypatch.setattr(jax, "process_index", lambda: process)
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", calls.append)
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    window = ProfileWindow((2, 3), tmp_path)
    for step in range(1, 5):
        window.before(step)
        calls.append(step)
        window.after(step, jnp.zeros(()))
    window.close()
    traced = [1, str(tmp_path), 2, 3, "stop", 4]
    assert calls == (traced if process == 0 else [1, 2, 3, 4])
    assert capsys.readouterr().out.count("profile") == (process == 0)
