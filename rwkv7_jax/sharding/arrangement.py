"""The order of devices in a mesh, from where they lie in the slices of a TPU.

A slice is a grid of chips. Its compiler refuses groups of devices that no shift takes into each
other. So a mesh is cut out of the grid: each prime factor of a size of the mesh lies along one
direction of the grid, for all groups alike.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from rwkv7_jax.sharding.layout import AXES, DATA

# The directions of the grid: the cores of a chip, its three coordinates, and the slices, between
# which the wires are slow.
_SLICES = 4


def arrange(sizes: Mapping[str, int], devices: Sequence[Any]) -> np.ndarray:
    """Puts devices in an order in which neighbours of the mesh are neighbours on the board.

    What shares the weights lies in compact tiles, within a process or a slice where it fits; rows
    lie across them. The devices of a process follow each other if the sizes of the mesh can be cut
    into those of what it has. Not by JAX's `mesh_utils` (0.10.2): it refuses meshes that cut a
    direction of the grid in two, and orders the first process of a slice unlike the others, which
    does not compile.

    Args:
        sizes: of all axes of the mesh, by name.
        devices: as many as these sizes have.
    """
    shape = [sizes[axis] for axis in AXES]
    arranged = np.empty(shape, object)
    grid = _grid(devices)
    if grid is None:
        arranged.flat[:] = sorted(devices, key=_near)
    else:
        arranged[tuple(_places(sizes, grid, _of_one_process(grid, devices)))] = devices
    return arranged


def _slice(device: Any) -> int:
    """Returns the number of a device's slice; 0 where there are none."""
    return getattr(device, "slice_index", 0)


def _near(device: Any) -> tuple[int, int, int]:
    """Orders devices of no grid, such as GPUs."""
    return (_slice(device), device.process_index, device.id)


def _grid(devices: Sequence[Any]) -> np.ndarray | None:
    """Returns where devices lie along each direction; None if they do not fill a grid."""
    if any(device.platform != "tpu" for device in devices):
        return None
    found = []
    for device in devices:
        found.append((device.core_on_chip, *device.coords, _slice(device)))
    # Counted from 0, whichever part of a slice they are.
    lines = [
        np.unique(line, return_inverse=True)[1] for line in zip(*found, strict=True)
    ]
    grid = np.stack(lines)
    is_full = np.prod(_extents(grid)) == len(devices) == len(set(found))
    return grid if is_full else None


def _extents(grid: np.ndarray) -> np.ndarray:
    return np.ptp(grid, axis=1) + 1


def _of_one_process(grid: np.ndarray, devices: Sequence[Any]) -> np.ndarray:
    """Returns the extents of what one process has, and all others alike."""
    processes = np.array([device.process_index for device in devices])
    return _extents(grid[:, processes == processes[0]])


def _places(
    sizes: Mapping[str, int], grid: np.ndarray, own: np.ndarray
) -> list[np.ndarray]:
    """Returns the places of devices along each axis of the mesh.

    Args:
        sizes: of the axes.
        grid: where the devices lie along each direction.
        own: the extents of what one process has.
    """
    left = grid.copy()
    extents = _extents(grid)
    taken = np.ones_like(extents)
    places = []
    for axis in reversed(AXES):
        place = np.zeros_like(left[0])
        along = []
        step = 1
        for factor in _prime_factors(sizes[axis]):
            best = _direction(factor, extents, taken, own, is_compact=axis != DATA)
            place += step * (left[best] % factor)
            left[best] //= factor
            taken[best] *= factor
            step *= factor
            along.append((best, factor))
        # Rows are not passed around.
        places.append(place if axis == DATA else _around_squares(place, along))
    return places[::-1]


def _direction(
    factor: int,
    extents: np.ndarray,
    taken: np.ndarray,
    own: np.ndarray,
    *,
    is_compact: bool,
) -> int:
    """Chooses the direction of the grid along which a factor of a mesh's size lies.

    Args:
        factor: a prime number that divides what is left of a direction.
        extents: of the grid.
        taken: of them, by factors before.
        own: the extents of what one process has.
        is_compact: whether tiles should be as long as wide. Rows, which need not, follow the order
            of the processes, one direction after the other.
    """

    def cost(direction: int) -> tuple[int, ...]:
        is_outside = own[direction] % (taken[direction] * factor) != 0
        length = taken[direction] if is_compact else 0
        return (is_outside, direction == _SLICES, length, direction)

    free = np.flatnonzero(extents // taken % factor == 0).tolist()
    return min(free, key=cost)


def _around_squares(place: np.ndarray, along: list[tuple[int, int]]) -> np.ndarray:
    """Lets four devices of a square follow each other around it, not across."""
    factors = [factor for _, factor in along[:2]]
    if factors != [2, 2] or along[0] == along[1]:
        return place
    return place ^ (place >> 1 & 1)


def _prime_factors(size: int) -> Iterator[int]:
    """Yields the prime factors of a size, the smallest first."""
    factor = 2
    while size > 1:
        while size % factor == 0:
            yield factor
            size //= factor
        factor += 1
