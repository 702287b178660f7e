"""Which devices a program uses: JAX may not reach one, or may silently use the CPU instead."""

import contextlib
import importlib.util
import logging
import os
import warnings
from collections.abc import Iterator

import jax

from rwkv7_jax.checks import first_line
from rwkv7_jax.runs.exit_codes import InUse
from rwkv7_jax.runs.waiting import report_wait

# Part of a reason if another process holds the device: libtpu's "The TPU is already in use by ...",
# and CUDA's "all CUDA-capable devices are busy or unavailable".
_IN_USE = ("already in use", "devices are busy")

_WRONG_PLATFORM = "`JAX_PLATFORMS` must name a platform of this machine; got {!r} ({})."

_HELD = (
    "another process holds this machine's accelerator ({}); wait for it or end it, or set "
    "JAX_PLATFORMS=cpu to use the CPU."
)

_UNUSABLE = (
    "JAX cannot use this machine's GPU ({}); check that `nvidia-smi` shows the GPU, and CUDA 13 "
    "for the extra `cuda` or CUDA 12 for `cuda12`, or set JAX_PLATFORMS=cpu to use the CPU."
)

# Files that show an NVIDIA GPU, also in a container and under WSL.
_GPU_FILES = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg")

# JAX's packages for GPUs.
_GPU_PLUGINS = ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")

# JAX logs here why it does not use a device.
_STARTING = logging.getLogger("jax._src.xla_bridge")


def use_cpu() -> None:
    """Keeps this process off the accelerator, which a run may be using.

    Without it, a command that only reads files would allocate most of a GPU's memory, or hold the
    TPU. It must be called before any use of a device.
    """
    jax.config.update("jax_platforms", "cpu")


def check_devices() -> None:
    """Starts JAX's backend, and checks that it is the one that the user expects.

    Warns if JAX uses no GPU or TPU because its package for them is not installed.

    Raises:
        InUse: another process holds the TPU or the GPU. Unless `JAX_PLATFORMS` is set, JAX would
            run on the CPU.
        ValueError: `JAX_PLATFORMS` names a platform that this machine does not have, or JAX's
            package for GPUs is installed and cannot use the GPU of this machine.
    """
    problem = start_devices()
    if problem is not None:
        raise problem


def start_devices() -> ValueError | None:
    """Starts JAX's backend; returns the error of `check_devices` if JAX can only use the CPU.

    Raises:
        ValueError: `JAX_PLATFORMS` names a platform that this machine does not have.
    """
    asked = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
    platform = None
    with _collect_reasons() as reasons, report_wait("JAX to start the devices"):
        try:
            platform = jax.default_backend()
        except RuntimeError as error:
            reasons.insert(0, first_line(error))
        except AssertionError:
            # JAX skips CUDA on machines without a GPU, and then finds no platform at all.
            reasons.insert(0, "no GPU was found")
    if platform is None:
        return _failure(asked, reasons[0])
    if platform == "cpu" and not asked:
        for reason in (*reasons, _reason_without_tpu()):
            if _is_in_use(reason):
                return InUse(_HELD.format(reason))
        if reasons and _has_gpu() and _has_gpu_plugin():
            return ValueError(_UNUSABLE.format(reasons[0]))
    for reason in reasons:
        warnings.warn(f"JAX reports: {reason}", stacklevel=2)
    return None


def _failure(asked: str | None, reason: str) -> ValueError:
    """Returns the error for a backend that did not start."""
    if _is_in_use(reason):
        return InUse(_HELD.format(reason))
    if asked:
        raise ValueError(_WRONG_PLATFORM.format(asked, reason))
    return ValueError(_UNUSABLE.format(reason))


def _is_in_use(reason: str) -> bool:
    return any(words in reason for words in _IN_USE)


def _has_gpu() -> bool:
    return any(map(os.path.exists, _GPU_FILES))


def _has_gpu_plugin() -> bool:
    if importlib.util.find_spec("jax_plugins") is None:
        return False
    return any(importlib.util.find_spec(name) for name in _GPU_PLUGINS)


@contextlib.contextmanager
def _collect_reasons() -> Iterator[list[str]]:
    """Collects what JAX logs while it starts, which it would print with tracebacks."""
    reasons: list[str] = []

    def collect(record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return True
        cause = record.exc_info[1] if record.exc_info else None
        reasons.append(first_line(cause or record.getMessage()))
        return False

    _STARTING.addFilter(collect)
    try:
        yield reasons
    finally:
        _STARTING.removeFilter(collect)


def _reason_without_tpu() -> str:
    """Returns JAX's reason for using no TPU."""
    try:
        jax.devices("tpu")
    except RuntimeError as error:
        return first_line(error)
    return ""
