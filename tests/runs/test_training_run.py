"""What a run checks before it loads anything."""

import pytest

from rwkv7_jax.runs.settings import read_settings
from rwkv7_jax.runs.training_run import refuse_own_result

STATE = {"mode": "state", "init": "base.pth"}


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"init": "run/model.pth"}, "init"),
        ({"init": "run/../run/./model.pth"}, "init"),
        ({"init": "link.pth"}, "init"),
        (STATE | {"start": "run/state.pth"}, "start"),
        (STATE | {"mode": "upscaled_state", "start": "run/state.safetensors"}, "start"),
        ({"mode": "test_time", "start": "run/state.pth"}, "start"),
        ({"mode": "observer", "init": "run/observer/model.safetensors"}, "init"),
        (STATE | {"tuning": {"states": "run/states"}}, "tuning.states"),
        (STATE | {"tuning": {"states": {"a": "run/states/a.txt"}}}, "tuning.states.a"),
        ({"data": {"path": "a.txt,run/model.pth"}}, "data.path"),
        ({"evaluation": {"retention": "a.txt,run/model.pth"}}, "evaluation.retention"),
    ],
)
def test_an_input_that_the_result_would_replace_is_rejected(
    tmp_path, monkeypatch, values, name
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "link.pth").symlink_to(tmp_path / "run" / "model.pth")
    with pytest.raises(ValueError, match=rf"`config\.{name}` must not be `.*run|link"):
        refuse_own_result(tmp_path / "run", read_settings(values))


@pytest.mark.parametrize(
    "values",
    [
        {"init": "model.pth"},
        STATE | {"init": "run/model.pth"},
        STATE | {"tuning": {"states": "run"}},
        {"mode": "pretrain", "data": {"path": "task:copy"}},
        {"mode": "observer", "init": "run/model.pth"},
        STATE | {"tuning": {"states": {"a": 3, "b": "task:copy"}}},
    ],
)
def test_other_inputs_may_be_in_the_run_directory(tmp_path, monkeypatch, values):
    monkeypatch.chdir(tmp_path)
    refuse_own_result(tmp_path / "run", read_settings(values))
