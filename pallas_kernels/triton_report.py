"""What the compilers make of the Triton kernels, told without a GPU. Level 0.

`python -m pallas_kernels.triton_report` compiles each kernel with the tiles that `triton_op` uses,
for heads of 64 and bfloat16 tokens, and prints registers, stack, shared memory and instructions.
"""

import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import triton_kernels, triton_op

SIZE = 64
FLOAT32 = ("log_w", "dlog_w", "state", "end", "dend", "dstate")
COLUMNS = ("kernel", "chunk", "values", "warps", "registers", "stack", "shared", "instructions")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def _compile(kernel, capability: int, tile: triton_op.Tile, constants: dict):
    """The compiled kernel; arrays lie at multiples of 16 bytes, as jax-triton promises too."""
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in ("tokens", "heads"):
            signature[name] = "i32"
        else:
            signature[name] = "*fp32" if name in FLOAT32 else "*bf16"
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return triton.compile(source, GPUTarget("cuda", capability, 32), options)


def _disassemble(compiled) -> tuple[str, str]:
    """cuobjdump's account of resources, and the machine instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        return tuple(
            subprocess.run(
                [TOOLS / "cuobjdump", flag, file.name], capture_output=True, text=True, check=True
            ).stdout
            for flag in ("-res-usage", "-sass")
        )


def count_instructions(sass: str, loops: bool) -> int:
    """Instructions of one chunk: of the longest loop with `loops`, else of the whole program."""
    listed = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", sass)
    lines = [(int(address, 16), text) for address, text in listed if not text.startswith("NOP")]
    if not loops:
        return len(lines)
    jumps = [(address, re.search(r"BRA.*?0x([0-9a-f]+)", text)) for address, text in lines]
    spans = [(int(jump[1], 16), address) for address, jump in jumps if jump]
    first, last = max(spans, key=lambda span: span[1] - span[0])
    return sum(first <= address <= last for address, _ in lines)


def _row(name: str, capability: int, chunk: int, tile: triton_op.Tile) -> dict:
    kernel = getattr(triton_kernels, name)
    values = min(tile.values or SIZE, SIZE)
    sizes = {"CHUNK": chunk, "KEYS": SIZE, "VALUES": SIZE, "BLOCK": values}
    constants = sizes | {"SAVE": True, "WHOLE": True}
    constants = {key: constants[key] for key in kernel.arg_names if key in constants}
    compiled = _compile(kernel, capability, tile, constants)
    usage, sass = _disassemble(compiled)
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    count = count_instructions(sass, loops=name != "gradients")
    return {
        "kernel": name,
        "chunk": chunk,
        "values": values,
        "warps": tile.warps,
        "registers": registers,
        "stack": stack,
        "shared": compiled.metadata.shared,
        "instructions": count * tile.warps * (SIZE // values) / chunk,
    }


def report(capability: int) -> list[dict]:
    """One row a kernel and chunk for this compute capability, 90 for 9.0; no GPU is needed.

    Returns:
        Rows with `COLUMNS`: chunk and values are the tile's sizes; registers those of a thread;
        stack the bytes a thread spills into; shared the bytes of a program; instructions those of
        all warps for one token of one head.
    """
    tiles = triton_op.best_tiles(capability)
    return [
        _row(name, capability, chunk, tile)
        for chunk, kernels in tiles.items()
        for name, tile in kernels._asdict().items()
    ]


def main() -> None:
    """Print the table of each listed capability."""
    for capability in triton_op.TILES:
        print(f"sm_{capability}: " + " ".join(f"{name:>14}" for name in COLUMNS))
        for row in report(capability):
            cells = (row[name] for name in COLUMNS)
            print(
                " " * 7
                + " ".join(f"{x:>14.0f}" if isinstance(x, float) else f"{x:>14}" for x in cells)
            )


if __name__ == "__main__":
    main()
