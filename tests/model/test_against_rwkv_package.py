"""The official inference package on CPU in float32, from files that this project wrote."""

import contextlib
import dataclasses
import io
import os
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trained_scale_models as calm_models

from rwkv7_jax.checkpoints.model_files import load_model, save_model
from rwkv7_jax.checkpoints.state_files import load_state
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import RWKV7State, init_state

LOGITS, STATES, BFLOAT16_RMS = 1e-4, 1e-5, 0.02
LENGTH = 19


@pytest.fixture(scope="module")
def official():
    """`official(path)` is the package's model of a .pth file."""
    # Here and not above: importing takes seconds, also of those who only collect.
    for package in ("torch", "rwkv"):
        pytest.importorskip(package, reason="the oracle extra is not installed")
    os.environ |= {"RWKV_V7_ON": "1", "RWKV_CUDA_ON": "0", "RWKV_JIT_ON": "0"}
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        from rwkv.model import RWKV

        def load(path):
            return RWKV(model=str(path.with_suffix("")), strategy="cpu fp32")

        with contextlib.redirect_stdout(io.StringIO()):
            yield load


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def pair(official, folder, config, *, dtype="float32"):
    """One file as the package and we read it."""
    path = folder / f"{config.num_layers}-{config.head_size}-{dtype}.pth"
    save_model(path, calm_models.calm(config, dtype=dtype), config)
    params, read = load_model(path)
    assert read == config
    return official(path), RWKV7(config), params


def as_list(state: RWKV7State, *, transpose: bool = False) -> list:
    """A batch-1 state in the package's layout."""
    import torch

    parts = []
    for att, wkv, ffn in zip(state.att_shift, state.wkv, state.ffn_shift, strict=True):
        wkv = wkv.mT if transpose else wkv
        parts += [torch.tensor(np.asarray(x[0], np.float32)) for x in (att, wkv, ffn)]
    return parts


def theirs(model, tokens, state, *, transpose=False):
    """The package's logits [T V] and final state."""
    memory = as_list(state, transpose=transpose)
    logits, memory = model.forward([int(t) for t in tokens], memory, full_output=True)
    return np.atleast_2d(logits.numpy()), memory


def check_state(ours: RWKV7State, memory: list) -> None:
    for i, expected in enumerate(as_list(ours)):
        found = memory[i].numpy()
        scale = np.abs(found).max()
        assert np.abs(expected.numpy() - found).max() <= STATES * scale, i


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "head_size", [pytest.param(32, marks=SLOW), 64, pytest.param(128, marks=SLOW)]
)
def test_logits_and_states_of_a_file_match_the_official_package(
    official, folder, head_size
):
    config = calm_models.config(head_size)
    model, ours, params = pair(official, folder, config)
    ids = calm_models.ids(config, 1, LENGTH)
    start = calm_models.start(config)
    apply = jax.jit(ours.apply)
    logits, end = apply({"params": params}, ids, start)
    expected, memory = theirs(model, ids[0], start)
    assert 0.5 < expected.std() < 2
    assert np.abs(np.asarray(logits[0]) - expected).max() <= LOGITS
    check_state(end, memory)

    wrong, _ = theirs(model, ids[0], start, transpose=True)
    assert np.abs(wrong - expected).max() > 100 * LOGITS


def test_token_by_token_and_any_cut_match_the_official_package(official, folder):
    config = calm_models.config()
    model, _, params = pair(official, folder, config)
    ids = calm_models.ids(config, 1, LENGTH)
    start = calm_models.start(config)
    expected, memory = theirs(model, ids[0], start)
    apply = jax.jit(RWKV7(dataclasses.replace(config, implementation="scan")).apply)
    state = start
    for t in range(LENGTH):
        logits, state = apply({"params": params}, ids[:, t : t + 1], state)
        assert np.abs(np.asarray(logits[0, 0]) - expected[t]).max() <= LOGITS, t
    check_state(state, memory)
    # One program for all cuts: both pieces padded to the whole length.
    for cut in range(1, LENGTH):
        pieces = ids, jnp.roll(ids, -cut, axis=1)
        head, middle = apply({"params": params}, pieces[0], start, jnp.array([cut]))
        tail, end = apply(
            {"params": params}, pieces[1], middle, jnp.array([LENGTH - cut])
        )
        logits = np.concatenate([head[0, :cut], tail[0, : LENGTH - cut]])
        assert np.abs(logits - expected).max() <= LOGITS, cut
        check_state(end, memory)


def test_a_session_of_the_official_package_loads_as_a_state_and_continues(
    official, folder
):
    import torch

    config = calm_models.config()
    model, ours, params = pair(official, folder, config)
    ids = calm_models.ids(config, 1, LENGTH)
    first = np.asarray(ids[0, :11])
    rest = ids[:, 11:]
    # As their chat programs do: a new session, read in two calls, and its list saved by torch.
    _, memory = model.forward(first[:4].tolist(), None)
    _, memory = model.forward(first[4:].tolist(), memory)
    torch.save(memory, folder / "session.pth")
    session = load_state(folder / "session.pth", config=config)
    zero = init_state(config)
    apply = jax.jit(ours.apply)
    _, read_by_us = apply({"params": params}, ids[:, :11], zero)
    for name in ("att_shift", "wkv", "ffn_shift"):
        theirs_ = getattr(session, name)
        own = getattr(read_by_us, name)
        assert np.any(own)
        error = np.abs(np.asarray(theirs_, np.float32) - np.asarray(own, np.float32))
        assert error.max() <= STATES * np.abs(own).max(), name
    # Heads are square: read the other way round, the list would load as well and mean nothing.
    assert np.abs(session.wkv.mT - read_by_us.wkv).max() > 100 * STATES
    logits, _ = apply({"params": params}, rest, session)
    expected, _ = model.forward(rest[0].tolist(), memory, full_output=True)
    assert np.abs(np.asarray(logits[0]) - expected.numpy()).max() <= LOGITS


@pytest.mark.slow
def test_the_official_token_by_token_mode_matches_our_prefill(official, folder):
    config = calm_models.config(32)
    model, ours, params = pair(official, folder, config)
    ids = calm_models.ids(config, 1, LENGTH)
    start = calm_models.start(config)
    logits, end = jax.jit(ours.apply)({"params": params}, ids, start)
    memory = as_list(start)
    for t, token in enumerate(np.asarray(ids[0])):
        one, memory = model.forward(int(token), memory)
        assert np.abs(np.asarray(logits[0, t]) - one.numpy()).max() <= LOGITS, t
    check_state(end, memory)


@pytest.mark.slow
def test_bfloat16_is_within_the_noise_of_the_reference(official, folder):
    config = calm_models.config()
    model, _, params = pair(official, folder, config, dtype="bfloat16")
    ids = calm_models.ids(config, 1, 64)
    start = calm_models.start(config)
    expected, _ = theirs(model, ids[0], start)
    half = RWKV7(dataclasses.replace(config, dtype="bfloat16"))
    shifts = {
        n: getattr(start, n).astype(jnp.bfloat16) for n in ("att_shift", "ffn_shift")
    }
    logits, _ = jax.jit(half.apply)({"params": params}, ids, start.replace(**shifts))
    error = np.asarray(logits[0], np.float32) - expected
    assert np.sqrt(np.mean(error**2)) <= BFLOAT16_RMS


@pytest.mark.slow
def test_a_model_of_the_smallest_published_size_matches(official, folder):
    config = calm_models.config(num_layers=12, width=768)
    model, ours, params = pair(official, folder, config)
    ids = calm_models.ids(config, 1, 40)
    start = calm_models.start(config)
    logits, end = jax.jit(ours.apply)({"params": params}, ids, start)
    expected, memory = theirs(model, ids[0], start)
    assert np.abs(np.asarray(logits[0]) - expected).max() <= LOGITS
    check_state(end, memory)
