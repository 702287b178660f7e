"""Linear attention: one function for a sequence, a piece and a token, equal to its definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import AS_USERS, relative_error

from rwkv7_jax.based.taylor import (
    feature_count,
    features,
    linear_attention,
    pair_weights,
    quadratic_attention,
)

B, T, H, D, N = 2, 37, 3, 5, 7
STATE = (B, H, feature_count(D), N + 1)

attend = functools.partial(jax.jit, static_argnames="chunk")(linear_attention)
quadratic = jax.jit(quadratic_attention)


@pytest.fixture
def x64():
    """Everything in float64."""
    with jax.enable_x64(True):
        yield


def inputs(tokens=T, seed=0):
    """Queries, keys and values, float64 on the host."""
    rng = np.random.default_rng(seed)
    sizes = (D, D, N)
    return [rng.normal(size=(B, tokens, H, size)) for size in sizes]


def past(seed=9):
    """The state after some tokens."""
    q, k, v = inputs(11, seed)
    return attend(q, k, v, jnp.zeros(STATE))[1]


def largest(one, two):
    """The largest difference of two trees."""
    differences = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - b).max(), one, two)
    return max(jax.tree.leaves(differences))


@pytest.mark.parametrize("size", [1, 2, 5])
def test_products_of_features_are_the_attention_weights(x64, size):
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(1, 4, 1, size)))
    k = jnp.asarray(rng.normal(size=(1, 6, 1, size)))
    products = features(q)[:, :, 0] @ jnp.swapaxes(features(k)[:, :, 0], -1, -2)
    assert features(q).shape[-1] == feature_count(size)
    assert largest(products, pair_weights(q, k)[:, 0]) < 1e-12


def test_every_attention_weight_is_at_least_a_half(x64):
    q, k, _ = map(jnp.asarray, inputs())
    assert pair_weights(3 * q, 3 * k).min() >= 0.5


@pytest.mark.parametrize("chunk", [1, 8, 16, 64])
def test_any_chunk_size_matches_the_definition(x64, chunk):
    q, k, v = inputs()
    y, end = attend(q, k, v, jnp.zeros(STATE), chunk=chunk)
    assert largest(y, quadratic(q, k, v)) < 1e-12
    state = np.einsum(
        "bthf,bthn->bhfn",
        features(jnp.asarray(k)),
        np.concatenate([v, np.ones_like(v[..., :1])], 3),
    )
    assert largest(end, state) < 1e-12 * np.abs(state).max()


@pytest.mark.parametrize("cut", [0, 1, 16, 36, 37])
def test_any_cut_matches_one_pass(x64, cut):
    q, k, v = inputs()
    y, end = attend(q, k, v, past(), chunk=8)
    one, middle = attend(q[:, :cut], k[:, :cut], v[:, :cut], past(), chunk=8)
    two, after = attend(q[:, cut:], k[:, cut:], v[:, cut:], middle, chunk=8)
    assert largest(np.concatenate([one, two], 1), y) < 1e-12
    assert largest(after, end) < 1e-12 * np.abs(end).max()


def test_token_by_token_matches_one_pass(x64):
    q, k, v = inputs()
    y, _ = attend(q, k, v, past(), chunk=16)
    state = past()
    for t in range(T):
        now = slice(t, t + 1)
        one, state = attend(q[:, now], k[:, now], v[:, now], state)
        assert largest(one, y[:, now]) < 1e-12


@pytest.mark.parametrize("chunk", [1, 8, 64])
def test_gradients_with_any_chunk_size_match_the_definition(x64, chunk):
    def loss(form):
        return jax.jit(jax.grad(lambda a: jnp.sum(jnp.sin(form(*a)))))

    chunked = loss(lambda *a: linear_attention(*a, jnp.zeros(STATE), chunk=chunk)[0])
    args = tuple(jnp.asarray(x) for x in inputs())
    assert largest(chunked(args), loss(quadratic_attention)(args)) < 1e-11


def test_the_gradient_of_the_state_does_not_depend_on_the_chunk_size(x64):
    q, k, v = map(jnp.asarray, inputs())

    def gradient(chunk):
        def loss(state):
            y, end = linear_attention(q, k, v, state, chunk=chunk)
            return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(end))

        return jax.jit(jax.grad(loss))(past())

    assert largest(gradient(1), gradient(16)) < 1e-11


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_float32_is_close_to_float64_after_4096_tokens(scale):
    rng = np.random.default_rng(0)
    shape = (1, 4096, 1, 16)
    q, k, v = (rng.normal(size=shape) for _ in range(3))
    k *= scale
    empty = np.zeros((1, 1, feature_count(16), 17))
    run = jax.jit(linear_attention, compiler_options=AS_USERS)
    with jax.enable_x64(True):
        wanted = np.asarray(run(q, k, v, empty)[0])
    single = [np.float32(x) for x in (q, k, v, empty)]
    got, _ = run(*single)
    assert got.dtype == jnp.float32
    assert relative_error(got, wanted) < 2e-6
    assert relative_error(got[:, -64:], wanted[:, -64:]) < 2e-6


@pytest.mark.parametrize("chunk", [8, 64])
def test_a_masked_token_changes_no_bit(chunk):
    lengths = np.array([0, 21])
    state = past()
    found = []
    for seed, noise in ((0, 1.0), (1, np.nan)):
        tensors = inputs()
        for x, other in zip(tensors, inputs(seed=seed + 50), strict=True):
            for row, length in enumerate(lengths):
                x[row, length:] = noise * other[row, length:]
        single = [np.float32(x) for x in tensors]
        y, end = attend(*single, state, chunk=chunk, lengths=lengths)
        found.append((np.asarray(y)[1, :21], np.asarray(end)))
    (y, end), (other_y, other_end) = found
    np.testing.assert_array_equal(y, other_y)
    np.testing.assert_array_equal(end, other_end)
    np.testing.assert_array_equal(end[0], state[0])


def test_the_state_after_masked_tokens_equals_that_of_a_shorter_row(x64):
    q, k, v = inputs()
    _, end = attend(q, k, v, past(), lengths=np.array([21, 37]), chunk=8)
    _, short = attend(q[:, :21], k[:, :21], v[:, :21], past(), chunk=8)
    assert largest(end[0], short[0]) < 1e-12 * np.abs(end).max()


def test_a_row_without_tokens_has_finite_outputs_and_gradients():
    tensors = tuple(jnp.asarray(x, jnp.float32) for x in inputs())

    def loss(tensors):
        state = jnp.zeros(STATE, jnp.float32)
        y, end = linear_attention(*tensors, state, lengths=np.array([0, 5]))
        return jnp.sum(y) + jnp.sum(end)

    value, gradients = jax.value_and_grad(loss)(tensors)
    for leaf in (value, *gradients):
        assert np.isfinite(leaf).all()


def test_without_tokens_the_state_is_returned():
    q, k, v = (np.float32(x[:, :0]) for x in inputs())
    state = past()
    y, end = attend(q, k, v, state)
    assert y.shape == (B, 0, H, N)
    np.testing.assert_array_equal(end, state)


def test_bfloat16_is_rounded_only_at_the_end():
    low = [jnp.asarray(x, jnp.bfloat16) for x in inputs()]
    y, end = attend(*low, past())
    assert y.dtype == jnp.bfloat16
    assert end.dtype == jnp.float32
    wide = [x.astype(jnp.float32) for x in low]
    wanted, wanted_end = attend(*wide, past())
    np.testing.assert_array_equal(y, wanted.astype(jnp.bfloat16))
    np.testing.assert_array_equal(end, wanted_end)


WRONG = {
    "three axes": ({"q": np.zeros((1, 2, 3))}, "`q` must have 4 axes"),
    "other keys": ({"k": np.zeros((B, T, H, D + 1))}, "`k` must have shape"),
    "fewer values": ({"v": np.zeros((B, T - 1, H, N))}, "`v` must have shape"),
    "another state": ({"state": np.zeros((B, H, 3, N + 1))}, "`state` must have shape"),
    "a half state": (
        {"state": np.zeros(STATE, np.float16)},
        "`state` must be float32 or float64; got float16",
    ),
    "no chunk": ({"chunk": 0}, "`chunk` must be at least 1; got 0"),
    "a length": ({"lengths": np.array([1, T + 1])}, "`lengths` must lie between 0 and"),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_input_is_named_in_one_sentence(unchecked, name):
    change, sentence = WRONG[name]
    q, k, v = (np.float32(x) for x in inputs())
    arguments = {"q": q, "k": k, "v": v, "state": np.zeros(STATE, np.float32)}
    arguments.update(change)
    with pytest.raises((TypeError, ValueError), match=f"^linear_attention: {sentence}"):
        linear_attention(**arguments)


def test_lists_are_accepted_as_arrays(unchecked):
    q, k, v = (np.ones((1, 3, 1, size), np.float32) for size in (2, 2, 4))
    state = np.zeros((1, 1, feature_count(2), 5), np.float32)
    expected = linear_attention(q, k, v, state)
    found = linear_attention(*(x.tolist() for x in (q, k, v)), state)
    for left, right in zip(found, expected, strict=True):
        np.testing.assert_array_equal(left, right)
