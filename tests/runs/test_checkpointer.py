"""Checkpoints of a run: damage is detected, reported and moved aside."""

import functools
import json
import os
import random
import shutil

import jax
import jax.numpy as jnp
import pytest
from random_checkpoints import differing
from saved_steps import (
    IDENTITY,
    PROGRESS,
    damage,
    files_of,
    new_state,
    open_checkpoints,
    save_steps,
    train_state,
)

from rwkv7_jax.checkpoints.orbax_import import import_orbax
from rwkv7_jax.runs.early_stopping import Progress, StateProgress
from rwkv7_jax.runs.exit_codes import DiskError, NoValidCheckpoint
from rwkv7_jax.runs.resume import step_directories


def restored_step(folder, **settings):
    """Returns the restored step; its state must equal the saved one bit-exactly."""
    found, progress = open_checkpoints(folder, **settings).restore(
        train_state(0), IDENTITY, new_state
    )
    assert differing(found, train_state(int(found.step))) == []
    assert progress == (Progress() if int(found.step) == 0 else PROGRESS)
    return int(found.step)


@functools.cache
def _pristine(root):
    return save_steps(root / "pristine", [3, 6])


@pytest.fixture
def folder(tmp_path, tmp_path_factory):
    """Steps 3 and 6, both intact."""
    shutil.copytree(_pristine(tmp_path_factory.getbasetemp()), tmp_path / "steps")
    return tmp_path / "steps"


def test_the_newest_step_is_restored_bit_exactly_with_its_progress(folder):
    assert restored_step(folder) == 6
    assert not (folder / step_directories.BAD).exists()


def test_an_empty_folder_starts_a_new_run(tmp_path):
    assert restored_step(tmp_path / "none") == 0


def assert_found(folder, name):
    """Checks that the newest step is rejected with a reason and moved aside for the older one."""
    assert restored_step(folder) == 3, name
    assert sorted(p.name for p in (folder / step_directories.BAD).iterdir()) == ["6"], (
        name
    )


@pytest.mark.slow
def test_each_of_200_flipped_bits_is_detected(folder, capfd):
    step = folder / "6"
    files = files_of(step)
    draw = random.Random(0)
    found = 0
    named = 0
    before = {path: path.read_bytes() for path in files}
    for index in range(200):
        path = files[index % len(files)]
        damage(path, draw.randrange(8 * len(before[path])))
        assert_found(folder, path)
        said = capfd.readouterr().err
        assert "step 6 is damaged: " in said
        found = found + 1
        named = named + ("leaves" in said)
        os.rename(folder / step_directories.BAD / "6", step)
        path.write_bytes(before[path])
    assert restored_step(folder) == 6
    print(f"{found} of 200 flips found, {named} of them by the name of a leaf")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["truncate", "delete", "zero"])
def test_every_truncated_deleted_or_zeroed_file_is_detected(folder, how):
    step = folder / "6"
    shutil.copytree(step, folder.parent / "whole")
    for path in files_of(step):
        damage(path, how)
        assert_found(folder, f"{how} {path}")
        shutil.rmtree(folder / step_directories.BAD)
        shutil.copytree(folder.parent / "whole", step)


def test_a_wrong_value_in_intact_files_is_reported_by_its_leaf(folder, capfd):
    record = next((folder / "6" / "record").glob("metadata"))
    fields = json.loads(record.read_text())
    assert "params/matrix" in fields["leaves"]
    checkpoints = open_checkpoints(folder)
    checkpoints._read_record = lambda number: (
        _changed(fields) if number == 6 else _real(folder, number)
    )
    found, _ = checkpoints.restore(train_state(0), IDENTITY, new_state)
    assert int(found.step) == 3
    assert (
        "step 6 is damaged: leaves params/matrix; it is now in"
        in capfd.readouterr().err
    )


def _changed(fields):
    leaves = fields["leaves"] | {"params/matrix": [[24, 40], "float32", "0" * 16]}
    return fields | {"leaves": leaves}


def _real(folder, number):
    return open_checkpoints(folder)._read_record(number)


def test_unknown_and_unfinished_folders_are_ignored_with_a_warning(folder, capfd):
    (folder / "notes").mkdir()
    (folder / "99").mkdir()
    half = folder / step_directories.SAVING / "9.orbax-checkpoint-tmp"
    half.mkdir(parents=True)
    (half / "d").write_text("half")
    shutil.copytree(folder / "6", folder / "1000")
    assert restored_step(folder) == 6
    said = capfd.readouterr().err
    assert "step 1000 is damaged: it is a copy of step 6" in said
    assert "notes is not a checkpoint" in said and "incomplete checkpoint" in said
    assert "99 was an empty folder" in said
    assert not (folder / step_directories.SAVING).exists()


def test_a_run_with_only_damaged_steps_does_not_start_anew(folder):
    for step in (3, 6):
        damage(folder / str(step) / "record" / "metadata", "zero")
    for _ in range(2):  # the second time, all of them lie aside already
        with pytest.raises(NoValidCheckpoint, match=r"no checkpoint in .* is intact"):
            open_checkpoints(folder).restore(train_state(0), IDENTITY, new_state)
    assert sorted(p.name for p in (folder / step_directories.BAD).iterdir()) == [
        "3",
        "6",
    ]


def test_another_model_is_rejected_with_the_difference_and_no_file_moves(folder):
    other = IDENTITY | {"model": {"width": "64"}}
    with pytest.raises(ValueError, match="holds a run whose `width` is 32; got 64"):
        open_checkpoints(folder).restore(train_state(0), other, new_state)
    grown = train_state(0).replace(
        params=train_state(0).params | {"half": jnp.zeros(8)}
    )
    with pytest.raises(
        ValueError, match=r"`params/half` is bfloat16\[7\]; got float32\[8\]"
    ):
        open_checkpoints(folder).restore(grown, IDENTITY, new_state)
    assert step_directories.step_numbers(folder) == [6, 3]


def test_a_step_with_nan_is_restored_only_on_request(folder, capfd):
    bad = train_state(9)
    bad = bad.replace(
        params=bad.params | {"half": bad.params["half"].at[2].set(jnp.nan)}
    )
    checkpoints = open_checkpoints(folder)
    checkpoints.save(bad, PROGRESS, IDENTITY)
    checkpoints.close()
    found, _ = open_checkpoints(folder, allow_nan=True).restore(
        train_state(0), IDENTITY, new_state
    )
    assert int(found.step) == 9
    assert restored_step(folder) == 6
    assert (
        "it has NaN or Inf (config.allow_nan accepts it) in half"
        in capfd.readouterr().err
    )


def test_retention_keeps_the_last_every_kth_and_the_best_step(tmp_path):
    progress = Progress({"": StateProgress(best=((0.1, 5), (0.2, 2)))})
    folder = save_steps(
        tmp_path / "steps", range(1, 10), progress, keep=2, keep_every=4, keep_best=1
    )
    assert step_directories.step_numbers(folder) == [9, 8, 5, 4]


def test_a_failed_save_reports_its_size_and_keeps_older_steps(
    folder, capfd, monkeypatch
):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    checkpoints = open_checkpoints(folder)
    monkeypatch.setattr(step_directories, "write_manifest", full)
    checkpoints.save(train_state(9), PROGRESS, IDENTITY)
    with pytest.raises(
        DiskError, match=r"step 9 could not be written: it needs 7,\d\d\d bytes"
    ):
        checkpoints.close()
    assert "training continues" in capfd.readouterr().err
    monkeypatch.undo()
    assert (
        not (folder / step_directories.SAVING).exists() and restored_step(folder) == 6
    )
    checkpoints.save(train_state(9), PROGRESS, IDENTITY)
    checkpoints.close()
    assert restored_step(folder) == 9


def test_orbax_still_changes_a_step_after_its_last_hook(tmp_path):
    # When this fails, CheckpointManager may do: see docs/decisions-checkpoints.md.
    ocp = import_orbax()
    seen = []

    def last_hook():
        (unfinished,) = tmp_path.glob("7*")
        step_directories.write_manifest(unfinished)
        seen.append(unfinished.name)

    options = ocp.options.AsyncOptions(post_finalization_callback=last_hook)
    with ocp.AsyncCheckpointer(
        ocp.StandardCheckpointHandler(), async_options=options
    ) as saver:
        saver.save(tmp_path / "7", args=ocp.args.StandardSave({"a": jnp.ones(3)}))
        saver.wait_until_finished()
    assert seen and seen[0] != "7"
    changed = step_directories.verify_manifest(tmp_path / "7")
    # Some versions write `commit_success.txt` as well.
    assert "_CHECKPOINT_METADATA" in changed


def test_a_state_is_restored_from_its_shapes_without_initialising_one(folder):
    def make_no_state():
        raise AssertionError("there is a step to restore")

    abstract = jax.eval_shape(new_state)
    found, _ = open_checkpoints(folder).restore(abstract, IDENTITY, make_no_state)
    assert differing(found, train_state(6)) == []
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(found))
