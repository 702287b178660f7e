"""Named start states: added, replaced and removed while requests are answered."""

import dataclasses
import os
import sys
import threading
from pathlib import Path

import jax.numpy as jnp
import pytest
from engine_cases import (
    BYTES,
    CONFIG,
    MODEL,
    STATES,
    alone,
    answer,
    ask,
    assert_same,
    drawn_requests,
    drawn_state,
    work,
)

from rwkv7_jax.checkpoints import load_state, save_state
from rwkv7_jax.model.state import init_state
from rwkv7_jax.serving.engine import Engine
from rwkv7_jax.serving.requests import Request, UnknownState
from rwkv7_jax.serving.start_states import StartStates
from rwkv7_jax.serving.state_files import StateFiles
from rwkv7_jax.tuning.upscaling import upscale


def test_the_states_of_these_tests_give_different_answers(engine):
    # Otherwise a request that read another one's state would pass unseen.
    differ = 0
    for request in drawn_requests(18):
        said = set()
        for state in (None, *STATES):
            said.add(answer(engine, dataclasses.replace(request, state=state)).tokens)
        differ += len(said) == 3
    assert differ >= 9


def test_states_are_added_and_removed_while_requests_are_answered(params, engine):
    request = Request(tuple(range(40, 90)), state="poet", tokens=9, temperature=0.0)
    before = answer(engine, request)
    _, answers = ask(engine, request)
    engine.tick()
    new = drawn_state(9)
    engine.put_state("poet", new)
    engine.put_state("critic", new)
    after = answer(engine, request)
    # The one that had begun goes on; nothing of the old state is in the cache for the new.
    assert answers[0].tokens == before.tokens
    assert after.cached_tokens == 0
    assert_same(after, alone(params, request, {"poet": new}))
    assert engine.state_names == ("poet", "judge", "critic")
    # What was taken before goes on, also where its prompt was not read yet.
    _, waiting = ask(engine, request)
    engine.remove_state("poet")
    work(engine)
    assert waiting[0].tokens == after.tokens
    with pytest.raises(UnknownState, match=r"\(judge, critic\); got 'poet'"):
        ask(engine, request)
    with pytest.raises(UnknownState):
        engine.remove_state("poet")
    as_critic = dataclasses.replace(request, state="critic")
    assert answer(engine, as_critic).tokens == after.tokens


def test_a_state_that_would_change_the_compiled_programs_is_rejected(params, engine):
    tokens = jnp.arange(40)[None]
    upscaled = upscale(MODEL, params, tokens, size=8, kind="gaussian")
    with pytest.raises(
        ValueError, match="put_state: `state` must have a memory of the same kind"
    ):
        engine.put_state("wide", upscaled)
    with pytest.raises(ValueError, match=r"put_state: `state.wkv` must have shape"):
        other = dataclasses.replace(CONFIG, head_size=32)
        engine.put_state("other", init_state(other))
    both = Engine(MODEL, params, BYTES, {"wide": upscaled}, slots=1)
    both.put_state("poet", STATES["poet"])
    request = Request((65, 66, 67), state="poet", tokens=6, temperature=0.0)
    assert_same(answer(both, request), alone(params, request))


def test_names_are_listed_while_another_thread_adds_some():
    # Many, so that listing them takes long enough to be interrupted.
    names = set(map(str, range(200)))
    states = StartStates(CONFIG, dict.fromkeys(names, STATES["poet"]))

    def add():
        for number in range(50):
            states.put(f"new {number}", STATES["poet"])

    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    other = threading.Thread(target=add)
    other.start()
    try:
        while other.is_alive():
            assert set(states.names()) >= names
    finally:
        other.join()
        sys.setswitchinterval(usual)


@pytest.mark.parametrize("name", [None, 5])
def test_a_state_has_a_name(params, unchecked, name):
    with pytest.raises(TypeError, match="Engine: each name in `states` must be"):
        Engine(MODEL, params, BYTES, {name: STATES["poet"]})


def test_states_of_another_model_are_rejected(params):
    other = init_state(dataclasses.replace(CONFIG, head_size=32))
    with pytest.raises(ValueError, match=r"Engine: `state.wkv` must have shape"):
        Engine(MODEL, params, BYTES, {"other": other})


def test_the_current_files_of_a_folder_are_served(params, tmp_path, caplog):
    files = StateFiles(
        {"own": tmp_path / "own" / "a.pth"},
        [tmp_path],
        suffixes=[".pth"],
        load=lambda path: load_state(path, config=CONFIG),
    )
    with pytest.raises(ValueError, match=r"a\.pth"):
        files.read()
    (tmp_path / "own").mkdir()
    save_state(tmp_path / "own" / "a.pth", STATES["judge"])
    save_state(tmp_path / "poet.pth", STATES["poet"])
    save_state(tmp_path / "no name.pth", STATES["poet"])
    engine = Engine(MODEL, params, BYTES, files.read(), slots=1)
    request = Request((65, 66, 67), state="poet", tokens=6, temperature=0.0)
    assert engine.state_names == ("own", "poet")
    assert_same(answer(engine, request), alone(params, request))

    # Replaced, new, gone, damaged: one after the other.
    new = drawn_state(9)
    save_state(tmp_path / "poet.pth", new)
    save_state(tmp_path / "critic.pth", new)
    files.refresh(engine)
    assert_same(answer(engine, request), alone(params, request, {"poet": new}))
    assert set(engine.state_names) == {"own", "poet", "critic"}
    (tmp_path / "critic.pth").unlink()
    (tmp_path / "own" / "a.pth").unlink()
    (tmp_path / "poet.pth").write_bytes(b"damaged")
    for _ in range(2):
        files.refresh(engine)
    assert set(engine.state_names) == {"own", "poet"}
    assert_same(answer(engine, request), alone(params, request, {"poet": new}))
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(f"serve: `{tmp_path / 'poet.pth'}` is not served: ")


@pytest.fixture
def folder_of_states(params, tmp_path):
    """A folder with the state "poet", its files, and the engine that serves it."""
    folder = tmp_path / "states"
    folder.mkdir()
    save_state(folder / "poet.pth", STATES["poet"])
    files = StateFiles(
        {},
        [folder],
        suffixes=[".pth"],
        load=lambda path: load_state(path, config=CONFIG),
    )
    return folder, files, Engine(MODEL, params, BYTES, files.read(), slots=1)


def refuse(path):
    raise PermissionError(13, "Permission denied", str(path))


@pytest.mark.parametrize("how", ["gone", "unreadable", "file"])
def test_states_remain_while_their_disk_is_unavailable(
    folder_of_states, monkeypatch, caplog, how
):
    folder, files, engine = folder_of_states
    away = folder.with_name("away")
    with monkeypatch.context() as patch:
        if how == "gone":
            folder.rename(away)
        else:
            patch.setattr(Path, "iterdir" if how == "unreadable" else "stat", refuse)
        for _ in range(2):
            files.refresh(engine)
    assert engine.state_names == ("poet",)
    (said,) = [record.getMessage() for record in caplog.records]
    lost = folder / "poet.pth" if how == "file" else folder
    assert said.startswith(f"serve: `{lost}` cannot be read; its earlier states")
    if how == "gone":
        away.rename(folder)
    files.refresh(engine)
    assert len(caplog.records) == 1
    # A file that is gone from a folder which is there is meant to be.
    (folder / "poet.pth").unlink()
    files.refresh(engine)
    assert engine.state_names == ()


def test_a_replaced_state_of_the_same_size_and_time_is_reloaded(
    folder_of_states, params
):
    folder, files, engine = folder_of_states
    file = folder / "poet.pth"
    request = Request((65, 66, 67), state="poet", tokens=20, temperature=0.0)
    old = answer(engine, request)
    before = file.stat()
    new = drawn_state(9, scale=5.0)
    save_state(file, new)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    files.refresh(engine)
    assert_same(answer(engine, request), alone(params, request, {"poet": new}))
    assert answer(engine, request).tokens != old.tokens
