"""Copies of activations that XLA for TPU inserts into one layer, forward and backward.

    python -m benchmarks.tpu_layout --json benchmarks/results/tpu-layout.json --check

To sum over heads of 64, XLA stores the array with the tokens in the lanes. The WKV kernel needs the
channels there, and each change of layout copies a full activation. libtpu compiles a gradient of a
model of three layers ahead of time, on any Linux machine, and the program reads the bodies of its
two loops over layers. It counts copies and transposes of at least one 16-bit activation that are
separate instructions, without prefetches into fast memory. Cycles are the compiler's estimates,
which exist for all instructions except the WKV kernels.
"""

import argparse
import functools
import os
import re
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

import rwkv7_jax as rwkv
from benchmarks import record
from pallas_kernels.compile_checks.tpu import require_libtpu
from rwkv7_jax.model import remat
from rwkv7_jax.plan import hlo
from rwkv7_jax.plan.chips import find_target

# Copies of activations in the loops of one layer that `--check` allows.
MOST_COPIES = {"forward": 3, "backward": 5}

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')

KERNELS = {"forward": "wkv7_forward_kernel", "backward": "wkv7_backward_kernel"}


def compile_gradient(
    config: rwkv.RWKV7Config, *, topology: str, batch: int, length: int
) -> hlo.Program:
    """Compiles the gradient of all weights and the start state; bfloat16 weights."""
    (device,) = find_target(topology).devices()
    model = rwkv.RWKV7(config)
    tokens = jnp.zeros((1, 1), jnp.int32)
    one = rwkv.init_state(config)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens, one)["params"]
    state = jax.eval_shape(functools.partial(rwkv.init_state, config, batch))

    def loss(params, state, tokens):
        x, _ = model.apply({"params": params}, tokens, state, method="hidden")
        return jnp.sum(jnp.square(x.astype(jnp.float32)))

    def describe(shape, dtype):
        there = SingleDeviceSharding(device)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=there)

    arguments = (
        jax.tree.map(lambda leaf: describe(leaf.shape, jnp.bfloat16), params),
        jax.tree.map(lambda leaf: describe(leaf.shape, leaf.dtype), state),
        describe((batch, length), jnp.int32),
    )
    target = Mesh(np.array([device]), ("alone",)).abstract_mesh
    with jax.sharding.use_abstract_mesh(target):
        traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(*arguments)
        compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    return hlo.parse(compiled.as_text() or "")


def loop_bodies(program: hlo.Program) -> dict[str, list[hlo.Instruction]]:
    """Finds the loops over layers: the bodies that call the WKV kernels."""
    found = {}
    for instructions in program.computations.values():
        called = " ".join(one.rest for one in instructions)
        for name, kernel in KERNELS.items():
            # Layer 0 calls both kernels outside of the loops.
            others = [other for other in KERNELS.values() if other != kernel]
            if kernel in called and not any(other in called for other in others):
                found[name] = instructions
    return found


def list_copies(body: list[hlo.Instruction], least: int) -> list[dict[str, Any]]:
    """Lists the copies of at least so many bytes: shape, layout, and what they are for."""
    rows = []
    for one in body:
        if (
            one.operation in ("copy", "transpose")
            and hlo.shape_bytes(one.shape) >= least
        ):
            # The end of a name is the model's operation.
            rows.append({"shape": one.shape, "of": one.op_name.split("/layers/")[-1]})
    return rows


def estimate_cycles(body: list[hlo.Instruction]) -> int:
    """Adds up the cycles that the compiler expects."""
    found = [_CYCLES.search(one.rest) for one in body]
    return sum(int(one[1]) for one in found if one)


def main() -> None:
    """Prints copies and cycles of both passes; with `--json`, writes the copies one by one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--size", default="0.4b", help="a published size, for its widths (%(default)s)"
    )
    parser.add_argument("--topology", default="v5e:1x1", help="one chip, as for plans")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--remat", choices=remat.CHOICES, default="none")
    parser.add_argument("--json", help="file to write")
    parser.add_argument(
        "--check", action="store_true", help="fail if a target is missed"
    )
    args = parser.parse_args()
    try:
        require_libtpu()
    except ModuleNotFoundError as error:
        raise SystemExit(f"tpu_layout: {error}") from None
    config = rwkv.RWKV7Config.preset(
        args.size,
        num_layers=3,
        vocab_size=512,
        dtype="bfloat16",
        remat=args.remat,
    )
    program = compile_gradient(
        config, topology=args.topology, batch=args.batch, length=args.length
    )
    least = 2 * args.batch * args.length * config.width
    copies = {}
    cycles = {}
    for name, body in loop_bodies(program).items():
        copies[name] = list_copies(body, least)
        cycles[name] = estimate_cycles(body)
        print(
            f"{name:<10}{len(copies[name])} copies, {cycles[name]:,} cycles", flush=True
        )
    if set(copies) != set(KERNELS):
        raise SystemExit("tpu_layout: the program has no loops over layers.")
    if args.json:
        record.write(
            args.json,
            "benchmarks.tpu_layout",
            packages=("jax", "jaxlib", "libtpu"),
            size=args.size,
            topology=args.topology,
            batch=args.batch,
            length=args.length,
            remat=args.remat,
            cycles=cycles,
            counts={name: len(rows) for name, rows in copies.items()},
            copies=copies,
        )
    over = [name for name, rows in copies.items() if len(rows) > MOST_COPIES[name]]
    if args.check and over:
        raise SystemExit(f"tpu_layout: too many copies {' and '.join(over)}.")


if __name__ == "__main__":
    main()
