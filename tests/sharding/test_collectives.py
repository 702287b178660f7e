"""The order in which many devices gather the shards of a weight."""

import itertools

import pytest

from rwkv7_jax.sharding import collectives


@pytest.mark.parametrize("count", [2, 8, 9, 12, 16, 64])
def test_every_device_gathers_all_shards_in_order(count):
    held = [[device] for device in range(count)]
    for groups in collectives._stages(count):
        gathered = {}
        for group in [range(count)] if groups is None else groups:
            for device in group:
                parts = [held[other] for other in group]
                gathered[device] = list(itertools.chain.from_iterable(parts))
        held = [gathered[device] for device in range(count)]
    assert held == [list(range(count))] * count


@pytest.mark.parametrize(("count", "stages"), [(8, 1), (9, 1), (12, 2), (16, 2)])
def test_more_than_eight_devices_gather_in_two_stages(count, stages):
    assert len(collectives._stages(count)) == stages
