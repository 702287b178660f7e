"""The model of a run: new sizes, or those of a checkpoint."""

import time

import pytest

from rwkv7_jax.runs import waiting
from rwkv7_jax.runs.modes import model_setup
from rwkv7_jax.runs.modes.model_setup import load_or_init, new_model
from rwkv7_jax.runs.settings import Settings


@pytest.mark.parametrize(
    ("sizes", "missing"),
    [
        ({}, "vocab_size, num_layers, width"),
        ({"dtype": "float32"}, "vocab_size, num_layers, width"),
        ({"vocab_size": 257, "width": 64}, "num_layers"),
    ],
)
def test_a_new_model_without_a_size_is_rejected_by_the_name_of_the_size(sizes, missing):
    with pytest.raises(
        ValueError, match=f"must have all sizes; it has no {missing}\\.$"
    ):
        new_model(sizes)


def test_a_size_that_a_checkpoint_fixes_is_rejected_before_it_is_read(tmp_path):
    settings = Settings(init=str(tmp_path / "missing.pth"), model={"width": 64})
    with pytest.raises(ValueError, match=r"^`config\.model\.width` must be left out"):
        load_or_init(settings)


def test_a_checkpoint_that_takes_long_to_load_is_named_in_the_meantime(
    monkeypatch, capsys
):
    def slow(path, **_):
        time.sleep(0.3)
        raise ValueError("read")

    monkeypatch.setattr(model_setup, "load_model", slow)
    monkeypatch.setattr(waiting, "SECONDS", 0.05)
    with pytest.raises(ValueError, match="read"):
        load_or_init(Settings(init="large.pth"))
    assert "waiting for the weights of large.pth (" in capsys.readouterr().err
