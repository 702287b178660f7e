"""BASED as a model: the state goes in and comes back, wherever a sequence is cut."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rwkv7_jax.based import Based, BasedConfig, BasedState, init_based_state
from rwkv7_jax.based.config import published_order

V, T = 50, 23

ORDERS = {
    "linear": ("conv", "linear"),
    "window": ("conv", "window"),
    "attention": ("conv", "attention"),
    "all": ("conv", "linear", "window", "attention", "conv"),
}


def config_of(order, dtype="float64"):
    """A small model with more than one head, whose window is shorter than a row."""
    return BasedConfig(
        vocab_size=V,
        width=12,
        layers=ORDERS[order],
        num_heads=2,
        feature_size=3,
        window=5,
        context=32,
        kernel_size=4,
        mlp_width=16,
        dtype=dtype,
    )


CONFIG = config_of("all")


@functools.cache
def weights(order):
    """Weights none of which are zero: a new MLP would be silent."""
    config = config_of(order, "float32")
    one = np.zeros((1, 1), np.int32)
    params = Based(config).init(jax.random.key(0), one, init_based_state(config))
    rng = np.random.default_rng(0)

    def stir(leaf):
        return np.asarray(leaf + 0.2 * rng.normal(size=leaf.shape), np.float32)

    return jax.tree.map(stir, params["params"])


@functools.cache
def compiled(order, dtype="float64"):
    """The model's call."""
    model = Based(config_of(order, dtype))
    # Not inside the compiled function, where they would be traced.
    params = weights(order)

    def call(tokens, state, lengths=None):
        return model.apply({"params": params}, tokens, state, lengths)

    return jax.jit(call)


def tokens(seed=0):
    """Two rows of ids."""
    return np.random.default_rng(seed).integers(0, V, (2, T), np.int32)


@pytest.fixture
def x64():
    """Everything in float64."""
    with jax.enable_x64(True):
        yield


def _norm(x, weight):
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + CONFIG.norm_eps) * weight


def _convolve(p, x):
    """The gated short convolution and its own residual."""
    taps = p["taps"]
    seen = np.concatenate([np.zeros((len(taps) - 1, x.shape[1])), x])
    windows = np.stack([seen[i : i + len(x)] for i in range(len(taps))], 1)
    mixed = p["shift"] + np.einsum("tkd,kd->td", windows, taps)
    return mixed * (x @ p["gate"].T + p["gate_bias"]) + x


def _attend(p, x, kind):
    """Attention over all pairs of tokens."""
    names = ("query", "key", "value")
    q, k, v = ((x @ p[name].T).reshape(T, CONFIG.num_heads, -1) for name in names)
    scores = np.einsum("thd,shd->hts", q, k) / np.sqrt(q.shape[-1])
    weights = 1 + scores + scores**2 / 2 if kind == "linear" else np.exp(scores)
    weights = np.tril(weights)
    if kind == "window":
        weights = np.triu(weights, 1 - CONFIG.window)
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("hts,shn->thn", weights, v).reshape(T, -1) @ p["output"].T


def restated(ids):
    """The logits of one row from an empty state, in numpy."""
    params = jax.tree.map(np.float64, weights("all"))
    x = params["emb"][ids]
    for index, kind in enumerate(CONFIG.layers):
        layer = params[f"layer_{index}"]
        normed = _norm(x, layer["mixer_norm"]["weight"])
        mixer = layer["mixer"]
        if kind == "conv":
            x = x + _convolve(mixer, normed)
        else:
            x = x + _attend(mixer, normed, kind)
        normed = _norm(x, layer["mlp_norm"]["weight"])
        hidden = np.maximum(normed @ layer["mlp"]["up"].T, 0) ** 2
        x = x + hidden @ layer["mlp"]["down"].T
    return _norm(x, params["norm"]["weight"]) @ params["head"].T


def test_logits_match_the_equations(x64):
    logits, _ = compiled("all")(tokens(), init_based_state(CONFIG, 2))
    for row, ids in zip(logits, tokens(), strict=True):
        np.testing.assert_allclose(row, restated(ids), rtol=0, atol=1e-11)


@pytest.mark.parametrize("order", ORDERS)
def test_pieces_and_single_tokens_match_one_pass(x64, order):
    run = compiled(order)
    ids = tokens()
    start = init_based_state(config_of(order), 2)
    whole, end = run(ids, start)
    first, state = run(ids[:, :9], start)
    parts = [first]
    for t in range(9, T):
        logits, state = run(ids[:, t : t + 1], state)
        parts.append(logits)
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, rtol=0, atol=1e-12)
    for one, two in zip(jax.tree.leaves(state), jax.tree.leaves(end), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-12, atol=1e-12)


def test_a_masked_token_changes_no_bit():
    run = compiled("all", "float32")
    ids = tokens()
    other = tokens(1)
    lengths = np.array([0, 17])
    for row, length in enumerate(lengths):
        other[row, :length] = ids[row, :length]
    start = run(tokens(2), init_based_state(config_of("all", "float32"), 2))[1]
    logits, end = run(ids, start, lengths)
    other_logits, other_end = run(other, start, lengths)
    np.testing.assert_array_equal(logits[1, :17], other_logits[1, :17])
    for leaf, same, before in zip(
        *map(jax.tree.leaves, (end, other_end, start)), strict=True
    ):
        np.testing.assert_array_equal(leaf, same)
        np.testing.assert_array_equal(leaf[0], before[0])
    assert np.isfinite(logits).all()


def test_a_padded_row_ends_like_a_shorter_one(x64):
    run = compiled("all")
    ids = tokens()
    start = init_based_state(config_of("all"), 2)
    _, end = run(ids, start, np.array([9, 9]))
    _, short = run(ids[:, :9], start)
    for one, two in zip(jax.tree.leaves(end), jax.tree.leaves(short), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-12, atol=1e-12)


def test_without_tokens_the_state_is_returned():
    config = config_of("all", "float32")
    _, state = compiled("all", "float32")(tokens(), init_based_state(config, 2))
    logits, end = compiled("all", "float32")(np.zeros((2, 0), np.int32), state)
    assert logits.shape == (2, 0, V)
    jax.tree.map(np.testing.assert_array_equal, end, state)


def test_all_weights_get_gradients():
    config = config_of("all", "float32")
    ids = tokens()

    @jax.jit
    @jax.grad
    def gradient(params):
        start = init_based_state(config, 2)
        logits, _ = Based(config).apply({"params": params}, ids, start)
        return jnp.sum(jnp.sin(logits))

    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient(weights("all"))):
        assert np.isfinite(leaf).all() and np.any(leaf != 0), path


def test_bfloat16_activations_keep_float32_sums_and_logits():
    config = config_of("all", "bfloat16")
    logits, state = compiled("all", "bfloat16")(tokens(), init_based_state(config, 2))
    assert logits.dtype == jnp.float32
    assert state.layers[1].sums.dtype == jnp.float32
    assert state.layers[2].keys.dtype == jnp.bfloat16
    wide, _ = compiled("all", "float32")(
        tokens(), init_based_state(config_of("all", "float32"), 2)
    )
    assert np.abs(logits - wide).max() < 0.1 * np.abs(wide).max()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_float32_where_float64_is_enabled(x64, dtype):
    config = config_of("all", dtype)
    state = init_based_state(config, 2)
    params = jax.eval_shape(
        lambda key: Based(config).init(key, tokens(), state), jax.random.key(0)
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_the_published_order_has_a_window_after_each_linear_attention():
    layers = published_order()
    linear = [index for index, kind in enumerate(layers) if kind == "linear"]
    window = [index for index, kind in enumerate(layers) if kind == "window"]
    assert len(layers) == 36
    assert linear == [1, 6, 11, 16, 21, 27, 33]
    assert window == [index + 1 for index in linear]
    assert layers.count("conv") == 22


def test_the_published_window_is_half_its_setting_plus_the_token_itself():
    """FlashAttention's window (256 // 2, 0): from 128 tokens before the current one to itself."""
    assert BasedConfig.published().window == len(range(-128, 0 + 1))


def test_the_published_order_runs():
    config = BasedConfig.published(
        vocab_size=V, width=32, mlp_width=None, dtype="float32"
    )
    start = init_based_state(config)
    shapes = jax.eval_shape(
        lambda key: Based(config).init_with_output(key, tokens()[:1], start),
        jax.random.key(0),
    )
    (logits, state), params = shapes
    assert logits.shape == (1, T, V)
    assert len(state.layers) == 36
    assert "mlp" not in params["params"]["layer_0"]


WRONG_CONFIGS = {
    "a list": ({"layers": ["conv"]}, "`layers` must be a tuple"),
    "no layer": ({"layers": ()}, "`layers` must name a layer; got none"),
    "a kind": ({"layers": ("conv", "mamba")}, "`layers` must be one of conv, linear"),
    "width": ({"width": 13}, "`width` must be a multiple of `num_heads`; got 13 and 2"),
    "no window": ({"window": 0}, "`window` must be at least 1; got 0"),
    "a fraction": ({"kernel_size": 2.5}, "`kernel_size` must be an integer; got float"),
    "a bool": ({"window": True}, "`window` must be an integer; got True"),
    "no mlp": ({"mlp_width": 0}, "`mlp_width` must be at least 1; got 0"),
    "dtype": ({"dtype": "float16"}, "`dtype` must be one of float32"),
    "eps": ({"norm_eps": 0.0}, "`norm_eps` must be above 0"),
}


@pytest.mark.parametrize("name", WRONG_CONFIGS)
def test_a_bad_config_is_named_in_one_sentence(unchecked, name):
    change, sentence = WRONG_CONFIGS[name]
    with pytest.raises((TypeError, ValueError), match=f"^BasedConfig: {sentence}"):
        dataclasses.replace(config_of("all"), **change)


def _wrong_calls():
    config = config_of("all", "float32")
    state = init_based_state(config, 2)
    ids = tokens()
    other = init_based_state(config_of("linear", "float32"), 2)
    bad_dtype = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), state)
    return {
        "an id": ((ids + V, state), "`tokens` must be at least 0 and below 50"),
        "flat ids": ((ids[0], state), r"`tokens` must have shape \[B T\]"),
        "rows": ((ids[:1], state), r"`state.layers\[0\].inputs` must have shape"),
        "layers": ((ids, other), "`state` must hold the memories of layers conv"),
        "dtype": (
            (ids, bad_dtype),
            r"`state.layers\[0\].inputs` must be float32; got bfl",
        ),
        "no state": ((ids, None), "`state` must be a BasedState; got NoneType"),
        "lengths": ((ids, state, [1, 99]), "`lengths` must lie between 0 and 23"),
    }


@pytest.mark.parametrize(
    "name", ["an id", "flat ids", "rows", "layers", "dtype", "no state", "lengths"]
)
def test_a_bad_call_is_named_in_one_sentence(unchecked, name):
    arguments, sentence = _wrong_calls()[name]
    model = Based(config_of("all", "float32"))
    with pytest.raises((TypeError, ValueError), match=f"^Based: {sentence}"):
        model.apply({"params": weights("all")}, *arguments)


def test_weights_of_another_model_are_rejected(unchecked):
    config = config_of("all", "float32")
    other = dataclasses.replace(config, mlp_width=8)
    state = init_based_state(other, 2)
    sentence = "^`params` must be those of this model, with layer_0/mlp/up of"
    with pytest.raises(ValueError, match=sentence):
        Based(other).apply({"params": weights("all")}, tokens(), state)
    with pytest.raises(ValueError, match=r"emb of shape \(50, 12\); got none\."):
        Based(config).apply({}, tokens(), state)


def test_strict_promotion_allows_lengths_under_x64():
    config = config_of("all", "float32")
    ids = np.zeros((2, 3), np.int32)
    lengths = np.array([1, 3], np.int32)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        # Traced only: promotion is decided there.
        logits, _ = jax.eval_shape(
            Based(config).apply,
            {"params": weights("all")},
            ids,
            init_based_state(config, 2),
            lengths,
        )
    assert logits.dtype == jnp.float32


def test_a_new_state_can_be_donated():
    state = init_based_state(config_of("window", "float32"))
    leaves = jax.tree.leaves(state)
    # An array that occurs twice cannot be donated.
    assert len(set(map(id, leaves))) == len(leaves)


def test_a_state_of_one_row_has_its_batch():
    assert init_based_state(config_of("all", "float32"), 3).batch == 3
    assert isinstance(init_based_state(config_of("all", "float32")), BasedState)
