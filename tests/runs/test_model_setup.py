"""The model of a run: new sizes, or those of a checkpoint."""

import pytest

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
