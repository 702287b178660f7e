"""Steps that check the kernels on this device: laws, repetitions, sanitizers."""

import dataclasses
import functools
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.device.sizes import Job, Jobs, Sizes, kernels, op_of
from pallas_kernels import bench, dispatch, tiles, tune
from pallas_kernels.cases import Case, make_inputs
from rwkv7_jax.reports.system_info import versions

PACKAGES = ("jax", "jaxlib", "jax-triton", "triton", "torch", "fla-core", "rwkv-ops")
# Largest relative L2 distances to float64: of y and the end state, and of gradients.
BARS = {"float32": (5e-6, 2e-5), "bfloat16": (5e-3, 8e-3)}
# Keys that are all the same are hard on bfloat16.
REPEATED_BAR = 4e-2
SECONDS_OF_A_COMMAND = 240
# The fields of a kernel's tile, with the numbers that are tried.
_TILE_NUMBERS = (
    ("warps", 2),
    ("warps", 4),
    ("warps", 8),
    ("stages", 1),
    ("stages", 2),
    ("stages", 3),
    ("values", 32),
)


def card(sizes: Sizes) -> Jobs:
    """Names the device and versions, and measures a copy and a product: the floors of the run."""

    def described():
        device = jax.devices()[0]
        return {"device": device.device_kind, "versions": versions(PACKAGES)}

    def clocks():
        tool = shutil.which("nvidia-smi")
        if tool is None:
            raise ImportError("nvidia-smi")
        query = "--query-gpu=clocks.max.sm,clocks.sm,power.limit,driver_version"
        command = [tool, query, "--format=csv"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        return {"nvidia-smi": done.stdout.splitlines()}

    def product():
        side = 256 if sizes.interpret else 8192
        x = jax.random.normal(jax.random.key(0), (side, side), jnp.bfloat16)
        run = functools.partial(jax.jit(jnp.matmul), x, x)
        wall, _ = bench.least_ms(run, repeats=sizes.repeats)
        return {"product TFLOP/s": 2 * side**3 / wall / 1e9}

    yield Job({}, described)
    yield Job({}, clocks)
    yield Job({}, lambda: {"copy GB/s": bench.copy_bandwidth(sizes.repeats) / 1e9})
    yield Job({}, product)


def law_cases(sizes: Sizes) -> Iterator[tuple[Case, str]]:
    """Yields cases and dtypes of tokens, those first that tell most."""
    keys, values = sizes.heads_of[0]
    usual = Case(2, 100, 4, keys, values)
    for dtype, mode in itertools.product(("bfloat16", "float32"), ("real", "repeated")):
        yield dataclasses.replace(usual, mode=mode), dtype
    for keys, values in sizes.heads_of[1:]:
        yield dataclasses.replace(usual, key_size=keys, value_size=values), "bfloat16"
    for number in sizes.rows_heads:
        tokens = max(sizes.lengths[0], 1024 if not sizes.interpret else 33)
        rows = 8 if number % 8 == 0 else 1
        case = dataclasses.replace(
            usual, batch=rows, tokens=tokens, heads=number // rows
        )
        yield case, "bfloat16"
    for tokens in sizes.lengths:
        yield dataclasses.replace(usual, tokens=tokens), "bfloat16"
    for mode in ("fast", "slow"):
        yield dataclasses.replace(usual, mode=mode), "bfloat16"


def check_law(op: bench.Op, case: Case, dtype: str) -> dict:
    """Compares y, the end state and all gradients with float64."""
    inputs, state = make_inputs(case, dtype)
    arguments = (inputs, state, jnp.sin(inputs.v), jnp.cos(state))
    true_y, true_end, true_grads = bench.truth(arguments)
    run = jax.jit(functools.partial(bench.forward_and_gradients, op))
    y, end, grads = run(*arguments)
    values = max(bench.relative(y, true_y), bench.relative(end, true_end))
    worst = max(map(bench.relative, grads, true_grads))
    most_values, most_grads = BARS[dtype]
    if (dtype, case.mode) == ("bfloat16", "repeated"):
        most_grads = REPEATED_BAR
    # NaN is no larger than a bar, and not at most one either.
    if not (values <= most_values and worst <= most_grads):
        raise ArithmeticError(
            f"wrong: {values:.2g} in values, {worst:.2g} in gradients"
        )
    return {"values": values, "gradients": worst}


def laws(sizes: Sizes) -> Jobs:
    """Compares the kernels with float64: sizes, lengths, data, numbers of segments, packed rows."""
    for name in kernels(sizes):
        op = op_of(name, sizes)
        for case, dtype in itertools.islice(law_cases(sizes), sizes.laws):
            labels = {"name": name, "case": dataclasses.astuple(case), "dtype": dtype}
            yield Job(labels, functools.partial(check_law, op, case, dtype))
    # The only kernel that takes packed rows.
    labels = {"name": "pallas_gpu", "what": "packed rows"}
    yield Job(labels, functools.partial(check_packed, sizes))


def check_packed(sizes: Sizes) -> dict:
    """Compares packed rows with the same tokens in separate rows; float32."""
    keys, values = sizes.heads_of[0]
    inputs, state = make_inputs(Case(4, 50, 2, keys, values))
    rows = jax.tree.map(lambda x: x.reshape(2, 100, *x.shape[2:]), inputs)
    ids = jnp.repeat(jnp.arange(2)[None], 2, axis=0).repeat(50, axis=1)

    def gradients(op, inputs):
        dy = jnp.sin(inputs.v)
        run = jax.jit(functools.partial(bench.forward_and_gradients, op))
        return run(inputs, state, dy, jnp.cos(state))

    packed = gradients(op_of("pallas_gpu", sizes, segment_ids=ids), rows)
    alone = gradients(op_of("pallas_gpu", sizes), inputs)
    pairs = zip(jax.tree.leaves(packed), jax.tree.leaves(alone), strict=True)
    worst = max(bench.relative(x.reshape(y.shape), y) for x, y in pairs)
    if not worst <= 1e-5:
        raise ArithmeticError(f"wrong: {worst:.2g}")
    return {"worst": worst}


@jax.jit
def same_bits(left, right) -> jax.Array:
    """Tells whether two results are equal; NaN equals nothing."""
    equal = jax.tree.map(lambda x, y: jnp.all(x == y), left, right)
    return functools.reduce(jnp.logical_and, jax.tree.leaves(equal))


def count_varying(run: Callable, sizes: Sizes) -> dict:
    """Runs a program again and again, once with freed memory full of NaN."""
    first = jax.block_until_ready(run())
    varying = sum(not bool(same_bits(first, run())) for _ in range(sizes.repetitions))
    # What JAX frees it gives to the next program that asks.
    jnp.full(sizes.filled_bytes // 4, jnp.nan, jnp.float32).block_until_ready().delete()
    varying += not bool(same_bits(first, run()))
    if varying:
        raise ArithmeticError(f"{varying} of {sizes.repetitions + 1} runs differ")
    return {"repetitions": sizes.repetitions + 1}


def repetitions(sizes: Sizes) -> Jobs:
    """Repeats both passes of every kernel and of every neighbour of its tiles, bit for bit."""

    def repeat(name, case, dtype):
        inputs, state = make_inputs(case, dtype)
        arguments = (inputs, state, jnp.sin(inputs.v), jnp.cos(state))
        op = op_of(name, sizes)
        run = jax.jit(functools.partial(bench.forward_and_gradients, op))
        return count_varying(functools.partial(run, *arguments), sizes)

    for dtype, case in itertools.product(("bfloat16", "float32"), sizes.cases[:2]):
        for name in kernels(sizes):
            labels = {"name": name, "case": dataclasses.astuple(case), "dtype": dtype}
            yield Job(labels, functools.partial(repeat, name, case, dtype))
    case = dataclasses.replace(sizes.cases[0], batch=1)
    for candidate in candidates(sizes, case):
        yield Job(tile_labels(candidate), functools.partial(check_apart, candidate))


def neighbours(choice: tiles.GPU) -> Iterator[tiles.GPU]:
    """Yields a choice and those that differ from it in one number."""
    yield choice
    for kernel in ("forward", "state", "gradients"):
        tile = getattr(choice, kernel)
        for field, number in _TILE_NUMBERS:
            # The gradients' kernel has no loop, and takes all value rows.
            if kernel == "gradients" and field != "warps":
                continue
            if number != getattr(tile, field):
                changed = tile._replace(**{field: number})
                yield choice._replace(**{kernel: changed})
    for chunk in dispatch.GPU_CHUNKS:
        if chunk != choice.chunk:
            yield choice._replace(chunk=chunk)


def table_choice(name: str, case: Case, sizes: Sizes) -> tiles.GPU:
    """Returns the table's tiles for a case in bfloat16."""
    capability = None if sizes.interpret else tiles.capability()
    table = dispatch.GPU_TABLES[name]
    return tiles.for_gpu(table, case.key_size, case.value_size, "bfloat16", capability)


def candidates(sizes: Sizes, case: Case) -> Iterator[tune.Candidate]:
    """Yields the table's tiles and their neighbours, in the passes for which they differ."""
    for name in kernels(sizes):
        table = table_choice(name, case, sizes)
        around = [table] if sizes.interpret else neighbours(table)
        for choice in around:
            for backward in passes_of(choice, table):
                yield tune.Candidate(
                    name,
                    case,
                    "bfloat16",
                    choice,
                    backward,
                    sizes.repeats,
                    sizes.interpret,
                    sizes.repetitions,
                )


def passes_of(choice: tiles.GPU, table: tiles.GPU) -> tuple[bool, ...]:
    """Returns the passes, backward or not, in which a choice runs other kernels than the table's.

    Both for the table's own choice, next to which the others are read.
    """
    if choice == table or choice.chunk != table.chunk:
        return False, True
    return (choice.forward == table.forward,)


def tile_labels(candidate: tune.Candidate) -> dict[str, Any]:
    """Returns the fields of the line of a tile's result."""
    label = "backward" if candidate.backward else "forward"
    return {"name": candidate.name, "choice": candidate.choice, "pass": label}


def check_apart(candidate: tune.Candidate) -> dict:
    """Checks and repeats one choice of tiles in a separate process."""
    _, reason = tune.run_apart(candidate)
    if reason:
        raise ArithmeticError(reason)
    return {"repetitions": candidate.repetitions}


def large(sizes: Sizes) -> Jobs:
    """Runs arrays of more than 2^31 numbers, whose rows are the same, and a very long row."""
    tokens = 64 if sizes.interpret else 4096
    keys, values = sizes.heads_of[0]
    heads = 1 if sizes.interpret else 32
    inputs, state = make_inputs(Case(1, tokens, heads, keys, values), "bfloat16")

    def many(name):
        op = jax.jit(op_of(name, sizes))
        full = jax.tree.map(lambda x: jnp.repeat(x, sizes.copies, axis=0), inputs)
        y, _ = op(full, jnp.repeat(state, sizes.copies, axis=0))
        if not bool(jnp.all(y == y[:1])):
            raise ArithmeticError("wrong: rows of the same tokens differ")
        return {"numbers": full.r.size}

    def long(name):
        repeated = jax.tree.map(
            lambda x: jnp.tile(x[:, :, :1], (1, sizes.copies, 1, 1)), inputs
        )
        run = jax.jit(op_of(name, sizes))
        y, end = run(repeated, state[:, :1])
        half = repeated.r.shape[1] // 2
        _, middle = run(jax.tree.map(lambda x: x[:, :half], repeated), state[:, :1])
        _, again = run(jax.tree.map(lambda x: x[:, half:], repeated), middle)
        distance = bench.relative(again, end)
        if not (distance <= BARS["bfloat16"][0] and bool(jnp.isfinite(y).all())):
            raise ArithmeticError(f"wrong: {distance:.2g} after cutting")
        return {"tokens": repeated.r.shape[1]}

    for name, run in itertools.product(kernels(sizes), (many, long)):
        labels = {"name": name, "what": run.__name__}
        yield Job(labels, functools.partial(run, name))


def sanitizer(sizes: Sizes) -> Jobs:
    """Runs a small law under NVIDIA's checks of memory and races."""
    tool = shutil.which("compute-sanitizer")
    program = [sys.executable, "-m", "benchmarks.device", "small"]

    def run(check):
        if tool is None:
            raise ImportError("compute-sanitizer")
        command = [tool, "--tool", check, "--error-exitcode", "9", *program]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=SECONDS_OF_A_COMMAND
        )
        lines = done.stdout.strip().splitlines() or [done.stderr[-200:]]
        if done.returncode:
            raise ArithmeticError(lines[-1])
        # A tool finds no error in a kernel that did not run.
        return {"last line": lines[-1], "kernels": right_kernels(lines)}

    for check in ("memcheck", "racecheck"):
        yield Job({"check": check}, functools.partial(run, check))


def right_kernels(lines: list[str]) -> list[str]:
    """Returns the kernels that ran and were right, by the lines that `small` printed.

    Raises:
        ArithmeticError: one was not, or none ran.
    """
    rows = [json.loads(line) for line in lines if line.startswith("{")]
    wrong = [f"{row['name']}: {row['result']}" for row in rows if row["result"] != "ok"]
    if wrong or not rows:
        raise ArithmeticError("; ".join(wrong) or "no kernel ran")
    return [row["name"] for row in rows]


def small(sizes: Sizes) -> Jobs:
    """Runs every kernel once, for `sanitizer`."""
    for name in kernels(sizes):
        op = op_of(name, sizes)
        run = functools.partial(check_law, op, Case(1, 128, 2), "bfloat16")
        yield Job({"name": name}, run)


def suite(sizes: Sizes) -> Jobs:
    """Runs the repository's own tests on this device, file by file."""
    platform = "cpu" if sizes.interpret else "cuda"

    def run(file):
        command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "--tb=line", file]
        # The kernels of TPUs would run in an interpreter.
        command += ["-m", "slow or not slow", "-k", "not pallas_tpu"]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": platform},
        )
        lines = done.stdout.strip().splitlines() or [done.stderr[-200:]]
        if done.returncode:
            failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
            raise ArithmeticError("; ".join([lines[-1], *failed[:20]]))
        return {"last line": lines[-1]}

    for file in sizes.tests:
        yield Job({"file": file}, functools.partial(run, file))
