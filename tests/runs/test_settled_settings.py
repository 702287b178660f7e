"""The dtype that a config leaves to the machine is settled once, when a run begins."""

import json

import jax
import pytest

from rwkv7_jax.runs.settings import read_settings
from rwkv7_jax.runs.settled_settings import settle_dtype


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


@pytest.mark.parametrize("text", ["", "3", "[]", '{"model": 3}', '{"model": {}}'])
def test_a_damaged_record_settles_nothing(tmp_path, text):
    (tmp_path / "checkpoints" / "2").mkdir(parents=True)
    (tmp_path / "settings.json").write_text(text)
    assert settle_dtype(settings("auto"), tmp_path) == settings("float32")
