"""Programs name a device that is missing or in use; they do not fall back to the CPU."""

import logging
import os
import subprocess
import sys

import jax
import pytest
from run_programs import ROOT

from rwkv7_jax.cli.commands import main
from rwkv7_jax.runs import devices
from rwkv7_jax.runs.devices import check_devices
from rwkv7_jax.runs.exit_codes import InUse, exit_code

HELD = "ABORTED: The TPU is already in use by process with pid 7. Not attempting"
ABSENT = "NOT_FOUND: TPU initialization failed: No jellyfish device found."


@pytest.fixture
def tpu_error(monkeypatch, global_config):
    """Makes JAX give a reason for using no TPU; the CPU is its default."""

    start = jax.devices

    def fail(reason):
        def devices(backend=None):
            if backend != "tpu":
                return start(backend)
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


# As the CUDA runtime says that it needs a newer driver.
OLD_DRIVER = (
    "operation cudaGetDeviceCount(&device_count) failed: CUDA driver version is insufficient for "
    "CUDA runtime version"
)

ABSENT_PACKAGE = (
    "An NVIDIA GPU may be present on this machine, but a CUDA-enabled jaxlib is not installed. "
    "Falling back to cpu."
)

NO_DEVICE = (
    "Unable to initialize backend 'cuda': FAILED_PRECONDITION: No visible GPU devices."
)


@pytest.fixture
def machine(monkeypatch, tpu_error, tmp_path):
    """Makes JAX start as on a machine with a GPU.

    A logged error makes it start on the CPU, a raised one not at all.
    """
    tpu_error(ABSENT)

    def start(*, logged=None, raised=None, has_gpu=True, has_plugin=True):
        log = logging.getLogger("jax._src.xla_bridge")
        gpu = tmp_path / "nvidia0"
        if has_gpu:
            gpu.touch()

        def default_backend():
            if isinstance(logged, Exception):
                log.error("Jax plugin configuration error", exc_info=logged)
            elif logged:
                log.warning(logged)
            if raised:
                raise RuntimeError(raised)
            return "cpu"

        monkeypatch.setattr(devices, "_GPU_FILES", (str(gpu),))
        monkeypatch.setattr(devices, "_has_gpu_plugin", lambda: has_plugin)
        monkeypatch.setattr(jax, "default_backend", default_backend)

    return start


def test_a_gpu_with_an_older_driver_is_not_replaced_by_the_cpu(machine, caplog):
    machine(logged=RuntimeError(OLD_DRIVER))
    with pytest.raises(ValueError, match=r"driver version.*`cuda12`.*JAX_PLATFORMS"):
        check_devices()
    # JAX's own message would be a traceback.
    assert not caplog.records


def test_a_gpu_that_jax_cannot_start_is_one_sentence(machine):
    machine(raised=NO_DEVICE)
    with pytest.raises(ValueError, match=r"GPU.*No visible GPU devices") as caught:
        check_devices()
    assert "JAX_PLATFORMS` must name" not in str(caught.value)


def test_a_gpu_that_another_process_holds_may_be_free_later(machine):
    machine(raised="CUDA_ERROR: all CUDA-capable devices are busy or unavailable")
    with pytest.raises(InUse, match="busy or unavailable"):
        check_devices()


def test_a_gpu_without_jaxs_package_for_it_is_a_warning(machine):
    machine(logged=ABSENT_PACKAGE, has_plugin=False)
    with pytest.warns(UserWarning, match="JAX reports: An NVIDIA GPU may be present"):
        check_devices()


def test_a_machine_without_a_gpu_may_have_jaxs_package_for_one(machine):
    machine(logged=RuntimeError(OLD_DRIVER), has_gpu=False)
    with pytest.warns(UserWarning, match="JAX reports: operation cudaGetDeviceCount"):
        check_devices()


@pytest.mark.parametrize("start", [{"logged": RuntimeError(OLD_DRIVER)}, {}])
def test_doctor_reports_a_gpu_that_jax_cannot_use(machine, start, capsys):
    machine(**start)
    assert main(["doctor"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("problem: JAX cannot use") == bool(start)


# JAX itself, with a package for GPUs that fails as with an older driver.
START = """
import sys
from jax._src import hardware_utils
from rwkv7_jax.runs import devices

hardware_utils._NVIDIA_GPU_DEVICES = [__file__]
devices._GPU_FILES = (__file__,)

from rwkv7_jax.cli.commands import main

sys.argv = ["rwkv7", "generate", "--model", "assets/tiny.pth", "--prompt", "a"]
sys.exit(main())
"""


def test_jaxs_package_for_gpus_fails_with_one_sentence(tmp_path):
    package = tmp_path / "jax_plugins" / "xla_cuda12"
    package.mkdir(parents=True)
    failing = f"def initialize():\n    raise RuntimeError({OLD_DRIVER!r})\n"
    (package / "__init__.py").write_text(failing)
    program = tmp_path / "start.py"
    program.write_text(START)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    environment.pop("JAX_PLATFORMS", None)
    done = subprocess.run(
        [sys.executable, program],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("rwkv7: JAX cannot use this machine's GPU (operation")
    assert "Traceback" not in done.stderr and not done.stdout


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
