"""A writer rejects what the loader rejects, before it touches the old file."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_observers
from random_checkpoints import CONFIG, differing, random_params, random_state

from rwkv7_jax.checkpoints.model_files import load_model, save_model
from rwkv7_jax.checkpoints.state_files import load_state, save_state
from rwkv7_jax.checkpoints.state_sidecar import read_sidecar, sidecar
from rwkv7_jax.observer.files import load_observer, save_observer

SUFFIXES = (".pth", ".safetensors", ".st", ".state")


def with_number(state, number):
    """Return the state with one value of its WKV part replaced."""
    return state.replace(wkv=state.wkv.at[1, 0, 0, 2, 3].set(number))


def snapshot(folder) -> dict:
    """Return the bytes of every file below a folder."""
    return {str(f): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


# The states are made when they are used, and not by those who only collect the tests.
STATES = [
    (lambda: with_number(random_state(), np.nan), {}, "must be finite"),
    (lambda: with_number(random_state(), np.inf), {}, "must be finite"),
    (
        lambda: with_number(random_state(), 1e6),
        {"dtype": "float16"},
        "float16 cannot hold 1e\\+06",
    ),
    (
        lambda: with_number(random_state(), 3.4e38),
        {"dtype": "bfloat16"},
        "bfloat16 cannot hold",
    ),
    (
        random_state,
        {"dtype": "int8"},
        "`dtype` must be a floating-point dtype; got int8",
    ),
    (
        random_state,
        {"dtype": "bool"},
        "`dtype` must be a floating-point dtype",
    ),
    (
        random_state,
        {"dtype": "float33"},
        "`dtype` must be a floating-point dtype",
    ),
    (random_state, {"dtype": "float8_e4m3fn"}, "must have a dtype"),
    (
        random_state,
        {"info": {"alpha": np.nan}},
        "`info` must hold finite JSON values",
    ),
    (
        random_state,
        {"info": {"alpha": float("-inf")}},
        "`info` must hold finite JSON values",
    ),
    (
        random_state,
        {"info": {"score": jnp.ones(2)}},
        "`info` must hold finite JSON values",
    ),
    (
        random_state,
        {"info": {"base_model": 3}},
        "`base_model` of a state's sidecar",
    ),
    (
        lambda: random_state().replace(att_shift=np.full((3, 1, 64), np.nan)),
        {},
        "must be finite",
    ),
    (
        lambda: random_state().replace(ffn_shift=np.zeros((2, 1, 64))),
        {},
        "must have ffn_shift",
    ),
    (
        lambda: random_state().replace(wkv=np.zeros((0, 1, 2, 32, 32))),
        {},
        "none of them 0",
    ),
]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(("state", "options", "sentence"), STATES)
def test_an_unloadable_state_is_not_saved(tmp_path, suffix, state, options, sentence):
    path = tmp_path / f"s{suffix}"
    save_state(path, random_state(seed=5), info={"base_model": "abc"})
    before = snapshot(tmp_path)
    with pytest.raises((ValueError, TypeError), match=sentence) as caught:
        save_state(path, state(), **options)
    assert "\n" not in str(caught.value)
    assert snapshot(tmp_path) == before


def test_info_cannot_override_the_tensor_metadata(tmp_path):
    info = {"axes": "wrong", "dynamics": 3, "layers": 77, "digest": "", "note": "kept"}
    save_state(tmp_path / "s.pth", random_state(), info=info)
    assert differing(load_state(tmp_path / "s.pth"), random_state()) == []
    card = read_sidecar(tmp_path / "s.pth")
    assert card["note"] == "kept" and card["layers"] == 3 and "digest" not in card


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["m.pth", "m.safetensors", "m.st", "orbax"])
def test_an_unloadable_model_is_not_saved(tmp_path, name, number):
    good = random_params()
    save_model(tmp_path / name, good, CONFIG)
    before = snapshot(tmp_path)
    bad = good | {"head": {"weight": good["head"]["weight"].at[3, 5].set(number)}}
    with pytest.raises(
        ValueError, match=r"save_model: `params` must be finite.*head\.weight"
    ):
        save_model(tmp_path / name, bad, CONFIG)
    bad = good | {"head": {"weight": good["head"]["weight"].astype(jnp.int32)}}
    with pytest.raises(TypeError, match="must be floating-point"):
        save_model(tmp_path / name, bad, CONFIG)
    bad = good | {"head": {"weight": np.zeros((75, 64), np.float64)}}
    with pytest.raises(TypeError, match="dtypes that JAX keeps; got head/weight"):
        save_model(tmp_path / name, bad, CONFIG)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", ["m.pth", "m.safetensors", "orbax"])
def test_overflow_in_a_narrower_dtype_names_the_tensor(tmp_path, name):
    large = random_params(dtype=jnp.float32)
    large["head"]["weight"] = large["head"]["weight"].at[3, 5].set(1e6)
    save_model(tmp_path / name, large, CONFIG)
    for allow_nan in (False, True):
        sentence = r"values in head\.weight that float16 cannot hold"
        with pytest.raises(ValueError, match=sentence):
            load_model(tmp_path / name, dtype="float16", allow_nan=allow_nan)
    assert (
        load_model(tmp_path / name, dtype="bfloat16")[0]["head"]["weight"].dtype
        == jnp.bfloat16
    )


@pytest.mark.parametrize("dtype", ["int8", "bool", "float33", "", "uint4", [1]])
def test_an_invalid_dtype_is_rejected_before_reading(tmp_path, dtype):
    with pytest.raises(
        TypeError, match="load_model: `dtype` must be a floating-point dtype"
    ):
        load_model(tmp_path / "none.pth", dtype=dtype)


def test_an_unloadable_observer_is_not_saved(tmp_path):
    observer, params = tiny_observers.made()
    save_observer(tmp_path / "o", observer, params)
    before = snapshot(tmp_path)
    changes = [
        {"left": params["left"].at[0].set(jnp.nan)},
        {"bias": params["bias"].astype(jnp.int32)},
        {"model": jax.tree.map(lambda leaf: leaf * jnp.inf, params["model"])},
    ]
    for change in changes:
        with pytest.raises((ValueError, TypeError), match="save_observer: `params"):
            save_observer(tmp_path / "o", observer, params | change)
    with pytest.raises(
        ValueError, match="save_observer: `info` must hold finite JSON values"
    ):
        save_observer(tmp_path / "o", observer, params, info={"variance": float("nan")})
    assert snapshot(tmp_path) == before
    load_observer(tmp_path / "o", tiny_observers.TEACHER)


def test_a_sidecar_must_match_its_tensors(tmp_path):
    save_state(tmp_path / "a.pth", random_state(seed=1), info={"score": 1.5})
    save_state(tmp_path / "b.pth", random_state(seed=2))
    good = sidecar(tmp_path / "a.pth").read_bytes()
    sidecar(tmp_path / "a.pth").write_bytes(sidecar(tmp_path / "b.pth").read_bytes())
    with pytest.raises(
        ValueError, match=r"a\.pth\.json` does not belong to the tensors in"
    ):
        load_state(tmp_path / "a.pth")
    card = json.loads(good)
    sidecar(tmp_path / "a.pth").write_text(json.dumps(card | {"heads": 5}))
    with pytest.raises(ValueError, match="does not belong to the tensors"):
        load_state(tmp_path / "a.pth")
    # A note says nothing of the tensors.
    sidecar(tmp_path / "a.pth").write_text(json.dumps(card | {"score": 1.75}))
    with pytest.warns(
        UserWarning, match="was changed after it was written: one of score"
    ):
        load_state(tmp_path / "a.pth")
    # As files of earlier versions are.
    for name in ("digest", "entries_digest"):
        del card[name]
    sidecar(tmp_path / "a.pth").write_text(json.dumps(card | {"score": 1.75}))
    assert differing(load_state(tmp_path / "a.pth"), random_state(seed=1)) == []
