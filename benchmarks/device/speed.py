"""Steps that measure the speed of the op: next to peers, by tiles, by segments, in float32."""

import dataclasses
import functools
from collections.abc import Callable
from unittest import mock

import jax

from benchmarks import peers_gpu
from benchmarks.device.correctness import candidates, tile_labels
from benchmarks.device.sizes import Job, Jobs, Sizes, kernels, op_of
from benchmarks.sequential_gpu import sequential
from pallas_kernels import bench, tiles, tune
from pallas_kernels.cases import Case
from pallas_kernels.gpu import segmented_passes

# Measured on the first case alone: what walks token by token, which takes seconds, and all but one
# of the sequential kernel's tiles.
FIRST_ALONE = {"scan", "definition"} | {
    f"sequential, {rows} rows, {warps} warps"
    for rows, warps in peers_gpu.SEQUENTIAL[1:]
}


@functools.lru_cache(maxsize=1)
def _data(case: Case):
    return peers_gpu.make_data(case)


@functools.lru_cache(maxsize=1)
def _truth(case: Case):
    return bench.truth(_data(case))


def errors(sizes: Sizes) -> Jobs:
    """Compares all implementations and peers with float64, on few heads: that takes memory."""
    case = dataclasses.replace(
        sizes.cases[0], batch=1, heads=min(4, sizes.cases[0].heads)
    )
    for name, make in _contestants(sizes, sizes.cases[0]).items():

        def run(make=make):
            row = make(_data(case), 1, _truth(case))
            return {name: row[name] for name in ("y error", "gradient error")}

        yield Job({"name": name, "case": dataclasses.astuple(case)}, run)


@functools.cache
def _bandwidth(repeats: int) -> float:
    return bench.copy_bandwidth(repeats)


def times(sizes: Sizes) -> Jobs:
    """Times all implementations and peers on the same data."""
    for case in sizes.cases:
        for name, make in _contestants(sizes, case).items():
            labels = {"name": name, "case": dataclasses.astuple(case)}
            yield Job(labels, functools.partial(_time, make, sizes, case))


def _contestants(sizes: Sizes, case: Case) -> dict[str, Callable]:
    """Returns the measurements of each implementation and peer, some only on the first case."""
    if sizes.interpret:
        op = functools.partial(sequential, interpret=True)
        return {"sequential": functools.partial(peers_gpu.measure, op)}
    runs = peers_gpu.contestants(case)
    # What `None` takes is among those with a name.
    left_out = {peers_gpu.OURS}
    if case != sizes.cases[0]:
        left_out |= FIRST_ALONE
    return {name: run for name, run in runs.items() if name not in left_out}


def _time(make: Callable, sizes: Sizes, case: Case) -> dict:
    row = make(_data(case), sizes.repeats)
    if sizes.warm:
        return row
    bandwidth = _bandwidth(sizes.repeats)
    shares = peers_gpu.of_copy(case, row | {"status": "ok"}, bandwidth)
    return row | {f"{passed} of copy": share for passed, share in shares.items()}


def neighbouring_tiles(sizes: Sizes) -> Jobs:
    """Times the tiles next to the table's; that they are right is asked by `repetitions`."""

    def run(candidate):
        # The tiles are no argument of what JAX has traced before.
        jax.clear_caches()
        with tiles.override(candidate.choice):
            run_pass, _ = tune.make_passes(candidate)
            jax.block_until_ready(run_pass())
        return {"ms": bench.least_ms(run_pass, repeats=sizes.repeats)[0]}

    for candidate in candidates(sizes, sizes.cases[0]):
        yield Job(tile_labels(candidate), functools.partial(run, candidate))


def segments(sizes: Sizes) -> Jobs:
    """Times forced numbers of segments next to what the rule chooses."""
    keys, values = sizes.heads_of[0]
    tokens = sizes.cases[0].tokens

    def run(name, case, count):
        jax.clear_caches()
        choose = segmented_passes.choose_segments
        forced = choose if count is None else lambda **_: count
        with mock.patch.object(segmented_passes, "choose_segments", forced):
            return peers_gpu.measure(op_of(name, sizes), _data(case), sizes.repeats)

    for name in kernels(sizes):
        for heads in (2,) if sizes.interpret else (16, 32, 64, 96, 128):
            case = Case(1, tokens, heads, keys, values)
            for count in (None, *sizes.segments):
                labels = {"name": name, "heads": heads, "segments": count}
                yield Job(labels, functools.partial(run, name, case, count))


def float32(sizes: Sizes) -> Jobs:
    """Times float32 tokens."""
    case = sizes.cases[-1]

    def run(name):
        data = jax.tree.map(lambda x: x.astype("float32"), _data(case))
        return peers_gpu.measure(op_of(name, sizes), data, sizes.repeats)

    for name in (*kernels(sizes), "chunked"):
        yield Job(
            {"name": name, "case": dataclasses.astuple(case)},
            functools.partial(run, name),
        )
