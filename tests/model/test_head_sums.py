"""Sums over heads: on TPU they are products, and say the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from tolerances import FORMULA, SAME, assert_close, assert_trees_close

from pallas_kernels import platforms
from rwkv7_jax.model import pointwise
from rwkv7_jax.model.head_sums import spread_over_heads, sum_heads, view_heads

BATCH, TOKENS = 2, 5


@pytest.fixture
def target(monkeypatch):
    """`target(platform)`: from here on, choose what that platform would run; it runs here."""

    def choose(platform):
        monkeypatch.setattr(platforms, "target_platform", lambda: platform)

    return choose


@pytest.fixture
def on_tpu(target):
    """Chooses what a TPU would run."""
    target("tpu")


def draw(*shape, dtype=jnp.float32):
    values = np.random.default_rng(len(shape)).normal(size=shape)
    return jnp.asarray(values, dtype)


def chain(heads, size, dtype=jnp.float32, tokens=TOKENS):
    """The functions of the model that sum over heads, of the values of one dictionary."""
    flat = (BATCH, tokens, heads * size)
    split = (BATCH, tokens, heads, size)
    values = {
        "k": draw(*flat, dtype=dtype),
        "raw": 0.3 * draw(*flat, dtype=dtype),
        "y": 2 + draw(*split, dtype=dtype),
        "r": -draw(*split, dtype=dtype),
        "v": 0.5 * draw(*split, dtype=dtype),
        "gate": 0.7 * draw(*flat, dtype=dtype),
        "vector": draw(heads * size),
        "matrix": draw(heads, size),
    }

    def run(x):
        removed = pointwise.removal_and_replacement(
            x["k"], x["raw"], x["vector"], x["matrix"], x["vector"]
        )
        read = pointwise.read_out(
            x["y"],
            (x["r"], removed[0], x["v"]),
            x["gate"],
            x["matrix"],
            (x["vector"], x["vector"]),
            eps=1e-3,
        )
        return read, removed

    return run, values


def equations(run, values):
    """Every equation of the traced function, those inside of others included."""
    found = []

    def visit(jaxpr):
        for equation in jaxpr.eqns:
            found.append(equation)
            for inner in jaxprs_in_params(equation.params):
                visit(inner)

    visit(jax.make_jaxpr(run)(values).jaxpr)
    return found


@pytest.mark.parametrize(("heads", "size"), [(3, 32), (2, 64), (1, 7)])
def test_every_channel_receives_the_sum_of_its_head(heads, size, target):
    x = draw(BATCH, TOKENS, heads * size)
    split = np.asarray(x, np.float64).reshape(BATCH, TOKENS, heads, size)
    sums = split.sum(axis=-1)
    of_channels = np.repeat(sums, size, axis=-1)

    for platform in ("cpu", "tpu"):
        target(platform)
        view = view_heads(x, size)
        found = sum_heads(view, size, x.dtype)
        assert_close(found.reshape(sums.shape), sums, FORMULA)
        spread = spread_over_heads(found, size, x.dtype)
        everywhere = jnp.broadcast_to(spread, view.shape).reshape(x.shape)
        assert_close(everywhere, of_channels, FORMULA)


def test_the_tpu_path_computes_the_same_values_and_gradients(target):
    run, values = chain(heads=3, size=32)

    def values_and_gradients():
        def loss(x):
            read, removed = run(x)
            return jnp.sum(jnp.sin(read)) + sum(jnp.sum(jnp.cos(x)) for x in removed)

        return run(values), jax.grad(loss)(values)

    expected, expected_gradients = values_and_gradients()
    target("tpu")
    found, gradients = values_and_gradients()
    for one, other in zip(
        jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
    ):
        assert_close(one, other, SAME["op"])
    assert_trees_close(gradients, expected_gradients, SAME["op"])


@pytest.mark.parametrize("tokens", [1, TOKENS])
def test_no_activation_is_summed_over_heads_on_tpu(on_tpu, tokens):
    run, values = chain(heads=2, size=64, tokens=tokens)

    def loss(x):
        return jax.vjp(run, x)[1](run(x))

    for equation in equations(loss, values):
        if equation.primitive.name == "reduce_sum":
            # Of vectors' gradients alone, over rows and tokens.
            assert 0 in equation.params["axes"]


@pytest.mark.parametrize(
    ("dtype", "passes"), [("bfloat16", "HIGH"), ("float32", "HIGHEST")]
)
def test_products_are_as_precise_as_the_activations_need(on_tpu, dtype, passes):
    products = []
    for one in equations(*chain(2, 64, dtype=dtype)):
        if one.primitive.name == "dot_general":
            products.append({each.name for each in one.params["precision"]})
    assert len(products) == 8
    assert all(one == {passes} for one in products)
