"""The chips that a step can be planned for, by JAX's and Google's names."""

import dataclasses
import functools
import math
import os
import re
from typing import Any

from jax.experimental import topologies

from pallas_kernels.compile_checks import gpu

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class _Generation:
    """A generation of TPUs.

    Attributes:
        limit: GiB of a device that a program may use, by the compiler.
        axes: number of axes of a topology.
        devices: JAX devices per chip.
        counts_cores: whether Google's names count cores, two per chip, instead of chips.
        on_one_host: most chips of one host.
        slices: shapes of Google's slices, by number of chips.
    """

    limit: float
    axes: int
    devices: int
    counts_cores: bool
    on_one_host: int
    slices: dict[int, str]


_FLAT = {
    1: "1x1",
    4: "2x2",
    8: "2x4",
    16: "4x4",
    32: "4x8",
    64: "8x8",
    128: "8x16",
    256: "16x16",
}

_CUBES = {
    4: "2x2x1",
    8: "2x2x2",
    16: "2x2x4",
    32: "2x4x4",
    64: "4x4x4",
    128: "4x4x8",
    256: "4x8x8",
    512: "8x8x8",
}

# The limits come from libtpu's (0.0.42.1) error for a program that needs more.
_GENERATIONS = {
    "v4": _Generation(15.25, 3, 2, True, 4, _CUBES),
    "v5e": _Generation(15.75, 2, 1, False, 8, _FLAT),
    "v5p": _Generation(95.74, 3, 1, True, 4, _CUBES),
    "v6e": _Generation(31.25, 2, 1, False, 8, _FLAT),
    "tpu7x": _Generation(94.75, 3, 2, False, 4, _CUBES),
}

# Other names of the same generations.
_FORMER = {"v5litepod": "v5e", "v5lite": "v5e", "v5": "v5p", "v7x": "tpu7x"}

# The GPUs, and their bytes as the driver reports them. A plan is for one GPU.
_GPUS = {
    "h100": (gpu.Device("NVIDIA H100 80GB HBM3", 90, 132, 232448), 81559 * 2**20),
    "h200": (gpu.Device("NVIDIA H200", 90, 132, 232448), 143771 * 2**20),
    "a100": (gpu.Device("NVIDIA A100-SXM4-80GB", 80, 108, 166912), 81920 * 2**20),
}

# These variables set the fraction of a GPU's memory that JAX takes, the second one under its former
# name; this is the default.
_SHARES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
_DEFAULT_SHARE = 0.75

# At most nine digits: `int` rejects numbers with thousands of digits.
_TOPOLOGY = re.compile(r"(\w+?):(\d{1,9}(?:x\d{1,9})+)((?:,\w+=\d{1,9}(?:x\d{1,9})*)*)")

_SLICE = re.compile(r"(\w+?)-(\d{1,9})")


@dataclasses.dataclass(frozen=True)
class Target:
    """Chips to compile for.

    Attributes:
        name: name in messages.
        platform: lowering platform, "tpu" or "cuda".
        compiler: package with the compiler.
        kind: kind of TPU or GPU.
        shape: chips along each axis; "" for a GPU.
        host: chips of one host along each axis; None for JAX's default.
        slices: TPU slices, joined by the data centre's network.
    """

    name: str
    platform: str
    compiler: str
    kind: str
    shape: str = ""
    host: tuple[int, ...] | None = None
    slices: int = 1

    @property
    def chips(self) -> int:
        """The number of chips."""
        return self.slices * _product(self.shape)

    @property
    def limit(self) -> float:
        """The GiB that a program may use of one device.

        Raises:
            ValueError: an environment variable sets it to something other than a number above 0.
        """
        if self.platform == "tpu":
            return _GENERATIONS[self.kind].limit
        return _GPUS[self.kind][1] * _gpu_share() / _GIB

    def devices(self) -> list[Any]:
        """Returns descriptions of the devices, which this machine does not need to have.

        Raises:
            RuntimeError: the compiler is unavailable or does not know the chips.
        """
        if self.platform == "cuda":
            device, memory = _GPUS[self.kind]
            return [gpu.absent_device(device, memory)]
        choices: dict[str, Any] = {}
        if self.host is not None:
            choices["chips_per_host_bounds"] = (*self.host, 1, 1)[:3]
        if self.slices > 1:
            choices["num_slices"] = self.slices
        topology = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{self.kind}:{self.shape}", **choices
        )
        return list(topology.devices)


_TPU = functools.partial(Target, platform="tpu", compiler="libtpu")


def _product(shape: str) -> int:
    return math.prod(map(int, shape.split("x"))) if shape else 1


def _gpu_share() -> float:
    """Returns the fraction of a GPU's memory that JAX takes."""
    for name in _SHARES:
        text = os.environ.get(name)
        if not text:
            continue
        try:
            share = float(text)
        except ValueError:
            share = math.nan
        # Above 1 is allowed: memory of the host.
        if not 0 < share < math.inf:
            raise ValueError(f"`{name}` must be a number above 0; got {text!r}.")
        return share
    return _DEFAULT_SHARE


def find_target(name: str) -> Target:
    """Finds the chips with a name.

    Args:
        name: a JAX topology such as "v5e:2x4", optionally with ",slices=2" for slices and
            ",host=2x4" for the chips of a host; a Google slice such as "v5p-128"; or "h100",
            "h200" or "a100" for one GPU.

    Raises:
        ValueError: the name is unknown.
    """
    text = name.lower().strip()
    if text in _GPUS:
        return Target(text, "cuda", "jax-cuda13-plugin", text)
    found = _TOPOLOGY.fullmatch(text)
    if found:
        return _of_topology(name, found)
    found = _SLICE.fullmatch(text)
    if found:
        return _of_slice(name, *found.groups())
    raise ValueError(
        "`--topology` must be a TPU such as v5e:2x4, v5p:4x4x4,slices=2 or v5p-128, or one of "
        f"{', '.join(_GPUS)}; got {name!r}."
    )


def _kind(name: str, kind: str) -> str:
    kind = _FORMER.get(kind, kind)
    if kind not in _GENERATIONS:
        raise ValueError(
            f"`--topology` must be a TPU of {', '.join(_GENERATIONS)}; got {name!r}."
        )
    return kind


def _of_topology(name: str, found: re.Match) -> Target:
    kind = _kind(name, found[1])
    axes = _GENERATIONS[kind].axes
    shape = found[2]
    if len(shape.split("x")) != axes or 0 in map(int, shape.split("x")):
        example = "4x4x4" if axes == 3 else "2x4"
        raise ValueError(
            f"`--topology` must have {axes} axes of chips, such as {kind}:{example}; got {name!r}."
        )
    choices = {}
    for choice in filter(None, found[3].split(",")):
        key, value = choice.split("=")
        if key not in ("slices", "host") or key in choices:
            raise ValueError(
                "`--topology` must have only the options slices=N and host=AxB after a comma, each "
                f"once; got {name!r}."
            )
        choices[key] = tuple(map(int, value.split("x")))
    slices, *more = choices.get("slices", (1,))
    if more or slices < 1:
        raise ValueError(f"`--topology` must have one number of slices; got {name!r}.")
    host = choices.get("host")
    if host is not None and (len(host) > 3 or 0 in host):
        raise ValueError(
            "`--topology` must have a host of one to three axes, such as host=2x2x1; got "
            f"{name!r}."
        )
    if host is None and _product(shape) == 1:
        host = (1,)
    return _TPU(name=name, kind=kind, shape=shape, host=host, slices=slices)


def _of_slice(name: str, kind: str, count: str) -> Target:
    """Returns the topology of a slice by Google's name, such as v5p-128: 64 chips."""
    kind = _kind(name, kind)
    generation = _GENERATIONS[kind]
    cores = 2 if generation.counts_cores else 1
    chips = int(count) // cores
    if int(count) % cores or chips not in generation.slices:
        known = [f"{kind}-{cores * chips}" for chips in generation.slices]
        raise ValueError(
            f"`--topology` must be one of {', '.join(known)}; got {name!r}."
        )
    shape = generation.slices[chips]
    # Google offers up to eight chips of v5e and v6e as one host; JAX's default is four.
    host = None
    if chips <= generation.on_one_host:
        host = tuple(map(int, shape.split("x")))
    return _TPU(name=name, kind=kind, shape=shape, host=host)
