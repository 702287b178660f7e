"""What libtpu makes of the TPU kernels, told without a TPU.

Each chip's kernels are compiled ahead of time in a process of its own, since libtpu serves one
process and one set of flags. Its final schedule says how many bundles, about as many cycles, a grid
step takes, and how often which slot of them is used.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental import topologies

from pallas_kernels.reference import WKVInputs
from pallas_kernels.tpu import pallas_calls as tpu

CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
# Key size, value size, dtype; the channels of a layer are shared out among heads.
SIZES = (
    (64, 64, "bfloat16"),
    (128, 128, "bfloat16"),
    (256, 256, "bfloat16"),
    (256, 64, "bfloat16"),
    (64, 64, "float32"),
)
BATCH, TOKENS, CHANNELS = 8, 4096, 2048
# Times that one tries for libtpu, which serves a single process of a machine.
PATIENCE = 40
FLAGS = "--xla_jf_dump_to={} --xla_jf_dump_hlo_text=true --xla_jf_dump_llo_text=true"
# Slots of a bundle in the utilisation file's columns; the ninth is that of spilled registers.
SLOTS, SPILLED = (4, 3, 4, 2, 1, 3, 3, 1, 1, 2), 8


def _program(passed: str, keys: int, values: int, dtype: str, sharding):
    """A function of arrays as a model has them, [B T C], and their shapes."""
    heads = CHANNELS // keys

    def array(kind, *shape):
        return jax.ShapeDtypeStruct(shape, kind, sharding=sharding)

    key_array = array(dtype, BATCH, TOKENS, heads * keys)
    tokens = WKVInputs(
        r=key_array,
        log_w=array("float32", BATCH, TOKENS, heads * keys),
        k=key_array,
        v=array(dtype, BATCH, TOKENS, heads * values),
        a=key_array,
        b=key_array,
    )
    state = array("float32", BATCH, heads, values, keys)

    def split(arrays):
        return jax.tree.map(lambda x: x.reshape(BATCH, TOKENS, heads, -1), arrays)

    def flat(x):
        return x.reshape(BATCH, TOKENS, -1)

    def forward(tokens, state):
        y, *rest = tpu.forward_saving(split(tokens), state)
        return flat(y), *rest

    def backward(tokens, starts, dy, dend):
        grads, dstate = tpu.backward(split(tokens), starts, split(dy), dend)
        return jax.tree.map(flat, grads), dstate

    if passed == "forward":
        return forward, (tokens, state)
    starts = jax.eval_shape(forward, tokens, state)[2]
    return backward, (tokens, array(starts.dtype, *starts.shape), tokens.v, state)


def _form(keys: int, values: int, dtype: str):
    """How the kernel tiles these."""
    key_shape = jax.ShapeDtypeStruct((BATCH, TOKENS, CHANNELS // keys, keys), dtype)
    value_shape = jax.ShapeDtypeStruct((BATCH, TOKENS, CHANNELS // keys, values), dtype)
    shapes = WKVInputs(key_shape, key_shape, key_shape, value_shape, key_shape, key_shape)
    return tpu.choose_layout(shapes, None)


def _read(folder: Path) -> dict:
    """Bundles of a grid step and the share of spilling slots, from the newest dumped schedule."""
    (schedule,) = folder.glob("*-wkv7*schedule-analysis_final_bundles.txt")
    (usage,) = folder.glob("*-wkv7*final_hlo-static*util*")
    bundles = int(re.search(r"total scheduled bundles:\s+(\d+)", schedule.read_text())[1])
    rows = [line.split() for line in usage.read_text().splitlines() if line[:1].isdigit()]
    spills = sum(int(row[SPILLED]) for row in rows if len(row) == len(SLOTS))
    return {"bundles": bundles, "spills": spills / bundles / sum(SLOTS)}


def _row(name: str, passed: str, size: tuple, sharding, folder: Path) -> dict:
    """One kernel, compiled and measured."""
    for path in folder.iterdir():
        path.unlink()
    began = time.monotonic()
    program, arguments = _program(passed, *size, sharding)
    compiled = jax.jit(program).trace(*arguments).lower(lowering_platforms=("tpu",)).compile()
    seconds = time.monotonic() - began
    found, form = _read(folder), _form(*size)
    return {
        "case": f"{name} {passed} {size[0]}x{size[1]} {size[2]}",
        "bundles": round(found["bundles"] / (form.chunk * form.heads * form.groups), 2),
        "spills": round(100 * found["spills"], 2),
        "temporary": compiled.memory_analysis().temp_size_in_bytes,
        "seconds": round(seconds, 1),
    }


def child(chip: str, folder: str) -> None:
    """Compile every case for a chip and print a JSON line each; its flags must be in place."""
    device = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip]).devices[0]
    abstract = jax.sharding.AbstractDevice(
        device_kind=device.device_kind, num_cores=device.num_cores, platform="tpu"
    )
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=abstract)
    with jax.sharding.use_abstract_mesh(mesh):
        for size in SIZES:
            for passed in ("forward", "backward"):
                sharding = jax.sharding.SingleDeviceSharding(device)
                print(json.dumps(_row(chip, passed, size, sharding, Path(folder))), flush=True)


def rows() -> Iterator[dict]:
    """One row a chip, pass and size.

    Yields:
        case; bundles for one token of one head; spills, per cent of all slots; temporary, bytes of
        HBM besides arguments and results; seconds that lowering and compiling took.

    Raises:
        ModuleNotFoundError: libtpu is not installed.
        RuntimeError: a kernel does not compile.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ModuleNotFoundError("libtpu is not installed: pip install 'jax[tpu]'")
    for chip in CHIPS:
        with tempfile.TemporaryDirectory() as folder:
            flags = {"LIBTPU_INIT_ARGS": FLAGS.format(folder), "TPU_SKIP_MDS_QUERY": "1"}
            command = [sys.executable, "-m", __name__, chip, folder]
            environment = os.environ | flags | {"JAX_PLATFORMS": "cpu"}
            for _ in range(PATIENCE):
                done = subprocess.run(command, env=environment, capture_output=True, text=True)
                if not done.returncode or "lockfile" not in done.stderr:
                    break
                time.sleep(3)
            if done.returncode:
                raise RuntimeError(done.stderr[-2000:])
            yield from map(json.loads, done.stdout.splitlines())


if __name__ == "__main__":
    child(*sys.argv[1:])
