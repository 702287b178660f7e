"""Steps that measure generation and prefill of a model on this device."""

import functools
import itertools

import jax.numpy as jnp

import rwkv7_jax as rwkv
from benchmarks import decode
from benchmarks.device.sizes import Job, Jobs, Sizes
from benchmarks.device.training import model_of, random_weights
from pallas_kernels import bench
from rwkv7_jax.generation.prefill import prefill


def generated(sizes: Sizes) -> Jobs:
    """Measures generated tokens a second, by rows, with and without the kernel of one token."""

    def run(batch, implementation):
        model = model_of(sizes, implementation=implementation)
        params = random_weights(sizes)
        out = rwkv.generate(model, params, [[1, 2, 3]] * batch, tokens=0)
        rates = decode.tokens_per_second(
            model,
            params,
            {batch: out},
            tokens=4 if sizes.interpret else 128,
            repeats=sizes.repeats,
        )
        return {"tokens/s": rates[batch], "ms a token": 1e3 * batch / rates[batch]}

    # The interpreter of kernels is no option of a model.
    implementations = (None,) if sizes.interpret else (None, "pallas_gpu")
    for batch, implementation in itertools.product(sizes.decoded, implementations):
        labels = {"rows": batch, "implementation": implementation}
        yield Job(labels, functools.partial(run, batch, implementation))


def prompts(sizes: Sizes) -> Jobs:
    """Measures how fast prompts are read, by their number and length."""
    model = model_of(sizes)

    def run(rows, length):
        call = functools.partial(
            prefill,
            model,
            random_weights(sizes),
            rwkv.init_state(model.config, rows),
            tokens=jnp.ones((rows, length), jnp.int32),
        )
        wall, _ = bench.least_ms(call, repeats=sizes.repeats)
        return {"ms": wall, "tokens/s": 1e3 * rows * length / wall}

    for rows, length in sizes.prompts:
        labels = {"rows": rows, "tokens": length}
        yield Job(labels, functools.partial(run, rows, length))
