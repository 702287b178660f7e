"""Phases of train.py and eval.py that may take minutes say what is waited for."""

import contextlib
import threading
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from run_programs import load_program
from slow_phases import SlowPhase

from rwkv7_jax.evaluation.task_scores import QuestionScores
from rwkv7_jax.runs import comparison, devices, training_run
from rwkv7_jax.runs.comparison import Comparison
from rwkv7_jax.runs.input_pipeline import DrawnBatches, PrefetchedBatches
from rwkv7_jax.runs.resume.checkpointer import SaveJob
from rwkv7_jax.runs.settings import Settings


class Interrupted(Exception):
    """Ends a phase whose result nobody needs."""


@pytest.fixture
def slow(monkeypatch, capsys):
    return SlowPhase(monkeypatch, capsys, error=Interrupted())


def start_devices(slow, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", slow)
    devices.start_devices()


def load_model_and_data(slow, monkeypatch):
    monkeypatch.setattr(training_run, "make_mode", slow)
    training_run.set_up(SimpleNamespace(settings=Settings(), path=Path()))


def read_batch(slow, monkeypatch):
    def batches():
        slow()
        yield

    feed = PrefetchedBatches(batches(), None, rows=1)
    with contextlib.closing(feed):
        feed(0, lambda: None)


def draw_batch(slow, monkeypatch):
    source = SimpleNamespace(batch=slow)
    DrawnBatches(source, None).batch(2, lambda: None)


def write_checkpoint(slow, monkeypatch):
    def write():
        with pytest.raises(Interrupted):
            slow()

    job = SaveJob(step=7, size=0, best=set(), thread=threading.Thread(target=write))
    job.thread.start()
    job.join()
    raise Interrupted


def read_prompt(slow, monkeypatch):
    monkeypatch.setattr(comparison, "prefill_state", slow)
    base = SimpleNamespace(starts={}, model=None, params=None)
    Comparison.with_prompts(base, np.arange(3), (2,))


@pytest.mark.parametrize(
    ("phase", "what"),
    [
        (start_devices, "JAX to start the devices"),
        (load_model_and_data, "the model and the data, and their digests"),
        (read_batch, "the first batch"),
        (draw_batch, "the first batch"),
        (write_checkpoint, "the checkpoint of step 7 to be written"),
        (read_prompt, "the state after the prompt"),
    ],
)
def test_a_phase_that_takes_long_is_named_in_the_meantime(
    phase, what, slow, monkeypatch
):
    with pytest.raises(Interrupted):
        phase(slow, monkeypatch)
    assert slow.said.startswith(f"waiting for {what} (")


def test_answered_questions_are_shown_in_a_bar(capsys):
    score = QuestionScores(np.ones(2), np.ones(2), ("a", "b"))

    def answer(comparison, start, *, on_progress):
        for done in (1, 2):
            on_progress(done, 2)
        return {"accuracy": score}

    questions = SimpleNamespace(notes=(), answer=answer, as_json=dict)
    starts = SimpleNamespace(starts={"base": None, "tuned state": None})
    load_program("eval.py")["evaluate_questions"](questions, starts, None)
    lines = capsys.readouterr().out.splitlines()
    assert "base 100%  0:00 left  2 of 2 questions" in lines
    assert "tuned state 100%  0:00 left  2 of 2 questions" in lines
