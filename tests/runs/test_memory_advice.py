"""Out of memory gives exit code 7 and one sentence with an estimate and what to change."""

import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from run_programs import ROOT
from smallest_runs import mode_settings, save_base_model

from rwkv7_jax import sharding
from rwkv7_jax.runs.exit_codes import exit_code
from rwkv7_jax.runs.modes.registry import make_mode
from rwkv7_jax.runs.monitoring.memory_advice import explain_out_of_memory
from rwkv7_jax.runs.process import exit_with_code
from rwkv7_jax.training.costs import tree_bytes

ERRORS = [
    MemoryError(),
    MemoryError("Unable to allocate 3.5 TiB for an array with shape (1,)"),
    RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8796093022208 bytes."),
    RuntimeError("RESOURCE_EXHAUSTED: Attempting to reserve 20.00G; 15.4G free\nmore"),
    RuntimeError("INTERNAL: CUDA_ERROR_OUT_OF_MEMORY: out of memory"),
    RuntimeError("Resource exhausted: Ran out of memory in memory space hbm."),
    RuntimeError("XLA:TPU compile permanent error. Exceeded hbm capacity by 3G"),
    RuntimeError("std::bad_alloc"),
    OSError(12, "Cannot allocate memory"),
    RuntimeError("Failed to allocate request for 2.0GiB on device ordinal 0"),
]


@pytest.mark.parametrize("error", ERRORS)
def test_every_platforms_message_ends_with_code_7_on_one_line(error, capfd):
    assert exit_code(error) == 7
    with pytest.raises(SystemExit) as ended, exit_with_code("train.py"):
        raise error
    assert ended.value.code == 7
    said = capfd.readouterr().err
    assert said.startswith("train.py: out of memory") and said.count("\n") == 1
    assert "`config.data.batch_size`" in said


def test_an_out_of_memory_cause_counts_and_other_errors_do_not():
    try:
        raise RuntimeError("the thread ended") from MemoryError()
    except RuntimeError as error:
        assert exit_code(error) == 7
    for other in (RuntimeError("no"), KeyError("out of memory")):
        assert exit_code(other) is None
    assert exit_code(ValueError("the file out of memory.txt is bad")) == 2


@pytest.mark.parametrize("mode", ["pretrain", "state", "observer"])
def test_the_message_has_the_estimate_its_largest_part_and_what_to_change(
    mode, tmp_path, capfd
):
    save_base_model(tmp_path / "base.pth")
    made = make_mode(mode_settings(mode, tmp_path / "base.pth"), tmp_path)
    with (
        pytest.raises(SystemExit) as ended,
        exit_with_code("train.py"),
        explain_out_of_memory(made, None),
    ):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nand pages of buffers")
    assert ended.value.code == 7
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    for part in ("batch_size` (2)", "length` (24)", "accumulate` (1)", "remat", "mesh"):
        assert part in said
    if mode != "observer":
        assert "MiB on each device, most of it" in said


def mesh_of(data, fsdp, sequence):
    """A mesh that repeats one device: an estimate reads only the sizes of a mesh."""
    devices = np.array([jax.devices()[0]] * (data * fsdp * sequence))
    return Mesh(devices.reshape(data, fsdp, sequence, 1), sharding.AXES)


@pytest.mark.parametrize(
    ("sizes", "rows", "length"),
    [((2, 1, 1), 4, 24), ((2, 2, 1), 2, 24), ((1, 1, 3), 8, 8), ((2, 1, 5), 4, 5)],
)
def test_the_estimate_counts_the_rows_and_tokens_of_one_device(
    tmp_path, sizes, rows, length
):
    save_base_model(tmp_path / "base.pth")
    settings = mode_settings("state", tmp_path / "base.pth", data__batch_size=8)
    alone = mode_settings(
        "state",
        tmp_path / "base.pth",
        data__batch_size=rows,
        data__length=length,
    )
    shared = make_mode(settings, tmp_path).memory_estimate(mesh_of(*sizes))
    own = make_mode(alone, tmp_path).memory_estimate()
    # Gathered weights apart, which a single device has none of.
    has_shards = sizes[1] > 1
    assert (shared.activations > own.activations) == has_shards
    assert (shared.parameters < own.parameters) == has_shards
    if not has_shards:
        assert shared == own


def test_a_device_holds_the_activations_of_its_own_states_of_a_stack(tmp_path):
    save_base_model(tmp_path / "base.pth")
    base = tmp_path / "base.pth"
    texts = {"poet": "task:mapping", "cook": "task:facts-8", "judge": "task:dictionary"}
    stack = {"data__path": "", "tuning__states": texts}
    for mode in ("state", "upscaled_state"):
        many = make_mode(mode_settings(mode, base, **stack), tmp_path)
        alone = make_mode(mode_settings(mode, base), tmp_path)
        shared = many.memory_estimate(mesh_of(1, 1, 3))
        own = alone.memory_estimate()
        assert shared.activations == own.activations
        assert shared.moments == 3 * own.moments
        trained = tree_bytes(alone.abstract_params)
        assert shared.parameters == own.parameters + 2 * trained


def test_the_features_of_a_memory_are_estimated_for_the_tokens_of_one_device(tmp_path):
    save_base_model(tmp_path / "base.pth")
    base = tmp_path / "base.pth"
    mode = make_mode(mode_settings("upscaled_state", base), tmp_path)
    short = mode_settings("upscaled_state", base, data__length=8)
    shared = mode.memory_estimate(mesh_of(1, 1, 3))
    assert shared == make_mode(short, tmp_path).memory_estimate()


def test_rows_that_do_not_divide_are_estimated_on_every_device(tmp_path):
    save_base_model(tmp_path / "base.pth")
    mode = make_mode(mode_settings("state", tmp_path / "base.pth"), tmp_path)
    assert mode.memory_estimate(mesh_of(3, 1, 1)) == mode.memory_estimate()


@pytest.mark.slow
def test_eval_names_its_own_settings(tmp_path):
    save_base_model(tmp_path / "base.pth")
    program = """
import sys, runpy
import rwkv7_jax.runs.modes.model_setup as model_setup
def fail(*_, **__):
    raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")
model_setup.load_model = fail
sys.argv = ["eval.py", "--config=configs/eval.py", "--config.init=" + sys.argv[1]]
runpy.run_path("eval.py", run_name="__main__")
"""
    ended = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "base.pth")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 7, ended.stderr
    assert "`config.evaluation.length`" in ended.stderr
    assert "accumulate" not in ended.stderr and "remat" not in ended.stderr
