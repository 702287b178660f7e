"""The WKV-7 op on CPU next to other implementations in JAX and a PyTorch loop, in one process.

Run from the repository's root, in a separate environment (the peers pin their own packages):

    pip install -e . ejkernel==0.0.80.3 rwkv-ops==0.11.3 keras torch
    python -m benchmarks.wkv_peers [--json FILE]

Times are the minimum process times of several runs. The cases are a short batch, a long sequence,
and the growth from 1,024 to 4,096 tokens.
"""

import argparse
import dataclasses
import importlib
import os
import warnings
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax.numpy as jnp
import numpy as np

from benchmarks import record
from benchmarks.timing import time_call
from pallas_kernels.bench import measure, table
from pallas_kernels.cases import CASES, make_inputs


def ejkernel_op():
    """Makes an op of ejkernel's XLA implementation: log decay, states with keys as rows."""
    # By name, as an optional package that most machines do not have.
    rwkv7 = importlib.import_module("ejkernel.kernels._xla.rwkv7").rwkv7

    def op(inputs, state):
        r, log_w, k, v, a, b = inputs
        # Its a and b are exchanged: a is written to the state, b reads it.
        y, end = rwkv7(
            r,
            log_w,
            k,
            v,
            b,
            a,
            softmax_scale=1.0,
            initial_state=state.mT,
        )
        return y, end.mT

    return op


def rwkv_ops_op():
    """Makes an op of rwkv-ops' native implementation: its decay is exp(-exp(w))."""
    native = importlib.import_module("rwkv_ops.rwkv7_kernel.native_keras_op")

    def op(inputs, state):
        r, log_w, k, v, a, b = inputs
        w = jnp.log(-log_w)
        return native.generalized_delta_rule(r, w, k, v, a, b, initial_state=state)

    return op


def torch_row(case, repeats: int) -> dict:
    """Measures a loop over tokens in PyTorch with its autograd, as in much published code."""
    import torch

    inputs, state = make_inputs(case, "float32")
    leaves = [torch.tensor(np.asarray(x), requires_grad=True) for x in (*inputs, state)]

    def forward(
        r,
        log_w,
        k,
        v,
        a,
        b,
        s,
    ):
        tokens = zip(*(x.unbind(1) for x in (r, log_w.exp(), k, v, a, b)), strict=True)
        ys = []
        for r, w, k, v, a, b in tokens:
            removed = torch.einsum("bhij,bhj->bhi", s, a)
            s = s * w[:, :, None] + removed[..., None] * b[:, :, None]
            s = s + v[..., None] * k[:, :, None]
            ys.append(torch.einsum("bhij,bhj->bhi", s, r))
        return torch.stack(ys, 1), s

    def both():
        y, end = forward(*leaves)
        (y.sum() + end.sum()).backward()

    row: dict[str, Any] = {"implementation": "torch loop"}
    for name, run in (("fwd", lambda: forward(*leaves)), ("fwd+bwd", both)):
        found = [time_call(run) for _ in range(repeats)]
        row[f"{name} ms"] = 1e3 * min(one.wall for one in found)
        row[f"{name} cpu ms"] = 1e3 * min(one.processor for one in found)
    return row | {"y error": None, "gradient error": None, "temp MiB": None}


def main() -> None:
    """Measures, prints a table for each case, and writes JSON where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="file to write")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    others = {"ejkernel xla": ejkernel_op(), "rwkv-ops native": rwkv_ops_op()}
    results = {}
    for name in ("train-1k", "train-4k"):
        rows = measure(
            CASES[name],
            "float32",
            repeats=args.repeats,
            others=others,
        )
        rows.append(torch_row(CASES[name], 2))
        ours = rows[0]["fwd+bwd cpu ms"]
        for row in rows:
            row["ours / this"] = ours / row["fwd+bwd cpu ms"]
        print(f"\n{name}: {CASES[name]}\n{table(rows)}", flush=True)
        results[name] = rows
    growth = {}
    for tokens in (1024, 4096):
        case = dataclasses.replace(CASES["train-1k"], batch=1, tokens=tokens)
        growth[tokens] = measure(case, "float32", repeats=args.repeats)[0][
            "fwd+bwd cpu ms"
        ]
    results["growth 1024 to 4096"] = growth[4096] / growth[1024]
    print(
        f"\n4 times the tokens take {results['growth 1024 to 4096']:.2f} times as long"
    )
    if args.json:
        packages = ("jax", "ejkernel", "rwkv-ops", "keras", "torch")
        record.write(
            args.json,
            "benchmarks.wkv_peers",
            packages=packages,
            results=results,
        )


if __name__ == "__main__":
    main()
