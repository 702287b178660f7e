"""Bytes of state by formula are those of the arrays that decoding carries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rwkv7_jax as rwkv
from rwkv7_jax.based import Based, BasedConfig, init_based_state, state_bytes
from rwkv7_jax.model import Features
from rwkv7_jax.tuning.upscaling import empty_memory

TOKENS = 40


def array_bytes(tree):
    """The bytes of all leaves."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "layers",
    [
        ("conv", "linear"),
        ("conv", "window"),
        ("conv", "attention"),
        ("conv", "linear", "window"),
    ],
)
def test_the_state_bytes_of_based_match_the_formula(layers, dtype):
    config = BasedConfig(
        vocab_size=20,
        width=12,
        layers=layers,
        num_heads=2,
        feature_size=3,
        window=8,
        context=TOKENS,
        kernel_size=4,
        dtype=dtype,
    )
    start = init_based_state(config)
    ids = np.zeros((1, TOKENS), np.int32)
    model = Based(config)
    (_, end), _ = jax.eval_shape(
        lambda key: model.init_with_output(key, ids, start), jax.random.key(0)
    )
    found = state_bytes(config, TOKENS)
    assert found.total == array_bytes(end)
    small = sum(
        array_bytes(
            layer if hasattr(layer, "inputs") else getattr(layer, "position", ())
        )
        for layer in end.layers
    )
    assert found.matrix == found.total - small


def upscaled_state(config, size, dynamics):
    """A state with an empty memory."""
    lead = (config.num_layers, 1, config.num_heads)
    features = Features(
        landmarks=jnp.zeros((*lead, size, config.head_size)),
        widths=jnp.zeros((*lead, size)),
        mean=jnp.zeros((*lead, size)),
        map=None,
        kind="fourier",
    )
    memory = empty_memory(features, dynamics=dynamics)
    return rwkv.init_state(config).replace(upscaled=memory)


def own_rows(state):
    """The leaves of which each sequence has its own."""
    own = [state.wkv, state.att_shift, state.ffn_shift]
    if state.upscaled is not None and state.upscaled.form.has_own_rows:
        own.append(state.upscaled.memory)
    return own


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dynamics", [None, "static", "decay", "delta"])
def test_the_state_bytes_of_rwkv7_match_the_formula(dynamics, dtype):
    config = rwkv.RWKV7Config(
        vocab_size=20, num_layers=2, width=16, head_size=8, dtype=dtype
    )
    state = rwkv.init_state(config)
    size = 0
    if dynamics is not None:
        state = upscaled_state(config, 24, dynamics)
        size = 0 if dynamics == "static" else 24
    ids = np.zeros((1, TOKENS), np.int32)
    one = jax.random.key(0)
    model = rwkv.RWKV7(config)
    (_, end), _ = jax.eval_shape(
        lambda key: model.init_with_output(key, ids, state), one
    )
    found = state_bytes(config, TOKENS, memory_size=size)
    assert found.total == array_bytes(own_rows(end))
    assert found.matrix == found.total - array_bytes([end.att_shift, end.ffn_shift])


def test_state_bytes_count_only_the_keys_in_the_cache():
    config = BasedConfig(
        vocab_size=20, width=12, layers=("window", "attention"), window=8, context=99
    )
    assert state_bytes(config, 0).matrix == 0
    assert state_bytes(config, 5).matrix == 2 * (2 * 12 * 5 * 4)
    assert state_bytes(config, 50).matrix == 2 * 12 * 4 * (8 + 50)
    assert state_bytes(config, 500).matrix == 2 * 12 * 4 * (8 + 99)


def test_bad_input_is_named_in_one_sentence(unchecked):
    config = BasedConfig(vocab_size=20, width=12, layers=("conv",))
    for arguments, sentence in (
        (({}, 3), "state_bytes: `config` must be a BasedConfig or an RWKV7Config"),
        ((config, -1), "state_bytes: `tokens` must be at least 0; got -1"),
    ):
        with pytest.raises((TypeError, ValueError), match=sentence):
            state_bytes(*arguments)
    with pytest.raises(ValueError, match="`memory_size` must be 0 for a BasedConfig"):
        state_bytes(config, 3, memory_size=4)
