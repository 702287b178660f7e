"""Tables of what compilers say about devices that were not used."""

import json
from typing import Any

from benchmarks.published.markdown import ROOT, Table, read
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.training.costs import training_memory

PAGE = "docs/results.md"
KERNELS = "docs/kernels.md"

# The memory that RWKV-PEFT publishes for state tuning, 1 x 1024 on an RTX 4090.
PUBLISHED = {"0.4b": "3.1 GB", "1.5b": "5.3 GB", "2.9b": "8.2 GB"}


def kept_by_blocks() -> list[list[str]]:
    """Makes the rows of the memory of a step by what blocks keep."""
    plans = read("h100-remat-memory")["plans"]
    rows = []
    for remat, size in {"none": 30, "op": 4, "block": 2}.items():
        peaks = [plans.get(f"{mode} {remat}") for mode in ("state", "pretrain")]
        shown = [f"{one['peak_gib']:.1f}" if one else "not compiled" for one in peaks]
        rows.append([f'"{remat}"', str(size), *shown])
    return rows


def sharded() -> list[list[str]]:
    """Makes the rows of plans with sharded weights."""
    files = {
        "tpu-plan-7.2b-v5e-8": "v5e:2x4, `fsdp=8`",
        "gpu-plan-7.2b-h100": "one H100 (`gpu-plan-7.2b-h100.json`)",
        "tpu-plan-7.2b-pretrain-v5p-64": "v5p:4x4x4, `fsdp=64`",
        "tpu-plan-1.5b-sequence-v5e-8": "v5e:2x4, `sequence=8`",
    }
    modes = {"state": "state tuning", "pretrain": "pre-training"}
    rows = []
    for name, chips in files.items():
        plan = read(name)
        size = name.split("-")[2].upper()
        limit = f"{plan['limit_gib']:.2f} GiB"
        if plan["chips"] == 1:
            limit = f"the {limit} that JAX allocates"
        expected = plan["expected_wire_gb"]
        shown = f"{expected:.2f}" if expected < 1 else f"{expected:.1f}"
        exchanged = plan["mesh"].get("sequence", 1) > 1
        note = ", without the exchange between parts of a row" if exchanged else ""
        sent = plan["wire_gb"]
        rows.append(
            [
                f"{size}, {modes[plan['mode']]}, {plan['batch']} x "
                + (
                    f"{plan['length']:,}"
                    if plan["length"] > 9999
                    else str(plan["length"])
                ),
                chips,
                f"{plan['peak_gib']:.2f} of {limit}",
                f"{plan['estimated_gib']:.2f} GiB",
                (f"{sent:.2f} GB" if sent < 1 else f"{sent:.1f} GB")
                if sent
                else "nothing",
                f"{shown} GB{note}" if sent else "nothing",
            ]
        )
    return rows


def one_device() -> list[list[str]]:
    """Makes the rows of plans for one chip, next to the estimate of train.py."""
    cases = read("tpu-plan")["cases"].values()
    order = ("state", "pretrain")
    rows = []
    for case in sorted(cases, key=lambda one: (order.index(one["mode"]), _size(one))):
        is_state = case["mode"] == "state"
        estimate = training_memory(
            RWKV7Config.preset(case["size"], dtype="bfloat16", remat="block"),
            batch=case["batch"],
            length=case["length"],
            trained="state" if is_state else "weights",
            weight_bytes=2 if is_state else 4,
            platform="tpu",
        )
        device = case["chip"].split("-")[0]
        rows.append(
            [
                f"{case['size'].upper()}, {'state tuning' if is_state else 'pre-training'}, "
                f"{case['batch']} x {case['length']}",
                ("H200" if device == "h200" else device)
                + ("" if case["fits"] else ", too small"),
                f"{case['peak_gib']:.2f} GiB, {case['peak_gib'] * 2**30 / 1e9:.2f} GB",
                f"{estimate.total / 2**30:.2f} GiB",
                PUBLISHED.get(case["size"], "") if is_state else "",
            ]
        )
    return rows


def _size(case: dict[str, Any]) -> float:
    return float(case["size"][:-1])


def eight_bits() -> list[list[str]]:
    """Makes the rows of the memory of frozen weights."""
    rows = []
    for form, found in read("tpu-step-memory")["bytes"].items():
        gib = [f"{found[name] / 2**30:.1f}" for name in ("weights", "peak")]
        rows.append([form, *gib])
    return rows


def kernels() -> list[list[str]]:
    """Makes the rows of the compilers' estimates for the kernels."""
    folder = ROOT / "pallas_kernels" / "compile_checks"
    tpu = json.loads((folder / "tpu-jaxlib-0.10.json").read_text())["cases"]
    gpu = json.loads((folder / "gpu-jaxlib-0.10.json").read_text())["cases"]

    def instructions(kernel: str, passes: tuple[str, ...], size: str) -> str:
        parts = (gpu[f"NVIDIA H200 {kernel} {one} {size}"] for one in passes)
        return f"{sum(part['instructions'] for part in parts):.0f}"

    rows = []
    for number in (64, 128):
        size = f"{number}x{number} bfloat16"
        for name, passes in {
            "forward": ("forward",),
            "backward": ("state", "gradients"),
            "token": ("token",),
        }.items():
            is_first = not rows
            cycles = (
                tpu[f"{chip} {name} {size}"]["bundles"]
                for chip in ("v5e", "v5p", "v6e", "tpu7x")
            )
            # Decoding has no Triton kernel.
            is_token = name == "token"
            triton = "" if is_token else instructions("triton", passes, size)
            rows.append(
                [
                    str(number) if name == "forward" else "",
                    "one token" if is_token else name,
                    *(f"{one:.1f}" for one in cycles),
                    "cycles; warp instructions:" if is_first else "",
                    instructions("pallas", passes, size),
                    triton,
                ]
            )
    return rows


def layouts() -> list[list[str]]:
    """Makes the rows of copies around the TPU kernels."""
    labels = {
        "tpu-layout": "sums as products",
        "tpu-layout-op": 'sums as products with `remat="op"` (`--remat op`, '
        "`tpu-layout-op.json`), where the backward pass recomputes the block",
        "tpu-layout-1.5b": "sums as products, at the widths of 1.5B (`--size 1.5b`, "
        "`tpu-layout-1.5b.json`)",
    }
    rows = []
    for name, label in labels.items():
        found = read(name)
        counts = " / ".join(str(found["counts"][k]) for k in ("forward", "backward"))
        cycles = (f"{found['cycles'][k]:,}" for k in ("forward", "backward"))
        rows.append([label, counts, " / ".join(cycles)])
    return rows


TABLES = (
    Table(
        PAGE,
        "| `config.model.remat` | bytes per layer | GiB, state tuning | GiB, pre-training |",
        kept_by_blocks,
    ),
    Table(
        PAGE,
        "| model, step, rows x tokens | chips, mesh | peak memory per chip | estimate of "
        "`train.py` | sent per chip and step | expected from the layout |",
        sharded,
    ),
    Table(
        PAGE,
        "| step, rows x tokens | device | peak memory | estimate of `train.py` | published "
        "for one RTX 4090 by RWKV-PEFT |",
        one_device,
    ),
    Table(
        PAGE,
        "| weights | GiB of weights | peak GiB |",
        eight_bits,
    ),
    Table(
        KERNELS,
        "| head size | | v5e | v5p | v6e | tpu7x | | H200, Pallas | H200, Triton |",
        kernels,
    ),
    Table(
        KERNELS,
        "| | copies of activations, forward / backward | cycles by the compiler, forward / "
        "backward |",
        layouts,
    ),
)
