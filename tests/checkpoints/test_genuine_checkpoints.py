"""Published checkpoints give the numbers of their authors' tests in every layout and format.

The files are not part of this project. Without them the tests are skipped.
"""

import dataclasses
import functools
import random

import foreign_layouts as layouts
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from genuine_checkpoints import REVERSE, TINY, genuine
from random_checkpoints import differing

from rwkv7_jax.checkpoints.model_files import load_model, model_hash, save_model
from rwkv7_jax.checkpoints.tensor_files import read_tensors
from rwkv7_jax.checkpoints.unused_value_residual import without_unused_value_residual
from rwkv7_jax.cli.commands import main
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import init_state

# rwkv.cpp's own file, and what its tests expect of the ids '"in' from a state of zeros.
TINY_BIN = "rwkvcpp-tiny-7v0-834k/tiny-rwkv-7v0-834K-FP32.bin"
TINY_LOGITS = "rwkvcpp-tiny-7v0-834k/expected-logits-7v0-834K.bin"
PROMPT = (34, 105, 110)
# rwkv.cpp's bar for the sum of the differences of 256 logits, and what float32 reaches.
SUM_OF_DIFFERENCES = 1e-3
LARGEST_DIFFERENCE = 2e-6
# The same model with names of RWKV-LM's experiments, and one with ROSA.
ORIGINAL_REVERSE = "blinkdl-reverse-260123/260123_reverse_L2_only_rwkv7.pth"
ROSA = "blinkdl-reverse-260123/251105_reverse_L2.pth"
MODELS = {"tiny": TINY, "reverse": REVERSE}


def plain(path):
    """Return a checkpoint without unused tensors, and its config."""
    params, config = load_model(path)
    return without_unused_value_residual(params), config


def written(name, format=None):
    """A row of the table: one of our writers."""

    def make(folder, params, config):
        if name.endswith(".gguf"):
            pytest.importorskip("gguf", reason="the gguf extra is not installed")
        if format == "hf":
            # The two rules for the epsilon of the heads agree for heads of 64.
            config = dataclasses.replace(
                config, group_norm_eps=config.head_size * config.norm_eps
            )
        save_model(folder / name, params, config, format=format)
        return folder / name

    return make


def foreign(write):
    """A row of the table: another program's layout."""

    def make(folder, params, config):
        return write(folder, layouts.official(params, config))

    return make


def rwkv_cpp(folder, arrays, *, half=False):
    layouts.write_rwkv_cpp(folder / "m.bin", arrays, half=half)
    return folder / "m.bin"


def in_folder(folder, arrays, change, **how):
    layouts.write_folder(folder / "m", change(arrays), config={}, **how)
    return folder / "m"


def for_transformers(folder, arrays):
    def change(arrays):
        return layouts.of_base_model(arrays, "rwkv7.")

    return in_folder(folder, arrays, change, shards=2)


def as_layers(folder, arrays):
    def change(arrays):
        return layouts.of_base_model(layouts.as_layers(arrays), "model.")

    return in_folder(folder, arrays, change)


def compiled(folder, arrays):
    path = folder / "m.bin"
    layouts.write_torch(path, layouts.prefixed(arrays, "_orig_mod."))
    return path


# What keeps every bit of bfloat16 and of float32.
EXACT = {
    "pth": written("m.pth"),
    "safetensors": written("m.safetensors"),
    "orbax": written("m"),
    "foreign: folder for transformers": foreign(for_transformers),
    "foreign: low rank as layers": foreign(as_layers),
    "foreign: torch.compile": foreign(compiled),
    "foreign: rwkv.cpp": foreign(rwkv_cpp),
}
# What has an epsilon of its own for heads other than 64, programs for such heads alone, or fewer
# digits.
OTHERS = {
    "hf": written("m", "hf"),
    "transformers": written("m", "transformers"),
    "gguf": written("m.gguf"),
    "st": written("m.st"),
    "foreign: rwkv.cpp in half precision": foreign(
        functools.partial(rwkv_cpp, half=True)
    ),
}


@pytest.fixture(scope="module")
def last_logits():
    """Return the logits at the last prompt token; compiled once for all files."""

    @functools.partial(jax.jit, static_argnums=1)
    def apply(params, config):
        tokens = jnp.asarray([PROMPT])
        return RWKV7(config).apply({"params": params}, tokens, init_state(config))[0]

    def logits(path):
        params, config = load_model(path, dtype="float32")
        config = dataclasses.replace(config, implementation="scan")
        return np.asarray(apply(without_unused_value_residual(params), config)[0, -1])

    return logits


def assert_as_rwkv_cpp_expects(logits):
    difference = logits - np.fromfile(genuine(TINY_LOGITS), "<f4")
    assert abs(difference.sum()) < SUM_OF_DIFFERENCES
    assert np.abs(difference).max() < LARGEST_DIFFERENCE


@pytest.mark.parametrize("file", [TINY_BIN, TINY])
def test_an_rwkv_cpp_file_gives_the_logits_of_rwkv_cpps_tests(last_logits, file):
    assert_as_rwkv_cpp_expects(last_logits(genuine(file)))


@pytest.mark.parametrize("format", EXACT | OTHERS)
def test_every_format_gives_the_same_logits(last_logits, tmp_path, format):
    params, config = plain(genuine(TINY))
    path = (EXACT | OTHERS)[format](tmp_path, params, config)
    assert_as_rwkv_cpp_expects(last_logits(path))


def test_the_bfloat16_file_equals_the_rwkv_cpp_file():
    wide, config = plain(genuine(TINY_BIN))
    narrow, config_of_derived = plain(genuine(TINY))
    assert config == config_of_derived
    assert differing(jax.tree.map(lambda x: x.astype(jnp.float32), narrow), wide) == []


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("format", EXACT)
def test_every_format_round_trips_bit_exactly(tmp_path, model, format):
    source = genuine(MODELS[model])
    params, config = load_model(source)
    path = EXACT[format](tmp_path, params, config)
    again, config_again = load_model(path)
    assert config_again == config
    save_model(tmp_path / "back.pth", again, config_again)
    first = {name: tensor.read() for name, tensor in read_tensors(source).items()}
    back = {
        name: tensor.read()
        for name, tensor in read_tensors(tmp_path / "back.pth").items()
    }
    for name, array in first.items():
        # rwkv.cpp's and llama.cpp's float32 hold bfloat16 without loss.
        narrow = back.pop(name).astype(array.dtype)
        assert narrow.shape == array.shape, name
        assert narrow.tobytes() == array.tobytes(), name
    # What is left are zeros in the place of tensors that no model reads.
    assert not any(array.any() for array in back.values())


def test_every_format_gives_the_same_hash(tmp_path):
    params, config = plain(genuine(REVERSE))
    hashes = {model_hash(params, config)}
    for format in ("pth", "safetensors", "orbax"):
        path = EXACT[format](tmp_path, params, config)
        hashes.add(model_hash(*load_model(path)))
    assert len(hashes) == 1


@pytest.mark.parametrize("file", [TINY_BIN, TINY])
def test_every_file_has_the_same_parameter_count(tmp_path, capsys, file):
    for path in (genuine(file), tmp_path / "m.safetensors"):
        assert main(["inspect", str(path)]) == 0
        assert "829,888 parameters, 12 layers, width 64" in capsys.readouterr().out
        if not (tmp_path / "m.safetensors").exists():
            save_model(tmp_path / "m.safetensors", *load_model(path))


@pytest.mark.parametrize("file", [ORIGINAL_REVERSE, ROSA])
def test_rosa_models_are_rejected_by_name(file):
    with pytest.raises(ValueError, match=r"is an RWKV-8 \(ROSA\) checkpoint") as caught:
        load_model(genuine(file))
    assert "\n" not in str(caught.value)


def reversing_strings() -> list[str]:
    """Return the numbers of the author's test.

    Source: BlinkDL/RWKV-LM@524481d RWKV-v8/251105_reverse_run.py.
    """
    # The module's own generator, because the author's test seeds that.
    generator = random.Random(42)
    numbers = []
    for digits in range(1, 61):
        least = 10 ** (digits - 1) if digits > 1 else 0
        for _ in range(10):
            numbers.append(str(generator.randint(least, 10**digits - 1)))
    return numbers


@pytest.mark.parametrize("implementation", ["scan", "chunked", None])
def test_the_reversal_model_makes_no_mistakes(implementation):
    params, config = load_model(genuine(REVERSE))
    config = dataclasses.replace(config, implementation=implementation)
    numbers = reversing_strings()
    rows = []
    for number in numbers:
        text = f"{number},{number[::-1]}".ljust(129, "#")
        rows.append(["0123456789,#".index(character) for character in text])
    ids = np.asarray(rows, np.int32)

    @jax.jit
    def predict(params, tokens):
        state = init_state(config, batch=len(tokens))
        logits, _ = RWKV7(config).apply({"params": params}, tokens, state)
        return logits.argmax(-1)

    predicted = np.asarray(predict(params, ids[:, :-1]))
    right = 0
    asked = 0
    for number, row, prediction in zip(numbers, ids, predicted, strict=True):
        # From the comma, which predicts the first digit, to the first sign for the end.
        answer = slice(len(number), 2 * len(number) + 1)
        right += int((prediction[answer] == row[1:][answer]).sum())
        asked += len(number) + 1
    assert (right, asked) == (18_900, 18_900)
