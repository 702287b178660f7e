"""The model of a run: new sizes, or those of a checkpoint."""

import pytest

from rwkv7_jax.runs.modes.model_setup import new_model


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
