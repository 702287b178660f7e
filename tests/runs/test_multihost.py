"""One run of several processes: in normal operation, after a lost process, and after a signal."""

import json
import re
import signal
import time

import pytest
from run_programs import SMALLEST, devices, finish, last_line, start, start_pair
from smallest_runs import save_base_model
from tolerances import SAME, assert_close

from rwkv7_jax.checkpoints.state_files import load_state
from rwkv7_jax.runs.exit_codes import EndedElsewhere, exit_code
from rwkv7_jax.runs.multihost import HEARTBEAT_SECONDS, join
from rwkv7_jax.runs.process_group import group_of_run
from rwkv7_jax.runs.resume.step_directories import step_numbers
from rwkv7_jax.tuning.rate_search import RATES

RUN = {**SMALLEST, "data.batch_size": 4, "save_every": 20}


def pair(workdir, **settings):
    """Both processes of a run, started: of one device, where other tests have one of two.

    Both add two gradients.
    """
    return start_pair(workdir, **{**RUN, **settings})


def record(workdir, step):
    return json.loads(
        (workdir / "checkpoints" / str(step) / "record" / "metadata").read_text()
    )


def lines(workdir):
    return (workdir / "metrics.csv").read_text().splitlines()


def saved(workdir, processes):
    """Wait for a checkpoint."""
    end = time.monotonic() + 200
    while not step_numbers(workdir / "checkpoints"):
        assert time.monotonic() < end and all(p.poll() is None for p in processes)
        time.sleep(0.05)


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """The folder of a run that lost its second process, and how the first one ended."""
    folder = tmp_path_factory.mktemp("broken")
    one, other = pair(folder, steps=1_000_000)
    saved(folder, (one, other))
    other.kill()
    began = time.monotonic()
    _, error = one.communicate(timeout=HEARTBEAT_SECONDS + 30)
    other.communicate()
    return folder, one.returncode, error, time.monotonic() - began


@pytest.mark.slow
def test_a_process_that_loses_the_other_ends_and_gives_the_reason(broken):
    _, code, error, seconds = broken
    print(f"{seconds:.1f} s, exit code {code}")
    assert seconds < 60
    assert code in (6, -signal.SIGABRT)
    assert re.search("Gloo|distributed service", error)


@pytest.mark.slow
def test_both_processes_resume_bit_exactly_from_the_checkpoint_of_process_0(
    broken, tmp_path
):
    folder = broken[0]
    before = step_numbers(folder / "checkpoints")[0]
    out, quiet = (finish(process)[0] for process in pair(folder, steps=before + 20))
    assert f"from step {before}" in out and "resume" not in quiet
    assert not (folder / "checkpoints" / "bad").exists()
    finish(start(tmp_path, steps=before + 20, **RUN))
    found = record(folder, before + 20)
    expected = record(tmp_path, before + 20)
    assert (
        found["leaves"] == expected["leaves"] and found["course"] == expected["course"]
    )


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["silent", "other"])
def test_a_first_state_is_sent_only_where_processes_did_not_make_the_same(
    tmp_path, fault
):
    run = {
        "child": ["tests/support/faulty_train.py"],
        "environment": {"FAULT": fault},
        "steps": 2,
    }
    for process in pair(tmp_path / "two", **run):
        finish(process)
    finish(start(tmp_path / "one", **RUN, steps=2))
    found = record(tmp_path / "two", 2)
    assert found["leaves"] == record(tmp_path / "one", 2)["leaves"]


@pytest.mark.slow
def test_a_signal_to_one_process_saves_one_step_and_ends_both(tmp_path):
    processes = pair(tmp_path, steps=1_000_000, save_every=0, log_every=5)
    while not (tmp_path / "metrics.csv").exists() or len(lines(tmp_path)) < 3:
        assert processes[0].poll() is None
        time.sleep(0.05)
    processes[1].terminate()
    ends = [last_line(finish(process)[1]) for process in processes]
    (step,) = step_numbers(tmp_path / "checkpoints")
    assert ends[0].startswith(
        f"train.py: stopped by a signal to another process; step {step} is"
    )
    assert ends[1].startswith(f"train.py: stopped by SIGTERM; step {step} is saved.")


@pytest.mark.slow
def test_an_error_of_process_0_ends_the_others_with_the_same_message(tmp_path):
    (tmp_path / "taken").write_text("")
    # A file is in the place of the folder that should have the run's.
    for process in pair(tmp_path / "taken" / "run"):
        assert "taken/run cannot be written" in last_line(finish(process, 5)[1])
    for process in pair(tmp_path / "run", data__batch_size=5):
        assert "5 rows must be a multiple of the 2 devices" in last_line(
            finish(process, 2)[1]
        )


@pytest.mark.parametrize(
    ("coordinator", "process", "sentence"),
    [
        ("localhost:1", 2, r"`--process` must be at least 0 and below .* 2 of 2\."),
        (
            "localhost",
            0,
            "`--coordinator` must be auto or an address and port; got 'localhost'.",
        ),
        ("", 0, "`--coordinator` must be given with `--processes` or `--process`."),
    ],
)
def test_a_process_without_its_number_is_rejected(coordinator, process, sentence):
    with pytest.raises(ValueError, match=sentence):
        join(coordinator, processes=2, process=process)


def test_a_single_process_needs_no_other():
    assert group_of_run().from_process_0(lambda: "done") == "done"
    assert exit_code(EndedElsewhere("no", 3)) == 3


@pytest.mark.slow
def test_states_and_rates_need_not_divide_among_processes(tmp_path):
    base = tmp_path / "base.pth"
    save_base_model(base)
    run = {
        name: value for name, value in SMALLEST.items() if not name.startswith("model.")
    }
    run |= {
        "config": "state_tuning",
        "init": base,
        "steps": 4,
        "data.path": "",
        "tuning.states.poet": "task:mapping",
        "tuning.states.cook": "task:facts-8",
        "tuning.states.judge": "task:dictionary",
        "model.dtype": "float32",
    }
    processes = start_pair(tmp_path / "two", **run)
    out, quiet = (finish(process)[0] for process in processes)
    assert "is used from step 0 on" in out and "rate" not in quiet
    finish(start(tmp_path / "one", environment=devices(1), **run))
    places = [tmp_path / name for name in ("two", "one")]
    found = [json.loads((place / "rate_search.json").read_text()) for place in places]
    for name in ("poet", "cook", "judge"):
        # Each at all of the default rates.
        assert len(found[0]["states"][name]["curve"]) == len(RATES)
        rates = [one["states"][name]["rate"] for one in found]
        assert rates[0] == rates[1] is not None
        states = [load_state(place / "states" / f"{name}.pth") for place in places]
        assert_close(states[0].wkv, states[1].wkv, SAME["model"])
