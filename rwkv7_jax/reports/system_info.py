"""Describes the machine of a measurement: devices, versions, memory."""

import contextlib
import importlib.metadata
import os
import platform
import resource
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

PACKAGES = ("rwkv7_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")

# Packages for accelerators, which are listed only if they are installed.
_OF_DEVICES = (
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
    "libtpu",
    "triton",
    "jax-triton",
)


class Peak(NamedTuple):
    """The peak memory use.

    Attributes:
        bytes: number of bytes.
        of: "device", or "process" if the device does not report its memory.
    """

    bytes: int
    of: str


def version(package: str) -> str:
    """Returns the installed version of a package, or "not installed"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Returns the versions of Python and of packages."""
    table = {"python": platform.python_version()}
    for name in packages:
        table[name] = version(name)
    return table


def installed_versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Returns the versions of those packages that are installed."""
    found = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _memory() -> int | None:
    """Returns the bytes of the machine's memory; None if the system does not report them."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _devices() -> list[dict[str, Any]]:
    """Returns each kind of device, with its count."""
    # Only local devices report their memory; those of other processes are assumed equal.
    limits = {}
    for device in jax.local_devices():
        # `memory_stats` is None on CPUs.
        limits[device.device_kind] = (device.memory_stats() or {}).get("bytes_limit")
    kinds: dict[tuple, dict[str, Any]] = {}
    for device in jax.devices():
        memory = limits.get(device.device_kind)
        kind = (device.platform, device.device_kind, memory)
        if kind not in kinds:
            kinds[kind] = {
                "platform": device.platform,
                "kind": device.device_kind,
                "memory_bytes": memory,
                "count": 0,
            }
        kinds[kind]["count"] += 1
    return list(kinds.values())


def system() -> dict[str, Any]:
    """Describes the machine, its devices and the package versions, for JSON."""
    return {
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "memory_bytes": _memory(),
        "devices": _devices(),
        "versions": versions() | installed_versions(_OF_DEVICES),
    }


def device_line() -> str:
    """Returns the first device's kind, the machine and its cores in one line."""
    return (
        f"{jax.devices()[0].device_kind}, {platform.machine()}, {os.cpu_count()} cores"
    )


def _gib(count: int | None) -> str:
    return f", {count / 2**30:.1f} GiB" if count else ""


def lines(info: Mapping[str, Any]) -> list[str]:
    """Formats the result of `system` as lines; missing entries are left out."""
    packages = dict(info.get("versions") or {})
    python = packages.pop("python", "?")
    cores = info.get("cores", "?")
    memory = _gib(info.get("memory_bytes"))
    printed = [
        f"python      {python} on {info.get('platform', '?')}, {cores} cores{memory}"
    ]
    for name, number in packages.items():
        printed.append(f"{name:<18}{number}")
    for device in info.get("devices") or ():
        size = _gib(device.get("memory_bytes"))
        count = device.get("count", 1)
        kind = device.get("kind")
        printed.append(f"device      {count} x {kind} ({device.get('platform')}{size})")
    return printed


def peak_memory(device: Any = None) -> Peak:
    """Returns the peak memory of a device, or of this process if the device does not report it.

    The peak of the process includes mapped pages of files.

    Args:
        device: JAX device; None for the first local one.
    """
    stats = (device or jax.local_devices()[0]).memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return Peak(stats["peak_bytes_in_use"], "device")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts kibibytes, macOS bytes.
    return Peak(peak if sys.platform == "darwin" else peak * 1024, "process")
