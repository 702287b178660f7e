"""A weighted loss after the head, whose gradients come from the forward pass."""

import dataclasses
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import assert_close, assert_trees_close

from rwkv7_jax.model.int8_weights import quantize_rows
from rwkv7_jax.training.head_loss import (
    TermWeights,
    _cross_entropy,
    token_statistics,
    weighted_loss,
)
from rwkv7_jax.training.token_chunks import Cut

BATCH, LENGTH, WIDTH, VOCAB, CHUNK = 3, 11, 8, 37, 8
MIB = 2**20
BARS = {"float32": 3e-6, "float64": 1e-13}


def draw(dtype: str, seed: int = 0) -> dict[str, Any]:
    """Every array that a loss may read."""
    noise = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(noise.normal(size=shape), dtype)

    def weights():
        return jnp.asarray(noise.uniform(size=(BATCH, LENGTH)), dtype)

    return {
        "hidden": normal(BATCH, LENGTH, WIDTH),
        "head": normal(VOCAB, WIDTH),
        "reference": normal(BATCH, LENGTH, WIDTH + 1),
        "reference_head": normal(VOCAB, WIDTH + 1),
        "nats": weights(),
        "square": weights(),
        "kl": weights(),
        "targets": jnp.asarray(noise.integers(0, VOCAB, (BATCH, LENGTH)), jnp.int32),
    }


@dataclasses.dataclass(frozen=True)
class Form:
    """What a loss is made of."""

    terms: tuple[str, ...]
    reverse_kl: bool = False
    temperature: float | None = None


FORMS = {
    "cross entropy": Form(("nats",)),
    "with L2Wrap": Form(("nats", "square")),
    "distillation": Form(("nats", "kl")),
    "divergence": Form(("kl",)),
    "policy": Form(("nats", "kl"), reverse_kl=True, temperature=0.7),
}


def plain(form: Form, x: dict[str, Any]) -> Any:
    """The loss from every logit at once."""
    logits = jnp.matmul(x["hidden"], x["head"].T, precision="highest")
    logp = jax.nn.log_softmax(logits)
    scaled = jax.nn.log_softmax(logits / (form.temperature or 1.0))
    base = jnp.matmul(x["reference"], x["reference_head"].T, precision="highest")
    other = jax.nn.log_softmax(base)
    p, q = (logp, other) if form.reverse_kl else (other, logp)
    values = {
        "nats": -jnp.take_along_axis(scaled, x["targets"][..., None], -1)[..., 0],
        "square": 0.5 * jnp.square(jnp.max(logits, axis=-1)),
        "kl": jnp.sum(jnp.exp(p) * (p - q), axis=-1),
    }
    return sum(jnp.sum(x[term] * values[term]) for term in form.terms)


def ours(form: Form, x: dict[str, Any], chunk: int = CHUNK) -> Any:
    """The package's."""
    named = {}
    if "kl" in form.terms:
        named = {name: x[name] for name in ("reference", "reference_head")}
    loss, _ = weighted_loss(
        x["hidden"],
        x["head"],
        x["targets"] if "nats" in form.terms else None,
        TermWeights(**{term: x[term] for term in form.terms}),
        reverse_kl=form.reverse_kl,
        temperature=form.temperature,
        chunk=chunk,
        **named,
    )
    return loss


def parted(function, form: Form, x: dict[str, Any], names: tuple[str, ...], **named):
    """The loss as a function of the named arrays."""

    def loss(moving):
        return function(form, {**x, **moving}, **named)

    return loss, {name: x[name] for name in names}


@pytest.mark.parametrize("dtype", BARS)
@pytest.mark.parametrize("name", FORMS)
def test_loss_and_gradients_equal_those_of_the_plain_form(name, dtype):
    form = FORMS[name]
    names = ("hidden", "head", *form.terms)
    if "kl" in form.terms:
        names = (*names, "reference", "reference_head")
    with jax.enable_x64(dtype == "float64"):
        x = draw(dtype)
        found, wanted = (
            jax.jit(jax.value_and_grad(loss))(moving)
            for loss, moving in (
                parted(ours, form, x, names),
                parted(plain, form, x, names),
            )
        )
    assert_close(found[0], wanted[0], BARS[dtype], "loss")
    assert_trees_close(found[1], wanted[1], BARS[dtype])


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 33, 1000])
def test_the_cut_between_positions_does_not_matter(chunk):
    x = draw("float32")
    form = FORMS["with L2Wrap"]
    results = []
    for size in (chunk, CHUNK):
        loss, moving = parted(ours, form, x, ("hidden", "head"), chunk=size)
        results.append(jax.jit(jax.value_and_grad(loss))(moving))
    assert_close(results[0][0], results[1][0], 1e-6, "loss")
    assert_trees_close(results[0][1], results[1][1], 1e-6)


def test_every_position_is_in_a_chunk_of_at_most_its_size():
    for rows, tokens, chunk in itertools.product(range(1, 8), range(1, 8), range(1, 9)):
        cut = Cut.of(rows, tokens, chunk)
        assert cut.rows * cut.tokens <= chunk
        assert cut.groups * cut.rows >= rows and cut.spans * cut.tokens >= tokens


def test_rows_are_independent():
    x = draw("float32")

    def loss(hidden, x):
        return ours(FORMS["cross entropy"], {**x, "hidden": hidden})

    gradient = jax.jit(jax.grad(loss))
    of_all = gradient(x["hidden"], x)
    for row in range(BATCH):
        one = {
            name: array[row : row + 1] if array.shape[0] == BATCH else array
            for name, array in x.items()
        }
        assert_close(gradient(one["hidden"], one)[0], of_all[row], 1e-6, f"row {row}")


def test_an_8_bit_head_has_the_gradient_of_its_dequantized_weights():
    x = draw("float32")
    x["head"] = quantize_rows(x["head"])
    loss, moving = parted(ours, FORMS["with L2Wrap"], x, ("hidden",))
    wide = {**x, "head": x["head"].dequantize()}
    expected, _ = parted(plain, FORMS["with L2Wrap"], wide, ("hidden",))
    assert_trees_close(jax.grad(loss)(moving), jax.grad(expected)(moving), 3e-6)


def test_gradients_of_16_bit_activations_differ_by_rounding():
    x = draw("float32")
    narrow = {**x, "hidden": x["hidden"].astype(jnp.bfloat16)}
    form = FORMS["with L2Wrap"]
    names = ("hidden", "head")
    loss, moving = parted(ours, form, narrow, names)
    exact, wide = parted(plain, form, x, names)
    found = jax.jit(jax.grad(loss))(moving)
    assert found["hidden"].dtype == jnp.bfloat16 and found["head"].dtype == jnp.float32
    assert_trees_close(found, jax.grad(exact)(wide), 2e-2)


def test_many_chunks_of_16_bit_weights_lose_at_most_one_rounding():
    # As in shards, where the head that a device has gathered is of 16 bits.
    noise = np.random.default_rng(1)
    rows, width, vocab = 4096, 16, 11
    hidden = noise.normal(size=(1, rows, width))
    head = noise.normal(size=(vocab, width))
    # Some ids are frequent: their sums are large, and the terms that are added to them small.
    targets = np.minimum(noise.zipf(1.5, (1, rows)) - 1, vocab - 1).astype(np.int32)

    def gradient(dtype, chunk=rows):
        weights = TermWeights(nats=jnp.ones((1, rows), jnp.float32))

        def loss(head):
            return weighted_loss(
                jnp.asarray(hidden, dtype), head, targets, weights, chunk=chunk
            )[0]

        return np.asarray(jax.jit(jax.grad(loss))(jnp.asarray(head, dtype)), float)

    exact = gradient("float32")
    error = np.linalg.norm(gradient("bfloat16", chunk=8) - exact) / np.linalg.norm(
        exact
    )
    assert error < 2**-8


def of_moving(function, x):
    loss, moving = parted(function, FORMS["with L2Wrap"], x, ("hidden", "head"))
    return loss, moving


@pytest.mark.parametrize(
    "differentiate",
    [
        pytest.param(lambda f: lambda m: jax.jvp(f, (m,), (m,))[1], id="forward mode"),
        pytest.param(
            lambda f: lambda m: jax.jvp(jax.grad(f), (m,), (m,))[1],
            id="forward over reverse",
        ),
        pytest.param(
            lambda f: jax.grad(
                lambda m: sum(jnp.sum(jnp.sin(g)) for g in jax.grad(f)(m).values())
            ),
            id="reverse over reverse",
        ),
    ],
)
def test_derivatives_of_both_modes_and_orders_match_plain_autodiff(differentiate):
    with jax.enable_x64(True):
        x = draw("float64")
        found, wanted = (
            jax.jit(differentiate(loss))(moving)
            for loss, moving in (of_moving(ours, x), of_moving(plain, x))
        )
    if isinstance(found, dict):
        assert_trees_close(found, wanted, 1e-12)
    else:
        assert_close(found, wanted, 1e-12)


def test_statistics_have_their_own_gradients():
    x = draw("float32")

    def through(make):
        def loss(hidden, head):
            return jnp.sum(jnp.square(make(hidden, head).nats))

        return jax.jit(jax.grad(loss, argnums=(0, 1)))(x["hidden"], x["head"])

    terms = TermWeights(nats=x["nats"])
    found = through(lambda h, w: weighted_loss(h, w, x["targets"], terms)[1])
    wanted = through(lambda h, w: token_statistics(h, w, x["targets"]))
    for left, right in zip(found, wanted, strict=True):
        assert_close(left, right, 1e-6)


def results_with_vocabulary(compiled) -> set[tuple[int, ...]]:
    """Shapes with a vocabulary axis that instructions of a program make."""
    found = re.findall(
        r"= f32\[([\d,]+)\]\S* (?!parameter|get-tuple)", compiled.as_text()
    )
    shapes = {tuple(map(int, shape.split(","))) for shape in found}
    return {shape for shape in shapes if VOCAB in shape}


def compile_gradient(name: str, x: dict[str, Any], names: tuple[str, ...]):
    """Compiles the gradient of the named arrays; all others are arguments as well."""

    def loss(moving, x):
        return ours(FORMS[name], {**x, **moving})

    moving = {name: x[name] for name in names}
    return jax.jit(jax.grad(loss)).lower(moving, x).compile()


def test_a_frozen_head_gets_no_gradient_and_a_trained_one_does():
    x = draw("float32")
    for names, made in ((("hidden",), False), (("hidden", "head"), True)):
        compiled = compile_gradient("cross entropy", x, names)
        assert ((VOCAB, WIDTH) in results_with_vocabulary(compiled)) == made


@pytest.mark.parametrize("name", FORMS)
def test_no_gradient_holds_the_logits_of_more_than_one_piece(name):
    compiled = compile_gradient(name, draw("float32"), ("hidden", "head"))
    shapes = results_with_vocabulary(compiled) - {(VOCAB, WIDTH), (WIDTH, VOCAB)}
    assert max(np.prod(shape) for shape in shapes) <= CHUNK * VOCAB


@pytest.mark.parametrize("batch", [1, 4, 512])
def test_the_head_loss_of_the_world_vocabulary_needs_less_than_128_mib(batch):
    width = 768
    vocab = 65536
    length = 2048 // batch

    def array(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    def loss(hidden, head, targets, weights):
        return weighted_loss(hidden, head, targets, TermWeights(nats=weights))[0]

    compiled = (
        jax.jit(jax.value_and_grad(loss))
        .lower(
            array(batch, length, width),
            array(vocab, width),
            array(batch, length, dtype=jnp.int32),
            array(batch, length),
        )
        .compile()
    )
    assert compiled.memory_analysis().temp_size_in_bytes <= 128 * MIB


@pytest.mark.parametrize("outside", [-1, -100, VOCAB, 2**30])
def test_a_target_out_of_range_makes_its_loss_nan(outside):
    x = draw("float32")
    loss = jax.jit(lambda x: ours(FORMS["cross entropy"], x))
    usual = loss(x)
    spoilt = {**x, "targets": x["targets"].at[1, 2].set(outside)}
    assert np.isfinite(usual) and np.isnan(loss(spoilt))
    ignored = {**x, "nats": x["nats"].at[1, 2].set(0.0)}
    expected = loss(ignored)
    found = loss({**ignored, "targets": spoilt["targets"]})
    assert float(found) == float(expected)


def test_a_nearly_right_prediction_still_has_a_gradient():
    # In float32 30 + log(1 + exp(-14)) is 30, so the target's softmax must not be made of it.
    slope = jax.jit(jax.grad(_cross_entropy))(jnp.array([30.0, 16.0]), jnp.array(0))
    assert float(slope[0]) == pytest.approx(-np.exp(-14.0), rel=0.1)


def test_the_first_of_equal_logits_is_the_prediction():
    # Whole numbers, so that products are exact and many logits are equal.
    noise = np.random.default_rng(1)
    hidden = noise.integers(-1, 2, (1, 200, 2)).astype(np.float32)
    head = noise.integers(-1, 2, (VOCAB, 2)).astype(np.float32)
    predicted = np.argmax(hidden @ head.T, axis=-1)
    targets = np.where(noise.random((1, 200)) < 0.5, predicted, -1)
    targets[0, ::5] = noise.integers(-2, VOCAB + 2, 40)
    found = jax.jit(token_statistics)(jnp.asarray(hidden), jnp.asarray(head), targets)
    np.testing.assert_array_equal(found.correct, predicted == targets)
