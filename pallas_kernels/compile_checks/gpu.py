"""What the compilers make of the GPU kernels, told without a GPU.

Pallas's kernels are compiled by XLA for a described device in a process of its own, and the PTX
that it dumps is assembled here; Triton's are compiled by Triton. NVIDIA's tools, which come with
Triton, tell the registers, stack and instructions of both.
"""

import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental import topologies

from pallas_kernels import tiles
from pallas_kernels.gpu import pallas_calls as gpu
from pallas_kernels.reference import WKVInputs

# Device kind, compute capability, multiprocessors, shared memory of a program at most.
DEVICES = (
    ("NVIDIA H200", 90, 132, 232448),
    ("NVIDIA A100-SXM4-80GB", 80, 108, 166912),
)
# Key size, value size, dtype; the channels of a layer are shared out among heads.
SIZES = ((64, 64, "bfloat16"), (128, 128, "bfloat16"), (256, 64, "bfloat16"), (64, 64, "float32"))
BATCH, TOKENS, CHANNELS = 32, 4096, 2048
# XLA's description of a device, as far as compiling these kernels asks for it.
DESCRIPTION = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: {shared}
  shared_memory_per_core: {shared} core_count: {cores} fpus_per_core: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 2000000000000 l2_cache_size: 41943040 clock_rate_ghz: 1.4
  device_memory_size: 80000000000 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA" runtime_version {{ major: 13 }} dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{kind}"
"""
FLOAT32 = ("log_w", "dlog_w", "state", "end", "dend", "dstate")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A compiled kernel: name, threads and bytes of shared memory of a program, machine code."""

    name: str
    threads: int
    shared: int
    cubin: bytes


def _tool(name: str, *arguments) -> str:
    """What one of NVIDIA's tools prints."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    done = subprocess.run([path, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
    return done.stdout


def count(code: str, loops: bool) -> int:
    """Instructions of one chunk: of the longest loop with `loops`, else of the whole program."""
    listed = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", code)
    lines = [(int(address, 16), text) for address, text in listed if not text.startswith("NOP")]
    if not loops:
        return len(lines)
    jumps = [(address, re.search(r"BRA.*?0x([0-9a-f]+)", text)) for address, text in lines]
    spans = [(int(jump[1], 16), address) for address, jump in jumps if jump]
    first, last = max(spans, key=lambda span: span[1] - span[0])
    return sum(first <= address <= last for address, _ in lines)


def _row(case: str, kernel: Kernel, size: tuple, chunk: int, tile: tiles.Tile) -> dict:
    """A kernel's numbers; instructions are those of all warps for one token of one head."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.cubin)
        usage = _tool("cuobjdump", "-res-usage", file.name)
        code = _tool("cuobjdump", "-sass", file.name)
    whole = "gradients" in kernel.name
    programs = 1 if whole else size[1] // min(size[1], tile.values)
    found = count(code, loops=not whole) * programs * kernel.threads // 32
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    return {
        "case": case,
        "instructions": round(found / chunk, 1),
        "registers": registers,
        "stack": stack,
        "shared": kernel.shared,
    }


def _passes(keys: int, values: int, dtype: str, sharding) -> Iterator[tuple]:
    """Both passes in Pallas, with the shapes of their arguments."""
    heads = CHANNELS // keys

    def array(kind, *shape):
        return jax.ShapeDtypeStruct(shape, kind, sharding=sharding)

    shape = (BATCH, TOKENS, heads, keys)
    inputs = WKVInputs(
        r=array(dtype, *shape),
        log_w=array("float32", *shape),
        k=array(dtype, *shape),
        v=array(dtype, *shape[:3], values),
        a=array(dtype, *shape),
        b=array(dtype, *shape),
    )
    state = array("float32", BATCH, heads, values, keys)
    starts = jax.eval_shape(gpu.KERNELS.forward_saving, inputs, state)[2]
    yield gpu.KERNELS.forward_saving, (inputs, state)
    yield gpu.KERNELS.backward, (inputs, array(starts.dtype, *starts.shape), inputs.v, state)


def child(kind: str, capability: str, cores: str, shared: str, *size: str) -> None:
    """Compile Pallas's kernels for a device; XLA's flags say where it dumps what it made."""
    major, minor = divmod(int(capability), 10)
    description = DESCRIPTION.format(
        kind=kind, major=major, minor=minor, cores=cores, shared=shared
    )
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="described", target_config=description, topology="1x1x1"
    )
    abstract = jax.sharding.AbstractDevice(device_kind=kind, num_cores=int(cores), platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=abstract)
    sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
    with jax.sharding.use_abstract_mesh(mesh):
        for run, arguments in _passes(int(size[0]), int(size[1]), size[2], sharding):
            jax.jit(run).trace(*arguments).lower(lowering_platforms=("cuda",)).compile()


def _pallas(device: tuple, size: tuple) -> Iterator[Kernel]:
    """What XLA makes of Pallas's kernels."""
    with tempfile.TemporaryDirectory() as folder:
        flags = {"XLA_FLAGS": f"--xla_dump_to={folder}", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
        command = [sys.executable, "-m", __name__, *map(str, (*device, *size))]
        done = subprocess.run(
            command, env=os.environ | flags | {"JAX_PLATFORMS": "cpu"}, capture_output=True
        )
        if done.returncode:
            raise RuntimeError(done.stderr.decode()[-2000:])
        listed = "".join(p.read_text() for p in Path(folder).glob("*thunk_sequence.txt"))
        for path in sorted(Path(folder).glob("*.ptx")):
            text = path.read_text()
            found = re.search(r"\.entry (wkv7_\w+)", text)
            if found is None:
                continue
            name, arch = found[1], re.search(r"\.target (\w+)", text)[1]
            line = next(line for line in listed.splitlines() if f" {name} " in line)
            threads, shared = re.search(r"threads: \[(\d+).*shared_memory: (\d+)", line).groups()
            _tool("ptxas-blackwell", "-arch", arch, path, "-o", f"{folder}/out.cubin")
            cubin = Path(folder, "out.cubin").read_bytes()
            yield Kernel(name.removeprefix("wkv7_"), int(threads), int(shared), cubin)


def _triton(name: str, capability: int, size: tuple, chunk: int, tile: tiles.Tile) -> Kernel:
    """What Triton makes of its kernel; arrays lie at multiples of 16 bytes, as in JAX."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pallas_kernels.gpu import triton_kernels

    kernel = getattr(triton_kernels, name)
    sizes = {"CHUNK": chunk, "KEYS": size[0], "VALUES": size[1], "READ": True, "SAVE": True}
    sizes["BLOCK"] = min(tile.values, size[1])
    constants = {name: sizes[name] for name in kernel.arg_names if name in sizes}
    other = "*bf16" if size[2] == "bfloat16" else "*fp32"
    kinds = {"tokens": "i32", "heads": "i32"} | dict.fromkeys(constants, "constexpr")
    kinds |= dict.fromkeys(FLOAT32, "*fp32")
    signature = {name: kinds.get(name, other) for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, kind in enumerate(signature.values())
        if kind.startswith("*")
    }
    source = ASTSource(kernel, signature, constants, aligned)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    made = triton.compile(source, GPUTarget("cuda", capability, 32), options)
    return Kernel(name, 32 * tile.warps, made.metadata.shared, made.asm["cubin"])


def rows() -> Iterator[dict]:
    """One row a device, implementation, kernel and size.

    Yields:
        case; instructions of all warps for one token of one head; registers and bytes of stack of a
        thread; shared, bytes of a program.

    Raises:
        ModuleNotFoundError: a package is not installed.
        RuntimeError: a kernel does not compile.
    """
    for package, command in (("jax_plugins.xla_cuda13", "jax-cuda13-plugin"), ("triton", "triton")):
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(f"{package} is not installed: pip install {command}")
    for device in DEVICES:
        for size in SIZES:
            keys, values, dtype = size
            if max(keys, values) > max(tiles.rows_for(tiles.PALLAS_GPU, device[1])):
                continue
            choices = [
                tiles.for_gpu(table, keys, values, dtype, device[1])
                for table in (tiles.PALLAS_GPU, tiles.TRITON)
            ]
            names = ("forward", "state", "gradients")
            for kernel in _pallas(device, size):
                name = next(name for name in names if kernel.name.startswith(name))
                case = f"{device[0]} pallas {name} {keys}x{values} {dtype}"
                tile = getattr(choices[0], name)
                yield _row(case, kernel, size, choices[0].chunk, tile)
            for name in names:
                tile, chunk = getattr(choices[1], name), choices[1].chunk
                twin = "state_gradient" if name == "state" else name
                kernel = _triton(twin, device[1], size, chunk, tile)
                case = f"{device[0]} triton {name} {keys}x{values} {dtype}"
                yield _row(case, kernel, size, chunk, tile)


if __name__ == "__main__":
    child(*sys.argv[1:])
