"""An observer's folder: saved bit for bit; refused if it is damaged or of another teacher."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_observers
from tiny_observers import SMALL, TEACHER, alive

from rwkv7_jax.checkpoints.model_files import model_hash
from rwkv7_jax.checkpoints.tensor_files import (
    read_metadata,
    read_safetensors,
    write_safetensors,
)
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.observer.files import (
    MAPS,
    MODEL,
    load_observer,
    observer_info,
    save_observer,
)

mirror = pytest.fixture(tiny_observers.mirror, scope="module")
teacher = pytest.fixture(tiny_observers.teacher, scope="module")
made = pytest.fixture(tiny_observers.made, scope="module")


def test_an_observer_round_trips_through_its_folder(made, teacher, tmp_path):
    observer, params = made
    params = params | {"left": params["left"].astype(jnp.bfloat16)}
    info = {
        "base_model": model_hash(teacher[1], TEACHER),
        "variance": [[0.1, 0.2], [0.3, 0.4]],
    }
    save_observer(tmp_path / "a" / "b", observer, params, info=info)
    found, loaded = load_observer(
        tmp_path / "a" / "b", TEACHER, base_model=info["base_model"]
    )
    # Which implementation runs is the machine's choice, and not in the file.
    small = dataclasses.replace(SMALL, implementation=None)
    assert found == dataclasses.replace(observer, model=RWKV7(small))
    assert observer_info(tmp_path / "a" / "b") == info
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    for one, two in zip(jax.tree.leaves(loaded), jax.tree.leaves(params), strict=True):
        assert one.dtype == two.dtype
        np.testing.assert_array_equal(one, two)


def test_a_folder_of_another_teacher_is_rejected(made, tmp_path):
    save_observer(tmp_path, *made, info={"base_model": "abc"})
    for change, sentence in (
        (
            {"num_layers": 3},
            "`teacher` must have the observer's num_layers 2; got 3",
        ),
        (
            {"vocab_size": 24},
            "`teacher` must have the observer's vocab_size 23; got 24",
        ),
        (
            {"head_size": 8},
            "`teacher` must have the observer's head_size 16; got 8",
        ),
    ):
        with pytest.raises(ValueError, match=f"load_observer: {sentence}"):
            load_observer(tmp_path, dataclasses.replace(TEACHER, **change))
    with pytest.raises(ValueError, match=r"belongs to abc; `base_model` is abd\."):
        load_observer(tmp_path, TEACHER, base_model="abd")


def test_a_damaged_folder_is_rejected(made, tmp_path):
    observer, params = made
    with pytest.raises(
        ValueError, match=r"is not an observer: it has no model\.safetensors"
    ):
        load_observer(tmp_path, TEACHER)
    save_observer(tmp_path, observer, params)
    with pytest.raises(ValueError, match="does not name its teacher"):
        load_observer(tmp_path, TEACHER, base_model="abc")
    maps = (tmp_path / MAPS).read_bytes()
    save_observer(tmp_path, observer, params | {"model": alive(params["model"], 9)})
    (tmp_path / MAPS).write_bytes(maps)
    with pytest.raises(
        ValueError, match=f"has a {MODEL} that does not belong to its {MAPS}"
    ):
        load_observer(tmp_path, TEACHER)
    with pytest.raises(
        ValueError, match=r"save_observer: `params\['bias'\]` must be finite"
    ):
        save_observer(
            tmp_path, observer, params | {"bias": params["bias"].at[0].set(jnp.nan)}
        )
    save_observer(tmp_path, observer, params)
    metadata = read_metadata(tmp_path / MAPS)
    maps = {
        name: tensor.read()
        for name, tensor in read_safetensors(tmp_path / MAPS).items()
    }
    maps["bias"] = np.full_like(maps["bias"], np.nan)
    write_safetensors(tmp_path / MAPS, maps.items(), metadata=metadata)
    with pytest.raises(ValueError, match="has NaN or Inf in bias"):
        load_observer(tmp_path, TEACHER)
    write_safetensors(tmp_path / MAPS, [("left", np.zeros(3))])
    with pytest.raises(ValueError, match="is not from an observer"):
        load_observer(tmp_path, TEACHER)
