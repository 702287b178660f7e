"""The op keeps digits that other algorithms lose, and takes little memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import wkv_reference
from tolerances import relative_error

import pallas_kernels
from pallas_kernels.cases import Case, make_inputs

KERNELS = [
    pytest.param(name, marks=pytest.mark.slow) for name in ("pallas_tpu", "pallas_gpu")
]


@pytest.mark.parametrize("implementation", ["scan", "chunked", *KERNELS])
def test_gradients_are_a_hundred_times_closer_than_by_dividing_by_the_decay(
    implementation,
):
    inputs, state = make_inputs(Case(1, 64, 2, mode="fast"))
    dy = jnp.sin(inputs[3])
    dend = jnp.cos(state)

    def op(*arguments):
        interpret = implementation.startswith("pallas")
        return pallas_kernels.wkv7(
            *arguments, implementation=implementation, interpret=interpret
        )

    ours = jax.jit(lambda *arguments: jax.vjp(op, *arguments)[1]((dy, dend)))(
        *inputs, state
    )
    *_, true = wkv_reference.both(inputs, state, dy, dend)
    *_, divided = wkv_reference.both(
        inputs, state, dy, dend, dtype=np.float32, eps=1e-6
    )
    worst = [max(map(relative_error, grads, true)) for grads in (ours, divided)]
    assert worst[1] >= 100 * worst[0], (
        f"ours {worst[0]:.2g}, by division {worst[1]:.2g}"
    )


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case(4, 1024, 4), id="A"),
        pytest.param(Case(1, 4096, 8), id="B", marks=pytest.mark.slow),
    ],
)
def test_training_needs_an_eighth_of_the_memory_of_the_definition(case):
    def temporary(op):

        def loss(inputs, state):
            return jnp.sum(op(inputs, state)[0])

        compiled = (
            jax.jit(jax.grad(loss, argnums=(0, 1)))
            .lower(*jax.eval_shape(lambda: make_inputs(case)))
            .compile()
        )
        return compiled.memory_analysis().temp_size_in_bytes

    ours = temporary(lambda inputs, state: pallas_kernels.wkv7(*inputs, state))
    plain = temporary(pallas_kernels.wkv7_reference)
    assert plain >= 8 * ours, (
        f"ours {ours / 2**20:.0f} MiB, the definition {plain / 2**20:.0f}"
    )
