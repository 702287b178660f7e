"""The order of devices in a mesh, from their positions in TPU slices.

A slice is a grid of chips. The TPU compiler rejects groups of devices that are not translations of
each other. Each prime factor of a mesh size is therefore laid along one direction of the grid, in
the same way for all groups.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from rwkv7_jax.sharding.layout import AXES, DATA

# The grid's directions are the cores of a chip, its three coordinates and, at this index, the
# slices, whose interconnect is slow.
_SLICES = 4


def arrange(sizes: Mapping[str, int], devices: Sequence[Any]) -> np.ndarray:
    """Orders devices so that neighbours in the mesh are neighbours in the grid.

    The devices that share the weights form compact tiles, inside one process or slice if they fit;
    rows are split across these tiles. The devices of a process are adjacent if the sizes of the
    mesh allow it. JAX's `mesh_utils` (0.10.2) does not do this: it rejects meshes that split a
    direction of the grid in two, and orders the first process of a slice differently from the
    others, which does not compile.

    Args:
        sizes: of all axes of the mesh, by name.
        devices: as many as the product of the sizes.
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
    """Returns the index of a device's slice; 0 without slices."""
    return getattr(device, "slice_index", 0)


def _near(device: Any) -> tuple[int, int, int]:
    """Returns a sort key for devices without a grid, such as GPUs."""
    return (_slice(device), device.process_index, device.id)


def _grid(devices: Sequence[Any]) -> np.ndarray | None:
    """Returns the coordinates of devices along each direction; None if they do not fill a grid."""
    if any(device.platform != "tpu" for device in devices):
        return None
    found = []
    for device in devices:
        found.append((device.core_on_chip, *device.coords, _slice(device)))
    # Renumbered from 0, for any part of a slice.
    lines = [
        np.unique(line, return_inverse=True)[1] for line in zip(*found, strict=True)
    ]
    grid = np.stack(lines)
    is_full = np.prod(_extents(grid)) == len(devices) == len(set(found))
    return grid if is_full else None


def _extents(grid: np.ndarray) -> np.ndarray:
    return np.ptp(grid, axis=1) + 1


def _of_one_process(grid: np.ndarray, devices: Sequence[Any]) -> np.ndarray:
    """Returns the extents of one process's part of the grid, which are the same for all."""
    processes = np.array([device.process_index for device in devices])
    return _extents(grid[:, processes == processes[0]])


def _places(
    sizes: Mapping[str, int], grid: np.ndarray, own: np.ndarray
) -> list[np.ndarray]:
    """Returns the coordinates of devices along each axis of the mesh.

    Args:
        sizes: of the axes.
        grid: the coordinates of the devices along each direction.
        own: the extents of one process's part of the grid.
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
        # The data axis needs no ring.
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
    """Chooses the direction of the grid for a factor of a mesh size.

    Args:
        factor: a prime number that divides the rest of at least one direction.
        extents: of the grid.
        taken: the parts of the extents that earlier factors took.
        own: the extents of one process's part of the grid.
        is_compact: whether to prefer square tiles. Otherwise one direction after another is filled,
            in the order of the processes.
    """

    def cost(direction: int) -> tuple[int, ...]:
        is_outside = own[direction] % (taken[direction] * factor) != 0
        length = taken[direction] if is_compact else 0
        return (is_outside, direction == _SLICES, length, direction)

    free = np.flatnonzero(extents // taken % factor == 0).tolist()
    return min(free, key=cost)


def _around_squares(place: np.ndarray, along: list[tuple[int, int]]) -> np.ndarray:
    """Orders the four devices of a square around it, so that consecutive ones are neighbours."""
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
