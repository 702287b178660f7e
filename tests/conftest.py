"""Strict ground: shapes are checked at each call; warnings and rank promotion are errors."""

import importlib.util
import os
import re
import signal
from importlib.metadata import version
from pathlib import Path

# Before JAX starts: two CPU devices, and no accelerator that would change these tests' numbers.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Further threads of OpenBLAS and PyTorch spin while they wait, on the core of the other worker.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Compiling is most of the suite's time. LLVM's optimisation is half of it: it is off, except where
# a test asks for a program as users get it (`AS_USERS` in tolerances.py). Half of what is left
# are jaxlib 0.10's fusion emitters; later versions have no other way and refuse the flag. A third
# of the rest is cutting programs into pieces for more cores than a test worker has.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=2",
        "--xla_backend_optimization_level=0"
        if os.environ["JAX_PLATFORMS"] == "cpu"
        else "",
        "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
        if os.environ["JAX_PLATFORMS"] == "cpu"
        and version("jaxlib").startswith("0.10.")
        else "",
    ]
)

# A folder of compiled programs is not shared by workers: JAX writes its files in place, and workers
# that begin with the same modules would read what another one has half written.
if "JAX_COMPILATION_CACHE_DIR" in os.environ and "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] += "/" + os.environ["PYTEST_XDIST_WORKER"]

import hypothesis
import jax
import jaxtyping
import pytest

# An example may take any time: the machine may be busy.
hypothesis.settings.register_profile("suite", deadline=None)
hypothesis.settings.load_profile("suite")

jax.config.update("jax_numpy_rank_promotion", "raise")

# As in a terminal: programs leave a signal ignored that their caller ignores, as nohup does.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def modules_with_shapes() -> list[str]:
    """Names the modules that have shapes in signatures: the others would only be slower."""
    found = []
    for package in ("rwkv7_jax", "pallas_kernels"):
        spec = importlib.util.find_spec(package)
        root = Path(spec.submodule_search_locations[0])
        for path in root.rglob("*.py"):
            imports = r"^from (jaxtyping|rwkv7_jax\.array_types) import"
            if re.search(imports, path.read_text(encoding="utf-8"), re.M):
                inside = path.relative_to(root.parent).with_suffix("")
                found.append(".".join(inside.parts))
    return found


# Shapes in signatures become checks; modules imported before the hook would escape it.
jaxtyping.install_import_hook(modules_with_shapes(), "signature_checks.check")


@pytest.fixture(scope="session", autouse=True)
def quiet_reads():
    """What a failed read leaves behind is ignored, as in programs: it may end in any later test."""
    from rwkv7_jax.checkpoints.orbax_import import hide_abandoned_reads

    # The one to pass on to is pytest's own, which is in place by now.
    hide_abandoned_reads()


@pytest.fixture(scope="module", autouse=True)
def forgotten_programs():
    """Programs of a module are forgotten at its end: those of all would take gigabytes."""
    yield
    jax.clear_caches()


@pytest.fixture
def unchecked(monkeypatch):
    """Signatures go unchecked, as for users: public functions check their own arguments."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def pytest_make_parametrize_id(val, argname):
    """Name a case by its argument where its bytes are no text: compressed ones hold the clock.

    The workers collect at different seconds, and have to find the same names.
    """
    return argname if isinstance(val, bytes) and not val.isascii() else None
