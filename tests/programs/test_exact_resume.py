"""A stopped and resumed run equals an uninterrupted one, in every mode: bits, and live memory."""

import contextlib
import dataclasses
import functools
import io
import json
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from live_bytes import measuring_live_bytes
from run_programs import MODEL, stopping_at, train_here
from smallest_runs import MODES, STEPS, mode_settings
from tiny_models import lively

from rwkv7_jax.checkpoints.model_files import save_model
from rwkv7_jax.checkpoints.state_files import load_state
from rwkv7_jax.evaluation.metric import Metric
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.runs.exit_codes import Stopped
from rwkv7_jax.runs.modes.state_tuning import StateTuningMode
from rwkv7_jax.runs.resume import checkpointer, checksums
from rwkv7_jax.runs.settings import Settings
from rwkv7_jax.test_time.rewarded_rollouts import PolicyBatch

# Without the checks of array shapes, as users run it.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("unchecked")]
TIMES = (
    "seconds",
    "tokens_per_second",
    "tokens_per_second_per_device",
    "waiting_share",
)
TIMES += ("compile_seconds", "step_seconds", "paused_seconds", "process_peak_mib")


def ended(folder: Path) -> tuple[dict, list[dict]]:
    """Reads the record of the last step, and the metrics without times and speeds."""
    record = json.loads(
        (folder / "checkpoints" / str(STEPS) / "record" / "metadata").read_text()
    )
    rows = [
        json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    return record, [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


class Run(NamedTuple):
    """A completed run: its folder, and the bytes that it and its parameters held."""

    folder: Path
    live: int
    params: int


def measured_run(settings: Settings, folder: Path, steps: int = STEPS) -> Run:
    """Runs to the end and measures what the run holds before its last step."""
    with measuring_live_bytes(steps - 1) as measured:
        train_here(settings, folder)
    return Run(folder, *measured[0])


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, base_model):
    """Runs a mode without interruption, once for all tests."""

    @functools.cache
    def run(mode):
        folder = tmp_path_factory.mktemp("unbroken") / "run"
        return measured_run(mode_settings(mode, base_model), folder)

    return run


@pytest.fixture(scope="module")
def resumed(tmp_path_factory, base_model):
    """Runs a mode that a signal stops and the same command continues, once for all tests."""

    @functools.cache
    def run(mode):
        # After step 2 an evaluation is due. The signal ends it, and the continued run makes up for
        # it.
        settings = mode_settings(mode, base_model)
        stop = 3 if mode in ("pretrain", "grpo") else 2
        folder = tmp_path_factory.mktemp("resumed") / "run"
        with (
            stopping_at(stop),
            pytest.raises(Stopped, match=f"stopped by SIGTERM; step {stop} is saved"),
        ):
            train_here(settings, folder)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            done = measured_run(settings, folder)
        assert f"resume    from step {stop}" in printed.getvalue()
        return done

    return run


@pytest.mark.parametrize("mode", MODES)
def test_a_run_stopped_by_a_signal_resumes_bit_exactly(unbroken, resumed, mode):
    one, two = (ended(run(mode).folder) for run in (unbroken, resumed))
    assert one[0]["leaves"] == two[0]["leaves"]
    assert one[0]["course"] == two[0]["course"]
    assert one[1] == two[1]


@pytest.mark.parametrize("mode", MODES)
def test_a_resumed_run_holds_as_many_bytes_as_a_new_one(unbroken, resumed, mode):
    assert resumed(mode).live == unbroken(mode).live


def test_training_with_adamw_holds_three_times_the_weights(
    tmp_path, base_model, unbroken
):
    runs = [unbroken("pretrain")]
    # Neither those of a checkpoint nor those of an earlier part of the run are kept beside them.
    for steps in (STEPS, STEPS + 2):
        settings = mode_settings(
            "pretrain", base_model, init=str(base_model), steps=steps
        )
        runs.append(measured_run(settings, tmp_path, steps))
    for run in runs:
        assert 3 * run.params <= run.live <= 3.1 * run.params


def test_a_save_need_not_compile_its_checksums(tmp_path, base_model, monkeypatch):
    """Between a signal and the end there is no time for it, so a run compiles them at its start."""
    known = checksums._sums
    # Not a program that an earlier test has compiled.
    monkeypatch.setattr(checksums, "_sums", jax.jit(lambda leaf: known(leaf)))
    compiled = []
    counts = []

    def note(event, seconds, fun_name="", **_):
        if event.endswith("backend_compile_duration") and "<lambda>" in fun_name:
            compiled.append(seconds)

    def counted(record, *arguments):
        before = len(compiled)
        made = record(*arguments)
        counts.append((before, len(compiled)))
        return made

    record = functools.partial(counted, checkpointer.make_record)
    monkeypatch.setattr(checkpointer, "make_record", record)
    jax.monitoring.register_event_duration_secs_listener(note)
    train_here(mode_settings("state", base_model, steps=2), tmp_path)
    jax.monitoring.clear_event_listeners()
    assert counts
    for before, after in counts:
        assert 0 < before == after


def test_a_run_with_several_updates_per_step_resumes_bit_exactly(
    tmp_path, base_model, capsys
):
    changes = {
        "test_time__updates": 3,
        "test_time__importance_cap": 2.0,
        "test_time__sampling_dtype": "bfloat16",
        "test_time__verifier": "smallest_runs:odd_sum",
        "tuning__layer_rates": (0.5,),
    }
    settings = mode_settings("grpo", base_model, **changes)
    train_here(settings, tmp_path / "one")
    with stopping_at(3), pytest.raises(Stopped, match="step 3 is saved"):
        train_here(settings, tmp_path / "two")
    train_here(settings, tmp_path / "two")
    assert "resume    from step 3" in capsys.readouterr().out
    one, two = (ended(tmp_path / name) for name in ("one", "two"))
    assert one == two
    learnt = [row for row in one[1] if row.get("updated") == 1.0]
    assert learnt
    for row in learnt:
        assert {"reward", "uniform_groups", "clipped", "importance_max"} <= set(row)


def test_dbp_changes_the_weights_and_such_a_run_resumes_bit_exactly(
    tmp_path, base_model, unbroken
):
    changes = {"optimizer__decorrelate": "dbp", "evaluation__patience": 0}
    train_here(
        mode_settings("pretrain", base_model, steps=3, **changes), tmp_path / "two"
    )
    for name in ("one", "two"):
        train_here(mode_settings("pretrain", base_model, **changes), tmp_path / name)
    folders = (tmp_path / "one", tmp_path / "two", unbroken("pretrain").folder)
    one, two, plain = (ended(folder)[0]["leaves"] for folder in folders)
    assert one == two
    name = "params/layer_0/att/key/weight"
    assert one[name] != plain[name]


def test_a_step_with_equal_rewards_applies_no_update_not_even_momentum(
    tmp_path, base_model, monkeypatch
):
    drawn = PolicyBatch.uniform.fget
    counts = iter(range(100))
    uniform = property(lambda made: next(counts) >= 2 or drawn(made))
    monkeypatch.setattr(PolicyBatch, "uniform", uniform)
    train_here(mode_settings("grpo", base_model, keep=9, save_every=1), tmp_path)
    leaves = []
    for step in range(1, STEPS + 1):
        place = tmp_path / "checkpoints" / str(step) / "record" / "metadata"
        found = json.loads(place.read_text())["leaves"]
        leaves.append({name: leaf for name, leaf in found.items() if name != "step"})
    assert leaves[1] == leaves[2] == leaves[4]
    rows = ended(tmp_path)[1]
    idle = [row for row in rows if row.get("updated") == 0.0]
    assert {3, 4, 5} <= {row["step"] for row in idle}
    assert all(
        "loss_nats" not in row and np.isfinite(row["learning_rate"]) for row in idle
    )
    # What was drawn is logged all the same.
    assert all(
        {"reward", "uniform_groups", "completion_tokens"} <= set(row) for row in idle
    )


def test_other_data_or_another_base_is_rejected_before_anything_compiles(
    tmp_path, base_model
):
    text = tmp_path / "text.txt"
    text.write_text("one two three four five six seven " * 40)
    changes = {"data__path": str(text), "steps": 1, "evaluation__patience": 0}
    settings = mode_settings(
        "state", base_model, data__evaluation="task:mapping", **changes
    )
    train_here(settings, tmp_path / "run")
    with pytest.raises(ValueError, match="holds a run whose `seed` is 0; got 1"):
        train_here(dataclasses.replace(settings, seed=1), tmp_path / "run")
    text.write_text("six five four three two one nought " * 40)
    with pytest.raises(
        ValueError, match=r"holds a run whose `data` is [0-9a-f]{32}; got"
    ):
        train_here(settings, tmp_path / "run")
    text.write_text("one two three four five six seven " * 40)
    config = RWKV7Config(**MODEL)
    before = base_model.read_bytes()
    save_model(base_model, lively(config, seed=1), config)
    try:
        with pytest.raises(
            ValueError, match=r"whose `weights of init` is [0-9a-f]{16}; got"
        ):
            train_here(settings, tmp_path / "run")
    finally:
        base_model.write_bytes(before)


def test_a_run_that_is_good_enough_stops_early_and_some_steps_are_profiled(
    tmp_path, base_model, capsys
):
    changes = {"evaluation__measure": "held_out_accuracy", "evaluation__enough": 0.0}
    train_here(
        mode_settings("pretrain", base_model, steps=9, profile_steps="1:3"),
        tmp_path / "one",
    )
    (profile,) = (tmp_path / "one" / "profile").rglob("*.xplane.pb")
    for name in (b"train", b"step_num", b"wait_for_batch", b"save_checkpoint"):
        assert name in profile.read_bytes()
    train_here(
        mode_settings("pretrain", base_model, steps=9, **changes), tmp_path / "two"
    )
    assert "stops early at step 0: held_out_accuracy reached" in capsys.readouterr().out


def test_with_patience_the_result_is_that_of_the_best_step(
    tmp_path, base_model, monkeypatch, capsys
):
    def ended_with(values, folder, **changes):
        left = iter(values)
        monkeypatch.setattr(
            StateTuningMode,
            "evaluate",
            lambda mode, params: {"held_out_nats": Metric.of(next(left), "nats")},
        )
        train_here(
            mode_settings("state", base_model, evaluation__every=1, **changes),
            tmp_path / folder,
        )
        return (tmp_path / folder / "state.pth").read_bytes()

    expected = ended_with([5.0, 3.0], "short", steps=1, evaluation__patience=0)
    assert ended_with([5.0, 3.0, 4.0], "long", evaluation__patience=1) == expected
    assert (
        "step 1 measured best: its parameters are the result" in capsys.readouterr().out
    )
    untouched = ended_with([1.0, 3.0, 4.0], "never", evaluation__patience=2)
    assert (
        not load_state(tmp_path / "never" / "state.pth").wkv.any()
        and untouched != expected
    )


def test_a_run_resumes_bit_exactly_on_another_machine_from_its_backup(
    tmp_path, base_model, unbroken
):
    settings = mode_settings("state", base_model)
    copied = dataclasses.replace(settings, backup=f"file://{tmp_path}/bucket")
    with stopping_at(2), pytest.raises(Stopped):
        train_here(copied, tmp_path / "lost")
    train_here(copied, tmp_path / "two")
    one = unbroken("state").folder
    assert ended(tmp_path / "two") == ended(one)
    copy = tmp_path / "bucket" / "state.pth"
    assert copy.read_bytes() == (one / "state.pth").read_bytes()
