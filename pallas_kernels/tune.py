"""`python -m pallas_kernels.tune`: measures tiles on the local device and prints a table row.

The printed row goes into `tiles`, where the op reads it: nothing is measured while a program is
traced. The search varies one kernel's tile at a time and keeps the others at their best so far.

A tile may be fast and wrong: some tiles are miscompiled and some kernels have data races. Each tile
is therefore measured in a separate process. There its results must first match those of "scan"
and be bit-exact across runs. A crash, an illegal access or a timeout loses only that tile.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch, scan, tiles
from pallas_kernels.bench import least_ms
from pallas_kernels.cases import CASES, Case, make_inputs

GROUPS = (1, 2, 4, 8)
WARPS = (2, 4, 8)
STAGES = (1, 2, 3)
VALUES = (16, 32, 64, 128)
TPU_CHUNKS = (16, 32, 64)
# Runs of one program whose results must be bit-exact.
REPETITIONS = 20
# Tolerances: the largest relative L2 distance to "scan" in float32, by dtype of the tokens.
# Rounding stays ten times below them; the results of a wrong tile are far above.
BARS = {"float32": 1e-4, "bfloat16": 4e-2}
# Timeout of a tile in seconds.
LIMIT = 180
_MODULE = "pallas_kernels.tune"

# Returns a choice's milliseconds in a gradient's backward pass if true, else its forward pass.
Measure = Callable[[tiles.GPU | tiles.TPU, bool], float]


class Candidate(NamedTuple):
    """One choice of tiles and how it is measured.

    Attributes:
        name: the implementation.
        case: sizes.
        dtype: of the tokens.
        choice: the tiles.
        backward: measure the backward pass instead of the forward pass of a gradient.
        repeats: measurements, of which the minimum counts.
        interpret: run in Pallas's interpreter, to test the tuner itself.
        repetitions: runs whose results must be bit-exact.
    """

    name: str
    case: Case
    dtype: str
    choice: tiles.GPU | tiles.TPU
    backward: bool
    repeats: int
    interpret: bool
    repetitions: int = REPETITIONS

    def to_json(self) -> str:
        """Serialises the candidate."""
        return json.dumps(self._replace(case=dataclasses.astuple(self.case)))

    @classmethod
    def from_json(cls, text: str) -> "Candidate":
        """Inverts `to_json`."""
        values: dict[str, Any] = dict(zip(cls._fields, json.loads(text), strict=True))
        if values["name"] == "pallas_tpu":
            choice = tiles.TPU(*values["choice"])
        else:
            chunk, *others, precision = values["choice"]
            of_kernels = (tiles.Tile(*tile) for tile in others)
            choice = tiles.GPU(chunk, *of_kernels, precision=precision)
        return cls(**values | {"case": Case(*values["case"]), "choice": choice})


def make_passes(candidate: Candidate) -> tuple[Callable, Callable]:
    """Makes the candidate's pass and the same pass of "scan", as functions without arguments.

    The backward pass starts from states that the same choice saved, since they depend on the chunk.
    """
    options = dispatch.Options(candidate.name, None, candidate.interpret)
    inputs, state = make_inputs(candidate.case, candidate.dtype)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), inputs)
    if not candidate.backward:

        @jax.jit
        def run(inputs, state):
            y, end, residuals = dispatch.forward_saving(options, inputs, state)
            # The residuals include the inputs, and returning those would copy them.
            return y, end, residuals.starts

        expected = jax.jit(scan.forward)
        return lambda: run(inputs, state), lambda: expected(wide, state)
    dy = jnp.sin(inputs.v)
    dend = jnp.cos(state)
    residuals = jax.jit(lambda *arrays: dispatch.forward_saving(options, *arrays)[2])(
        inputs, state
    )
    run = jax.jit(functools.partial(dispatch.backward, options))

    @jax.jit
    def expected(inputs, state, dy, dend):
        starts = scan.forward_saving(inputs, state)[2]
        return scan.backward(inputs, starts, dy, dend)

    return (
        lambda: run(residuals, dy, dend),
        lambda: expected(wide, state, dy.astype(jnp.float32), dend),
    )


def _distance(found, expected) -> float:
    """Returns the largest relative L2 distance between two results' arrays; infinity for NaN."""
    largest = 0.0
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        x = jax.device_get(x).astype("float64")
        y = jax.device_get(y).astype("float64")
        distance = float(((x - y) ** 2).sum() / ((y**2).sum() or 1.0)) ** 0.5
        largest = max(largest, math.inf if math.isnan(distance) else distance)
    return largest


def check_and_measure(candidate: Candidate) -> tuple[float, str]:
    """Runs a candidate in this process.

    Returns:
        Milliseconds and an empty string, or infinity and the reason.
    """
    with tiles.override(candidate.choice):
        run, run_expected = make_passes(candidate)
        first = jax.block_until_ready(run())
    # The saved states are not compared: those of "scan" have another layout.
    expected = run_expected()
    distance = _distance(first[: len(expected)], expected)
    if distance > BARS[candidate.dtype]:
        return math.inf, f"wrong: {distance:.2g} from 'scan'"
    kept = jax.tree.leaves(jax.device_get(first))
    for _ in range(candidate.repetitions):
        again = jax.tree.leaves(jax.device_get(run()))
        if not all((x == y).all() for x, y in zip(kept, again, strict=True)):
            return math.inf, "not repeatable"
    wall, _ = least_ms(run, repeats=candidate.repeats)
    return wall, ""


def run_apart(candidate: Candidate) -> tuple[float, str]:
    """Runs a candidate in a separate process.

    Returns:
        Milliseconds and an empty string, or infinity and the reason: the results are wrong, it does
        not compile, it crashes, or it times out.
    """
    command = [sys.executable, "-m", _MODULE, "--candidate", candidate.to_json()]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return math.inf, f"no result in {LIMIT} s"
    if done.returncode == 0:
        wall, reason = json.loads(done.stdout.splitlines()[-1])
        return float(wall), reason
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return math.inf, lines[-1][:100]


def measure_apart(candidate: Candidate) -> float:
    """Works as `run_apart`, prints the result and returns the milliseconds."""
    wall, reason = run_apart(candidate)
    shown = f"{wall:9.3f} ms" if math.isfinite(wall) else "   no result"
    print(f"{shown}  {candidate.choice}  {reason}".rstrip(), flush=True)
    return wall


def tune_tpu(measure: Measure) -> tiles.TPU:
    """Returns the choice with the shortest total time of both passes."""
    choices = [tiles.TPU(*numbers) for numbers in itertools.product(TPU_CHUNKS, GROUPS)]
    return min(choices, key=lambda choice: _total(measure, choice))


def _total(measure: Measure, choice: tiles.GPU | tiles.TPU) -> float:
    return measure(choice, False) + measure(choice, True)


def tune_gpu(measure: Measure, values: int) -> tiles.GPU:
    """Returns the fastest choice; tunes one kernel after another for every chunk length."""
    blocks = [block for block in VALUES if block <= values]
    walking = [
        tiles.Tile(*options) for options in itertools.product(WARPS, STAGES, blocks)
    ]
    # The gradient kernel has no loop to pipeline and takes all value rows.
    one_chunk = [tiles.Tile(warps, 1, values) for warps in WARPS]
    plan = (
        ("forward", False, walking),
        ("state", True, walking),
        ("gradients", True, one_chunk),
    )
    totals: dict[tiles.GPU, float] = {}
    for chunk in dispatch.GPU_CHUNKS:
        first = tiles.Tile(4, 1, min(64, values))
        choice = tiles.GPU(
            chunk,
            forward=first,
            state=first,
            gradients=first,
        )
        for kernel, backward, candidates in plan:
            times: dict[tiles.GPU, float] = {}
            for tile in candidates:
                candidate = choice._replace(**{kernel: tile})
                times[candidate] = measure(candidate, backward)
            choice = min(times, key=lambda candidate, times=times: times[candidate])
        # Measured again with the complete choice, since the kernels were tuned one by one.
        totals[choice] = _total(measure, choice)
    return min(totals, key=lambda choice: totals[choice])


def main(arguments: list[str] | None = None) -> None:
    """Measures and prints one row of the table.

    Raises:
        SystemExit: no kernel runs on this device, or all tiles give wrong results.
    """
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.tune")
    parser.add_argument("--case", default="h200", choices=CASES)
    parser.add_argument(
        "--size",
        type=int,
        default=64,
        help="key and value channels of a head",
    )
    parser.add_argument("--dtype", default="bfloat16", choices=tuple(BARS))
    parser.add_argument("--implementation", choices=tuple(dispatch.PLATFORMS))
    parser.add_argument("--repeats", type=int, default=5)
    # For the process that measures one candidate.
    parser.add_argument("--candidate", help=argparse.SUPPRESS)
    flags = parser.parse_args(arguments)
    if flags.candidate:
        print(json.dumps(check_and_measure(Candidate.from_json(flags.candidate))))
        return
    device = jax.devices()[0].device_kind
    runnable = [name for name in dispatch.PLATFORMS if name in dispatch.available()]
    name = flags.implementation or next(iter(runnable), None)
    if name not in runnable:
        raise SystemExit(f"tune: no kernel runs on {device}.")
    case = CASES[flags.case]
    case = dataclasses.replace(
        case,
        heads=max(1, case.heads * case.key_size // flags.size),
        key_size=flags.size,
        value_size=flags.size,
    )

    def measure(choice, backward):
        return measure_apart(
            Candidate(
                name,
                case,
                flags.dtype,
                choice,
                backward,
                flags.repeats,
                interpret=False,
            )
        )

    best = (
        tune_tpu(measure)
        if name == "pallas_tpu"
        else tune_gpu(measure, values=flags.size)
    )
    if not math.isfinite(_total(measure, best)):
        raise SystemExit(f"tune: no tile of {name} gives correct results on {device}.")
    print(f"{name} on {device}, heads of {flags.size}: {best}")


if __name__ == "__main__":
    main()
