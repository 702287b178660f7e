"""Thousands of damaged files: each is rejected by name or reads unchanged.

The seed is fixed, so every run damages the same files in the same way.
"""

import collections
import functools
import json
import shutil
import warnings
from pathlib import Path

import foreign_layouts as layouts
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_checkpoints import random_params, random_state

from rwkv7_jax.checkpoints.integrity.verification import verify
from rwkv7_jax.checkpoints.model_files import load_model, save_model
from rwkv7_jax.checkpoints.state_files import load_state, save_state
from rwkv7_jax.data.token_cache import open_cache, write_cache
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.model.kernel_features import Features
from rwkv7_jax.model.upscaled_memory import Upscaled
from rwkv7_jax.observer.files import load_observer, save_observer
from rwkv7_jax.observer.observer import init_observer
from rwkv7_jax.text.tokenizer import Tokenizer

# Without the checks of array shapes, as users run it.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("unchecked")]

SIZES = {
    "decay_rank": 3,
    "icl_rank": 4,
    "value_rank": 2,
    "gate_rank": 5,
    "ffn_width": 24,
}
CONFIG = RWKV7Config(vocab_size=11, num_layers=2, width=16, head_size=8, **SIZES)
HF_CONFIG = RWKV7Config(**{**CONFIG.__dict__, "group_norm_eps": 8 * CONFIG.norm_eps})

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
PAGE = b"\n<!DOCTYPE html><html><head><title>404</title></head></html>"


def upscaled_state():
    """A state with a small memory of random numbers."""
    state = random_state(CONFIG)
    rng = np.random.default_rng(3)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=(2, 1, 2, *shape)), jnp.float32)

    features = Features(
        landmarks=draw(6, 8), widths=draw(6), mean=draw(6), map=draw(6, 6)
    )
    memory = Upscaled(
        memory=draw(8, 6), write=draw(8), features=features, dynamics="static"
    )
    return state.replace(upscaled=memory)


def shifted_state():
    """A state whose token shifts are not zero."""
    state = random_state(CONFIG)
    return state.replace(
        att_shift=state.att_shift + 0.5, ffn_shift=state.ffn_shift - 0.25
    )


def make_observer(folder):
    """Write an observer of the small model."""
    observer, params = init_observer(CONFIG, CONFIG, jax.random.key(0))
    params = params | {"model": random_params(CONFIG, dtype=jnp.float32)}
    save_observer(folder, observer, params, info={"base_model": "abc"})


def make_cache(path):
    """Write a cache of two documents, one of them with loss-masked tokens."""
    lines = [{"text": "abc"}, {"prompt": "de", "answer": "fgh"}]
    source = path.parent / "source.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_cache([source], path, Tokenizer.bytes())
    source.unlink()


def read_cache(path):
    """Read everything in a cache."""
    stream = open_cache(path, Tokenizer.bytes(), split="train", held_out=0.0)
    masks = [mask for _, mask in stream.pieces(0, len(stream))]
    return jax.tree.map(jnp.asarray, (stream[:], masks))


@functools.cache
def params():
    """Random weights, made on first use and not during collection."""
    return random_params(CONFIG)


# Number of damaged files, name, function that writes it, function that reads it, and what must find
# every change: reading, `verify`, or neither (files of other programs, without digests).
FORMATS = {
    "pth": (
        380,
        "m.pth",
        lambda path: save_model(path, params(), CONFIG),
        load_model,
        "verify",
    ),
    "safetensors": (
        340,
        "m.safetensors",
        lambda path: save_model(path, params(), CONFIG),
        load_model,
        "verify",
    ),
    "st": (
        160,
        "m.st",
        lambda path: save_model(path, params(), CONFIG),
        load_model,
        "verify",
    ),
    "hf folder": (
        200,
        "hf",
        lambda path: save_model(path, params(), HF_CONFIG, format="hf"),
        load_model,
        "verify",
    ),
    "orbax folder": (
        24,
        "orbax",
        lambda path: save_model(path, params(), CONFIG),
        load_model,
        "verify",
    ),
    "rwkv.cpp": (
        200,
        "m.bin",
        lambda path: layouts.write_rwkv_cpp(path, layouts.official(params(), CONFIG)),
        load_model,
        "neither",
    ),
    "folder of shards": (
        200,
        "m",
        lambda path: layouts.write_folder(
            path,
            layouts.of_base_model(layouts.official(params(), CONFIG), "model."),
            config={"model_type": "rwkv7"},
            shards=2,
        ),
        load_model,
        "neither",
    ),
    "state pth": (
        300,
        "s.pth",
        lambda path: save_state(path, shifted_state(), info={"base_model": "abc"}),
        load_state,
        "read",
    ),
    "state st": (
        150,
        "s.st",
        lambda path: save_state(path, random_state(CONFIG)),
        load_state,
        "read",
    ),
    "state safetensors": (
        160,
        "s.safetensors",
        lambda path: save_state(path, shifted_state()),
        load_state,
        "read",
    ),
    "upscaled state": (
        260,
        "s.safetensors",
        lambda path: save_state(path, upscaled_state()),
        load_state,
        "read",
    ),
    "observer": (
        40,
        "observer",
        make_observer,
        lambda path: load_observer(path, CONFIG)[1],
        "read",
    ),
    "token cache": (
        260,
        "c.bin",
        make_cache,
        read_cache,
        "read",
    ),
}


def damage_json(data: bytes, rng) -> bytes:
    """Change the value or type of one entry of a JSON object, or remove the entry."""
    table = json.loads(data)
    holder = table
    while True:
        name = sorted(holder)[rng.integers(len(holder))]
        inside = holder[name]
        if not isinstance(inside, dict) or not inside or rng.random() < 0.3:
            break
        holder = inside
    junk = (
        None,
        True,
        -1,
        0,
        2.5,
        "junk",
        [],
        {},
        [1],
        {"a": 1},
        1e300,
        "static",
        "decay",
        "x" * 99,
    )
    if rng.random() < 0.2:
        del holder[name]
    else:
        holder[name] = junk[rng.integers(len(junk))]
    return json.dumps(table).encode()


def damage(data: bytes, rng, *, is_json: bool) -> bytes:
    """Damage bytes as real files get damaged."""
    if is_json and rng.random() < 0.6:
        choices = (
            b"[]",
            b"null",
            b"3",
            b"",
            b"  \n",
            b"[" * 100_000,
            data[: len(data) // 2],
        )
        choice = rng.integers(len(choices) + 12)
        return choices[choice] if choice < len(choices) else damage_json(data, rng)
    size = max(len(data), 1)
    place = int(rng.integers(size))
    length = int(rng.integers(1, 40))
    kind = rng.integers(12)
    if kind < 5:
        changed = bytearray(data or b"\0")
        # Headers are a small part of the bytes and have most of the ways to go wrong.
        place = place if rng.random() < 0.5 else int(rng.integers(min(size, 400)))
        changed[place] ^= 1 << int(rng.integers(8))
        return bytes(changed)
    if kind == 5:
        return data[:place]
    if kind == 6:
        return data[:place] + data[place + length :]
    if kind == 7:
        return data[:place] + bytes(length) + data[place + length :]
    if kind == 8:
        return data[:place] + rng.bytes(length) + data[place:]
    if kind == 9:
        return data[:place] + rng.bytes(length) + data[place + length :]
    if kind == 10:
        # The end of the file, where a zip has its list of entries.
        place = max(0, size - int(rng.integers(1, 600)))
        return data[:place] + rng.bytes(2) + data[place + 2 :]
    return (POINTER, PAGE, b"", bytes(size), data + data, data[::-1])[rng.integers(6)]


def content(result) -> list:
    """Return the bits of the loaded value and its metadata."""
    leaves, structure = jax.tree.flatten(result)
    bits = []
    for leaf in leaves:
        # A config has a dtype too.
        if isinstance(leaf, jax.Array):
            array = np.asarray(leaf)
            bits.append((str(array.dtype), array.shape, array.tobytes()))
        else:
            bits.append(leaf)
    return [str(structure), bits]


@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_file_is_rejected_by_name_or_reads_unchanged(tmp_path, name):
    count, file_name, write, read, finder = FORMATS[name]
    good = tmp_path / "good"
    good.mkdir()
    write(good / file_name)
    files = sorted(file for file in good.rglob("*") if file.is_file())
    # The digits in a name must not make two formats draw the same damages.
    rng = np.random.default_rng(list(name.encode()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = content(read(good / file_name))
    place = tmp_path / "damaged"
    shutil.copytree(good, place)
    faults = []
    outcomes = collections.Counter()
    for number in range(count):
        source = files[rng.integers(len(files))]
        target = place / source.relative_to(good)
        data = source.read_bytes()
        changed = damage(data, rng, is_json=source.suffix == ".json")
        if number % 25 == 24:
            target.unlink()
        else:
            target.write_bytes(changed)
        outcome = judge(place, place / file_name, read, before, finder)
        outcomes[outcome.split(":")[0]] += 1
        if ":" in outcome:
            faults.append(f"{number} {target.relative_to(place)} {outcome}")
        target.write_bytes(data)
    assert faults == [], dict(outcomes)


def judge(folder: Path, path: Path, read, before: list, finder: str) -> str:
    """Return how a damaged file was handled; a fault is followed by a colon and the reason."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            after = content(read(path))
        except (ValueError, TypeError, OSError) as error:
            if str(folder) not in str(error):
                return f"nameless: {type(error).__name__} {error}"
            return "refused"
        except Exception as error:
            return f"traceback: {type(error).__name__} {error}"
        if after == before:
            return "same"
        if finder == "verify":
            try:
                verify(path)
            except ValueError:
                return "found by verify"
        # Other programs' files carry no digest of ours.
        return "other" if finder == "neither" else "silent: read otherwise"
