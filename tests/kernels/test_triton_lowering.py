"""The Triton kernels in JAX programs for a GPU that this machine does not have."""

import functools
import importlib.util
import sys
from pathlib import Path

import abstract_devices
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

import pallas_kernels
from pallas_kernels.cases import Case, make_inputs

# It refuses to be imported where JAX has no plugin for CUDA.
jax_triton = pytest.importorskip(
    "jax_triton",
    reason="needs the triton extra and JAX's CUDA plugin",
    exc_type=ImportError,
)

pytestmark = pytest.mark.slow
INPUTS, STATE = make_inputs(Case(2, 90, 2), "bfloat16")


def op(inputs, state):
    """Calls the op with the Triton kernels."""
    return pallas_kernels.wkv7(*inputs, state, implementation="triton")


def loss(inputs, state, run=op):
    """Sums both results."""
    y, end = run(inputs, state)
    return jnp.sum(y.astype(jnp.float32)) + jnp.sum(end)


@pytest.fixture
def lower(monkeypatch):
    """Returns a function that counts the kernels of a program lowered for an H200."""
    # Triton reads its kernels' source, which the tests' checks of shapes would wrap.
    name = "pallas_kernels.gpu.triton_kernels"
    path = Path(pallas_kernels.__file__).parent / "gpu" / "triton_kernels.py"
    spec = importlib.util.spec_from_file_location(name, path)
    kernels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernels)
    monkeypatch.setitem(sys.modules, name, kernels)
    monkeypatch.setattr(pallas_kernels, "triton_kernels", kernels, raising=False)
    library = jax_triton.triton_lib.triton_kernel_call_lib
    monkeypatch.setattr(library, "get_compute_capability", lambda device: 90)

    def run(program, *arguments, mesh=((1,), ("x",))):
        with jax.sharding.use_abstract_mesh(abstract_devices.mesh("gpu", *mesh)):
            traced = jax.jit(program).trace(*arguments)
            text = traced.lower(lowering_platforms=("cuda",)).as_text()
        return text.count("triton_kernel_call")

    return run


def test_both_passes_are_lowered_to_kernels(lower):
    assert lower(op, INPUTS, STATE) == 1
    assert lower(jax.grad(loss, argnums=(0, 1)), INPUTS, STATE) == 3


def test_vmap_is_one_call_on_a_larger_batch(lower):
    inputs, state = jax.tree.map(lambda x: jnp.stack([x, x]), (INPUTS, STATE))
    assert lower(jax.vmap(op), inputs, state) == 1
    assert lower(jax.vmap(op, in_axes=(0, None)), inputs, STATE) == 1
    assert lower(jax.vmap(jax.grad(loss, argnums=(0, 1))), inputs, state) == 3


def test_it_shards_over_devices(lower):
    mesh = ((2, 2), ("batch", "heads"))
    tokens = PartitionSpec("batch", None, "heads")
    states = PartitionSpec("batch", "heads")
    sharded = jax.shard_map(
        op,
        mesh=abstract_devices.mesh("gpu", *mesh),
        in_specs=(tokens, states),
        out_specs=(tokens, states),
        check_vma=False,
    )
    sharded_loss = functools.partial(loss, run=sharded)
    assert lower(jax.grad(sharded_loss, argnums=(0, 1)), INPUTS, STATE, mesh=mesh) == 3
