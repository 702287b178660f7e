"""Devices of TPU slices that are not here, as far as a mesh of them can be made."""

import dataclasses
import itertools

# Chips of slices, and of one of their hosts, along each direction.
SLICES = {
    "v5e-4": ((2, 2, 1), (2, 2, 1)),
    "v5e-8": ((2, 4, 1), (2, 4, 1)),
    "v5e:2x4": ((2, 4, 1), (2, 2, 1)),
    "v5e-16": ((4, 4, 1), (2, 2, 1)),
    "v5e-32": ((4, 8, 1), (2, 2, 1)),
    "v5e-64": ((8, 8, 1), (2, 2, 1)),
    "v5p-32": ((2, 2, 4), (2, 2, 1)),
    "v5p-128": ((4, 4, 4), (2, 2, 1)),
}


class FirstProcess:
    """A client that is process 0."""

    @staticmethod
    def process_index():
        return 0


@dataclasses.dataclass(frozen=True)
class TpuCore:
    """A device of a TPU slice."""

    id: int
    coords: tuple[int, ...]
    process_index: int
    core_on_chip: int = 0
    slice_index: int = 0
    platform = "tpu"
    device_kind = "TPU v5 lite"
    client = FirstProcess


def tpu(name, slices=1, cores=1):
    """The devices of slices, those of a host next to each other, as JAX lists them."""
    shape, host = SLICES[name]
    found = []
    hosts = [size // own for size, own in zip(shape, host, strict=True)]
    for number, z, y, x in itertools.product(range(slices), *map(range, shape[::-1])):
        at = [place // own for place, own in zip((x, y, z), host, strict=True)]
        process = at[0] + hosts[0] * (at[1] + hosts[1] * (at[2] + hosts[2] * number))
        for core in range(cores):
            one = TpuCore(len(found), (x, y, z), process, core, number)
            found.append(one)
    return sorted(found, key=lambda device: device.process_index)
