"""Settings that a config leaves open are fixed once, when a run begins."""

import json

import jax
import pytest

from rwkv7_jax.json_files import read_object
from rwkv7_jax.runs import multihost
from rwkv7_jax.runs.process_group import ProcessGroup
from rwkv7_jax.runs.resume.run_identity import flat_settings
from rwkv7_jax.runs.run_directory import OwnedRunDirectory
from rwkv7_jax.runs.settings import Settings, as_config, read_settings
from rwkv7_jax.runs.settled_settings import settle


def settings(dtype):
    return read_settings({"model": {"dtype": dtype, "remat": "block"}})


def packing(name):
    return read_settings({"mode": "state", "data": {"packing": name}})


@pytest.mark.parametrize(
    ("platform", "dtype"),
    [("cpu", "float32"), ("gpu", "bfloat16"), ("tpu", "bfloat16")],
)
def test_a_new_run_takes_the_dtype_of_its_machine(monkeypatch, platform, dtype):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    assert settle(settings("auto"), {}) == settings(dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_explicit_dtype_is_kept(dtype):
    began = {"model": {"dtype": "float16"}}
    assert settle(settings(dtype), began) == settings(dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_a_resumed_run_keeps_its_dtype(monkeypatch, platform, dtype):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    assert settle(settings("auto"), {"model": {"dtype": dtype}}) == settings(dtype)


@pytest.mark.parametrize("began", ["auto", "stream", "packed"])
def test_a_resumed_run_keeps_its_packing(began):
    # A new run leaves it to its data.
    assert settle(packing("auto"), {}) == packing("auto")
    before = {"data": {"packing": began}}
    assert settle(packing("auto"), before) == packing(began)
    # What is named is not changed in silence.
    assert settle(packing("documents"), before) == packing("documents")


def test_a_resumed_run_keeps_its_final_rate():
    now = read_settings({"optimizer": {"learning_rate": 1e-5}})
    before = as_config(now)
    before["optimizer"]["final_learning_rate"] = 6e-5
    assert settle(now, before).optimizer.final_learning_rate == 6e-5
    assert settle(now, {}) == now
    named = read_settings(
        {"optimizer": {"learning_rate": 1e-5, "final_learning_rate": 0}}
    )
    assert settle(named, before) == named


def test_a_resumed_run_keeps_its_rate_if_the_command_sets_none():
    named = read_settings({"mode": "state", "optimizer": {"learning_rate": 0.1}})
    kept = settle(read_settings({"mode": "state"}), as_config(named))
    assert kept == named and not kept.finds_rate


@pytest.mark.parametrize("text", ["", "3", "[]", '{"model": 3}', '{"model": {}}'])
def test_damaged_settings_of_a_run_are_ignored(tmp_path, text):
    (tmp_path / "settings.json").write_text(text)
    began = read_object(tmp_path / "settings.json") or {}
    assert settle(settings("auto"), began) == settings("float32")
    assert settle(packing("auto"), began) == packing("auto")


@pytest.mark.parametrize("name", list(as_config(Settings())))
@pytest.mark.parametrize("junk", [3, None, [], "x"])
def test_damaged_settings_are_compared_as_far_as_they_can_be(name, junk):
    values = as_config(Settings())
    # Such a value is a difference, or is not compared at all.
    found = flat_settings({**values, name: junk})
    expected = flat_settings(values)
    assert found.keys() <= expected.keys() | {name}


def test_a_folder_without_a_checkpoint_holds_no_run(tmp_path):
    (tmp_path / "settings.json").write_text(json.dumps(as_config(packing("stream"))))
    with OwnedRunDirectory(tmp_path, packing("documents")) as folder:
        assert folder.began == {}


def test_a_run_directory_fills_in_settings_that_the_command_leaves_open(
    tmp_path, capsys
):
    named = read_settings({"mode": "state", "optimizer": {"learning_rate": 0.1}})
    with OwnedRunDirectory(tmp_path, named) as folder:
        assert folder.settings == named
    (tmp_path / "checkpoints" / "2").mkdir(parents=True)
    with OwnedRunDirectory(tmp_path, read_settings({"mode": "state"})) as folder:
        assert folder.settings == named
    assert f"rate      0.1, with which the run in {tmp_path}" in capsys.readouterr().out
    recorded = json.loads((tmp_path / "settings.json").read_text())
    assert recorded["optimizer"]["learning_rate"] == 0.1


class SecondProcess(ProcessGroup):
    """A process whose process 0 sends one value."""

    is_primary = False

    def __init__(self, sent):
        self.sent = sent

    def from_process_0(self, call):
        return self.sent


def test_all_processes_use_the_settings_of_process_0(tmp_path, monkeypatch):
    before = {"data": {"packing": "stream"}}
    monkeypatch.setattr(multihost, "group_of_run", lambda: SecondProcess(before))
    with multihost.open_run_directory(tmp_path / "none", packing("auto")) as folder:
        assert folder.settings == packing("stream")
    assert not (tmp_path / "none").exists()
