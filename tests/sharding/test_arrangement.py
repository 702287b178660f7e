"""The order of devices in a mesh: each once, groups alike, weights near, rows across."""

import dataclasses
import importlib.util
import itertools
import json
import math
import subprocess
import sys

import numpy as np
import pytest
from run_programs import ROOT
from tpu_slices import SLICES, FirstProcess, tpu

from rwkv7_jax import sharding
from rwkv7_jax.sharding.arrangement import arrange
from rwkv7_jax.sharding.layout import AXES

# Compiles a sum along each axis of meshes, in a process of its own; prints what fails.
CHILD = """
import json, sys
import jax
from jax.sharding import NamedSharding, PartitionSpec
from rwkv7_jax import sharding
from rwkv7_jax.plan.chips import find_target
from rwkv7_jax.sharding.layout import AXES

def sums(array):
    found = [jax.lax.psum(array, axis) for axis in AXES]
    gathered = jax.lax.all_gather(array, "fsdp", tiled=True)
    return found, gathered, jax.lax.psum_scatter(gathered, "fsdp", tiled=True)

failed = {}
for topology, sizes in json.loads(sys.argv[1]):
    devices = find_target(topology).devices()
    mesh = sharding.make_mesh(sizes, 0, devices)
    everywhere = PartitionSpec()
    on_each = jax.shard_map(
        sums, mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False
    )
    array = jax.ShapeDtypeStruct(
        (1024, 128), "float32", sharding=NamedSharding(mesh, everywhere)
    )
    lowered = jax.jit(on_each).trace(array).lower(lowering_platforms=("tpu",))
    try:
        lowered.compile()
    except Exception as error:
        failed[f"{topology} {sizes}"] = str(error).splitlines()[0]
print(json.dumps(failed))
"""
# In the orders of JAX's `mesh_utils` the first two do not compile, and it makes no third one.
COMPILED = [
    ("v5e:8x8", {"data": 16, "fsdp": 4}),
    ("v5e:8x8", {"data": 32, "fsdp": 2}),
    ("v5e:4x4", {"data": 2, "fsdp": 8}),
    ("v5e:8x8", {"data": 4, "fsdp": 16}),
    ("v5e:8x8", {"fsdp": 64}),
    ("v5p:4x4x4", {"data": 8, "fsdp": 8}),
    ("v5e:4x4,slices=2", {"data": 4, "fsdp": 8}),
    ("v5e:4x4,slices=2", {"fsdp": 32}),
]


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device without coordinates: two to a process, and four to a slice."""

    id: int
    platform = "cpu"
    device_kind = "cpu"
    client = FirstProcess

    @property
    def process_index(self):
        return self.id // 2

    @property
    def slice_index(self):
        return self.id // 4


def meshes(count):
    """All sizes of the four axes that have so many devices."""
    divisors = [size for size in range(1, count + 1) if count % size == 0]
    for sizes in itertools.product(divisors, repeat=3):
        if count % math.prod(sizes) == 0:
            yield dict(zip(AXES, (*sizes, count // math.prod(sizes)), strict=True))


def place_of(device):
    return (device.slice_index, *device.coords, device.core_on_chip)


def extents(devices):
    """Along each direction, of the smallest box around devices."""
    places = np.array([place_of(device) for device in devices])
    return np.ptp(places, axis=0) + 1


@pytest.mark.parametrize("name", SLICES)
def test_every_mesh_of_a_slice_has_each_device_once(name):
    devices = tpu(name)
    for sizes in meshes(len(devices)):
        arranged = arrange(sizes, devices)
        assert arranged.shape == tuple(sizes.values())
        assert set(arranged.flat) == set(devices), sizes


@pytest.mark.parametrize("name", SLICES)
def test_the_groups_of_an_axis_are_translations_of_each_other(name):
    devices = tpu(name)
    for sizes in meshes(len(devices)):
        places = np.array([place_of(one) for one in arrange(sizes, devices).flat])
        places = places.reshape(*sizes.values(), -1)
        for axis in range(len(AXES)):
            groups = np.moveaxis(places, axis, -2)
            shifts = groups - groups[..., :1, :]
            assert (shifts == shifts.reshape(-1, *shifts.shape[-2:])[0]).all(), sizes


@pytest.mark.parametrize("name", SLICES)
def test_weight_shards_form_a_compact_tile_within_a_host_if_possible(name):
    devices = tpu(name)
    of_host = sum(device.process_index == 0 for device in devices)
    for sizes in meshes(len(devices)):
        tiles = arrange(sizes, devices).reshape(sizes["data"], -1)
        for tile in tiles:
            assert math.prod(extents(tile)) == len(tile), sizes
            hosts = {device.process_index for device in tile}
            assert len(hosts) == max(len(tile) // of_host, 1), sizes


@pytest.mark.parametrize("name", SLICES)
def test_the_rows_of_a_host_are_contiguous(name):
    devices = tpu(name)
    for sizes in meshes(len(devices)):
        order = [device.process_index for device in arrange(sizes, devices).flat]
        changes = np.count_nonzero(np.diff(order))
        assert changes == len(set(order)) - 1, sizes
        # The first rows are of the first process, unless several share the weights.
        if sizes["data"] >= len(set(order)):
            assert order == sorted(order), sizes


def test_four_devices_form_a_ring_on_a_square():
    for name, size in (("v5e-4", 4), ("v5e-8", 8)):
        sizes = {**dict.fromkeys(AXES, 1), "sequence": size}
        places = [place_of(one) for one in arrange(sizes, tpu(name)).flat]
        steps = np.abs(np.diff(np.array(places), axis=0)).sum(axis=1)
        assert (steps == 1).all()


def test_the_cores_of_a_chip_share_the_weights_first():
    sizes = {**dict.fromkeys(AXES, 1), "data": 4, "fsdp": 2}
    for pair in arrange(sizes, tpu("v5e-4", cores=2)).reshape(4, 2):
        assert [device.core_on_chip for device in pair] == [0, 1]
        assert pair[0].coords == pair[1].coords


@pytest.mark.parametrize("sizes", [{"data": 4, "fsdp": 8}, {"data": 2, "fsdp": 16}])
def test_only_the_data_axis_spans_slices(sizes):
    sizes = {**dict.fromkeys(AXES, 1), **sizes}
    arranged = arrange(sizes, tpu("v5e-16", slices=2))
    for half, devices in enumerate(arranged.reshape(2, -1)):
        assert {device.slice_index for device in devices} == {half}


def test_weights_that_span_slices_fill_them_in_order():
    sizes = {**dict.fromkeys(AXES, 1), "fsdp": 32}
    order = [one.slice_index for one in arrange(sizes, tpu("v5e-16", slices=2)).flat]
    assert order == sorted(order)


@pytest.mark.parametrize("count", [3, 5, 6, 7])
def test_a_mesh_may_use_some_of_the_devices(count):
    devices = tpu("v5e-8")
    mesh = sharding.make_mesh({"data": count}, count, devices)
    assert set(mesh.devices.flat) == set(devices[:count])


@pytest.mark.parametrize(("sets", "count"), [(8, 4), (5, 3), (4, 4), (3, 3), (9, 3)])
def test_sets_share_as_few_devices_as_their_largest_part_allows(sets, count):
    mesh = sharding.make_mesh("auto", sets, tpu("v5e-4"), are_sets=True)
    assert mesh.shape["data"] == count


@pytest.mark.parametrize(
    "sizes", [{"fsdp": 64}, {"data": 8, "fsdp": 8}, {"data": 4, "fsdp": 8, "tensor": 2}]
)
def test_a_host_makes_its_own_rows_if_weights_are_sharded_over_hosts(sizes):
    mesh = sharding.make_mesh(sizes, 64, tpu("v5e-64"))
    of_process_0 = 4 // sizes.get("tensor", 1)
    rows = 64 // sizes.get("tensor", 1)
    assert sharding.own_rows(mesh, rows) == slice(0, of_process_0)


@pytest.mark.parametrize(
    ("sizes", "groups"),
    [
        ({"data": 4, "fsdp": 2}, [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ({"data": 2, "fsdp": 4}, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ({"data": 1, "fsdp": 8}, [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ({"data": 2, "fsdp": 2, "tensor": 2}, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ({"data": 4, "tensor": 2}, [[0, 1], [2, 3], [4, 5], [6, 7]]),
    ],
)
def test_without_coordinates_shards_stay_within_a_process_or_slice_if_possible(
    sizes, groups
):
    mesh = sharding.make_mesh(sizes, 8, [Chip(number) for number in range(8)])
    assert [[chip.id for chip in row.flat] for row in mesh.devices] == groups
    assert sharding.is_shared(mesh) == (len(groups[0]) > 2)


def test_shards_stay_within_a_process_whatever_the_numbers_of_its_devices():
    class Interleaved(Chip):
        process_index = property(lambda self: self.id % 2)

    sizes = {**dict.fromkeys(AXES, 1), "data": 4, "fsdp": 2}
    arranged = arrange(sizes, [Interleaved(number) for number in range(8)])
    groups = [[device.id for device in group.flat] for group in arranged]
    assert groups == [[0, 2], [1, 3], [4, 6], [5, 7]]


class LaterProcess:
    """A client that is process 2."""

    @staticmethod
    def process_index():
        return 2


class SeenLater(Chip):
    """A device as process 2 sees it."""

    client = LaterProcess


def test_a_later_process_makes_the_rows_of_its_own_devices():
    chips = [SeenLater(number) for number in range(8)]
    mesh = sharding.make_mesh({"data": 8}, 16, chips)
    assert sharding.own_rows(mesh, 16) == slice(8, 12)


@pytest.mark.parametrize(("rows", "own"), [(8, slice(0, 2)), (3, slice(None))])
def test_a_process_makes_the_rows_of_its_own_devices(rows, own):
    chips = [Chip(number) for number in range(8)]
    mesh = sharding.make_mesh({"data": 2, "fsdp": 4}, 8, chips)
    assert sharding.own_rows(mesh, rows) == own


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)
def test_the_tpu_compiler_recognizes_groups_that_cut_a_torus_direction():
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(COMPILED)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={
            "PATH": "/usr/bin:/bin",
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "LLVM_DISABLE_SYMBOLIZATION": "1",
        },
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout) == {}
