"""What a config leaves open is settled once, when a run begins."""

import json

import jax
import pytest

from rwkv7_jax.runs.settings import read_settings
from rwkv7_jax.runs.settled_settings import keep_packing_of_run, settle_dtype


def settings(dtype):
    return read_settings({"model": {"dtype": dtype, "remat": "block"}})


@pytest.mark.parametrize(
    ("platform", "dtype"),
    [("cpu", "float32"), ("gpu", "bfloat16"), ("tpu", "bfloat16")],
)
def test_a_new_run_takes_the_dtype_of_its_machine(
    monkeypatch, tmp_path, platform, dtype
):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    assert settle_dtype(settings("auto"), tmp_path / "new") == settings(dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_dtype_that_is_named_stays(tmp_path, dtype):
    assert settle_dtype(settings(dtype), tmp_path) == settings(dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_a_run_that_goes_on_keeps_its_own(monkeypatch, tmp_path, platform, dtype):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    (tmp_path / "checkpoints" / "2").mkdir(parents=True)
    before = {"model": {"dtype": dtype}}
    (tmp_path / "settings.json").write_text(json.dumps(before))
    assert settle_dtype(settings("auto"), tmp_path) == settings(dtype)


def packing(name):
    return read_settings({"mode": "state", "data": {"packing": name}})


@pytest.mark.parametrize("began", ["auto", "stream", "packed"])
def test_a_run_that_goes_on_keeps_the_packing_that_it_began_with(tmp_path, began):
    # A new run leaves it to its data.
    assert keep_packing_of_run(packing("auto"), tmp_path) == packing("auto")
    (tmp_path / "checkpoints" / "2").mkdir(parents=True)
    before = {"data": {"packing": began}}
    (tmp_path / "settings.json").write_text(json.dumps(before))
    assert keep_packing_of_run(packing("auto"), tmp_path) == packing(began)
    # What is named is not changed in silence.
    assert keep_packing_of_run(packing("documents"), tmp_path) == packing("documents")


@pytest.mark.parametrize("text", ["", "3", "[]", '{"model": 3}', '{"model": {}}'])
def test_a_damaged_record_settles_nothing(tmp_path, text):
    (tmp_path / "checkpoints" / "2").mkdir(parents=True)
    (tmp_path / "settings.json").write_text(text)
    assert settle_dtype(settings("auto"), tmp_path) == settings("float32")
    assert keep_packing_of_run(packing("auto"), tmp_path) == packing("auto")
