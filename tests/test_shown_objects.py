"""What a notebook shows of the public objects: their shapes, and no pages of numbers."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_models import TINIEST, lively, random_state, tokens
from upscaled_states import empty_state

import rwkv7_jax as rwkv
from rwkv7_jax.based import BasedConfig, init_based_state
from rwkv7_jax.model.int8_weights import quantize_rows
from rwkv7_jax.text.id_tokenizer import IdTokenizer


def generation():
    model = rwkv.RWKV7(TINIEST)
    return rwkv.generate(model, lively(TINIEST), [1, 2], tokens=8, temperature=0)


def based_state():
    layers = ("linear", "window", "conv")
    return init_based_state(
        BasedConfig(vocab_size=13, width=8, layers=layers, feature_size=2, window=3)
    )


SHOWN = {
    "Batch": lambda: rwkv.data.Batch(tokens(2, 40), mask=np.ones((2, 39), np.float32)),
    "Generation": generation,
    "RWKV7State": lambda: random_state(TINIEST),
    "Upscaled": lambda: empty_state().upscaled,
    "Features": lambda: empty_state().upscaled.features,
    "BasedState": based_state,
    "Int8Matrix": lambda: quantize_rows(jnp.ones((3, 8))),
    "TrainState": lambda: rwkv.TrainState.create(
        random_state(TINIEST), optax.adam(0.1)
    ),
}


@pytest.mark.parametrize("kind", SHOWN)
def test_arrays_print_their_shapes(kind):
    value = SHOWN[kind]()
    shown = repr(value)
    assert shown.startswith(f"{kind}(") and "rray(" not in shown
    assert "32[" in shown or "int8[" in shown
    assert len(shown) < 700


def test_a_donated_state_can_be_printed():
    train = rwkv.TrainState.create(random_state(TINIEST), optax.adam(0.1))
    shown = repr(train)
    jax.tree.map(lambda leaf: leaf.delete(), train)
    assert repr(train) == shown


def test_tokenizers_print_their_names():
    assert repr(rwkv.Tokenizer.bytes()) == "Tokenizer('bytes', vocab_size=257)"
    assert repr(IdTokenizer(13)) == "IdTokenizer('ids', vocab_size=13)"


def test_dir_lists_lazy_names():
    """For completion, without the seconds that loading takes."""
    script = (
        "import sys, rwkv7_jax; names = dir(rwkv7_jax)\n"
        "assert {'RWKV7', 'data', 'tuning', 'serving', 'text'} <= {*names}, names\n"
        "assert 'jax' not in sys.modules\n"
        "assert 'Loads' in rwkv7_jax.load_model.__doc__"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
