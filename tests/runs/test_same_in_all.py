"""Processes that were not given the same run are rejected in all of them, with the difference."""

import dataclasses
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from processes_as_threads import run_as_processes
from smallest_runs import mode_settings, save_base_model

from rwkv7_jax.runs import same_in_all, training_run
from rwkv7_jax.runs.resume import first_state
from rwkv7_jax.runs.run_directory import NullRunDirectory
from rwkv7_jax.runs.same_in_all import require_same_command, require_same_inputs

BEGINNING = "all processes of a run must have the same settings, files and versions: "
LOCK = threading.Lock()
IDENTITY = {
    "settings": {},
    "model": {"width": "16"},
    "inputs": {"data": "of /a", "data content": "12", "anchor": "34"},
}


def write_text(path, word):
    path.write_text(f"the {word} sat on the mat and slept\n" * 40)
    return str(path)


@pytest.fixture
def base(tmp_path):
    """Returns the path of a model of one layer."""
    path = tmp_path / "base.pth"
    save_base_model(path)
    return path


def ends(call, *choices):
    """Returns how each process ends that makes a call with its own choice."""
    outcomes, _ = run_as_processes(
        lambda member: call(member, choices[member.index]), count=len(choices)
    )
    return outcomes


def rejected(outcomes):
    """Returns the end of the message that all processes give."""
    assert {type(outcome) for outcome in outcomes} == {ValueError}
    (message,) = {str(outcome) for outcome in outcomes}
    assert message.startswith(BEGINNING)
    return message.removeprefix(BEGINNING)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("steps", (4, 8)),
        ("log_every", (1, 2)),
        ("evaluation.every", (1, 2)),
        ("optimizer.learning_rate", (0.5, 0.25)),
        ("data.length", (24, 32)),
    ],
)
def test_other_settings_are_rejected_even_those_that_a_resumed_run_may_change(
    base, name, values
):
    settings = [mode_settings("state", base, **{name: value}) for value in values]
    message = rejected(ends(require_same_command, *settings))
    expected = f"`config.{name}` is {values[0]} in process 0, and {values[1]} in"
    assert message.startswith(expected)
    assert ends(require_same_command, settings[0], settings[0]) == [None, None]


def test_the_process_that_differs_is_named(base):
    settings = [mode_settings("state", base, steps=steps) for steps in (4, 4, 5)]
    message = rejected(ends(require_same_command, *settings))
    assert message == "`config.steps` is 4 in process 0, and 5 in process 2."


def test_a_file_may_have_another_path_in_each_process_but_may_not_be_missing(
    base, tmp_path
):
    paths = [write_text(tmp_path / name, "cat") for name in ("a.txt", "b.txt")]
    paths.append(str(tmp_path / "none.txt"))
    settings = [mode_settings("pretrain", base, data__path=path) for path in paths]
    assert ends(require_same_command, *settings[:2]) == [None, None]
    message = rejected(ends(require_same_command, *settings))
    assert message == (
        "the file of `config.data.path` is present in process 0, and absent in process 2."
    )


@pytest.mark.parametrize(
    ("mode", "setting", "name"),
    [
        ("state", "evaluation__retention", "retention"),
        ("state", "start", "start"),
        ("context", "test_time__context", "context"),
    ],
)
def test_texts_of_evaluations_and_starts_may_not_differ_either(
    base, tmp_path, monkeypatch, mode, setting, name
):
    path = tmp_path / "general.txt"
    settings = mode_settings(mode, base, **{setting: str(path)})
    read = same_in_all.content_digests
    own = threading.local()

    def digests(paths):
        with LOCK:
            write_text(path, own.word)
            return read(paths)

    def call(member, word):
        own.word = word
        require_same_command(member, settings)

    # One path on two machines.
    path.touch()
    monkeypatch.setattr(same_in_all, "content_digests", digests)
    assert ends(call, "cat", "cat") == [None, None]
    assert rejected(ends(call, "cat", "dog")).startswith(f"the digest of {name}")


def test_processes_that_share_weights_may_not_start_from_different_ones(
    tmp_path, monkeypatch
):
    own = threading.local()
    monkeypatch.setattr(first_state, "group_of_run", lambda: own.member)
    monkeypatch.setattr(first_state.sharding, "is_shared", lambda mesh: True)
    folder = SimpleNamespace(
        share_checkpoints=lambda: None,
        restore=lambda abstract, identity, init: (init(), None),
    )

    def call(member, scale):
        own.member = member
        state = {"norm": np.full(3, scale, np.float32)}
        first_state._restore_in_all(folder, None, {}, lambda: state, None)

    assert ends(call, 1.0, 1.0) == [None, None]
    assert rejected(ends(call, 1.0, 2.0)).startswith("the digest of the first state is")


def test_other_code_or_versions_are_rejected(base, monkeypatch):
    settings = mode_settings("state", base)
    own = threading.local()

    def call(member, version):
        own.version = version
        require_same_command(member, settings)

    monkeypatch.setattr(same_in_all, "versions", lambda _: {"jax": own.version})
    message = rejected(ends(call, "1", "2"))
    assert message == "the version of jax is 1 in process 0, and 2 in process 1."
    monkeypatch.setattr(same_in_all, "versions", lambda _: {})
    monkeypatch.setattr(same_in_all, "_code_digest", lambda: own.version)
    assert rejected(ends(call, "1", "2")).startswith("the code of rwkv7_jax is 1 in")


def test_the_digest_of_the_code_is_that_of_its_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(same_in_all, "_CODE", tmp_path)
    (tmp_path / "rwkv7_jax" / "model").mkdir(parents=True)
    found = []
    for name, text in (("a.py", "1"), ("a.py", "2"), ("b.py", ""), ("b.pyc", "3")):
        (tmp_path / "rwkv7_jax" / "model" / name).write_text(text)
        found.append(same_in_all._code_digest())
    assert len(set(found)) == 3 and found[2] == found[3]


@pytest.mark.parametrize(
    ("group", "change", "message"),
    [
        (
            "inputs",
            {"anchor": "35"},
            "the digest of anchor is 34 in process 0, and 35 in",
        ),
        (
            "inputs",
            {"start": "1"},
            "the digest of start is absent in process 0, and 1 in",
        ),
        ("inputs", {"data content": "13"}, "the digest of data content is 12 in"),
        (
            "model",
            {"width": "32"},
            "`width` of the model is 16 in process 0, and 32 in",
        ),
    ],
)
def test_another_model_or_other_data_is_rejected(group, change, message):
    other = {**IDENTITY, group: {**IDENTITY[group], **change}}
    found = rejected(ends(require_same_inputs, IDENTITY, other))
    assert found.startswith(message)


def test_a_digest_of_a_path_may_differ_where_the_content_is_equal():
    other = {**IDENTITY, "inputs": {**IDENTITY["inputs"], "data": "of /b"}}
    assert ends(require_same_inputs, IDENTITY, other) == [None, None]


def test_data_that_one_process_cannot_read_or_that_differs_ends_all(
    base, tmp_path, monkeypatch
):
    torn = write_text(tmp_path / "a.jsonl", "{")
    plain = {"tuning__anchor": 0.0, "tuning__anchor_path": None}
    settings = mode_settings("state", base, **plain)
    own = threading.local()
    monkeypatch.setattr(training_run, "group_of_run", lambda: own.member)

    def set_up(member, path):
        own.member = member
        data = dataclasses.replace(settings.data, path=path)
        one = dataclasses.replace(settings, data=data)
        training_run.set_up(NullRunDirectory(tmp_path, tmp_path, one, {}))

    texts = [write_text(tmp_path / f"{word}.txt", word) for word in ("cat", "dog")]
    assert ends(set_up, texts[0], texts[0]) == [None, None]
    assert rejected(ends(set_up, *texts)).startswith("the digest of data is ")
    first, second = ends(set_up, texts[0], torn)
    assert "a.jsonl" in str(second) and str(first) == str(second)
