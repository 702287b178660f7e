"""Phases of train.py and eval.py that may take minutes say what is waited for."""

import contextlib
import threading
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from run_programs import load_program, load_train
from slow_phases import SlowPhase

from rwkv7_jax.evaluation.task_scores import QuestionScores
from rwkv7_jax.plan import __main__ as plan_program
from rwkv7_jax.runs import comparison, devices, process, training_run
from rwkv7_jax.runs.comparison import Comparison
from rwkv7_jax.runs.input_pipeline import DrawnBatches, PrefetchedBatches
from rwkv7_jax.runs.modes import test_time
from rwkv7_jax.runs.modes.base import TrainingMode
from rwkv7_jax.runs.modes.test_time import TestTimeMode
from rwkv7_jax.runs.process import StopSignals
from rwkv7_jax.runs.resume.checkpointer import SaveJob
from rwkv7_jax.runs.run_directory import OwnedRunDirectory
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


def prepare(slow, monkeypatch):
    class Mode(TrainingMode):
        prepare = slow

        def set_up(self):
            pass

        def retention_evaluators(self):
            return []

        def _check_evaluations(self):
            pass

    Mode.__abstractmethods__ = frozenset()
    Mode(Settings(), Path())


def load_teacher(slow, monkeypatch):
    monkeypatch.setattr(test_time, "load_model", slow)
    mode = object.__new__(TestTimeMode)
    mode.settings = Settings()
    mode.mesh = None
    mode._collect_traces("large.pth")


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


def restore(slow, monkeypatch):
    train_steps = load_train()["train_steps"]
    monkeypatch.setitem(train_steps.__globals__, "restore_or_init", slow)
    mode = SimpleNamespace(optimizer=lambda: (None, None))
    run = SimpleNamespace(mode=mode, mesh=None, settings=None, identity=None)
    with StopSignals() as stop:
        train_steps(run, None, stop)


def write_checkpoint(slow, monkeypatch):
    def write():
        with pytest.raises(Interrupted):
            slow()

    job = SaveJob(step=7, size=0, best=set(), thread=threading.Thread(target=write))
    job.thread.start()
    job.join()
    raise Interrupted


def write_result(slow, monkeypatch):
    train = load_train()["train"]
    run = SimpleNamespace(mode=SimpleNamespace(mesh=None), mesh=None, identity=None)
    for name, value in {
        "set_up": lambda folder: run,
        "train_steps": lambda *_: (None, None),
        "check_stopped": lambda *_: None,
        "save_result": slow,
    }.items():
        monkeypatch.setitem(train.__globals__, name, value)
    folder = SimpleNamespace(settings=SimpleNamespace(finds_rate=False))
    with StopSignals() as stop:
        train(folder, stop)


def write_last_files(slow, monkeypatch):
    folder = object.__new__(OwnedRunDirectory)
    folder._lock = SimpleNamespace(release=lambda: None)
    folder._backup = None
    folder.checkpoints = SimpleNamespace(leave=lambda: None)
    folder._metrics = SimpleNamespace(close=slow)
    folder.__exit__(None, None, None)


def read_prompt(slow, monkeypatch):
    monkeypatch.setattr(comparison, "prefill_state", slow)
    base = SimpleNamespace(starts={}, model=None, params=None)
    Comparison.with_prompts(base, np.arange(3), (2,))


def evaluate(slow, monkeypatch):
    main = load_program("eval.py")["main"]
    monkeypatch.setattr(process, "program", lambda *_, **__: StopSignals())
    for name in ("read_settings", "refuse_settings_without_effect", "check_devices"):
        monkeypatch.setitem(main.__globals__, name, lambda *_: None)
    for name in ("config_flags", "compilation_cache"):
        monkeypatch.setitem(main.__globals__, name, SimpleNamespace())
    main.__globals__["config_flags"].config_values = dict
    cache = main.__globals__["compilation_cache"]
    cache.user_folder = cache.enable_compilation_cache = lambda *_: None
    monkeypatch.setitem(main.__globals__, "evaluate", slow)
    main(["eval.py"])


def plan(slow, monkeypatch):
    main = plan_program.main
    monkeypatch.setattr(process, "program", lambda *_, **__: StopSignals())
    monkeypatch.setattr(plan_program, "_TOPOLOGY", SimpleNamespace(value="v5e-1"))
    for name in ("_PRESET", "_SEARCH", "_TIMEOUT", "_JSON"):
        monkeypatch.setattr(plan_program, name, SimpleNamespace(value=None))
    monkeypatch.setattr(plan_program, "_settings", dict)
    job = SimpleNamespace(compile=slow)
    monkeypatch.setattr(plan_program, "make_job", lambda *_: job)
    main(["plan"])


@pytest.mark.parametrize(
    ("phase", "what"),
    [
        (start_devices, "JAX to start the devices"),
        (load_model_and_data, "the model and the data, and their digests"),
        (prepare, "the initial state and its statistics"),
        (load_teacher, "the weights of large.pth"),
        (read_batch, "the first batch"),
        (draw_batch, "the batch of step 3"),
        (restore, "the newest checkpoint, or a first state"),
        (write_checkpoint, "the checkpoint of step 7 to be written"),
        (write_result, "the result to be written"),
        (write_last_files, "the run's last files"),
        (read_prompt, "the state after the prompt"),
        (evaluate, "the evaluation"),
        (plan, "the compilation of the step"),
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
