"""`python -m pallas_kernels.bench [case]`: time, error and memory of every implementation.

* Time is the minimum of several runs, as wall time and as process time (the sum over all threads),
  since a machine is seldom idle.
* Error is the relative L2 distance to the float64 definition: of y, and of the worst of the seven
  gradients.
* Memory is the temporary memory of the compiled gradient, without its arguments and results.
* "of copy" is the time to copy the bytes of `least_bytes`, as a fraction of the measured time. A
  large copy in the same run gives the bandwidth.
"""

import argparse
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.cases import CASES, MODES, Case, make_inputs
from pallas_kernels.dispatch import available
from pallas_kernels.reference import State, WKVInputs, wkv7_reference
from pallas_kernels.wkv7 import wkv7

# Calls are repeated until a measurement takes this long.
RUN_SECONDS = 0.02
COPIED_BYTES = 2**28
# Tokens between two states that the forward pass of a gradient saves.
SAVED_EVERY = 32
# Autodiff of the definition saves every state. It is skipped if they take more than this.
STATES_LIMIT_BYTES = 2**32

# Maps the inputs and the start state to y and the last state.
Op = Callable[[WKVInputs, State], tuple[Array, State]]


def forward_and_gradients(
    op: Op,
    inputs: WKVInputs,
    state: State,
    dy: Array,
    dend: Array,
) -> tuple[Array, Array, tuple[Array, ...]]:
    """Computes y, the last state and the gradients of all seven arrays."""
    (y, end), pull = jax.vjp(op, inputs, state)
    grads, dstate = pull((dy.astype(y.dtype), dend.astype(end.dtype)))
    return y, end, (*grads, dstate)


def _named(implementation: str | None) -> Op:
    return lambda inputs, state: wkv7(*inputs, state, implementation=implementation)


def implementations(case: Case) -> dict[str, Op]:
    """Returns the implementations to measure: the default, each available one, the definition."""
    ops = {"(best)": _named(None)}
    for name in available():
        ops[name] = _named(name)
    states = 4 * case.batch * case.tokens * case.heads * case.key_size * case.value_size
    if states <= STATES_LIMIT_BYTES:
        ops["definition"] = wkv7_reference
    return ops


def least_ms(
    run: Callable, *, repeats: int, wait: Callable = jax.block_until_ready
) -> tuple[float, float]:
    """Measures the minimum wall and process time of a call, in milliseconds.

    Args:
        run: a function without arguments.
        repeats: measurements, each of enough calls to take at least `RUN_SECONDS`.
        wait: waits until the result of `run` is ready.
    """

    def seconds(calls: int) -> tuple[float, float]:
        wall = time.perf_counter()
        process = time.process_time()
        for _ in range(calls):
            result = run()
        wait(result)
        return time.perf_counter() - wall, time.process_time() - process

    # The first call compiles.
    wait(run())
    calls = 1
    # A single call of a small case takes less time than the clock's resolution and the dispatch.
    while seconds(calls)[0] < RUN_SECONDS:
        calls *= 2
    # The minimum instead of the mean: other programs can only make a run slower.
    walls, processes = zip(*(seconds(calls) for _ in range(repeats)), strict=True)
    return 1e3 * min(walls) / calls, 1e3 * min(processes) / calls


def copy_bandwidth(repeats: int) -> float:
    """Measures the bandwidth of adding 1 to a large bfloat16 array, in bytes per second."""
    x = jnp.ones(COPIED_BYTES // 2, jnp.bfloat16)
    run = functools.partial(jax.jit(lambda x: x + 1), x)
    wall, _ = least_ms(run, repeats=repeats)
    return 2 * x.nbytes / (1e-3 * wall)


def least_bytes(case: Case, dtype: str) -> dict[str, int]:
    """Counts the bytes that the op must read and write for one token of one head, by pass.

    The forward pass reads the six inputs and writes y. For a gradient it also writes a state every
    `SAVED_EVERY` tokens, in the tokens' dtype. The backward pass reads the same arrays, with dy in
    place of y, and writes six gradients. In bfloat16 with heads of 64 these are 1,024 bytes
    forward, 1,280 with the states, and 2,176 backward.
    """
    size = jnp.dtype(dtype).itemsize
    # log_w stays float32.
    inputs = size * (4 * case.key_size + case.value_size) + 4 * case.key_size
    forward = inputs + size * case.value_size
    forward_saving = forward + size * case.key_size * case.value_size // SAVED_EVERY
    both = 2 * forward_saving + inputs
    return {
        "fwd": forward,
        "fwd saving": forward_saving,
        "bwd": both - forward_saving,
        "fwd+bwd": both,
    }


def relative(actual: Array, expected: Array) -> float:
    """Computes the relative L2 distance, in float64."""
    with jax.enable_x64(True):
        actual = jnp.asarray(actual).astype(jnp.float64)
        expected = jnp.asarray(expected).astype(jnp.float64)
        return float(
            jnp.linalg.norm((actual - expected).ravel()) / jnp.linalg.norm(expected)
        )


def truth(arguments: tuple) -> tuple[Array, Array, tuple[Array, ...]]:
    """Computes y, the last state and the gradients token by token in float64.

    It uses "scan", which recomputes states; autodiff of the definition would save all of them.
    """
    run = functools.partial(forward_and_gradients, _named("scan"))
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x.astype(jnp.float64), arguments)
        return jax.jit(run)(*wide)


def measure(
    case: Case,
    dtype: str,
    *,
    repeats: int,
    others: dict[str, Op] | None = None,
    on_begin: Callable[[str], None] | None = None,
) -> list[dict]:
    """Measures every implementation; returns a row of numbers for each.

    Args:
        case: sizes and data.
        dtype: of the tokens.
        repeats: measurements, of which the minimum counts.
        others: further implementations by name.
        on_begin: called with the name of each before it is compiled and measured.
    """
    inputs, state = make_inputs(case, dtype)
    dy = jnp.sin(inputs.v)
    dend = jnp.cos(state)
    arguments = (inputs, state, dy, dend)
    true_y, _, true_grads = truth(arguments)
    # Milliseconds to copy one byte for each token of each head.
    ms_per_byte = 1e3 * case.batch * case.tokens * case.heads / copy_bandwidth(repeats)
    counts = least_bytes(case, dtype)
    rows = []
    for name, op in (implementations(case) | (others or {})).items():
        if on_begin is not None:
            on_begin(name)
        training = jax.jit(functools.partial(forward_and_gradients, op))
        compiled = training.lower(*arguments).compile()
        memory = compiled.memory_analysis()
        run_both = functools.partial(compiled, *arguments)
        y, _, grads = run_both()
        run_forward = functools.partial(jax.jit(op), inputs, state)
        wall, process = least_ms(run_forward, repeats=repeats)
        both_wall, both_process = least_ms(run_both, repeats=repeats)
        rows.append(
            {
                "implementation": name,
                "fwd ms": wall,
                "fwd cpu ms": process,
                "fwd+bwd ms": both_wall,
                "fwd+bwd cpu ms": both_process,
                "fwd of copy": ms_per_byte * counts["fwd"] / wall,
                "fwd+bwd of copy": ms_per_byte * counts["fwd+bwd"] / both_wall,
                "y error": relative(y, true_y),
                "gradient error": max(map(relative, grads, true_grads)),
                "temp MiB": memory.temp_size_in_bytes / 2**20 if memory else None,
            }
        )
    return rows


def _format_cell(value) -> str:
    if not isinstance(value, float):
        return "-" if value is None else str(value)
    return f"{value:.1e}" if value < 1e-2 else f"{value:.1f}"


def table(rows: list[dict]) -> str:
    """Formats the rows as a text table."""
    lines = [list(rows[0])]
    for row in rows:
        lines.append([_format_cell(value) for value in row.values()])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = []
    for line in lines:
        cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        texts.append("  ".join(cells))
    return "\n".join(texts)


def _say_begin(name: str) -> None:
    """Prints to stderr what is measured now, because the table comes only at the end."""
    print(f"measuring {name}", file=sys.stderr, flush=True)


def plot(case: Case, dtype: str, path: str, *, repeats: int) -> None:
    """Draws time and gradient error against length, up to the length of `case`."""
    # Optional: the plot extra.
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # A case shorter than all of these is drawn as a single point.
    lengths = [n for n in (64, 256, 1024, 4096) if n <= case.tokens] or [case.tokens]
    by_name: dict[str, list[dict]] = {}
    for tokens in lengths:
        shorter = dataclasses.replace(case, tokens=tokens)
        for row in measure(shorter, dtype, repeats=repeats, on_begin=_say_begin):
            by_name.setdefault(row["implementation"], []).append(
                row | {"tokens": tokens}
            )
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for axis, key in zip(axes, ("fwd+bwd ms", "gradient error"), strict=True):
        for name, rows in by_name.items():
            x = [row["tokens"] for row in rows]
            y = [row[key] for row in rows]
            axis.loglog(x, y, "o-", label=name)
        axis.set(xlabel="tokens", ylabel=key)
    axes[0].legend()
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> None:
    """Measures one case, prints a table and writes the requested files."""
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.bench")
    parser.add_argument(
        "case",
        nargs="?",
        default="tiny",
        choices=CASES,
    )
    parser.add_argument("--mode", default="real", choices=MODES)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--json", metavar="PATH", help="also write the numbers to this file"
    )
    parser.add_argument(
        "--plot", metavar="PATH", help="also draw time and error against length"
    )
    flags = parser.parse_args(arguments)
    case = dataclasses.replace(CASES[flags.case], mode=flags.mode)
    device = jax.devices()[0]
    print(
        f"{flags.case}: {case}\n{flags.dtype} on {device.device_kind}, jax {jax.__version__}\n",
        flush=True,
    )
    rows = measure(case, flags.dtype, repeats=flags.repeats, on_begin=_say_begin)
    print(table(rows))
    if flags.json:
        record = {
            "case": dataclasses.asdict(case),
            "dtype": flags.dtype,
            "rows": rows,
            "device": device.device_kind,
            "jax": jax.__version__,
        }
        with open(flags.json, "w") as file:
            json.dump(record, file, indent=1)
    if flags.plot:
        plot(case, flags.dtype, flags.plot, repeats=flags.repeats)


if __name__ == "__main__":
    main()
