"""Weights are drawn when a module is initialised; a call only compares shapes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from tiny_models import TINIEST, lively, tokens

from rwkv7_jax.model import RWKV7, init_state
from rwkv7_jax.model.weights import get_weight


def test_initial_values_are_computed_only_by_init():
    drawn = []

    def draw(key, shape, value):
        drawn.append(shape)
        return jnp.full(shape, value)

    class Scale(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x * get_weight(self, "scale", draw, (3,), 2.0)

    variables = Scale().init(jax.random.key(0), jnp.ones(3))
    assert variables["params"]["scale"].tolist() == [2.0, 2.0, 2.0]
    assert drawn == [(3,)]
    assert Scale().apply(variables, jnp.ones(3)).tolist() == [2.0, 2.0, 2.0]
    assert drawn == [(3,)]


@pytest.mark.parametrize(
    ("spoil", "came"),
    [
        # Of size 1, it would be broadcast.
        (lambda weight: weight[0, :1], r"\(1,\)"),
        (lambda weight: weight[0, 0], r"\(\)"),
        (lambda weight: weight[0].tolist(), "list"),
        (lambda weight: None, "none"),
    ],
)
def test_a_weight_of_another_shape_is_named(spoil, came):
    params = lively(TINIEST)
    att = dict(params["layer_0"]["att"])
    weight = spoil(att.pop("x_r")[None])
    if weight is not None:
        att["x_r"] = weight
    params = params | {"layer_0": params["layer_0"] | {"att": att}}
    sentence = (
        r"^`params` must be those of this model, with layer_0/att/x_r of shape "
        rf"\(32,\); got {came}\."
    )
    with pytest.raises(ValueError, match=sentence):
        RWKV7(TINIEST).apply(
            {"params": params}, tokens(1, 2, TINIEST), init_state(TINIEST)
        )
