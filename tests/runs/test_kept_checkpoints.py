"""A resumed run deletes no foreign entry and no checkpoint of other retention settings."""

import json
import shutil
from unittest.mock import ANY

import pytest
from run_programs import train_here
from saved_steps import (
    IDENTITY,
    PROGRESS,
    new_state,
    open_checkpoints,
    save_steps,
    train_state,
)
from smallest_runs import mode_settings, save_base_model

from rwkv7_jax.runs import run_lock
from rwkv7_jax.runs.resume.run_identity import (
    content_digests,
    require_same_identity,
)
from rwkv7_jax.runs.resume.step_directories import step_numbers
from rwkv7_jax.runs.run_directory import OwnedRunDirectory
from rwkv7_jax.runs.settings import EvaluationSettings, Settings

STRAYS = ["007", "٣", "1" * 5000, "-3", "3.0", "+4", " 5", "1e3", "0x10", "12345678901"]


def save_here(workdir, step, **settings):
    """Opens the run directory as the program does, saves a step, and closes the directory."""
    with OwnedRunDirectory(workdir, Settings(**settings)) as directory:
        directory.checkpoints.save(train_state(step), PROGRESS, IDENTITY)
        directory.checkpoints.close()
    return step_numbers(workdir / "checkpoints")


@pytest.mark.parametrize(
    "changes",
    [
        {"keep": 1},
        {"keep": 2, "keep_every": 7},
        {"keep": 3, "keep_best": 1},
        {"keep": 3, "evaluation": EvaluationSettings(patience=2)},
    ],
)
def test_retention_keeps_steps_saved_under_other_retention_settings(tmp_path, changes):
    for step in (10, 20, 30):
        save_here(tmp_path, step, keep=3)
    assert save_here(tmp_path, 40, **changes) == [40, 30, 20, 10]
    # The next process remembers, although its settings are those of the last one.
    assert set(save_here(tmp_path, 50, **changes)) >= {50, 30, 20, 10}


def test_retention_continues_in_a_run_resumed_with_the_same_settings(tmp_path):
    for step in (10, 20, 30):
        found = save_here(tmp_path, step, keep=2)
    assert found == [30, 20]
    # Other settings than those of retention make no difference.
    assert save_here(tmp_path, 40, keep=2, steps=77, log_every=3) == [40, 30]


@pytest.mark.parametrize("junk", ["", "[10, 20", "{}", "null"])
def test_a_damaged_list_of_protected_steps_deletes_none(tmp_path, junk):
    for step in (10, 20, 30):
        save_here(tmp_path, step, keep=3)
    assert save_here(tmp_path, 40, keep=1) == [40, 30, 20, 10]
    (tmp_path / "protected_steps.json").write_text(junk)
    assert save_here(tmp_path, 50, keep=1) == [50, 40, 30, 20, 10]


@pytest.mark.parametrize("junk", ["", "[", "[1", "{}", "3", "[[[[", "\0", '["x"]'])
def test_damaged_files_of_a_run_directory_cause_no_traceback(
    tmp_path, junk, capfd, monkeypatch
):
    # A lock that names no machine is watched for some heartbeats.
    monkeypatch.setattr(run_lock, "HEARTBEAT_SECONDS", 0.01)
    save_here(tmp_path, 10, keep=1)
    for name in ("settings.json", "protected_steps.json", "run.lock"):
        (tmp_path / name).write_text(junk)
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": "x"}}\n{junk}\n{{"step": 1}}\n')
    (tmp_path / "samples.jsonl").write_text(f'{{"step": null}}\n{junk}\n')
    with OwnedRunDirectory(tmp_path, Settings(keep=1)) as directory:
        restored, _ = directory.restore(train_state(0), IDENTITY, new_state)
        directory.log(11, {"loss": 1.0})
    assert int(restored.step) == 10
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("name", ["settings.json", "protected_steps.json"])
def test_a_deeply_nested_file_counts_as_damaged(tmp_path, name):
    save_here(tmp_path, 10, keep=1)
    (tmp_path / name).write_text("[" * 200_000)
    assert save_here(tmp_path, 20, keep=1)[0] == 20


@pytest.mark.parametrize("name", STRAYS)
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_foreign_entries_with_numeric_names_are_ignored(tmp_path, name, kind):
    if len(name) > 200:
        name = name[:200]
    stray = tmp_path / name
    save_steps(tmp_path, [3])
    if kind == "file":
        stray.write_text("mine")
    else:
        stray.mkdir()
    checkpoints = open_checkpoints(tmp_path, keep=1)
    restored, _ = checkpoints.restore(train_state(0), IDENTITY, new_state)
    assert int(restored.step) == 3
    assert stray.exists()


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_foreign_entry_named_like_a_step_is_neither_deleted_nor_counted(
    tmp_path, kind
):
    save_steps(tmp_path, [3, 4])
    for number in ("2", "5", "999"):
        stray = tmp_path / number
        if kind == "folder":
            stray.mkdir()
            stray = stray / "notes.txt"
        stray.write_text("mine")
    checkpoints = open_checkpoints(tmp_path, keep=2)
    restored, _ = checkpoints.restore(train_state(0), IDENTITY, new_state)
    assert int(restored.step) == 4
    checkpoints.save(train_state(5), PROGRESS, IDENTITY)
    checkpoints.close()
    assert step_numbers(tmp_path) == [5, 4]
    assert (tmp_path / "2").exists() and (tmp_path / "999").exists()
    # What was in the way of step 5 was moved.
    assert (tmp_path / "bad" / "5").exists()


@pytest.mark.parametrize("deleted", ["checkpoints", "."])
def test_a_folder_deleted_during_a_run_is_created_again(tmp_path, deleted, capfd):
    workdir = tmp_path / "run"
    with OwnedRunDirectory(workdir, Settings()) as directory:
        directory.log(1, {"loss": 1.0})
        shutil.rmtree(workdir / deleted)
        directory.log(2, {"loss": 1.0, "other": 2.0})
        directory.note_event(2, "lost")
        directory.checkpoints.save(train_state(2), PROGRESS, IDENTITY)
        directory.checkpoints.close()
    assert step_numbers(workdir / "checkpoints") == [2]


def test_paths_are_ignored_if_their_contents_are_compared(tmp_path):
    here = tmp_path / "a.jsonl"
    there = tmp_path / "moved" / "b.jsonl"
    there.parent.mkdir()
    here.write_text("text")
    there.write_text("text")
    was = content_digests({"data": str(here)})
    now = content_digests({"data": str(there)})
    assert was == now and list(was) == ["data content"]
    old = {"settings": {"data.path": str(here)}, "inputs": {"data": "1", **was}}
    new = {"settings": {"data.path": str(there)}, "inputs": {"data": "2", **now}}
    require_same_identity(tmp_path, old, new)
    there.write_text("other")
    new["inputs"] |= content_digests({"data": str(there)})
    with pytest.raises(ValueError, match=r"`data\.path` is .*a\.jsonl; got"):
        require_same_identity(tmp_path, old, new)


def test_a_comma_in_the_name_of_a_file_does_not_hide_its_content(tmp_path):
    file = tmp_path / "a,b.pth"
    file.write_text("one")
    (digest,) = content_digests({"start": str(file)}).values()
    file.write_text("other")
    assert content_digests({"start": str(file)}) == {"start content": ANY}
    assert content_digests({"start": str(file)})["start content"] != digest
    old = {"settings": {"start": f"{tmp_path}/./a,b.pth"}, "inputs": {}}
    new = {"settings": {"start": str(file)}, "inputs": {}}
    require_same_identity(tmp_path, old, new)


def test_records_without_digests_of_contents_compare_paths_in_any_spelling(tmp_path):
    old = {"settings": {"init": f"{tmp_path}/m.pth"}, "inputs": {"data": "1"}}
    for spelling in (f"{tmp_path}/./m.pth", f"{tmp_path}/x/../m.pth"):
        new = {"settings": {"init": spelling}, "inputs": {"data": "1"}}
        require_same_identity(tmp_path, old, new)
    new["settings"]["init"] = f"{tmp_path}/n.pth"
    with pytest.raises(ValueError, match="`init` is "):
        require_same_identity(tmp_path, old, new)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 3, 4])
def test_a_run_resumed_with_fewer_steps_ends_and_keeps_its_checkpoints(
    tmp_path, steps, capfd
):
    save_base_model(tmp_path / "base.pth")
    workdir = tmp_path / "run"

    def settings(**changes):
        return mode_settings("pretrain", tmp_path / "base.pth", **changes)

    train_here(settings(steps=4, save_every=1, keep=9), workdir)
    before = (workdir / "model.pth").read_bytes()
    capfd.readouterr()
    train_here(settings(steps=steps, save_every=1, keep=1), workdir)
    assert step_numbers(workdir / "checkpoints") == [4, 3, 2, 1]
    said = capfd.readouterr().err
    assert ("already has 4 steps" in said) == (steps < 4)
    assert len(before) == (workdir / "model.pth").stat().st_size
    rows = (workdir / "metrics.jsonl").read_text().splitlines()
    assert max(json.loads(row)["step"] for row in rows) == 4
