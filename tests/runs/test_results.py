"""The result of a run: whether it is worse than no training."""

import math
import types

import pytest

from rwkv7_jax.runs import results
from rwkv7_jax.runs.early_stopping import StateProgress
from rwkv7_jax.runs.results import _harm


@pytest.mark.parametrize(
    ("measure", "base", "result", "is_worse"),
    [
        ("held_out_bits_per_byte", 2.0, 2.5, True),
        ("held_out_bits_per_byte", 2.0, 2.0, False),
        ("held_out_bits_per_byte", 2.0, math.nan, True),
        ("held_out_bits_per_byte", math.nan, 2.0, False),
        ("held_out_bits_per_byte", 2.0, None, False),
        ("held_out_accuracy", 0.5, 0.4, True),
        ("held_out_accuracy", 0.5, math.nan, True),
        ("held_out_accuracy", 0.5, 0.6, False),
    ],
)
def test_a_result_that_is_not_as_good_as_no_training_is_harm(
    measure, base, result, is_worse
):
    rows = {0: {f"poet/{measure}": base}, 8: {f"poet/{measure}": result}}
    found = _harm(rows, StateProgress(measure=measure), 8, "poet/")
    assert (found is not None) == is_worse
    # Measured on other data than the start.
    assert _harm(rows, StateProgress(measure=measure, since=4), 8, "poet/") is None


def test_a_plot_that_fails_does_not_fail_the_run_whose_result_is_saved(
    tmp_path, monkeypatch, capsys
):
    def fail(*_):
        raise ImportError("numpy.core.multiarray failed to import\nmore")

    monkeypatch.setattr(results, "draw", fail)
    warnings = []
    folder = types.SimpleNamespace(path=tmp_path, warn=warnings.append)
    mode = types.SimpleNamespace(
        mesh=None,
        tunes_state=False,
        save=lambda folder, params, *, without: folder / "model.pth",
    )
    results._write_result(mode, {}, folder, [])
    assert capsys.readouterr().out == f"saved {tmp_path / 'model.pth'}\n"
    (said,) = warnings
    assert said == "the state cannot be drawn: numpy.core.multiarray failed to import"
