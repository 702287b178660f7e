"""The Triton kernels in JAX programs for a GPU that this machine does not have."""

import functools
import importlib.util
import re
import sys
import zlib
from pathlib import Path

import abstract_devices
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec
from jaxlib import gpu_triton

import pallas_kernels
from pallas_kernels.cases import Case, make_inputs
from pallas_kernels.gpu import triton_launcher

pytest.importorskip("triton", reason="needs the triton extra")
if not hasattr(gpu_triton, "TritonKernel"):
    pytest.skip("needs JAX's CUDA plugin", allow_module_level=True)

pytestmark = pytest.mark.slow
INPUTS, STATE = make_inputs(Case(2, 90, 2), "bfloat16")


def op(inputs, state):
    """Calls the op with the Triton kernels."""
    return pallas_kernels.wkv7(*inputs, state, implementation="triton")


def loss(inputs, state, run=op):
    """Sums both results."""
    y, end = run(inputs, state)
    return jnp.sum(y.astype(jnp.float32)) + jnp.sum(end)


@pytest.fixture(params=["jax-triton", "jaxlib"])
def launcher(request, monkeypatch):
    """What launches the kernels."""
    by_jax_triton = request.param == "jax-triton"
    if by_jax_triton and not triton_launcher.has_fitting_jax_triton():
        pytest.skip("no jax-triton that fits is installed")
    monkeypatch.setattr(
        triton_launcher, "has_fitting_jax_triton", lambda: by_jax_triton
    )
    return request.param


@pytest.fixture
def compiled(monkeypatch):
    """Returns a function that gives the custom calls of a program compiled for an H200."""
    # Triton reads its kernels' source, which the tests' checks of shapes would wrap.
    name = "pallas_kernels.gpu.triton_kernels"
    path = Path(pallas_kernels.__file__).parent / "gpu" / "triton_kernels.py"
    spec = importlib.util.spec_from_file_location(name, path)
    kernels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernels)
    monkeypatch.setitem(sys.modules, name, kernels)
    monkeypatch.setattr(pallas_kernels, "triton_kernels", kernels, raising=False)
    # jax-triton asks the driver.
    monkeypatch.setattr(gpu_triton, "get_compute_capability", lambda device: 90)

    def run(program, *arguments, mesh=((1,), ("x",))):
        with jax.sharding.use_abstract_mesh(abstract_devices.mesh("gpu", *mesh)):
            traced = jax.jit(program).trace(*arguments)
            module = traced.lower(lowering_platforms=("cuda",)).compiler_ir()
        return list(custom_calls(module.operation))

    return run


def custom_calls(operation):
    """Yields what each launch of a kernel in an operation of StableHLO passes on, as bytes."""
    is_call = operation.name == "stablehlo.custom_call"
    if (
        is_call
        and operation.attributes["call_target_name"].value == "triton_kernel_call"
    ):
        yield zlib.decompress(operation.attributes["backend_config"].value_bytes)
    for region in operation.regions:
        for block in region.blocks:
            for inner in block.operations:
                yield from custom_calls(inner.operation)


@pytest.fixture
def lower(launcher, compiled):
    """Returns a function that counts the kernels of a program compiled for an H200."""
    return lambda *arguments, **sizes: len(compiled(*arguments, **sizes))


def fields(message):
    """Yields the fields of a message of Protocol Buffers: number, and a number or bytes."""
    position = 0

    def read_number():
        nonlocal position
        number, shift = 0, 0
        while True:
            byte = message[position]
            position += 1
            number |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return number

    while position < len(message):
        number, kind = divmod(read_number(), 8)
        value = read_number()
        if kind == 2:
            position += value
            value = message[position - value : position]
        else:
            assert kind == 0
        yield number, value


def instructions(ptx):
    """Returns PTX without what it says about source files and debugging."""
    text = re.sub(rb"\n\t\.section\t\.debug.*", b"", ptx, flags=re.DOTALL)
    return re.sub(rb"\n\t\.(file|loc)\t.*", b"", text)


def describe(call):
    """Returns a launch's kernel, with its instructions, and its grid and parameters."""
    # Of a call: the kernel's call is 1. Of that: the kernel is 1. Of that: PTX is 4, and 5 is an
    # intermediate form that is only shown.
    launch = list(fields(dict(fields(call))[1]))
    kernel = dict(fields(dict(launch)[1]))
    kernel[4] = instructions(kernel[4])
    del kernel[5]
    return kernel, launch[1:]


def test_both_launchers_pass_the_same_instructions_and_parameters(
    monkeypatch, compiled
):
    if not triton_launcher.has_fitting_jax_triton():
        pytest.skip("no jax-triton that fits is installed")
    found = []
    for by_jax_triton in (True, False):
        monkeypatch.setattr(
            triton_launcher,
            "has_fitting_jax_triton",
            lambda by_jax_triton=by_jax_triton: by_jax_triton,
        )
        # A new function each time: JAX would keep what it has traced.
        program = jax.grad(lambda *x: loss(*x), argnums=(0, 1))
        found.append(list(map(describe, compiled(program, INPUTS, STATE))))
    assert len(found[0]) == 3 and len(found[0][0][0][4]) > 10_000
    assert found[0] == found[1]


def test_both_passes_are_lowered_to_kernels(lower):
    assert lower(op, INPUTS, STATE) == 1
    assert lower(jax.grad(loss, argnums=(0, 1)), INPUTS, STATE) == 3


def test_vmap_is_one_call_on_a_larger_batch(lower):
    inputs, state = jax.tree.map(lambda x: jnp.stack([x, x]), (INPUTS, STATE))
    assert lower(jax.vmap(op), inputs, state) == 1
    assert lower(jax.vmap(op, in_axes=(0, None)), inputs, STATE) == 1
    assert lower(jax.vmap(jax.grad(loss, argnums=(0, 1))), inputs, state) == 3


def test_the_op_shards_over_devices(lower):
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
