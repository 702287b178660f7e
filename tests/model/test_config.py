"""Sizes: what is refused, what published models have, how many weights follow."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import init_state


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"width": 100}, "`width` must be a multiple of `head_size`; got 100 and 64."),
        ({"num_layers": 0}, "`num_layers` must be a positive integer; got 0."),
        ({"vocab_size": 2.0}, "`vocab_size` must be a positive integer; got 2.0."),
        ({"head_size": True}, "`head_size` must be a positive integer; got True."),
        ({"gate_rank": -1}, "`gate_rank` must be a positive integer; got -1."),
        ({"norm_eps": 0.0}, "`norm_eps` must lie between 0 and 1; got 0.0."),
        (
            {"dtype": "float16"},
            "`dtype` must be one of float32, bfloat16; got 'float16'.",
        ),
        ({"remat": "all"}, "`remat` must be one of none, op, block; got 'all'."),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_a_wrong_size_is_named_in_one_sentence(unchecked, change, sentence):
    with pytest.raises(ValueError) as caught:
        RWKV7Config(**({"vocab_size": 16, "num_layers": 1, "width": 64} | change))
    assert str(caught.value) == f"RWKV7Config: {sentence}"


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_epsilons_may_be_numpy_numbers(unchecked, kind):
    values = {"norm_eps": kind(0.001), "group_norm_eps": kind(0.064)}
    config = RWKV7Config(vocab_size=16, num_layers=1, width=64, **values)
    for name, value in values.items():
        # JSON and the metadata of files need Python's own.
        assert type(getattr(config, name)) is float
        assert getattr(config, name) == value


def test_sizes_may_be_numpy_integers(unchecked):
    config = RWKV7Config(vocab_size=np.int64(16), num_layers=np.int32(1), width=64)
    assert config == RWKV7Config(vocab_size=16, num_layers=1, width=64)
    # JSON writes no others.
    assert type(config.vocab_size) is int and type(config.num_layers) is int
    with pytest.raises(
        ValueError, match=r"`width` must be .* got np\.float64\(64\.0\)"
    ):
        RWKV7Config(vocab_size=16, num_layers=1, width=np.float64(64))


def test_a_misspelt_field_is_an_error():
    with pytest.raises(TypeError, match="widht"):
        RWKV7Config(vocab_size=16, num_layers=1, width=64, widht=64)


def test_an_unknown_preset_is_an_error_that_lists_them():
    with pytest.raises(ValueError, match=r"0\.1b, 0\.4b.*got '3b'"):
        RWKV7Config.preset("3b")


def test_a_config_is_frozen_and_hashable():
    config = RWKV7Config.preset("0.1B", dtype=jnp.bfloat16)
    assert config.dtype == "bfloat16"
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.width = 1
    assert hash(config) == hash(RWKV7Config.preset("0.1b", dtype="bfloat16"))


# Layers, width, then the ranks of decay, in-context rate, value and gate.
PUBLISHED = {
    "0.1b": (12, 768, 64, 64, 32, 128),
    "0.4b": (24, 1024, 64, 64, 32, 128),
    "1.5b": (24, 2048, 96, 96, 64, 256),
    "2.9b": (32, 2560, 96, 96, 64, 320),
    "7.2b": (32, 4096, 128, 128, 96, 480),
    "13.3b": (61, 4096, 192, 192, 128, 384),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_size_has_the_parameter_count_of_its_file(name):
    layers, width, w, a, v, g = PUBLISHED[name]
    official = 2 * 65536 * width + 4 * width
    official += layers * (19 * width + 12 * width**2 + 2 * width * (w + a + v + g))
    unused = (
        width + 2 * width * v
    )  # v0, v1, v2 of layer 0, which files carry and nothing reads

    config = dataclasses.replace(RWKV7Config.preset(name), implementation="scan")
    state = jax.eval_shape(lambda: init_state(config))
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    params = jax.eval_shape(RWKV7(config).init, jax.random.key(0), ids, state)["params"]
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(params)) == official - unused


def test_the_ranks_of_a_new_model_follow_its_width():
    config = RWKV7Config(vocab_size=16, num_layers=1, width=2048)
    ranks = (config.decay_rank, config.icl_rank, config.value_rank, config.gate_rank)
    assert (config.ffn_width, ranks) == (8192, (128, 128, 64, 224))
