"""What follows a step: a signal may interrupt an evaluation, but not its recording."""

import contextlib
import os
import signal
import time
from types import SimpleNamespace

import numpy as np

from rwkv7_jax.evaluation.metric import Metric
from rwkv7_jax.runs import after_step, waiting
from rwkv7_jax.runs.process import StopSignals

METRICS = {
    "held_out_bits_per_byte": Metric(1.0, "bits_per_byte", higher_is_better=False)
}
SAMPLES = [("a prompt", "its text")]


def evaluated(signalled, *, seconds=0.0):
    """Evaluates with a signal at one point; returns what was recorded and whether the run stops."""
    recorded = []

    def at(name, result=None):
        if name == signalled:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    def log_evaluation(step, metrics):
        recorded.append("metrics")
        at("log")

    def evaluate(params):
        time.sleep(seconds)
        return at("evaluate", METRICS)

    mode = SimpleNamespace(
        mesh=None,
        evaluate=evaluate,
        sample_texts=lambda params: iter(SAMPLES),
    )
    run = SimpleNamespace(mode=mode, local_params=lambda state: None)
    log = SimpleNamespace(paused=contextlib.nullcontext, log_evaluation=log_evaluation)
    folder = SimpleNamespace(note_sample=lambda *_: recorded.append("sample"))
    state = SimpleNamespace(step=np.asarray(3))
    with StopSignals() as stop:
        after_step._evaluate_unless_stopped(run, state, folder, log, stop)
        stops = stop.should_stop()
    return recorded, stops


def test_an_evaluation_interrupted_by_a_signal_leaves_no_record():
    assert evaluated("evaluate") == ([], True)


def test_a_signal_during_recording_leaves_a_complete_record(capsys):
    assert evaluated("log") == (["metrics", "sample"], True)
    assert "its text" in capsys.readouterr().out


def test_without_a_signal_an_evaluation_is_recorded_once():
    assert evaluated(None) == (["metrics", "sample"], False)


def test_a_long_evaluation_is_reported_in_the_meantime(monkeypatch, capsys):
    monkeypatch.setattr(waiting, "SECONDS", 0.05)
    evaluated(None, seconds=0.3)
    assert "waiting for an evaluation (" in capsys.readouterr().err
