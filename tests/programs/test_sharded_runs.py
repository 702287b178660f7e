"""Runs of train.py with weights sharded over eight devices."""

import csv
import functools

import numpy as np
import pytest
from run_programs import MODEL, SMALLEST, devices, finish, start
from tiny_models import lively
from tolerances import SAME, relative_error

from rwkv7_jax.checkpoints.model_files import save_model
from rwkv7_jax.model.config import RWKV7Config

pytestmark = pytest.mark.slow

STEPS = 6
# Devices can share two heads.
SIZES = MODEL | {"head_size": 8}
RUN = {
    **SMALLEST,
    "model.head_size": 8,
    "data.batch_size": 8,
    "steps": STEPS,
    "save_every": 3,
    # Adam's first step is a sign, also of gradients that are rounding errors: small, so that
    # these do not count.
    "optimizer.learning_rate": 1e-3,
    "optimizer.warmup_steps": 0,
}


def losses(workdir):
    """The loss of every step in the log of a run."""
    with (workdir / "metrics.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return np.asarray([float(row["loss"]) for row in rows if row.get("loss")])


@pytest.fixture(scope="module")
def base_model(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "model.pth"
    config = RWKV7Config(**SIZES)
    save_model(path, lively(config), config)
    return path


def settings_of(mode, base_model):
    """The config and the settings of a run of a mode."""
    if mode == "pretrain":
        return "pretrain_toy", RUN
    named = {name: one for name, one in RUN.items() if not name.startswith("model.")}
    return "state_tuning", named | {"init": base_model}


@pytest.fixture(scope="module")
def alone(tmp_path_factory, base_model):
    """Returns the losses of a mode's run on one device, computed once for all tests."""

    @functools.cache
    def run(mode):
        config, settings = settings_of(mode, base_model)
        folder = tmp_path_factory.mktemp(mode)
        finish(start(folder, config, environment=devices(1), **settings))
        return losses(folder)

    return run


@pytest.mark.parametrize("mode", ["pretrain", "state"])
def test_a_sharded_run_has_the_losses_of_a_run_on_one_device(
    tmp_path, base_model, alone, mode
):
    config, settings = settings_of(mode, base_model)
    runs = {
        "fsdp": (8, "fsdp=8"),
        "both": (8, "data=2,fsdp=4"),
        "heads": (8, "data=2,fsdp=2,tensor=2"),
    }
    started = {}
    for name, (count, mesh) in runs.items():
        started[name] = start(
            tmp_path / name,
            config,
            environment=devices(count),
            **settings,
            mesh=mesh,
        )
    said = {name: finish(process)[0] for name, process in started.items()}
    assert "mesh      data 1, fsdp 8" in said["fsdp"]
    expected = alone(mode)
    assert len(expected) == STEPS
    for name in runs:
        error = relative_error(losses(tmp_path / name), expected)
        assert error <= SAME["model"], name


def test_a_run_resumes_on_another_mesh_and_on_one_device(tmp_path, alone):
    place = tmp_path / "run"
    for steps, count, mesh in (
        (3, 8, "fsdp=8"),
        (4, 8, "data=2,fsdp=4"),
        (5, 2, "tensor=2"),
        (6, 1, "auto"),
    ):
        said, _ = finish(
            start(
                place,
                environment=devices(count),
                **{**RUN, "steps": steps, "mesh": mesh},
            )
        )
    assert "resume    from step 5" in said
    error = relative_error(losses(place), alone("pretrain"))
    assert error <= SAME["model"]
