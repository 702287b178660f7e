"""Which kernels programs hold that are lowered for other platforms, on any machine."""

import contextlib

import abstract_devices
import jax
import jax.export
import jax.extend.core
import jax.numpy as jnp
import pytest
from abstract_devices import MARKS
from tolerances import SAME, assert_close
from wkv_inputs import INPUTS, STATE, op

import pallas_kernels
from pallas_kernels import platforms
from pallas_kernels.cases import Case, make_inputs
from pallas_kernels.multi_platform_export import kernels_of_all_platforms

# The products between the tokens of a chunk, per row and head, as XLA is given them.
SQUARES = "tensor<3x2x16x16xf32>"


def targeting(platform):
    """Returns a context in which programs are made for the platform."""
    if platform == "cpu":
        return contextlib.nullcontext()
    name = "gpu" if platform == "cuda" else platform
    return jax.sharding.use_abstract_mesh(abstract_devices.mesh(name))


def lower(platform, inputs=INPUTS, state=STATE):
    """Traces the op anew and lowers it for the platform."""
    # A fresh function: JAX would take the trace that another context has left.
    traced = jax.jit(lambda *arguments: op(*arguments)).trace(inputs, state)
    return traced.lower(lowering_platforms=(platform,)).as_text()


def kernels_in(lowered):
    """Lists the platforms whose kernels a lowered program holds."""
    return [name for name, mark in MARKS.items() if mark in lowered]


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_the_default_is_the_kernel_of_the_target(platform):
    with targeting(platform):
        lowered = lower(platform)
    assert kernels_in(lowered) == [name for name in MARKS if name == platform]
    assert SQUARES not in lowered


@pytest.mark.parametrize("platform", ["tpu", "cuda", "rocm"])
def test_a_program_for_a_cpu_is_lowered_for_other_platforms_without_kernels(platform):
    lowered = lower(platform)
    assert kernels_in(lowered) == []
    assert SQUARES in lowered


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda", "rocm"])
def test_the_export_context_lowers_for_every_platform_on_any_machine(platform):
    with kernels_of_all_platforms():
        lowered = lower(platform)
    assert kernels_in(lowered) == [name for name in MARKS if name == platform]
    assert (SQUARES in lowered) == (platform == "rocm")


@pytest.mark.parametrize(
    "case", [Case(1, 21, 2, 24, 40), Case(1, 1, 2)], ids=["sizes", "a token"]
)
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("exports", [False, True], ids=["targeted", "exported"])
def test_unsupported_sizes_and_single_tokens_are_left_to_xla(platform, case, exports):
    with kernels_of_all_platforms() if exports else targeting(platform):
        lowered = lower(platform, *make_inputs(case))
    assert MARKS[platform] not in lowered
    # A single token is not padded to a chunk, whose tokens would be multiplied by each other.
    assert ("tensor<1x2x16x16xf32>" in lowered) == (case.tokens > 1)


def test_an_unchecked_gpu_runs_plain_jax_and_rejects_a_named_kernel():
    newer = jax.sharding.use_abstract_mesh(abstract_devices.mesh("newer gpu"))
    with newer:
        lowered = lower("cuda")
        assert kernels_in(lowered) == []
        assert SQUARES in lowered
        assert not {"pallas_gpu", "triton"} & set(pallas_kernels.available())
        for name in ("pallas_gpu", "triton"):
            with pytest.raises(NotImplementedError, match=r"8\.0 to 9\.0.*NVIDIA B200"):
                op(INPUTS, STATE, implementation=name)


@pytest.mark.parametrize("chunk", [16, 32, 64])
def test_chunks_of_64_are_left_to_xla_on_a_gpu(chunk):
    with targeting("cuda"):
        traced = jax.jit(lambda *x: op(*x, chunk=chunk)).trace(INPUTS, STATE)
        lowered = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert (MARKS["cuda"] in lowered) == (chunk != 64)
        if chunk == 64:
            with pytest.raises(NotImplementedError, match="chunks of 16 or 32 tokens"):
                pallas_kernels.wkv7(
                    *INPUTS, STATE, implementation="pallas_gpu", chunk=chunk
                )


@pytest.mark.parametrize("implementation", [None, "kernel"])
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_a_gradient_is_lowered_for_an_absent_device(platform, implementation):
    name = implementation and {"tpu": "pallas_tpu", "cuda": "pallas_gpu"}[platform]

    def loss(inputs, state):
        return jnp.sum(pallas_kernels.wkv7(*inputs, state, implementation=name)[0])

    with targeting(platform):
        traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(INPUTS, STATE)
        lowered = traced.lower(lowering_platforms=(platform,)).as_text()
    assert lowered.count(MARKS[platform]) >= 2
    assert SQUARES not in lowered


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_a_program_for_an_accelerator_is_correct_on_a_cpu(platform):
    """As where arrays are committed to a CPU next to the accelerator."""

    def both(inputs, state):
        (y, end), pull = jax.vjp(op, inputs, state)
        return y, end, pull((jnp.sin(y), jnp.cos(end)))

    expected = jax.jit(both)(INPUTS, STATE)
    with targeting(platform):
        traced = jax.jit(both).trace(INPUTS, STATE)
    found = traced.lower(lowering_platforms=("cpu",)).compile()(INPUTS, STATE)
    for left, right in zip(
        jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
    ):
        assert_close(left, right, SAME["op"])


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_a_backward_pass_traced_outside_the_context_matches_its_forward_pass(
    monkeypatch, platform
):
    """As where `jax.default_device` has changed between the two."""
    with monkeypatch.context() as context:
        device = abstract_devices.mesh(platform).abstract_device
        context.setattr(platforms, "target", lambda: device)
        (y, end), pull = jax.vjp(op, INPUTS, STATE)
    cotangents = (jnp.sin(y), jnp.cos(end))
    expected = jax.vjp(op, INPUTS, STATE)[1](cotangents)
    for left, right in zip(
        *map(jax.tree.leaves, (pull(cotangents), expected)), strict=True
    ):
        assert_close(left, right, SAME["op"])


def test_one_exported_program_serves_every_platform():
    # JAX promises nothing about how long this call's format will be read.
    allowed = jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")
    export = jax.export.export(
        jax.jit(lambda *arguments: op(*arguments)),
        platforms=("cpu", "tpu", "cuda"),
        disabled_checks=[allowed],
    )
    with kernels_of_all_platforms():
        exported = export(INPUTS, STATE)
    assert all(mark in exported.mlir_module() for mark in MARKS.values())
    for left, right in zip(
        exported.call(INPUTS, STATE), jax.jit(op)(INPUTS, STATE), strict=True
    ):
        assert_close(left, right, SAME["op"])


def test_the_export_context_ends_on_exit():
    with kernels_of_all_platforms():
        pass
    assert kernels_in(lower("tpu")) == []


def test_an_exported_gradient_has_the_kernels_of_its_targets_and_runs_on_a_cpu():
    def gradients(inputs, state):
        (y, end), pull = jax.vjp(op, inputs, state)
        return tuple(pull((jnp.sin(y), jnp.cos(end)))[0])

    allowed = jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")
    export = jax.export.export(
        jax.jit(lambda *arguments: gradients(*arguments)),
        platforms=("cpu", "cuda"),
        disabled_checks=[allowed],
    )
    expected = jax.jit(gradients)(INPUTS, STATE)
    with kernels_of_all_platforms(), targeting("cuda"):
        exported = export(INPUTS, STATE)
    assert exported.mlir_module().count(MARKS["cuda"]) >= 2
    for left, right in zip(exported.call(INPUTS, STATE), expected, strict=True):
        assert_close(left, right, SAME["op"])
