"""What libtpu reports about the TPU kernels, without a TPU.

Each chip's kernels are compiled ahead of time in a separate process, since libtpu serves a single
process with one set of flags. Its final schedule gives the number of bundles of a grid step, which
take about a cycle each, and how often each of their slots is used.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from jax.experimental import topologies

from pallas_kernels.cases import Case, describe, describe_inputs
from pallas_kernels.reference import WKVInputs
from pallas_kernels.tpu import pallas_calls, token_step
from pallas_kernels.tpu.head_packing import TileLayout

CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
# Key size, value size, dtype. The number of heads follows from `CHANNELS`.
SIZES = (
    (64, 64, "bfloat16"),
    (128, 128, "bfloat16"),
    (256, 256, "bfloat16"),
    (256, 64, "bfloat16"),
    (64, 64, "float32"),
)
# The kernel for single tokens, as in decoding.
TOKEN = "token"
# The last two are for packed rows. They cost little more, so they are compiled for one chip only.
KERNELS = ("forward", "backward", TOKEN, "packed forward", "packed backward")
BATCH = 8
TOKENS = 4096
CHANNELS = 2048
PACKED_CHIP = "v5e"
# Sequences of a packed row.
SEQUENCES = 16
# Attempts to load libtpu, which serves one process per machine, three seconds apart.
ATTEMPTS = 40
# Only the last pass is dumped: dumping all of them takes twice as long as compiling.
FLAGS = (
    "--xla_jf_dump_to={} --xla_jf_dump_llo_text=true "
    "--xla_jf_dump_llo_pass_label_regex=.*final_hlo.*"
)
# The column of spilled registers in the utilisation file.
SPILLED = 8


def cases(chip: str) -> Iterator[tuple[str, tuple[int, int, str]]]:
    """Yields the kernels and sizes that are compiled for a chip."""
    for size in SIZES:
        with_packed = chip == PACKED_CHIP and size == SIZES[0]
        for kernel in KERNELS if with_packed else KERNELS[:3]:
            yield kernel, size


def _case(keys: int, values: int) -> Case:
    """Returns the sizes of a call with these head sizes."""
    return Case(BATCH, TOKENS, CHANNELS // keys, keys, values)


def _make_program(
    kernel: str,
    keys: int,
    values: int,
    dtype: str,
    sharding,
) -> tuple[Callable, tuple]:
    """Makes a function of arrays [B T C], as in a model, and describes its arguments.

    Args:
        kernel: one of `KERNELS`.
        keys: key channels of a head.
        values: value channels of a head.
        dtype: of the tokens.
        sharding: of all arrays.
    """
    inputs, state = describe_inputs(_case(keys, values), dtype, sharding)
    heads = inputs.r.shape[2]
    if kernel == TOKEN:
        return token_step.run_kernel, _token_arguments(keys, values, dtype, sharding)
    owners = None
    if kernel.startswith("packed"):
        states = (SEQUENCES * BATCH, *state.shape[1:])
        state = jax.ShapeDtypeStruct(states, state.dtype, sharding=sharding)
        chunks = (BATCH, TOKENS // _choose_layout(keys, values, dtype).chunk)
        owners = jax.ShapeDtypeStruct(chunks, "int32", sharding=sharding)

    def split(arrays):
        return jax.tree.map(lambda x: x.reshape(BATCH, TOKENS, heads, -1), arrays)

    # Flat arrays as in the model: a reshape that needs a copy shows as temporary memory.
    def flat(x):
        return x.reshape(BATCH, TOKENS, -1)

    def forward(tokens, state, owners):
        y, end, starts = pallas_calls.forward_saving(split(tokens), state, owners)
        return flat(y), end, starts

    def backward(tokens, starts, dy, dend, owners):
        grads, dstate = pallas_calls.backward(
            split(tokens), starts, split(dy), dend, owners
        )
        return jax.tree.map(flat, grads), dstate

    flat_inputs = jax.eval_shape(lambda arrays: jax.tree.map(flat, arrays), inputs)
    tokens = describe(flat_inputs, sharding)
    if kernel.endswith("forward"):
        return forward, (tokens, state, owners)
    starts = describe(jax.eval_shape(forward, tokens, state, owners)[2], sharding)
    return backward, (tokens, starts, tokens.v, state, owners)


def _token_arguments(
    keys: int, values: int, dtype: str, sharding
) -> tuple[WKVInputs, token_step.TiledState]:
    """Describes the arguments of the kernel for single tokens."""
    case = Case(BATCH, 1, CHANNELS // keys, keys, values)
    inputs, state = describe_inputs(case, dtype, sharding)
    return inputs, describe(jax.eval_shape(token_step.tile, state), sharding)


def _tokens_per_step(kernel: str, size: tuple[int, int, str]) -> int:
    """Returns the tokens of a grid step, summed over heads."""
    if kernel == TOKEN:
        _, state = _token_arguments(*size, sharding=None)
        rows, groups = token_step.block(state)
        return rows * groups * state.tiles.shape[3] // state.keys
    layout = _choose_layout(*size)
    return layout.chunk * layout.heads * layout.groups


def _choose_layout(keys: int, values: int, dtype: str) -> TileLayout:
    """Returns the layout that the kernels choose for these sizes."""
    inputs, _ = describe_inputs(_case(keys, values), dtype)
    return pallas_calls.choose_layout(inputs, None)


def _read_schedule(folder: Path) -> tuple[int, float]:
    """Reads a grid step's bundles and the fraction of slots that spill from libtpu's dump."""
    (usage,) = folder.glob("*-wkv7*final_hlo-static*util*")
    numbers = []
    for line in usage.read_text().splitlines():
        if line.strip()[:1].isdigit():
            numbers.append([int(word) for word in line.split()])
    # The first line lists a bundle's slots of each kind; every other line is a bundle.
    slots, *bundles = numbers
    spills = sum(bundle[SPILLED] for bundle in bundles)
    return len(bundles), spills / len(bundles) / sum(slots)


def _measure(
    chip: str,
    kernel: str,
    size: tuple[int, int, str],
    sharding,
    folder: Path,
) -> dict:
    """Compiles one kernel and returns its numbers per token and head."""
    # Remove the previous kernel's dump.
    for path in folder.iterdir():
        path.unlink()
    began = time.monotonic()
    program, arguments = _make_program(kernel, *size, sharding)
    compiled = (
        jax.jit(program).trace(*arguments).lower(lowering_platforms=("tpu",)).compile()
    )
    seconds = time.monotonic() - began
    memory = compiled.memory_analysis()
    if memory is None:
        raise RuntimeError("libtpu does not report the program's memory.")
    bundles, spills = _read_schedule(folder)
    keys, values, dtype = size
    return {
        "case": f"{chip} {kernel} {keys}x{values} {dtype}",
        "bundles": round(bundles / _tokens_per_step(kernel, size), 2),
        "spills": round(100 * spills, 2),
        "temporary": memory.temp_size_in_bytes,
        "seconds": round(seconds, 1),
    }


def compile_for_chip(chip: str, folder: str) -> None:
    """Compiles every case for a chip and prints a JSON line for each.

    It runs in a separate process, whose environment holds libtpu's flags.
    """
    device = topologies.get_topology_desc(
        platform="tpu", topology_name=CHIPS[chip]
    ).devices[0]
    abstract = jax.sharding.AbstractDevice(
        device_kind=device.device_kind,
        num_cores=device.num_cores,
        platform="tpu",
    )
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=abstract)
    sharding = jax.sharding.SingleDeviceSharding(device)
    with jax.sharding.use_abstract_mesh(mesh):
        for kernel, size in cases(chip):
            row = _measure(chip, kernel, size, sharding, Path(folder))
            print(json.dumps(row), flush=True)


def _run_process(chip: str) -> str:
    """Runs `compile_for_chip` in a new process and returns its output.

    Raises:
        RuntimeError: it failed, or another process held libtpu for too long.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", __name__, chip, folder]
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "LIBTPU_INIT_ARGS": FLAGS.format(folder),
            "TPU_SKIP_MDS_QUERY": "1",
        }
        error = ""
        for _ in range(ATTEMPTS):
            done = subprocess.run(
                command,
                env=environment,
                capture_output=True,
                text=True,
            )
            if done.returncode == 0:
                return done.stdout
            error = done.stderr
            if "lockfile" not in error:
                break
            time.sleep(3)
        raise RuntimeError(error[-2000:])


def require_libtpu() -> None:
    """Checks that libtpu is installed.

    Raises:
        ModuleNotFoundError: it is not.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ModuleNotFoundError("libtpu is not installed: pip install 'jax[tpu]'")


def rows() -> Iterator[dict]:
    """Yields one row for each chip, kernel and size.

    Yields:
        case; bundles per token and head; spills in percent of all slots; temporary bytes of HBM,
        without arguments and results; seconds of lowering and compiling.

    Raises:
        ModuleNotFoundError: libtpu is not installed.
        RuntimeError: a kernel does not compile.
    """
    require_libtpu()
    for chip in CHIPS:
        for line in _run_process(chip).splitlines():
            yield json.loads(line)


if __name__ == "__main__":
    compile_for_chip(*sys.argv[1:])
