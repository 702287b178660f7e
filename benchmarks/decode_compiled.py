"""The cost of a generated token on a GPU, by the compiler, without the device.

    python -m benchmarks.decode_compiled --json benchmarks/results/gpu-decode-compiled.json --check

XLA compiles the decode loop ahead of time (`pip install "rwkv7_jax[cuda]"`) on any Linux machine;
it needs only shapes. The program counts the kernels of the loop's body and the bytes that they
read and write, without branches that depend on the sampling options. "kernel" is the loop with
`implementation="pallas_gpu"`, whose kernel for one token reads each state once. "whole" is the same
without split-K products, which XLA chooses by autotuning on a device and by a guess here. "scan" is
a loop over the model's call, which scans over stacked weights.
"""

import argparse
import dataclasses
import functools
import math
import os
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import record
from pallas_kernels.compile_checks.gpu import DEVICES, absent_device
from rwkv7_jax.generation import sampling
from rwkv7_jax.generation.decode_loop import DecodeState, KnownTokens, decode
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import init_state
from rwkv7_jax.model.unrolled import split_params

# The published model of 0.4 billion numbers, with the weights' dtype of its file.
CONFIG = RWKV7Config(vocab_size=65536, num_layers=24, width=1024, dtype="bfloat16")


class Form(NamedTuple):
    """A way to decode.

    Attributes:
        implementation: of the WKV op.
        batches: rows that it is compiled for.
        whole: whether no product is summed in parts.
    """

    implementation: str | None = None
    batches: tuple[int, ...] = (1, 8, 32)
    whole: bool = False


FORMS = {
    "unrolled": Form(batches=(1, 8, 32, 256)),
    "kernel": Form("pallas_gpu", batches=(1, 8, 32, 256)),
    "whole": Form("pallas_gpu", whole=True),
    "scan": Form(),
}
# Bars: kernels a token of "unrolled" in a batch of 1, and bytes over weights and states of "whole"
# in a batch of 32.
MOST_KERNELS = 500
MOST_BYTES = 1.3

# Describes an array on the device that is compiled for, with another dtype where one is given.
Place = Callable[..., jax.ShapeDtypeStruct]

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s64": 8, "u64": 8}
# The operand that instructions write into the first one; what is not updated is not touched.
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}
# Instructions that launch nothing and move nothing.
_FREE = {
    "parameter",
    "get-tuple-element",
    "tuple",
    "bitcast",
    "constant",
    "while",
    "conditional",
    "after-all",
    "iota",
    "partition-id",
    "copy-done",
    "async-done",
}
_INSTRUCTION = re.compile(
    r"^\s+(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<type>\(.*?\)|\S+) (?P<code>[\w\-]+)\((?P<rest>.*)$"
)


class Instruction(NamedTuple):
    """One line of a program.

    Attributes:
        code: what it does.
        bytes: of the result.
        operands: names of instructions.
        text: all of the line.
    """

    code: str
    bytes: int
    operands: tuple[str, ...]
    text: str


Computations = dict[str, dict[str, Instruction]]


def type_bytes(text: str) -> int:
    """Returns the bytes of all arrays in the text of a type."""
    total = 0
    for kind, sizes in re.findall(r"(\w+)\[([\d,]*)\]", text):
        numbers = [int(size) for size in sizes.split(",") if size]
        total += math.prod(numbers) * _BYTES.get(kind, 4)
    return total


def find(pattern: str, text: str) -> str:
    """Returns the first group of the first match.

    Raises:
        RuntimeError: there is none, as where the compiler's output has changed.
    """
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"The compiler's output has no match for {pattern!r}.")
    return match[1]


def parse(text: str) -> Computations:
    """Reads the computations of a compiled program."""
    computations: Computations = {}
    current: dict[str, Instruction] = {}
    for line in text.splitlines():
        head = re.match(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line)
        if head:
            current = computations.setdefault(head[1], {})
        found = _INSTRUCTION.match(line)
        if found:
            inside = found["rest"].split("), ")[0]
            current[found["name"]] = Instruction(
                code=found["code"],
                bytes=type_bytes(found["type"]),
                operands=tuple(re.findall(r"%([\w.\-]+)", inside)),
                text=line,
            )
    return computations


def operand_bytes(
    instruction: Instruction, body: dict[str, Instruction], all_: Computations
) -> int:
    """Returns the bytes that a kernel reads; of an array that it takes rows of, only those."""
    sizes = [body[name].bytes for name in instruction.operands]
    called = re.search(r"calls=%?([\w.\-]+)", instruction.text)
    if called is None:
        return sum(sizes)
    inside = all_[called[1]]
    for name, part in inside.items():
        if part.code != "parameter":
            continue
        number = int(find(r"parameter\((\d+)\)", part.text))
        users = [other for other in inside.values() if name in other.operands]
        slices = [
            user.bytes
            for user in users
            if user.code in ("gather", "dynamic-slice", "slice")
            and user.operands[0] == name
        ]
        updated = [
            inside[user.operands[_UPDATES[user.code]]].bytes
            for user in users
            if user.code in _UPDATES and user.operands[0] == name
        ]
        if users and len(slices) + len(updated) == len(users):
            sizes[number] = min(sizes[number], sum(slices) + sum(updated))
    return sum(sizes)


def written_bytes(instruction: Instruction, all_: Computations) -> int:
    """Returns the bytes that a kernel writes."""
    called = re.search(r"calls=%?([\w.\-]+)", instruction.text)
    inside = all_[called[1]] if called else {}
    for part in inside.values():
        if part.code in _UPDATES and part.bytes == instruction.bytes:
            return inside[part.operands[_UPDATES[part.code]]].bytes
    return instruction.bytes


def loop_costs(text: str) -> dict[str, int]:
    """Counts kernels and bytes in the body of the program's largest loop, and of loops in it."""
    all_ = parse(text)

    def costs(name: str) -> dict[str, int]:
        found = {"kernels": 0, "bytes": 0, "joined": 0, "sliced": 0}
        for instruction in all_[name].values():
            if instruction.code == "while":
                # Layers that are scanned over; the bisections of sampling are in branches.
                inner = find(r"body=%?([\w.\-]+)", instruction.text)
                trips = re.search(r'known_trip_count":\{"n":"(\d+)"', instruction.text)
                for key, value in costs(inner).items():
                    found[key] += value * int(trips[1] if trips else 1)
            if instruction.code in _FREE:
                continue
            found["kernels"] += 1
            found["bytes"] += operand_bytes(instruction, all_[name], all_)
            found["bytes"] += written_bytes(instruction, all_)
            shown = instruction.text
            called = re.search(r"calls=%?([\w.\-]+)", shown)
            inside = all_[called[1]].values() if called else [instruction]
            codes = {part.code for part in inside}
            found["joined"] += "concatenate" in codes and "multiply" not in codes
            found["sliced"] += codes <= {
                "parameter",
                "dynamic-slice",
                "bitcast",
                "constant",
            }
        return found

    bodies = set(re.findall(r"body=%?([\w.\-]+)", text))
    return max((costs(name) for name in bodies), key=lambda found: found["bytes"])


def generate_by_scan(model, params, run, *, limit):
    """Generates greedily by the model's own call."""

    def one(loop):
        state, logits, index = loop
        tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        logits, state = model.apply(
            {"params": params}, tokens[:, None], state, jnp.ones_like(tokens)
        )
        return state, logits[:, 0], index + 1

    loop = (run.state, run.logits, jnp.zeros((), jnp.int32))
    return jax.lax.while_loop(lambda loop: loop[2] < limit, one, loop)


def describe_arguments(batch: int, place: Place) -> tuple[Any, DecodeState]:
    """Describes the weights, in bfloat16, and the state that a loop carries."""
    model = RWKV7(CONFIG)
    tokens = jnp.zeros((1, 1), jnp.int32)
    make = functools.partial(model.init, jax.random.key(0), tokens)
    params = jax.eval_shape(make, init_state(CONFIG))["params"]
    params = jax.tree.map(lambda leaf: place(leaf, jnp.bfloat16), params)

    def start():
        logits = jnp.zeros((batch, CONFIG.vocab_size))
        return DecodeState.create(init_state(CONFIG, batch), logits)

    return params, jax.tree.map(place, jax.eval_shape(start))


def trace_form(name: str, batch: int, place: Place, params: Any, run: DecodeState):
    """Traces one form of the loop.

    Args:
        name: of `FORMS`.
        batch: rows.
        place: describes an array on the device.
        params: the weights' description.
        run: that of the state.
    """
    implementation = FORMS[name].implementation
    config = dataclasses.replace(CONFIG, implementation=implementation)
    if name == "scan":
        step = functools.partial(generate_by_scan, RWKV7(config))
        limit = place(np.zeros((), np.int32))
        return jax.jit(step).trace(params, run, limit=limit)
    return trace_loop(config, batch, place, params, run)


def trace_loop(
    config: RWKV7Config, batch: int, place: Place, params: Any, run: DecodeState
):
    """Traces the decode loop of a model with this config; see `trace_form`."""
    split = jax.tree.map(place, jax.eval_shape(split_params, params))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
    options = sampling.make_options(config.vocab_size)
    known = KnownTokens(np.zeros(batch, np.int32), np.zeros(batch, bool))
    return decode.trace(
        RWKV7(config),
        split,
        run,
        known=jax.tree.map(place, known),
        keys=place(keys),
        options=jax.tree.map(place, options),
        limits=place(np.zeros(batch, np.int32)),
        capacity=32,
    )


def compile_form(name: str, batch: int) -> dict[str, Any]:
    """Compiles one form for an H200 and returns its costs."""
    device = DEVICES[0]
    sharding = jax.sharding.SingleDeviceSharding(absent_device(device))
    abstract = jax.sharding.AbstractDevice(
        device_kind=device.kind, num_cores=device.cores, platform="gpu"
    )
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=abstract)

    def place(leaf, dtype=None):
        return jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=sharding)

    params, run = describe_arguments(batch, place)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = trace_form(name, batch, place, params, run)
        began = time.monotonic()
        lowered = traced.lower(lowering_platforms=("cuda",))
        options: dict[str, str | bool] = {}
        if FORMS[name].whole:
            options["xla_gpu_experimental_force_split_k"] = "1"
        compiled = lowered.compile(compiler_options=options)
    weights = sum(leaf.size * 2 for leaf in jax.tree.leaves(params))
    # Of the embedding, a token reads its row.
    weights -= CONFIG.vocab_size * CONFIG.width * 2
    states = 2 * sum(
        leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(run.state)
    )
    costs = loop_costs(compiled.as_text() or "")
    return {
        **costs,
        "least bytes": weights + states,
        "ratio": costs["bytes"] / (weights + states),
        "seconds of compiling": round(time.monotonic() - began, 1),
    }


def main() -> None:
    """Prints a line for each form and batch; `--check` exits with 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", help="file to write")
    parser.add_argument(
        "--check", action="store_true", help="exit with 1 if a target is missed"
    )
    args = parser.parse_args()
    rows = {}
    for name, form in FORMS.items():
        for batch in form.batches:
            rows[f"{name}, batch {batch}"] = row = compile_form(name, batch)
            print(f"{name:>9} batch {batch:>3}", row, flush=True)
            # After each row: a run takes twenty minutes.
            if args.json:
                record.write(
                    args.json,
                    "benchmarks.decode_compiled",
                    packages=("jax", "jax-cuda13-plugin"),
                    bars={
                        "kernels, unrolled, batch 1": MOST_KERNELS,
                        "ratio, whole, batch 32": MOST_BYTES,
                    },
                    rows=rows,
                )
    missed = (
        rows["unrolled, batch 1"]["kernels"] > MOST_KERNELS
        or rows["whole, batch 32"]["ratio"] > MOST_BYTES
        or any(row["sliced"] for name, row in rows.items() if "scan" not in name)
    )
    if args.check and missed:
        raise SystemExit("decode_compiled: a target is missed.")


if __name__ == "__main__":
    main()
