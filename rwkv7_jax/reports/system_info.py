"""The machine that a number was measured on: devices, versions, memory."""

import importlib.metadata
import os
import platform
import resource
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

PACKAGES = ("rwkv7_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


class Peak(NamedTuple):
    """The most memory that was ever in use.

    Attributes:
        bytes: how much.
        of: "device", or "process" where the device does not say.
    """

    bytes: int
    of: str


def version(package: str) -> str:
    """The installed version, or "not installed"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Python's version, and those of packages."""
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def _memory() -> int | None:
    """Bytes of the machine's memory, where the system says."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _devices() -> list[dict[str, Any]]:
    """Each kind of device, and how many of it there are."""
    found: dict[tuple, dict[str, Any]] = {}
    local = jax.local_devices()  # others do not say what memory they have
    limits = {d.device_kind: (d.memory_stats() or {}).get("bytes_limit") for d in local}
    for device in jax.devices():
        kind = (device.platform, device.device_kind, limits.get(device.device_kind))
        one = dict(zip(("platform", "kind", "memory_bytes"), kind, strict=True)) | {"count": 0}
        found.setdefault(kind, one)["count"] += 1
    return list(found.values())


def system() -> dict[str, Any]:
    """Everything that a result should say of where it comes from; fit for JSON."""
    return {
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "memory_bytes": _memory(),
        "devices": _devices(),
        "versions": versions(),
    }


def device_line() -> str:
    """The first device's kind, the machine and its cores, in one line."""
    return f"{jax.devices()[0].device_kind}, {platform.machine()}, {os.cpu_count()} cores"


def _gib(count: int | None) -> str:
    return f", {count / 2**30:.1f} GiB" if count else ""


def lines(info: Mapping[str, Any]) -> list[str]:
    """What `system()` found, as lines to print; what is missing in `info` is left out."""
    known = dict(info.get("versions") or {})
    python, cores = known.pop("python", "?"), info.get("cores", "?")
    memory = _gib(info.get("memory_bytes"))
    found = [f"python      {python} on {info.get('platform', '?')}, {cores} cores{memory}"]
    found += [f"{name:<18}{number}" for name, number in known.items()]
    for one in info.get("devices") or ():
        size, count = _gib(one.get("memory_bytes")), one.get("count", 1)
        found.append(f"device      {count} x {one.get('kind')} ({one.get('platform')}{size})")
    return found


def peak_memory(device: jax.Device | None = None) -> Peak:
    """The most memory that the device had in use, else this process (pages of files included).

    Args:
        device: the first one if None.
    """
    stats = (device or jax.local_devices()[0]).memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return Peak(stats["peak_bytes_in_use"], "device")
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return Peak(used if sys.platform == "darwin" else used * 1024, "process")
