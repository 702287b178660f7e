"""The memory of a state tuning step of a published size, as the compiler of an absent TPU says it.

    python -m benchmarks.step_memory --json benchmarks/results/tpu-step-memory.json

Nothing but shapes is needed: the step is compiled ahead of time by libtpu (`pip install
"rwkv7_jax[tpu]"`), on any machine with Linux. Rows are the forms of the frozen weights: bfloat16,
as published files hold them, and 8 bits. The peak is the compiler's own, with the optimizer's
moments; whether a chip has room for it, the compiler decides as well.
"""

import argparse
import functools
import os
import time
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
import jax.numpy as jnp
import optax
from jax.experimental import topologies

import rwkv7_jax as rwkv
from benchmarks import record
from rwkv7_jax.model.int8_weights import quantize
from rwkv7_jax.training.costs import parameter_count, training_memory

# Chips by JAX's names of their topologies, and the bytes that a program may use of each.
CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
FORMS = ("bfloat16", "int8")
GIB = 2**30


def describe_inputs(
    config: rwkv.RWKV7Config, form: str, *, batch: int, length: int, sharding: Any
) -> tuple[Any, Any, Any]:
    """Describes the arguments of a step: weights, the state that is tuned, tokens and mask.

    Args:
        config: of the model.
        form: of the frozen weights, of `FORMS`.
        batch: rows.
        length: tokens of a row.
        sharding: of all arrays.
    """
    model = rwkv.RWKV7(config)
    tokens = jnp.zeros((1, 1), jnp.int32)
    make = functools.partial(model.init, jax.random.key(0), tokens)
    params = jax.eval_shape(make, rwkv.init_state(config))["params"]

    def in_bfloat16(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16)

    params = jax.tree.map(in_bfloat16, params)
    if form == "int8":
        params = jax.eval_shape(quantize, params)
    state = jax.eval_shape(lambda: rwkv.init_state(config))
    rows = {
        "tokens": jax.ShapeDtypeStruct((batch, length + 1), jnp.int32),
        "mask": jax.ShapeDtypeStruct((batch, length), jnp.float32),
    }

    def place(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    # The tuned state is float32, as in a run.
    state = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), state
    )
    return jax.tree.map(place, (params, state, rows))


def compile_step(
    config: rwkv.RWKV7Config, form: str, *, chip: str, batch: int, length: int
) -> dict[str, Any]:
    """Compiles one step and returns the compiler's bytes, by name."""
    device = topologies.get_topology_desc(
        platform="tpu", topology_name=CHIPS[chip]
    ).devices[0]
    abstract = jax.sharding.AbstractDevice(
        device_kind=device.device_kind, num_cores=device.num_cores, platform="tpu"
    )
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=abstract)
    sharding = jax.sharding.SingleDeviceSharding(device)
    params, state, rows = describe_inputs(
        config, form, batch=batch, length=length, sharding=sharding
    )
    model = rwkv.RWKV7(config)
    tx = optax.adam(1e-3)

    def step(params, train, rows):
        return rwkv.make_train_step(rwkv.state_loss(model, params), tx)(train, rows)

    train = jax.eval_shape(lambda state: rwkv.TrainState.create(state, tx), state)
    train = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        train,
    )
    began = time.monotonic()
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(step, donate_argnums=1).trace(params, train, rows)
        compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    memory = compiled.memory_analysis()
    text = compiled.as_text()
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    estimate = training_memory(
        config,
        batch=batch,
        length=length,
        trained="state",
        weight_bytes=held / parameter_count(config),
    )
    return {
        "weights": held,
        "arguments": memory.argument_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "peak": memory.peak_memory_in_bytes,
        "estimated": estimate.total,
        "float_stacks": count_float_stacks(text, config),
        "seconds": round(time.monotonic() - began),
    }


def count_float_stacks(text: str, config: rwkv.RWKV7Config) -> int:
    """Counts instructions of a program that make all layers' feed-forward weights as floats."""
    stack = f"[{config.num_layers - 1},{config.ffn_width},{config.width}]"
    return sum(text.count(f" = {kind}{stack}") for kind in ("bf16", "f32"))


def main() -> None:
    """Prints a row for each form; with `--json`, writes them with versions, date and command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="7.2b", help="a published size (%(default)s)")
    parser.add_argument("--chip", choices=CHIPS, default="v5e")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS)
    parser.add_argument("--json", help="file to write")
    args = parser.parse_args()
    config = rwkv.RWKV7Config.preset(args.size, dtype="bfloat16", remat="block")
    rows = {}
    for form in args.forms:
        row = compile_step(
            config, form, chip=args.chip, batch=args.batch, length=args.length
        )
        rows[form] = row
        sizes = {name: row[name] / GIB for name in ("weights", "temporary", "peak")}
        shown = "  ".join(f"{name} {size:.2f} GiB" for name, size in sizes.items())
        print(f"{form:<10}{shown}  {row['seconds']} s", flush=True)
    if args.json:
        record.write(
            args.json,
            "benchmarks.step_memory",
            packages=("jax", "jaxlib", "libtpu"),
            model=args.size,
            chip=args.chip,
            batch=args.batch,
            length=args.length,
            bytes=rows,
        )


if __name__ == "__main__":
    main()
