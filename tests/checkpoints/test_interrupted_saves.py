"""A save killed at any point leaves the old or the new files, and they load."""

import _thread
import dataclasses
import os
import shutil
import time

import jax
import jax.numpy as jnp
import pytest
import tiny_observers
from random_checkpoints import CONFIG, differing, random_params, random_state

from rwkv7_jax import atomic_write
from rwkv7_jax.checkpoints import model_folder, orbax_folder
from rwkv7_jax.checkpoints.model_files import load_model, save_model
from rwkv7_jax.checkpoints.state_files import load_state, save_state
from rwkv7_jax.checkpoints.state_sidecar import read_sidecar, sidecar
from rwkv7_jax.observer.files import load_observer, save_observer

HF_CONFIG = dataclasses.replace(
    CONFIG, group_norm_eps=CONFIG.head_size * CONFIG.norm_eps
)


class Killed(BaseException):
    """The exception that ends a save in these tests, in place of SIGKILL."""


def interrupt(monkeypatch, step, *, after):
    """Simulate a kill just before or just after the given rename."""
    replace = os.replace
    exchange = model_folder.exchange_paths
    done = 0

    def counted(function):
        def run(*arguments):
            nonlocal done
            done += 1
            if done == step and not after:
                raise Killed
            result = function(*arguments)
            if done == step:
                raise Killed
            return result

        return run

    monkeypatch.setattr(os, "replace", counted(replace))
    monkeypatch.setattr(model_folder, "exchange_paths", counted(exchange))
    assert atomic_write.os is os


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".st"])
@pytest.mark.parametrize("has_digest", [True, False])
@pytest.mark.parametrize("after", [True, False])
@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_state_loads_after_a_save_killed_at_any_point(
    tmp_path, monkeypatch, suffix, has_digest, after, step
):
    path = tmp_path / f"s{suffix}"
    states = {"old": random_state(seed=1), "new": random_state(seed=2)}
    save_state(path, states["old"], info={"name": "old"})
    if not has_digest:
        # As earlier versions wrote it.
        text = '{"axes": "%s", "name": "old"}'
        axes = "head, key, value" if suffix == ".st" else "head, value, key"
        sidecar(path).write_text(text % axes)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        interrupt(patch, step, after=after)
        save_state(path, states["new"], info={"name": "new"})
    name = read_sidecar(path)["name"]
    assert differing(load_state(path), states[name]) == []
    assert name == ("new" if step == 3 or (step, after) == (2, True) else "old")
    # A further save works, and cleans up.
    save_state(path, states["new"], info={"name": "again"})
    assert read_sidecar(path)["name"] == "again"


@pytest.mark.parametrize("after", [True, False])
@pytest.mark.parametrize("format", ["hf", None])
def test_a_model_folder_loads_after_a_save_killed_at_any_point(
    tmp_path, monkeypatch, format, after
):
    if not exchanges(tmp_path):
        pytest.skip("this file system cannot exchange two folders in one step")
    config = CONFIG
    if format == "hf":
        config = dataclasses.replace(
            CONFIG, group_norm_eps=CONFIG.head_size * CONFIG.norm_eps
        )
    old = random_params(config, seed=1)
    new = random_params(config, seed=2)
    save_model(tmp_path / "m", old, config, format=format)
    # An HF folder's weights are written by one rename before; the exchange is the last one.
    with monkeypatch.context() as patch, pytest.raises(Killed):
        interrupt_exchange(patch, after=after)
        save_model(tmp_path / "m", new, config, format=format)
    loaded, _ = load_model(tmp_path / "m")
    assert differing(loaded, new if after else old) == []


def interrupt_exchange(monkeypatch, *, after):
    """Simulate a kill at the exchange of two folders, without cleanup."""
    exchange = model_folder.exchange_paths

    def run(*arguments):
        if after:
            exchange(*arguments)
        raise Killed

    monkeypatch.setattr(model_folder, "exchange_paths", run)
    monkeypatch.setattr(model_folder.shutil, "rmtree", lambda *_, **__: None)


def exchanges(folder) -> bool:
    """Return whether this system can exchange two folders atomically."""
    one = folder / "one"
    two = folder / "two"
    (one / "a").mkdir(parents=True)
    two.mkdir()
    return model_folder.exchange_paths(one, two) and (two / "a").is_dir()


@pytest.mark.parametrize("after", [True, False])
def test_an_observer_loads_after_a_save_killed_at_any_point(
    tmp_path, monkeypatch, after
):
    if not exchanges(tmp_path):
        pytest.skip("this file system cannot exchange two folders in one step")
    observer, old = tiny_observers.made()
    new = old | {
        "bias": old["bias"] + 1,
        "model": jax.tree.map(jnp.negative, old["model"]),
    }
    save_observer(tmp_path / "o", observer, old)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        interrupt_exchange(patch, after=after)
        save_observer(tmp_path / "o", observer, new)
    _, loaded = load_observer(tmp_path / "o", tiny_observers.TEACHER)
    assert differing(loaded, new if after else old) == []


def test_two_renames_replace_an_atomic_exchange(tmp_path, monkeypatch):
    monkeypatch.setattr(model_folder, "exchange_paths", lambda one, two: False)
    old = random_params(seed=1)
    save_model(tmp_path / "m", old, CONFIG)
    new = random_params(seed=2)
    save_model(tmp_path / "m", new, CONFIG)
    assert differing(load_model(tmp_path / "m")[0], new) == []
    assert os.listdir(tmp_path) == ["m"]


FOLDERS = {
    "orbax": (
        lambda path, seed: save_model(path, random_params(seed=seed), CONFIG),
        lambda path: load_model(path)[0],
        lambda seed: random_params(seed=seed),
    ),
    "hf": (
        lambda path, seed: save_model(
            path, random_params(HF_CONFIG, seed=seed), HF_CONFIG, format="hf"
        ),
        lambda path: load_model(path)[0],
        lambda seed: random_params(HF_CONFIG, seed=seed),
    ),
    "observer": (
        lambda path, seed: save_observer(path, *observer_of(seed)),
        lambda path: load_observer(path, tiny_observers.TEACHER)[1],
        lambda seed: observer_of(seed)[1],
    ),
    "observer among other files": (
        lambda path, seed: save_among_others(path, seed),
        lambda path: load_observer(path, tiny_observers.TEACHER)[1],
        lambda seed: observer_of(seed)[1],
    ),
}


def save_among_others(path, seed):
    """Save an observer to a folder that cannot be exchanged atomically."""
    path.mkdir(exist_ok=True)
    (path / "notes.txt").write_text("mine")
    save_observer(path, *observer_of(seed))


def observer_of(seed):
    """Return an observer and parameters that depend on the seed."""
    observer, params = tiny_observers.made()
    model = jax.tree.map(lambda leaf: leaf * seed, params["model"])
    return observer, params | {"bias": params["bias"] + seed, "model": model}


def kill_at(patch, step):
    """Simulate a kill after the given number of renames; later operations do nothing."""
    replace = os.replace
    done = 0

    def counted(*arguments):
        nonlocal done
        if done >= step:
            raise Killed
        done += 1
        replace(*arguments)

    def remove(*arguments, **options):
        if done >= step:
            raise Killed

    patch.setattr(model_folder, "exchange_paths", lambda one, two: False)
    patch.setattr(os, "replace", counted)
    patch.setattr(model_folder.shutil, "rmtree", remove)


@pytest.mark.parametrize("kind", FOLDERS)
def test_without_atomic_exchange_a_folder_survives_a_kill_at_any_rename(
    tmp_path, monkeypatch, kind
):
    write, read, expected = FOLDERS[kind]
    seen = set()
    (tmp_path / "first").mkdir()
    write(tmp_path / "first" / "m", 1)
    # Files inside a folder are renamed too; the last two renames are the folder's.
    for step in range(9):
        path = tmp_path / str(step) / "m"
        shutil.copytree(tmp_path / "first", path.parent)
        with monkeypatch.context() as patch:
            kill_at(patch, step)
            try:
                write(path, 2)
            except Killed:
                finished = False
            else:
                finished = True
        seen.add(path.exists())
        loaded = read(path)
        new = differing(loaded, expected(2)) == []
        assert new or differing(loaded, expected(1)) == []
        # The next save works whatever was left, and its result loads.
        write(path, 3)
        assert differing(read(path), expected(3)) == []
        if finished:
            assert new
            break
    assert finished
    moves_folders = kind != "observer among other files"
    assert seen == ({True, False} if moves_folders else {True})


def test_a_displaced_folder_is_restored_through_a_symlink(tmp_path):
    save_model(tmp_path / "m", random_params(seed=1), CONFIG)
    (tmp_path / "link").symlink_to("m")
    (tmp_path / ".m.abcdefgh").mkdir()
    os.replace(tmp_path / "m", tmp_path / ".m.abcdefgh" / "old")
    assert differing(load_model(tmp_path / "link")[0], random_params(seed=1)) == []
    assert sorted(os.listdir(tmp_path)) == ["link", "m"]
    # What is there is never replaced by something older.
    (tmp_path / ".m.abcdefgh" / "old").mkdir(parents=True)
    assert differing(load_model(tmp_path / "m")[0], random_params(seed=1)) == []


def test_a_displaced_folder_is_restored_only_under_its_own_name(tmp_path):
    (tmp_path / ".m.v2.abcdefgh" / "old").mkdir(parents=True)
    for other in ("m", "m.v", "v2"):
        model_folder.restore_interrupted(tmp_path / other)
    assert os.listdir(tmp_path) == [".m.v2.abcdefgh"]
    model_folder.restore_interrupted(tmp_path / "m.v2")
    assert os.listdir(tmp_path) == ["m.v2"]


def test_an_unreadable_orbax_folder_never_replaces_a_good_one(tmp_path, monkeypatch):
    old = random_params(seed=1)
    save_model(tmp_path / "m", old, CONFIG)
    restore = orbax_folder._restore

    def damaged(*arguments):
        return jax.tree.map(lambda leaf: leaf + 1, restore(*arguments))

    with monkeypatch.context() as patch, pytest.raises(ValueError, match="is damaged"):
        patch.setattr(orbax_folder, "_restore", damaged)
        save_model(tmp_path / "m", random_params(seed=2), CONFIG)
    assert differing(load_model(tmp_path / "m")[0], old) == []


def test_ctrl_c_waits_for_the_thread():
    done = []

    def work():
        # By then the main thread waits.
        time.sleep(0.2)
        _thread.interrupt_main()
        time.sleep(0.2)
        done.append(True)

    with pytest.raises(KeyboardInterrupt):
        model_folder.run_to_end(work)
    assert done


def test_ctrl_c_in_an_orbax_save_leaves_no_extra_files(tmp_path, monkeypatch):
    """Orbax's threads once kept writing to the folder that was being removed."""
    path = tmp_path / "m"
    params = random_params()
    save_model(path, params, CONFIG)
    checkpointer = orbax_folder.import_orbax().StandardCheckpointer
    save = checkpointer.save

    def interrupted(*arguments, **named):
        save(*arguments, **named)
        _thread.interrupt_main()
        # Where this is the main thread, the interrupt is raised here.
        time.sleep(0.1)

    monkeypatch.setattr(checkpointer, "save", interrupted)
    for _ in range(5):
        with pytest.raises(KeyboardInterrupt):
            save_model(path, params, CONFIG)
    time.sleep(0.5)
    assert [entry.name for entry in tmp_path.iterdir()] == ["m"]
    loaded, _ = load_model(path)
    assert differing(loaded, params) == []
