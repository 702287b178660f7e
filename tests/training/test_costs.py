"""Arithmetic and memory by sizes alone, compared with the compiler's counts."""

import dataclasses
import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from run_programs import ROOT

import pallas_kernels
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import init_state
from rwkv7_jax.training.costs import (
    flops_per_token,
    mfu,
    parameter_count,
    peak_flops,
    state_count,
    training_memory,
)
from rwkv7_jax.training.losses import pretrain_loss
from rwkv7_jax.training.token_chunks import CHUNK
from rwkv7_jax.tuning.state_tuning import state_loss

# One token a row: the compiler counts the body of a loop once. Norms and activations, which are
# left out, are a small part of a wide model: measured 2, 7 and 3 % for the three counts below.
CONFIG = RWKV7Config(
    vocab_size=32, num_layers=2, width=256, head_size=64, implementation="scan"
)
ROWS, OVER = 8, 1.10

RESULTS = ROOT / "benchmarks/results"


def shapes(config, rows):
    """Model, weights and states without numbers."""
    model = RWKV7(config)
    tokens = jnp.zeros((1, 1), jnp.int32)
    state = init_state(config)
    draw = jax.eval_shape(lambda key: model.init(key, tokens, state), jax.random.key(0))
    return model, draw["params"], jax.eval_shape(lambda: init_state(config, rows))


def batch(rows, length):
    """A batch without numbers."""
    tokens = jax.ShapeDtypeStruct((rows, length + 1), jnp.int32)
    return {"tokens": tokens, "mask": jax.ShapeDtypeStruct((rows, length), jnp.float32)}


def compiled(config, kind, rows, length):
    """The compiled forward pass, or the gradient of the trained numbers."""
    model, params, states = shapes(config, rows)
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    if kind == "forward":
        made = jax.jit(lambda p, x, s: model.apply({"params": p}, x, s))
        return made.lower(params, tokens, states).compile()
    if kind == "weights":
        made = jax.jit(
            lambda p, b: jax.grad(lambda p: pretrain_loss(model)(p, b)[0])(p)
        )
        return made.lower(params, batch(rows, length)).compile()
    made = jax.jit(lambda p, s, b: jax.grad(lambda s: state_loss(model, p)(s, b)[0])(s))
    start = jax.eval_shape(lambda: init_state(config))
    return made.lower(params, start, batch(rows, length)).compile()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "field"),
    [("forward", "forward"), ("weights", "training"), ("state", "state")],
)
def test_the_operation_count_matches_the_compiler(kind, field):
    counted = compiled(CONFIG, kind, ROWS, 1).cost_analysis()["flops"] / ROWS
    expected = getattr(flops_per_token(CONFIG), field)
    assert expected < counted < OVER * expected


def test_the_operation_count_of_the_recurrence_matches_the_compiler():
    """What a model's count has in proportion to the head size is the recurrence's."""
    size, heads, rows = 64, 2, 4
    token = jax.ShapeDtypeStruct((rows, 1, heads, size), jnp.float32)
    state = jax.ShapeDtypeStruct((rows, heads, size, size), jnp.float32)
    run = jax.jit(lambda *x: pallas_kernels.wkv7(*x, implementation="scan"))
    counted = run.lower(*[token] * 6, state).compile().cost_analysis()["flops"] / rows
    half, whole = (
        flops_per_token(
            RWKV7Config(vocab_size=9, num_layers=1, width=128, head_size=n)
        ).forward
        for n in (size // 2, size)
    )
    assert counted == pytest.approx(2 * (whole - half), rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "op", "block"])
@pytest.mark.parametrize("trained", ["weights", "state"])
def test_activations_are_within_a_quarter_of_the_compilers_temporary_memory(
    remat, trained
):
    config = RWKV7Config(
        vocab_size=64, num_layers=4, width=128, head_size=64, remat=remat
    )
    needed = compiled(config, trained, 2, 128).memory_analysis().temp_size_in_bytes
    found = training_memory(config, batch=2, length=128, trained=trained).activations
    assert 0.75 < found / needed < 1.25


def test_the_parameter_count_matches_the_tree():
    _, params, state = shapes(CONFIG, 1)
    assert parameter_count(CONFIG) == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert state_count(CONFIG) == state.wkv.size


def test_parameters_of_a_published_size_follow_the_published_formula():
    config = RWKV7Config.preset("1.5b")
    v = 65536
    c = 2048
    layers = 24
    ranks = 96 + 96 + 64 + 256
    whole = 2 * v * c + 4 * c + layers * (19 * c + 12 * c**2 + 2 * c * ranks)
    assert parameter_count(config) == whole - (
        c + 2 * c * 64
    )  # without block 0's unused value residual


def test_training_a_large_model_takes_six_operations_per_weight():
    config = RWKV7Config.preset("2.9b")
    weights = parameter_count(config) - config.vocab_size * config.width
    found = flops_per_token(config)
    assert found.training == pytest.approx(6 * weights, rel=0.05)
    assert found.forward < found.state < found.training


def test_the_first_layer_has_no_value_residual_and_needs_no_gradient_of_its_inputs():
    def added(name):
        """Returns how often one more rank's pair of vectors is multiplied."""
        wider = dataclasses.replace(CONFIG, **{name: getattr(CONFIG, name) + 1})
        pair = 2 * 2 * CONFIG.width
        before = dataclasses.astuple(flops_per_token(CONFIG))
        after = dataclasses.astuple(flops_per_token(wider))
        return [(b - a) / pair for a, b in zip(before, after, strict=True)]

    # Of two layers: forward; with gradients of inputs and weights; with those of inputs.
    assert added("decay_rank") == [2, 6, 3]
    assert added("value_rank") == [1, 3, 2]


def test_moments_and_gradients_exist_for_trained_parameters_only():
    memory = training_memory(CONFIG, batch=4, length=64, accumulate=2)
    weights = 4 * parameter_count(CONFIG)
    assert (memory.parameters, memory.moments) == (weights, 2 * weights)
    assert memory.gradients == 2 * weights
    tuned = training_memory(CONFIG, batch=4, length=64, trained="state", weight_bytes=2)
    assert tuned.parameters == weights // 2 + tuned.gradients
    assert tuned.gradients == 4 * state_count(CONFIG)
    assert tuned.total == sum(dataclasses.astuple(tuned))


def test_gathered_weights_have_gathered_gradients_if_they_are_trained():
    def gathered(trained):
        whole, halved = (
            training_memory(CONFIG, batch=4, length=64, trained=trained, shards=shards)
            for shards in (1, 2)
        )
        return halved.activations - whole.activations

    assert gathered("weights") == 2 * gathered("state") > 0


def test_logits_exist_for_one_chunk_of_tokens():
    """Their bytes grow with the tokens up to a chunk, and with the vocabulary."""
    wide = dataclasses.replace(CONFIG, vocab_size=1032)

    def of_logits(tokens):
        needs = [
            training_memory(config, batch=2, length=tokens // 2).activations
            for config in (CONFIG, wide)
        ]
        return needs[1] - needs[0]

    assert of_logits(CHUNK) == 2 * of_logits(CHUNK // 2) == of_logits(4 * CHUNK)
    # At least the logits and their gradient, in float32.
    assert of_logits(CHUNK) >= 2 * 4 * 1000 * CHUNK


def test_accumulation_and_rematerialisation_need_less_memory():
    def need(config=CONFIG, length=64, **changes):
        made = training_memory(config, batch=4, length=length, **changes)
        return made.activations

    assert need(accumulate=4) == pytest.approx(need() / 4, rel=0.01)
    deep = RWKV7Config(vocab_size=32, num_layers=24, width=256)
    op = dataclasses.replace(deep, remat="op")
    block = dataclasses.replace(deep, remat="block")
    half = dataclasses.replace(deep, dtype="bfloat16")
    assert need(block) < 0.25 * need(deep)
    assert need(block) < need(op) < 0.75 * need(deep)
    # Long rows, since weights are cast to bfloat16 as well.
    assert need(half, length=256) < 0.75 * need(deep, length=256)


class Compiled(NamedTuple):
    """A step of a published size of which a compiler's peak is committed.

    Attributes:
        name: of the step.
        size: of the model.
        trained: "weights" or "state".
        rows: that one device computes.
        length: tokens of a row.
        weight_bytes: of one weight.
        shards: that a weight is cut into.
        peak: bytes of one device.
    """

    name: str
    size: str
    trained: str
    rows: int
    length: int
    weight_bytes: float
    shards: int
    peak: float


def compiled_steps():
    """The steps of all committed plans of large models."""
    one = json.loads((RESULTS / "tpu-step-memory.json").read_text())
    count = parameter_count(RWKV7Config.preset(one["model"]))
    for form, found in one["bytes"].items():
        yield Compiled(
            name=form,
            size=one["model"],
            trained="state",
            rows=one["batch"],
            length=one["length"],
            weight_bytes=found["weights"] / count,
            shards=1,
            peak=found["peak"],
        )
    for file in sorted(RESULTS.glob("?pu-plan-*.json")):
        plan = json.loads(file.read_text())
        yield of_plan(file.stem, file.stem.split("-")[2], plan, plan["mesh"])
    table = json.loads((RESULTS / "tpu-plan.json").read_text())["cases"]
    for name, plan in table.items():
        yield of_plan(name, plan["size"], plan, {})


def of_plan(name, size, plan, mesh):
    """The step of a plan on a mesh whose axes have these sizes."""
    shards = mesh.get("fsdp", 1)
    is_new = plan["mode"] == "pretrain"
    return Compiled(
        name=name,
        size=size,
        trained="weights" if is_new else "state",
        rows=plan["batch"] // shards,
        length=plan["length"] // mesh.get("sequence", 1),
        weight_bytes=4 if is_new else 2,
        shards=shards,
        peak=plan["peak_gib"] * 2**30,
    )


@pytest.mark.parametrize("step", list(compiled_steps()), ids=lambda step: step.name)
def test_the_estimate_of_a_large_model_matches_the_compiler(step):
    found = training_memory(
        RWKV7Config.preset(step.size, dtype="bfloat16", remat="block"),
        batch=step.rows,
        length=step.length,
        trained=step.trained,
        weight_bytes=step.weight_bytes,
        platform="tpu",
        shards=step.shards,
    )
    assert found.total == pytest.approx(step.peak, rel=0.15)


def test_an_unknown_set_of_trained_parameters_is_rejected():
    sentence = "training_memory: `trained` must be one of weights, state; got 'head'."
    with pytest.raises(ValueError) as caught:
        training_memory(CONFIG, batch=1, length=1, trained="head")
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
    ],
)
def test_known_devices_have_their_published_peak(kind, peak):
    assert peak_flops(kind) == peak


@pytest.mark.parametrize(
    "kind",
    [
        "cpu",
        "NVIDIA GH200 480GB",
        "NVIDIA H100 NVL",
        "NVIDIA GeForce RTX 4090",
        "TPU v7",
    ],
)
def test_other_devices_have_no_peak(kind):
    assert peak_flops(kind) is None
    assert mfu(1e6, 1e9, device_kind=kind) is None


def test_utilization_is_work_over_the_peak_of_all_devices():
    assert mfu(1e6, 4e9, device_kind="TPU v4", devices=4) == pytest.approx(
        4e15 / 1.1e15
    )
