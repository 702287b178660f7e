"""The WKV-7 op on one NVIDIA GPU next to its peers, in one run with the same data.

    python -m benchmarks.peers_gpu [--case h200] [--repeats N] [--json FILE]

The program measures all of our implementations that run here; the algorithm of most published
kernels in the same framework (`benchmarks.sequential_gpu`); and, if installed, the JAX kernels of
rwkv-ops and `chunk_rwkv7` of flash-linear-attention. The last one runs in a separate process on a
copy of the data. A peer that is missing or fails keeps its row, and "status" gives the reason.

Tokens are bfloat16, log_w and states float32. A time is the minimum of several runs, each with
enough calls to take over 20 ms. Errors are relative L2 distances to float64, of y and of the worst
of seven gradients. "of copy" is the fraction of the time that a large copy in the same run needs
for the bytes of `pallas_kernels.bench.least_bytes`.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import record
from benchmarks.sequential_gpu import sequential
from pallas_kernels.bench import (
    copy_bandwidth,
    forward_and_gradients,
    implementations,
    least_bytes,
    least_ms,
    relative,
    table,
    truth,
)
from pallas_kernels.cases import CASES, Case, make_inputs

OURS = "(best)"
# Value rows of a forward program and warps of a backward one; the fastest counts.
SEQUENTIAL = ((16, 4), (32, 4), (16, 8))
NAMES = ("r", "log_w", "k", "v", "a", "b", "state", "dy", "dend")
COLUMNS = (
    *(
        "implementation",
        "fwd ms",
        "fwd+bwd ms",
        "fwd of copy",
        "fwd+bwd of copy",
        "ours / this",
    ),
    *("y error", "gradient error", "temp MiB", "status"),
)
PACKAGES = (
    "jax",
    "jaxlib",
    "jax-triton",
    "triton",
    "torch",
    "fla-core",
    "rwkv-ops",
    "keras",
)
FLA_SECONDS = 300


def make_data(case: Case):
    """Makes the six inputs, the start state, and gradients of y and of the last state."""
    inputs, state = make_inputs(case, "bfloat16")
    return inputs, state, jnp.sin(inputs[3]), jnp.cos(state)


def errors(y, gradients, true) -> dict[str, float]:
    """Computes relative distances to `true`, which comes from `truth`."""
    worst = max(map(relative, gradients, true[2]))
    return {"y error": relative(y, true[0]), "gradient error": worst}


def measure(
    op: Callable,
    data,
    repeats: int,
    true=None,
) -> dict[str, float]:
    """Measures times and memory of one op in JAX, and its errors if `true` is given."""
    forward = functools.partial(jax.jit(op), *data[:2])
    compiled = (
        jax.jit(functools.partial(forward_and_gradients, op)).lower(*data).compile()
    )
    both = functools.partial(compiled, *data)
    memory = compiled.memory_analysis()
    # A backend may not tell.
    row = {} if memory is None else {"temp MiB": memory.temp_size_in_bytes / 2**20}
    if true is not None:
        y, _, gradients = both()
        row |= errors(y, gradients, true)
    row["fwd ms"] = least_ms(forward, repeats=repeats)[0]
    row["fwd+bwd ms"] = least_ms(both, repeats=repeats)[0]
    return row


def attempt(run: Callable[[], dict]) -> dict:
    """Returns the result of `run` with a status; only the status if it raises."""
    try:
        return run() | {"status": "ok"}
    except ImportError as error:
        return {"status": f"not installed: {error}"}
    except Exception as error:
        message = str(error).strip().partition("\n")[0]
        return {"status": f"failed: {type(error).__name__}: {message}"}


def rwkv_ops(kernel: str) -> Callable:
    """Makes an op of rwkv-ops' "pallas" or "triton" kernel: decay exp(-exp(w)), w of r's dtype."""
    os.environ.setdefault("KERAS_BACKEND", "jax")
    os.environ.setdefault("KERNEL_TYPE", "native")
    os.environ.setdefault("RWKV_OPS_PALLAS_BACKEND", "triton")
    module = importlib.import_module(f"rwkv_ops.rwkv7_kernel.jax_{kernel}_kernel")

    def op(inputs, state):
        r, log_w, k, v, a, b = inputs
        w = jnp.log(-log_w).astype(r.dtype)
        return module.generalized_delta_rule(r, w, k, v, a, b, initial_state=state)

    return op


def fla(data, repeats: int, true=None) -> dict[str, float]:
    """Measures flash-linear-attention with `fla_child`, in another process."""
    for package in ("torch", "fla"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"No module named {package!r}")
    given: dict[str, Any] = {}
    for name, array in zip(NAMES, (*data[0], *data[1:]), strict=True):
        given[name] = np.asarray(array, np.float32)
    with tempfile.TemporaryDirectory() as folder:
        np.savez(f"{folder}/given.npz", **given)
        command = [sys.executable, "-m", "benchmarks.peers_gpu", "--child", folder]
        child = subprocess.run(
            [*command, "--repeats", str(repeats)],
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            timeout=FLA_SECONDS,
            stderr=subprocess.PIPE,
            text=True,
        )
        if child.returncode:
            raise RuntimeError(
                (child.stderr.strip().splitlines() or ["no message"])[-1]
            )
        found = dict(np.load(f"{folder}/found.npz"))
    times = {name: float(found[name]) for name in ("fwd ms", "fwd+bwd ms")}
    if true is None:
        return times
    return times | errors(found["y"], [found[name] for name in NAMES[:7]], true)


def fla_child(folder: str, repeats: int) -> None:
    """Times `chunk_rwkv7` on the folder's data, called as in fla's own layer; writes its results.

    Its states have keys as rows.
    """
    import torch
    from fla.ops.rwkv7 import chunk_rwkv7

    if not torch.cuda.is_available():
        raise SystemExit("torch has no CUDA here")
    given = {
        n: torch.from_numpy(x).cuda() for n, x in np.load(f"{folder}/given.npz").items()
    }
    given |= {name: given[name].mT.contiguous() for name in ("state", "dend")}
    given |= {name: given[name].bfloat16() for name in ("r", "k", "v", "a", "b", "dy")}
    leaves = [given[name].requires_grad_() for name in NAMES[:7]]

    r, log_w, k, v, a, b, state = leaves

    def forward():
        return chunk_rwkv7(
            r,
            log_w,
            k,
            v,
            a,
            b,
            initial_state=state,
            output_final_state=True,
            safe_gate=True,
            # The least log decay that an official model can have, -exp(-0.5).
            lower_bound=-0.6065306597126334,
            chunk_size=64,
        )

    def both():
        results = forward()
        return results[0], torch.autograd.grad(
            results, leaves, (given["dy"], given["dend"])
        )

    def wait(_):
        torch.cuda.synchronize()

    y, (*gradients, dstate) = both()
    arrays = {"y": y} | dict(zip(NAMES[:7], (*gradients, dstate.mT), strict=True))
    found: dict[str, Any] = {}
    for name, array in arrays.items():
        found[name] = array.detach().float().cpu().numpy()
    with torch.no_grad():
        found["fwd ms"] = least_ms(forward, repeats=repeats, wait=wait)[0]
    found["fwd+bwd ms"] = least_ms(both, repeats=repeats, wait=wait)[0]
    np.savez(f"{folder}/found.npz", **found)


def passes(row: dict) -> dict[str, float]:
    """Returns milliseconds by pass, the backward one by difference; empty without times."""
    if row["status"] != "ok":
        return {}
    forward = row["fwd ms"]
    both = row["fwd+bwd ms"]
    return {"fwd": forward, "bwd": both - forward, "fwd+bwd": both}


def over(above: dict[str, float], below: dict[str, float]) -> dict[str, float]:
    """Divides the numbers that both have."""
    return {name: x / below[name] for name, x in above.items() if name in below}


def of_copy(case: Case, row: dict, bandwidth: float) -> dict[str, float]:
    """Computes the time in which a copy moves `least_bytes`, over the time of the row."""
    per_byte = 1e3 * case.batch * case.tokens * case.heads / bandwidth
    floors = {
        name: per_byte * count for name, count in least_bytes(case, "bfloat16").items()
    }
    return over(floors, passes(row))


def contestants(case: Case) -> dict[str, Callable[..., dict]]:
    """Returns what measures each implementation and peer, by name, ours first.

    Each takes the arguments of `measure` after the op.
    """
    runs: dict[str, Callable[..., dict]] = {}
    for name, op in implementations(case).items():
        runs[name] = functools.partial(measure, op)
    for rows, warps in SEQUENTIAL:
        op = functools.partial(sequential, rows=rows, warps=warps)
        runs[f"sequential, {rows} rows, {warps} warps"] = functools.partial(measure, op)
    for kernel in ("pallas", "triton"):
        runs[f"rwkv-ops {kernel}"] = lambda *given, kernel=kernel: measure(
            rwkv_ops(kernel), *given
        )
    return runs | {"fla chunk_rwkv7": fla}


def measure_all(case: Case, bandwidth: float, repeats: int) -> list[dict]:
    """Measures a row of `COLUMNS` for each implementation and peer; the truth is computed once."""
    data = make_data(case)
    given = (data, repeats, truth(data))
    found = []
    for name, make in contestants(case).items():
        row = attempt(functools.partial(make, *given))
        found.append(dict.fromkeys(COLUMNS) | {"implementation": name} | row)
        row = found[-1]
        shares = of_copy(case, row, bandwidth)
        row |= {f"{name} of copy": shares.get(name) for name in ("fwd", "fwd+bwd")}
        row["ours / this"] = over(passes(found[0]), passes(row)).get("fwd+bwd")
        print(f"{name}: {row['status']}, ms {passes(row)}", flush=True)
    return found


def ratios(
    case: Case,
    rows: list[dict],
    bandwidth: float,
    repeats: int,
) -> dict[str, dict]:
    """Computes the measures G2 to G6 of the best implementation, by pass; runs G5 and G6."""
    by_name = {row["implementation"]: row for row in rows}
    ours = passes(by_name[OURS])
    tried = [
        passes(row) for name, row in by_name.items() if name.startswith("sequential")
    ]
    fastest = {
        name: min(times[name] for times in tried if times)
        for name in ours
        if any(tried)
    }

    def other(**sizes):
        another = dataclasses.replace(case, **sizes)
        op = implementations(another)[OURS]
        row = attempt(lambda: measure(op, make_data(another), repeats))
        return over(passes(row), ours) or {"status": row["status"]}

    found = {
        "G2: scan / ours": over(passes(by_name["scan"]), ours),
        "G3: sequential / ours": over(fastest, ours),
        "G4: of copy": of_copy(case, by_name[OURS], bandwidth),
        f"G5: batch 1 / batch {case.batch}": other(batch=1),
    }
    channels = case.heads * case.key_size
    for size in (128, 256):
        if channels % size == 0:
            sizes = {"heads": channels // size, "key_size": size, "value_size": size}
            found[f"G6: heads of {size} / of {case.key_size}"] = other(**sizes)
    return found


def shown(row: dict) -> dict:
    """Returns a row with three digits of each number."""
    return {
        name: f"{value:.3g}" if isinstance(value, float) else value
        for name, value in row.items()
    }


def main() -> None:
    """Measures one case, prints a table and the ratios, and writes JSON where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--case", default="h200", choices=CASES)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="file to write")
    parser.add_argument("--child", metavar="FOLDER", help="internal")
    args = parser.parse_args()
    if args.child:
        return fla_child(args.child, args.repeats)
    try:
        jax.devices("cuda")
    except RuntimeError:
        raise SystemExit(
            "benchmarks.peers_gpu needs a CUDA device; JAX finds none."
        ) from None
    case = CASES[args.case]
    bandwidth = copy_bandwidth(args.repeats)
    print(f"{args.case}: {case}\na copy moves {bandwidth / 1e9:.0f} GB/s", flush=True)
    rows = measure_all(case, bandwidth, args.repeats)
    print(f"\n{table([shown(row) for row in rows])}\n", flush=True)
    measures = ratios(case, rows, bandwidth, args.repeats)
    print(*(f"{name}: {found}" for name, found in measures.items()), sep="\n")
    if args.json:
        there = {found.metadata["Name"] for found in importlib.metadata.distributions()}
        numbers = {"copy GB/s": bandwidth / 1e9, "rows": rows, "ratios": measures}
        numbers |= {
            "case": dataclasses.asdict(case),
            "dtype": "bfloat16",
            "repeats": args.repeats,
        }
        packages = tuple(name for name in PACKAGES if name in there)
        record.write(
            args.json,
            "benchmarks.peers_gpu",
            packages=packages,
            **numbers,
        )


if __name__ == "__main__":
    main()
