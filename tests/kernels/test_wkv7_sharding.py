"""The op under `shard_map` over batch and heads: each device computes its own rows and heads."""

import functools

import abstract_devices
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec
from tolerances import SAME, assert_close

import pallas_kernels
from pallas_kernels.cases import Case, make_inputs

AXES = ("batch", "heads")
TOKENS = PartitionSpec("batch", None, "heads")
STATES = PartitionSpec(*AXES)
INPUTS, STATE = make_inputs(Case(2, 40, 4, key_size=32, value_size=32))


def op(inputs, state, *, implementation):
    """Calls the op; named kernels run in the interpreter."""
    return pallas_kernels.wkv7(
        *inputs,
        state,
        implementation=implementation,
        interpret=implementation is not None,
    )


def gradients(run, inputs, state):
    """Returns y, the last state and the gradients of both."""
    (y, end), pull = jax.vjp(run, inputs, state)
    return y, end, pull((jnp.sin(y), jnp.cos(end)))


def sharded(run, mesh, **options):
    """Shards `run` over rows and heads."""
    return jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(TOKENS, STATES),
        out_specs=(TOKENS, STATES),
        **options,
    )


@pytest.mark.parametrize("shape", [(2, 1), (1, 2)], ids=AXES)
@pytest.mark.parametrize(
    "implementation",
    [
        None,
        "scan",
        "chunked",
        *(
            pytest.param(k, marks=pytest.mark.slow)
            for k in ("pallas_tpu", "pallas_gpu")
        ),
    ],
)
def test_sharding_over_devices_changes_no_result(implementation, shape):
    mesh = jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 2)
    run = functools.partial(op, implementation=implementation)
    # Pallas's interpreter, not its kernels, fails JAX's check of varying axes.
    over = sharded(
        run, mesh, check_vma=implementation not in ("pallas_tpu", "pallas_gpu")
    )
    found = jax.jit(functools.partial(gradients, over))(INPUTS, STATE)
    alone = jax.jit(functools.partial(gradients, run))(INPUTS, STATE)
    for left, right in zip(jax.tree.leaves(found), jax.tree.leaves(alone), strict=True):
        assert_close(left, right, SAME["op"])


@pytest.mark.parametrize("implementation", ["scan", "chunked"])
def test_a_start_state_may_be_created_inside_shard_map(implementation):
    mesh = jax.make_mesh((2, 1), AXES, axis_types=(AxisType.Auto,) * 2)
    zeros = jnp.zeros_like(STATE)

    def of_device(inputs):
        state = jnp.zeros((1, *STATE.shape[1:]))
        return op(inputs, state, implementation=implementation)

    over = jax.shard_map(
        of_device, mesh=mesh, in_specs=TOKENS, out_specs=(TOKENS, STATES)
    )
    expected = op(INPUTS, zeros, implementation=implementation)
    for left, right in zip(jax.jit(over)(INPUTS), expected, strict=True):
        assert_close(left, right, SAME["op"])


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize(("platform", "lowered"), [("tpu", "tpu"), ("gpu", "cuda")])
def test_sharding_over_abstract_accelerators_is_lowered_to_kernels(
    platform, lowered, named
):
    mesh = abstract_devices.mesh(platform, (2, 2), AXES)

    def run(inputs, state):
        name = f"pallas_{platform}" if named else None
        return pallas_kernels.wkv7(*inputs, state, implementation=name)

    with jax.sharding.use_abstract_mesh(mesh):
        program = jax.jit(functools.partial(gradients, sharded(run, mesh)))
        text = (
            program.trace(INPUTS, STATE).lower(lowering_platforms=(lowered,)).as_text()
        )
    assert text.count(abstract_devices.MARKS[lowered]) >= 2


def lower_for_gpus(program):
    """Lowers a program of a batch whose rows are sharded over two described H200s."""
    mesh = abstract_devices.mesh("gpu", (2,), ("batch",))
    rows = jax.sharding.NamedSharding(mesh, PartitionSpec("batch"))

    def describe(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows)

    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(program).trace(*jax.tree.map(describe, (INPUTS, STATE)))
        return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("implementation", [None, "pallas_gpu"])
@pytest.mark.parametrize("differentiated", [False, True])
def test_a_plain_jit_does_not_gather_a_sharded_batch_for_a_gpu_kernel(
    implementation, differentiated
):
    def run(inputs, state):
        return pallas_kernels.wkv7(*inputs, state, implementation=implementation)

    program = functools.partial(gradients, run) if differentiated else run
    with pytest.raises(NotImplementedError, match=r"jax\.shard_map"):
        lower_for_gpus(program)


def test_a_plain_jit_does_not_gather_a_sharded_batch_for_the_single_token_kernel():
    def run(inputs, state):
        token = jax.tree.map(lambda x: x[:, :1], inputs)
        return pallas_kernels.wkv7(*token, state, implementation="pallas_gpu")

    with pytest.raises(NotImplementedError, match=r"jax\.shard_map"):
        lower_for_gpus(run)


def test_the_compiler_partitions_plain_jax_over_gpus():
    def run(inputs, state):
        return pallas_kernels.wkv7(*inputs, state, implementation="chunked")

    assert abstract_devices.MARKS["cuda"] not in lower_for_gpus(run)
