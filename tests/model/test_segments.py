"""Several sequences in one row of the model: each is what it would be in a row of its own."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import QUICK, SCANNED, lively, random_state, tokens
from tolerances import assert_trees_close
from upscaled_states import SIZE

from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import repeat
from rwkv7_jax.tuning.upscaling import upscale

ROWS, T, K = 2, 23, 3
# One sequence has no token, one has a single token.
SIZES = ((4, 0, 19), (17, 1, 2))
LENGTHS = jnp.array([23, 20])
IDS = jnp.array(
    [np.repeat(np.arange(K), (4, 0, 19)), np.repeat(np.arange(K), (17, 1, 5))]
)
IDS_OF_TEXT = tokens(ROWS, T)
# Of the same arithmetic in another order.
BAR = 1e-6


def separate(model, params, text, state):
    """Runs every sequence in a row of its own; returns the logits in place and the end states."""
    sizes = np.ravel(SIZES)
    longest = sizes.max()
    # Both [ROWS * K, longest]; what fills a row up is not counted.
    rows = np.arange(ROWS).repeat(K)[:, None]
    starts = np.cumsum(SIZES, axis=1) - SIZES
    places = np.minimum(np.ravel(starts)[:, None] + np.arange(longest), T - 1)
    logits, end = model.apply({"params": params}, text[rows, places], state, sizes)
    is_token = np.arange(longest) < sizes[:, None]
    logits = jnp.where(is_token[..., None], logits, 0)
    return jnp.zeros((ROWS, T, logits.shape[-1])).at[rows, places].add(logits), end


def together(model, params, text, state):
    """Runs the packed rows; what is padding gives zeros."""
    logits, end = model.apply(
        {"params": params}, text, state, lengths=LENGTHS, segment_ids=IDS
    )
    is_token = jnp.arange(T)[None] < LENGTHS[:, None]
    return jnp.where(is_token[..., None], logits, 0), end


@pytest.mark.parametrize(
    "config",
    [
        QUICK,
        pytest.param(
            dataclasses.replace(SCANNED, implementation=None), marks=pytest.mark.slow
        ),
    ],
    ids=["shallow", "deep, chunked"],
)
def test_packed_sequences_equal_separate_rows_with_all_gradients(config):
    model = RWKV7(config)
    params = lively(config)
    state = random_state(config, batch=ROWS * K)

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(run, params, state):
        def loss(params, state):
            logits, end = run(model, params, IDS_OF_TEXT, state)
            ends = [jnp.sum(jnp.cos(x)) for x in jax.tree.leaves(end)]
            return jnp.sum(jnp.sin(logits)) + sum(ends), (logits, end)

        grads, outputs = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, state)
        return outputs, grads

    (logits, end), grads = gradients(together, params, state)
    (true_logits, true_end), true_grads = gradients(separate, params, state)
    assert_trees_close(
        {"logits": logits, "end": end}, {"logits": true_logits, "end": true_end}, BAR
    )
    # Gradients of weights are sums over tokens in another order.
    assert_trees_close({"grads": grads}, {"grads": true_grads}, 1e-5)


def test_one_sequence_per_row_equals_the_plain_call():
    model = RWKV7(QUICK)
    params = lively(QUICK)
    state = random_state(QUICK, batch=ROWS)

    def call(segment_ids):
        run = functools.partial(model.apply, segment_ids=segment_ids)
        return jax.jit(run)({"params": params}, IDS_OF_TEXT, state)

    packed = call(jnp.zeros((ROWS, T), int))
    assert_trees_close({"x": packed}, {"x": call(None)}, BAR)


def test_a_static_memory_is_shared_by_packed_sequences():
    model = RWKV7(QUICK)
    params = lively(QUICK)
    start = upscale(model, params, tokens(6, 40, seed=5), size=SIZE, dynamics="static")
    upscaled = start.upscaled
    memory = jnp.sin(jnp.arange(upscaled.memory.size, dtype=jnp.float32))
    start = start.replace(
        upscaled=upscaled.replace(memory=memory.reshape(upscaled.memory.shape))
    )
    state = repeat(start, ROWS * K)
    choices = (model, params, IDS_OF_TEXT, state)
    found = jax.jit(together, static_argnums=0)(*choices)[0]
    expected = jax.jit(separate, static_argnums=0)(*choices)[0]
    assert_trees_close({"logits": found}, {"logits": expected}, BAR)


def test_rows_without_tokens_return_every_state_and_its_gradient():
    params = lively(QUICK)
    state = random_state(QUICK, ROWS * K)
    nothing = jnp.zeros((ROWS, 0), jnp.int32)

    def read(state):
        model = RWKV7(QUICK)
        return model.apply({"params": params}, nothing, state, segment_ids=nothing)

    (logits, end), pull = jax.vjp(read, state)
    assert logits.shape == (ROWS, 0, QUICK.vocab_size)
    jax.tree.map(np.testing.assert_array_equal, end, state)
    (gradient,) = pull((logits, state))
    jax.tree.map(np.testing.assert_array_equal, gradient, state)


def test_a_changing_memory_is_rejected(unchecked):
    model = RWKV7(QUICK)
    params = lively(QUICK)
    start = upscale(model, params, tokens(6, 40, seed=5), size=SIZE, dynamics="delta")
    with pytest.raises(ValueError, match=r"`state.upscaled` must be static and shared"):
        model.apply(
            {"params": params}, IDS_OF_TEXT, repeat(start, ROWS * K), segment_ids=IDS
        )


SENTENCES = [
    (IDS[:, :4], ValueError, r"`segment_ids` must have shape \(2, 23\)"),
    (IDS.astype(float), TypeError, "`segment_ids` must be integers; got float"),
    (IDS - 1, ValueError, "`segment_ids` must be at least 0 and below 3.*got -1"),
    (IDS + 1, ValueError, "`segment_ids` must be at least 0 and below 3.*got 3"),
    (IDS.at[0, 22].set(0), ValueError, "`segment_ids` must not decrease.*row 0 does"),
]


@pytest.mark.parametrize(("ids", "error", "sentence"), SENTENCES)
def test_bad_ids_are_named_in_one_sentence(unchecked, ids, error, sentence):
    state = random_state(QUICK, batch=ROWS * K)
    with pytest.raises(error, match=f"^RWKV7: {sentence}"):
        RWKV7(QUICK).apply(
            {"params": lively(QUICK)}, IDS_OF_TEXT, state, segment_ids=ids
        )


def test_states_of_another_dtype_or_shape_are_named(unchecked):
    state = random_state(QUICK, batch=ROWS * K)
    for wrong, error, sentence in (
        (state.wkv.astype(jnp.bfloat16), TypeError, "must be float32; got bfloat16"),
        (state.wkv[..., :-1], ValueError, "must have shape"),
    ):
        with pytest.raises(error, match=f"^RWKV7: `state.wkv` {sentence}"):
            RWKV7(QUICK).apply(
                {"params": lively(QUICK)},
                IDS_OF_TEXT,
                state.replace(wkv=wrong),
                segment_ids=IDS,
            )


def test_states_must_be_a_multiple_of_the_rows(unchecked):
    with pytest.raises(
        ValueError, match=r"^RWKV7: `state` must hold a multiple of 2 sequences"
    ):
        RWKV7(QUICK).apply(
            {"params": lively(QUICK)},
            IDS_OF_TEXT,
            random_state(QUICK, batch=5),
            segment_ids=IDS,
        )
