"""`python -m pallas_kernels.bench [case]`: time, error, memory of every implementation.

Time is the least of several runs, by the wall and by the process (all its threads together): a
machine is seldom idle. Error is the relative L2 distance to the float64 definition, of y and of
the worst of seven gradients. Memory is what the compiled gradient takes besides its arguments and
results. "of copy" is the share of the time in which a large copy of the same run would have moved
the bytes of `least_bytes`.
"""

import argparse
import dataclasses
import functools
import json
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.cases import CASES, MODES, Case, make_inputs
from pallas_kernels.dispatch import available
from pallas_kernels.reference import wkv7_reference
from pallas_kernels.wkv7 import wkv7

RUN_SECONDS = 0.02
COPIED_BYTES = 2**28
# The definition's own autodiff stores every state: beyond this much it is left out.
STATES_LIMIT_BYTES = 2**32


def forward_and_gradients(op, inputs, state, dy, dend):
    """y, the last state and the gradients of all seven inputs."""
    (y, end), pull = jax.vjp(op, inputs, state)
    grads, dstate = pull((dy.astype(y.dtype), dend.astype(end.dtype)))
    return y, end, (*grads, dstate)


def implementations(case: Case) -> dict:
    """What runs here, by name: the named ones, what None takes, and the definition if it fits."""

    def named(implementation):
        return lambda inputs, state: wkv7(*inputs, state, implementation=implementation)

    ops = {name: named(name) for name in available()}
    states = 4 * case.batch * case.tokens * case.heads * case.key_size * case.value_size
    if states <= STATES_LIMIT_BYTES:
        ops["definition"] = wkv7_reference
    return {"(best)": named(None), **ops}


def least_ms(
    run: Callable, *, repeats: int, wait: Callable = jax.block_until_ready
) -> tuple[float, float]:
    """Least wall and least process milliseconds of a call.

    Args:
        run: what is measured, without arguments.
        repeats: measurements, each of enough calls to take over `RUN_SECONDS`.
        wait: returns when what `run` returned is there.
    """

    def seconds(calls: int) -> tuple[float, float]:
        wall, process = time.perf_counter(), time.process_time()
        for _ in range(calls):
            result = run()
        wait(result)
        return time.perf_counter() - wall, time.process_time() - process

    wait(run())
    calls = 1
    while seconds(calls)[0] < RUN_SECONDS:
        calls *= 2
    walls, processes = zip(*(seconds(calls) for _ in range(repeats)), strict=True)
    return 1e3 * min(walls) / calls, 1e3 * min(processes) / calls


def copy_bandwidth(repeats: int) -> float:
    """Bytes a second, read and written, of adding one to a large array of bfloat16."""
    x = jnp.ones(COPIED_BYTES // 2, jnp.bfloat16)
    run = functools.partial(jax.jit(lambda x: x + 1), x)
    return 2 * x.nbytes / (1e-3 * least_ms(run, repeats=repeats)[0])


def least_bytes(case: Case, dtype: str, chunk: int = 32) -> dict[str, int]:
    """Bytes that the op has to read and write for one token of one head, by pass.

    The forward pass reads the six inputs and writes y and, for the backward pass, a state every
    `chunk` tokens in the tokens' dtype; the backward pass reads all that, with dy for y, and writes
    six gradients. In bfloat16 and for heads of 64: 1,280 and 2,176. A forward pass alone need not
    keep states: 1,024.
    """
    size = jnp.dtype(dtype).itemsize
    inputs = size * (4 * case.key_size + case.value_size) + 4 * case.key_size
    lone = inputs + size * case.value_size
    forward = lone + size * case.key_size * case.value_size // chunk
    both = 2 * forward + inputs
    return {"fwd": lone, "fwd saving": forward, "bwd": both - forward, "fwd+bwd": both}


def relative(actual, expected) -> float:
    """Relative L2 distance, in float64."""
    with jax.enable_x64(True):
        actual, expected = (jnp.asarray(x).astype(jnp.float64) for x in (actual, expected))
        return float(jnp.linalg.norm((actual - expected).ravel()) / jnp.linalg.norm(expected))


def truth(arguments):
    """y, last state and gradients token by token in float64.

    By "scan", whose backward pass recomputes states; autodiff of the definition would store all.
    """

    def op(inputs, state):
        return wkv7(*inputs, state, implementation="scan")

    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x.astype(jnp.float64), arguments)
        return jax.jit(functools.partial(forward_and_gradients, op))(*wide)


def measure(case: Case, dtype: str, *, repeats: int, others: dict | None = None) -> list[dict]:
    """One row of numbers for every implementation.

    Args:
        case: sizes and data.
        dtype: of the tokens.
        repeats: runs of which the fastest counts.
        others: further ones by name: functions of the tokens and the state, as `wkv7` is.
    """
    inputs, state = make_inputs(case, dtype)
    dy, dend = jnp.sin(inputs[3]), jnp.cos(state)
    true_y, _, true_grads = truth((inputs, state, dy, dend))
    per_byte = 1e3 * case.batch * case.tokens * case.heads / copy_bandwidth(repeats)
    floors = {name: per_byte * count for name, count in least_bytes(case, dtype).items()}
    rows = []
    for name, op in (implementations(case) | (others or {})).items():
        training = jax.jit(functools.partial(forward_and_gradients, op))
        compiled = training.lower(inputs, state, dy, dend).compile()
        both = functools.partial(compiled, inputs, state, dy, dend)
        y, _, grads = both()
        forward = functools.partial(jax.jit(op), inputs, state)
        wall, process = least_ms(forward, repeats=repeats)
        both_wall, both_process = least_ms(both, repeats=repeats)
        rows.append(
            {
                "implementation": name,
                "fwd ms": wall,
                "fwd cpu ms": process,
                "fwd+bwd ms": both_wall,
                "fwd+bwd cpu ms": both_process,
                "fwd of copy": floors["fwd"] / wall,
                "fwd+bwd of copy": floors["fwd+bwd"] / both_wall,
                "y error": relative(y, true_y),
                "gradient error": max(map(relative, grads, true_grads)),
                "temp MiB": compiled.memory_analysis().temp_size_in_bytes / 2**20,
            }
        )
    return rows


def table(rows: list[dict]) -> str:
    """The rows as text in columns."""

    def cell(value):
        if not isinstance(value, float):
            return "-" if value is None else str(value)
        return f"{value:.1e}" if value < 1e-2 else f"{value:.1f}"

    lines = [list(rows[0]), *([cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True))
        for line in lines
    )


def plot(case: Case, dtype: str, path: str, *, repeats: int) -> None:
    """A picture of time and gradient error against length, up to that of `case`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lengths = [n for n in (64, 256, 1024, 4096) if n <= case.tokens] or [case.tokens]
    by_name: dict[str, list[dict]] = {}
    for tokens in lengths:
        for row in measure(dataclasses.replace(case, tokens=tokens), dtype, repeats=repeats):
            by_name.setdefault(row["implementation"], []).append(row | {"tokens": tokens})
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for axis, key in zip(axes, ("fwd+bwd ms", "gradient error"), strict=True):
        for name, rows in by_name.items():
            axis.loglog([r["tokens"] for r in rows], [r[key] for r in rows], "o-", label=name)
        axis.set(xlabel="tokens", ylabel=key)
    axes[0].legend()
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> None:
    """Measure one case; print a table, write what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.bench")
    parser.add_argument("case", nargs="?", default="tiny", choices=CASES)
    parser.add_argument("--mode", default="real", choices=MODES)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", metavar="PATH", help="also write the numbers there")
    parser.add_argument("--plot", metavar="PATH", help="also draw time and error against length")
    flags = parser.parse_args(arguments)
    case = dataclasses.replace(CASES[flags.case], mode=flags.mode)
    device = jax.devices()[0]
    print(f"{flags.case}: {case}\n{flags.dtype} on {device.device_kind}, jax {jax.__version__}\n")
    rows = measure(case, flags.dtype, repeats=flags.repeats)
    print(table(rows))
    if flags.json:
        record = {"case": dataclasses.asdict(case), "dtype": flags.dtype, "rows": rows}
        record |= {"device": device.device_kind, "jax": jax.__version__}
        with open(flags.json, "w") as file:
            json.dump(record, file, indent=1)
    if flags.plot:
        plot(case, flags.dtype, flags.plot, repeats=flags.repeats)


if __name__ == "__main__":
    main()
