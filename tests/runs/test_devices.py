"""Programs name a device that is missing or in use; they do not fall back to the CPU."""

import os
import subprocess
import sys

import jax
import pytest
from run_programs import ROOT

from rwkv7_jax.runs.devices import check_devices
from rwkv7_jax.runs.exit_codes import InUse, exit_code

HELD = "ABORTED: The TPU is already in use by process with pid 7. Not attempting"
ABSENT = "NOT_FOUND: TPU initialization failed: No jellyfish device found."


@pytest.fixture
def tpu_error(monkeypatch, global_config):
    """Makes JAX give a reason for using no TPU; the CPU is its default."""

    def fail(reason):
        def devices(backend=None):
            raise RuntimeError(f"Backend 'tpu' failed to initialize: {reason}")

        monkeypatch.setattr(jax, "devices", devices)

    return fail


@pytest.fixture
def global_config():
    """Unsets the platforms that the tests ask for."""
    asked = jax.config.jax_platforms
    jax.config.update("jax_platforms", None)
    yield
    jax.config.update("jax_platforms", asked)


def test_a_tpu_that_another_process_holds_is_not_replaced_by_the_cpu(tpu_error):
    tpu_error(HELD)
    with pytest.raises(InUse, match=r"pid 7.*JAX_PLATFORMS=cpu") as caught:
        check_devices()
    assert exit_code(caught.value) == 75


def test_a_machine_without_a_tpu_runs_on_the_cpu(tpu_error):
    tpu_error(ABSENT)
    check_devices()


def test_a_cpu_that_was_asked_for_is_used(tpu_error):
    tpu_error(HELD)
    jax.config.update("jax_platforms", "cpu")
    check_devices()


PROGRAMS = {
    "train.py": (
        "train.py",
        "--config=configs/state_tuning.py",
        "--workdir=x",
        "--config.init=assets/tiny.pth",
        "--config.data.path=charmaps",
    ),
    "eval.py": (
        "eval.py",
        "--config=configs/eval.py",
        "--config.init=assets/tiny.pth",
        "--config.data.path=charmaps",
    ),
    "rwkv7": ("-m", "rwkv7_jax.cli", "doctor"),
}


def run_on(platform, *words):
    """Runs Python on a platform that JAX is asked for."""
    return subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": platform},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("platform", ["cuda", "nonsense"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_platform_that_is_not_here_is_one_sentence(program, platform):
    if platform == "cuda" and os.path.exists("/dev/nvidiactl"):
        pytest.skip("this machine has a GPU")
    done = run_on(platform, *PROGRAMS[program])
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"{program}: `JAX_PLATFORMS` must name a platform of this")
    assert repr(platform) in last and "Traceback" not in done.stderr


def test_commands_that_only_read_files_leave_the_accelerator_alone(tmp_path):
    words = ("convert", "assets/tiny.pth", str(tmp_path / "model.safetensors"))
    done = run_on("nonsense", "-m", "rwkv7_jax.cli", *words)
    assert done.returncode == 0, done.stderr
