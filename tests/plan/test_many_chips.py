"""Plans for many devices: the traffic in the compiled program."""

import json
import subprocess
import sys

import pytest
from run_programs import ROOT, devices

from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.training.costs import parameter_count

# In a process of its own, which has the devices.
CHILD = """
import dataclasses, json, sys
import jax
from rwkv7_jax.plan.child import compile_step
from rwkv7_jax.plan.chips import Target
from rwkv7_jax.plan.job import make_job
from rwkv7_jax.plan.steps import describe_step

class Here(Target):
    limit = 100.0

sizes = {"vocab_size": 512, "num_layers": 3, "width": 256, "dtype": "float32", "remat": "block"}
plans = []
for mode, mesh, rows, *states in json.loads(sys.argv[1]):
    data = {"batch_size": rows, "length": 32}
    tuning = {}
    if states:
        tuning = {"states": {f"s{number}": "task:mapping" for number in range(*states)}}
    job = make_job(
        "v5e:2x4",
        {"mode": mode, "mesh": mesh, "model": sizes, "data": data, "tuning": tuning},
        None,
    )
    step = describe_step(job.settings, job.config, "float32", jax.devices())
    plans.append(compile_step(step, Here("cpu", "cpu", "", "")))
print(json.dumps(plans))
"""
# Of more devices than a gather of one stage has.
WIDE = ("pretrain", "fsdp=16", 16)
CASES = [("state", "fsdp=8"), ("pretrain", "fsdp=8"), ("pretrain", "data=2,fsdp=4")]
OBSERVER = ("observer", "fsdp=8")

# Of the gradients of that model, in float32.
WEIGHTS_GB = 4e-9 * parameter_count(
    RWKV7Config(vocab_size=512, num_layers=3, width=256)
)


def make_plans(cases, count):
    """Return the plans of modes, meshes and batch sizes."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(cases)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={
            "PATH": "/usr/bin:/bin",
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            **devices(count),
        },
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def plans():
    """The plans of each case on eight devices."""
    names = [*CASES, OBSERVER]
    found = make_plans([(mode, mesh, 8) for mode, mesh in names], 8)
    return dict(zip(names, found, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_compiled_traffic_matches_the_sharding(plans, case):
    plan = plans[case]
    assert plan["devices"] == 8 and plan["fits"]
    kinds = {row["kind"] for row in plan["collectives"]}
    assert {"all-gather", "all-reduce", "all-to-all"} <= kinds
    assert ("reduce-scatter" in kinds) == (case[0] == "pretrain")
    assert plan["wire_gb"] == pytest.approx(plan["expected_wire_gb"], rel=0.1)


@pytest.mark.slow
def test_the_compiled_traffic_of_a_stack_matches_the_sharding():
    for plan in make_plans([("state", "data=8", 2, 8), ("state", "fsdp=8", 8, 8)], 8):
        assert plan["wire_gb"] == pytest.approx(plan["expected_wire_gb"], rel=0.1)


@pytest.mark.slow
def test_observer_gradients_are_reduce_scattered(plans):
    plan = plans[OBSERVER]
    kinds = {row["kind"] for row in plan["collectives"]}
    assert {"all-gather", "reduce-scatter", "all-to-all"} <= kinds
    assert plan["devices"] == 8 and plan["expected_wire_gb"] is None


@pytest.mark.slow
def test_traffic_per_device_stays_bounded_as_devices_grow():
    counts = (8, 64, 256)
    cases = [("pretrain", f"data={count}", count) for count in counts]
    *plans, wide = make_plans([*cases, WIDE], 256)
    for count, plan in zip(counts, plans, strict=True):
        assert plan["devices"] == count
        # Of an all-reduce among n devices each sends 2 (n - 1) / n of the bytes.
        sent = sum(row["wire_gb"] for row in plan["collectives"])
        assert sent == pytest.approx(2 * (count - 1) / count * WEIGHTS_GB, rel=0.05)
    # Gathers and reduce-scatters in two stages send as much as in one.
    groups = {(row["kind"], row["group"]) for row in wide["collectives"]}
    assert {("all-gather", 4), ("reduce-scatter", 4)} <= groups
    assert ("reduce-scatter", 16) not in groups
    assert wide["wire_gb"] == pytest.approx(wide["expected_wire_gb"], rel=0.1)
