"""What the compilers report about the GPU kernels, without a GPU.

For Pallas, XLA compiles the kernels for a described device in a separate process, and the PTX that
it dumps is assembled here. Triton's kernels are compiled by Triton. NVIDIA's tools, which come with
Triton, report the registers, the stack and the instructions of both.
"""

import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from pallas_kernels import tiles
from pallas_kernels.cases import Case, describe, describe_inputs
from pallas_kernels.gpu import pallas_calls


class Device(NamedTuple):
    """A GPU: kind, compute capability, multiprocessors, maximum shared memory of a program."""

    kind: str
    capability: int
    cores: int
    shared: int


class Size(NamedTuple):
    """Key and value channels of a head, and the tokens' dtype."""

    keys: int
    values: int
    dtype: str

    def __str__(self) -> str:
        """Returns the size as it appears in the name of a case."""
        return f"{self.keys}x{self.values} {self.dtype}"


DEVICES = (
    Device("NVIDIA H200", 90, 132, 232448),
    Device("NVIDIA A100-SXM4-80GB", 80, 108, 166912),
)
SIZES = (
    Size(64, 64, "bfloat16"),
    Size(128, 128, "bfloat16"),
    Size(256, 64, "bfloat16"),
    Size(64, 64, "float32"),
)
KERNELS = ("forward", "state", "gradients")
# The Pallas kernel of a single token, as in decoding.
TOKEN_KERNEL = "token"
# The kernels that differ for packed rows; compiled only by Pallas and for the first size.
PACKED_KERNELS = ("forward", "state")
# Sequences of a packed row.
SEQUENCES = 16
BATCH = 32
TOKENS = 4096
# The channels of a layer, which are divided among heads.
CHANNELS = 2048
# XLA's description of a device, with the fields that compiling these kernels needs.
DESCRIPTION = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: {shared}
  shared_memory_per_core: {shared} core_count: {cores} fpus_per_core: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 2000000000000 l2_cache_size: 41943040 clock_rate_ghz: 1.4
  device_memory_size: {memory} registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA" runtime_version {{ major: 13 }} dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{kind}"
"""
# Arguments of the Triton kernels that are float32 for every dtype of the tokens.
FLOAT32 = ("log_w", "dlog_w", "state", "end", "dend", "dstate")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A compiled kernel.

    Attributes:
        name: of the kernel.
        threads: of a program.
        shared: bytes of shared memory of a program.
        cubin: machine code.
        ttir: Triton's IR of it; None for kernels that XLA compiled.
    """

    name: str
    threads: int
    shared: int
    cubin: bytes
    ttir: str | None = None


def _find(pattern: str, text: str) -> re.Match:
    """Returns the first match.

    Raises:
        RuntimeError: no match, because the compiler's output format has changed.
    """
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"The compiler's output has no match for {pattern!r}.")
    return match


def _run_tool(name: str, *arguments: str | Path) -> str:
    """Runs one of NVIDIA's tools and returns what it prints."""
    # Optional: triton is an extra.
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    done = subprocess.run([path, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
    return done.stdout


def count(code: str, loops: bool) -> int:
    """Counts a chunk's instructions: those of the longest loop with `loops`, else all."""
    lines = []
    for address, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", code):
        if not text.startswith("NOP"):
            lines.append((int(address, 16), text))
    if not loops:
        return len(lines)
    spans = []
    for address, text in lines:
        jump = re.search(r"BRA.*?0x([0-9a-f]+)", text)
        if jump:
            spans.append((int(jump[1], 16), address))
    # A backward jump closes a loop; forward jumps have negative lengths. The longest loop is the
    # one over the chunks.
    first, last = max(spans, key=lambda span: span[1] - span[0])
    return sum(first <= address <= last for address, _ in lines)


class _Statement(NamedTuple):
    """One statement of TTIR: its operation, its operands and the rows of its result."""

    operation: str
    operands: list[str]
    rows: int


def _statements(ttir: str) -> dict[str, _Statement]:
    """Parses the statements of a TTIR program, by the name that each defines."""
    found = {}
    for line in ttir.splitlines():
        match = re.match(r"\s*(%\w+) = ([\w.]+) (.*)", line)
        if match is not None:
            name, operation, rest = match.groups()
            shapes = re.findall(r"tensor<(\d+)x", rest)
            rows = int(shapes[-1]) if shapes else 0
            found[name] = _Statement(operation, re.findall(r"%\w+", rest), rows)
    return found


def _follow(name: str, statements: dict[str, _Statement], through: set[str]) -> str:
    """Traces a value back to its source, through the given operations."""
    while name in statements and statements[name].operation in through:
        # The value of a select is its second operand; of the others the first.
        is_select = statements[name].operation == "arith.select"
        name = statements[name].operands[is_select]
    return name


def count_turned(ttir: str) -> int:
    """Counts transposed 16-bit products that are the left operand of a warpgroup's product.

    Triton miscompiles these for Hopper, whose warpgroup products have 64 rows or more.

    Source: triton-lang/triton#6124.
    """
    statements = _statements(ttir)
    casts = {"arith.truncf", "arith.select"}
    total = 0
    for statement in statements.values():
        if statement.operation != "tt.dot" or statement.rows < 64:
            continue
        left = statements.get(statement.operands[0])
        if left is None or left.operation != "tt.trans":
            continue
        source = statements.get(_follow(left.operands[0], statements, casts))
        total += source is not None and source.operation == "tt.dot"
    return total


def count_carried(ttir: str) -> int:
    """Counts products that accumulate into a loop-carried value.

    Triton miscompiles two of them in a row for compute capability 10.0.

    Source: triton-lang/triton#10821.
    """
    statements = _statements(ttir)
    carried = set()
    for arguments in re.findall(r"iter_args\((.*?)\)", ttir):
        carried |= set(re.findall(r"(%\w+) =", arguments))
    total = 0
    for statement in statements.values():
        if statement.operation == "tt.dot":
            accumulator = _follow(statement.operands[2], statements, {"arith.mulf"})
            total += accumulator in carried
    return total


def _measure(
    case: str,
    kernel: Kernel,
    size: Size,
    chunk: int,
    tile: tiles.Tile,
) -> dict:
    """Returns a kernel's numbers; instructions are summed over warps, per token and head."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.cubin)
        usage = _run_tool("cuobjdump", "-res-usage", file.name)
        code = _run_tool("cuobjdump", "-sass", file.name)
    # Kernels that loop over the chunks, once for every block of value rows.
    is_walk = kernel.name in ("forward", "state", "state_gradient")
    # Each of these programs prepares the chunk again, so more blocks cost more instructions.
    programs = size.values // min(size.values, tile.values)
    instructions = count(code, loops=is_walk) * programs * kernel.threads // 32
    row = {
        "case": case,
        "instructions": round(instructions / chunk, 1),
        "registers": int(_find(r"REG:(\d+)", usage)[1]),
        "stack": int(_find(r"STACK:(\d+)", usage)[1]),
        "shared": kernel.shared,
        "warpgroup": code.count("HGMMA"),
    }
    if kernel.ttir is not None:
        row["turned"] = count_turned(kernel.ttir)
        row["carried"] = count_carried(kernel.ttir)
    return row


def _make_passes(
    size: Size, packed: bool, sharding
) -> Iterator[tuple[Callable, tuple]]:
    """Yields Pallas's forward and backward passes and its token kernel, with argument shapes."""
    case = Case(BATCH, TOKENS, CHANNELS // size.keys, size.keys, size.values)
    inputs, state = describe_inputs(case, size.dtype, sharding)
    owners = None
    if packed:
        choice = tiles.for_gpu(tiles.PALLAS_GPU, *size, tiles.capability())
        states = (BATCH * SEQUENCES, *state.shape[1:])
        state = jax.ShapeDtypeStruct(states, state.dtype, sharding=sharding)
        chunks = (BATCH, TOKENS // choice.chunk)
        owners = jax.ShapeDtypeStruct(chunks, "int32", sharding=sharding)
    kernels = pallas_calls.KERNELS
    saved = jax.eval_shape(kernels.forward_saving, inputs, state, owners)
    starts = describe(saved[2], sharding)
    yield kernels.forward_saving, (inputs, state, owners)
    yield kernels.backward, (inputs, starts, inputs.v, state, owners)
    if not packed:
        token = dataclasses.replace(case, tokens=1)
        yield kernels.forward, describe_inputs(token, size.dtype, sharding)


def absent_device(device: Device, memory: int = 80_000_000_000) -> Any:
    """Returns a JAX device that only describes a GPU, for which programs can be compiled.

    Args:
        device: one of `DEVICES`.
        memory: bytes of its memory.
    """
    # XLA's Triton compiler attaches a stack trace to each remark. Symbolizing them, where
    # llvm-symbolizer is installed, takes ten times as long as the compilation.
    os.environ.setdefault("LLVM_DISABLE_SYMBOLIZATION", "1")
    major, minor = divmod(device.capability, 10)
    description = DESCRIPTION.format(
        kind=device.kind,
        major=major,
        minor=minor,
        cores=device.cores,
        shared=device.shared,
        memory=memory,
    )
    topology = topologies.get_topology_desc(
        platform="cuda",
        topology_name="described",
        target_config=description,
        topology="1x1x1",
    )
    return topology.devices[0]


def compile_for_device(device: Device, size: Size, packed: bool) -> None:
    """Compiles the Pallas kernels for a device.

    It runs in a separate process, whose environment tells XLA where to dump the results.
    """
    abstract = jax.sharding.AbstractDevice(
        device_kind=device.kind,
        num_cores=device.cores,
        platform="gpu",
    )
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=abstract)
    sharding = jax.sharding.SingleDeviceSharding(absent_device(device))
    # The mesh makes this device the target of `tiles` and Pallas.
    with jax.sharding.use_abstract_mesh(mesh):
        for run, arguments in _make_passes(size, packed, sharding):
            jax.jit(run).trace(*arguments).lower(lowering_platforms=("cuda",)).compile()


def _compile_pallas(device: Device, size: Size, packed: bool) -> Iterator[Kernel]:
    """Yields the Pallas kernels as XLA compiles them."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            __name__,
            *map(str, (*device, *size, int(packed))),
        ]
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
            # From jaxlib 0.12 on, PTX is dumped only on request. Dumping all emitters' output
            # would take as long as compiling.
            "XLA_FLAGS": f"--xla_dump_to={folder} --xla_dump_emitter_re=.*ptx.*",
        }
        done = subprocess.run(command, env=environment, capture_output=True)
        if done.returncode:
            raise RuntimeError(done.stderr.decode()[-2000:])
        thunks = "".join(
            p.read_text() for p in Path(folder).glob("*thunk_sequence.txt")
        )
        found = set()
        # Sorted, so that the table has the same order in every run.
        for path in sorted(Path(folder).glob("*.ptx")):
            text = path.read_text()
            entry = re.search(r"\.entry (wkv7_\w+)", text)
            # XLA's own kernels, such as copies, have other names.
            if entry is not None:
                found.add(entry[1])
                yield _assemble(entry[1], path, text, thunks)
        if len(found) < len(KERNELS):
            raise RuntimeError(f"XLA dumped PTX only for {sorted(found)}.")


def _assemble(name: str, path: Path, ptx: str, thunks: str) -> Kernel:
    """Assembles a kernel from the PTX at `path`; XLA's list of thunks holds its launch."""
    arch = _find(r"\.target (\w+)", ptx)[1]
    line = next(line for line in thunks.splitlines() if f" {name} " in line)
    launch = _find(r"threads: \[(\d+).*shared_memory: (\d+)", line)
    target = path.with_name("out.cubin")
    _run_tool("ptxas-blackwell", "-arch", arch, path, "-o", target)
    return Kernel(
        name=name.removeprefix("wkv7_").removesuffix("_kernel"),
        threads=int(launch[1]),
        shared=int(launch[2]),
        cubin=target.read_bytes(),
    )


def _compile_triton(
    name: str,
    capability: int,
    size: Size,
    chunk: int,
    tile: tiles.Tile,
) -> Kernel:
    """Compiles the Triton kernel of this name."""
    # Optional: triton is an extra, and slow to import.
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pallas_kernels.gpu import triton_kernels

    kernel = getattr(triton_kernels, name)
    settings = {
        "CHUNK": chunk,
        "KEYS": size.keys,
        "VALUES": size.values,
        "BLOCK": min(tile.values, size.values),
        "READ": True,
        "SAVE": True,
        # Without probes, as in the loop that every call runs.
        "SEGMENTS": 0,
        "PROBED": 0,
    }
    constants = {}
    signature = {}
    alignment = {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in settings:
            constants[argument] = settings[argument]
            signature[argument] = "constexpr"
        elif argument in ("tokens", "heads"):
            signature[argument] = "i32"
        else:
            is_float32 = argument in FLOAT32 or size.dtype == "float32"
            signature[argument] = "*fp32" if is_float32 else "*bf16"
            # JAX aligns arrays to 16 bytes.
            alignment[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, alignment)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    compiled = triton.compile(source, GPUTarget("cuda", capability, 32), options)
    return Kernel(
        name=name,
        threads=32 * tile.warps,
        shared=compiled.metadata.shared,
        cubin=compiled.asm["cubin"],
        ttir=compiled.asm["ttir"],
    )


def _measure_pallas(device: Device, size: Size, packed: bool) -> Iterator[dict]:
    """Yields the rows of the Pallas kernels of one size on one device."""
    choice = tiles.for_gpu(tiles.PALLAS_GPU, *size, device.capability)
    for kernel in _compile_pallas(device, size, packed):
        name = kernel.name
        if packed and name not in PACKED_KERNELS:
            continue
        case = f"{device.kind} pallas {'packed ' * packed}{name} {size}"
        if name == TOKEN_KERNEL:
            yield _measure(case, kernel, size, 1, pallas_calls.token_tile(size.keys))
        else:
            yield _measure(case, kernel, size, choice.chunk, getattr(choice, name))


def _measure_triton(device: Device, size: Size) -> Iterator[dict]:
    """Yields the rows of the Triton kernels of one size on one device."""
    choice = tiles.for_gpu(tiles.TRITON, *size, device.capability)
    for name in KERNELS:
        tile = getattr(choice, name)
        function = "state_gradient" if name == "state" else name
        kernel = _compile_triton(function, device.capability, size, choice.chunk, tile)
        case = f"{device.kind} triton {name} {size}"
        yield _measure(case, kernel, size, choice.chunk, tile)


def rows() -> Iterator[dict]:
    """Yields one row for each device, implementation, kernel and size.

    Yields:
        case; instructions per token and head, summed over warps; registers and bytes of stack per
        thread; shared, bytes per program; warpgroup, the number of Hopper's warpgroup products; for
        Triton also turned and carried: see `count_turned` and `count_carried`.

    Raises:
        ModuleNotFoundError: a package is not installed.
        RuntimeError: a kernel does not compile.
    """
    for module, package in (
        ("jax_plugins.xla_cuda13", "jax-cuda13-plugin"),
        ("triton", "triton"),
    ):
        if importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError(
                f"{module} is not installed: pip install {package}"
            )
    for device in DEVICES:
        largest = max(tiles.rows_for(tiles.PALLAS_GPU, device.capability))
        for size in SIZES:
            if max(size.keys, size.values) <= largest:
                yield from _measure_pallas(device, size, packed=False)
                yield from _measure_triton(device, size)
        yield from _measure_pallas(device, SIZES[0], packed=True)


if __name__ == "__main__":
    _kind, _capability, _cores, _shared, _keys, _values, _dtype, _packed = sys.argv[1:]
    compile_for_device(
        Device(_kind, int(_capability), int(_cores), int(_shared)),
        Size(int(_keys), int(_values), _dtype),
        packed=_packed == "1",
    )
