"""Runs that search for their rate: equal to runs with that rate, resumable, honest on failure."""

import json

import numpy as np
import pytest
from run_programs import stopping_at, train_here
from smallest_runs import mode_settings

from rwkv7_jax.checkpoints.state_files import load_state
from rwkv7_jax.evaluation.metric import Metric
from rwkv7_jax.runs.exit_codes import Stopped
from rwkv7_jax.runs.modes.rate_stack import RateStackMode
from rwkv7_jax.runs.modes.registry import make_mesh_of, make_mode
from rwkv7_jax.runs.modes.state_tuning import StateTuningMode
from rwkv7_jax.runs.rate_record import RECORD, _discard_other_plan, _read_record
from rwkv7_jax.runs.resume.object_store import ObjectStore
from rwkv7_jax.runs.settings import DataSettings, Settings, as_config
from rwkv7_jax.tuning.rate_search import SearchPlan

# Without the checks of array shapes, as users run it.
pytestmark = pytest.mark.usefixtures("unchecked")

SEARCH = {
    "optimizer__learning_rate": None,
    "tuning__rates": (0.01, 0.1, 1.0),
    "evaluation__patience": 0,
    "evaluation__every": 0,
}


def searched(base_model, mode="state", **changes):
    choices = SEARCH | changes
    if choices["optimizer__learning_rate"] is not None:
        # Next to a rate, rates to search are rejected.
        del choices["tuning__rates"]
    return mode_settings(mode, base_model, **choices)


def found(folder) -> dict:
    return json.loads((folder / RECORD).read_text())["states"]


def tuned(folder, name="state.pth"):
    return load_state(folder / name).wkv


def graded(monkeypatch, values):
    """Makes searches measure these losses: without a state, then at each rate."""
    left = iter(values)
    monkeypatch.setattr(
        StateTuningMode,
        "losses",
        lambda mode, params, windows: {"held_out_nats": Metric.of(next(left), "nats")},
    )


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["state", "upscaled_state"])
def test_a_run_with_a_searched_rate_equals_a_run_with_that_rate_set(
    tmp_path, base_model, mode
):
    train_here(searched(base_model, mode), tmp_path / "found")
    rate = found(tmp_path / "found")[""]["rate"]
    assert rate in SEARCH["tuning__rates"]
    named = {"optimizer__learning_rate": rate}
    named |= {"optimizer__final_learning_rate": 0.01 * rate}
    train_here(searched(base_model, mode, **named), tmp_path / "named")
    file = "state.pth" if mode == "state" else "state.safetensors"
    one = (tmp_path / "found" / file).read_bytes()
    assert one == (tmp_path / "named" / file).read_bytes()
    assert "Learning rate" in (tmp_path / "found" / "report.html").read_text()
    assert not (tmp_path / "named" / RECORD).exists()


@pytest.mark.slow
def test_a_search_stopped_by_a_signal_resumes_bit_exactly(tmp_path, base_model, capsys):
    train_here(searched(base_model), tmp_path / "one")
    sentence = "step 3 of the search for a learning rate is saved"
    with stopping_at(3), pytest.raises(Stopped, match=sentence):
        train_here(searched(base_model), tmp_path / "two")
    assert not (tmp_path / "two" / RECORD).exists()
    train_here(searched(base_model), tmp_path / "two")
    assert "resume    from step 3" in capsys.readouterr().out
    assert found(tmp_path / "one") == found(tmp_path / "two")
    np.testing.assert_array_equal(tuned(tmp_path / "one"), tuned(tmp_path / "two"))
    places = "rate_search/checkpoints/5/record/metadata"
    records = [json.loads((tmp_path / k / places).read_text()) for k in ("one", "two")]
    assert records[0]["leaves"] == records[1]["leaves"]


@pytest.mark.slow
def test_a_search_stopped_and_given_other_steps_begins_anew(
    tmp_path, base_model, capsys
):
    # A tenth of these steps is more than the least steps of a search.
    longer = {"steps": 60, "tuning__search_share": 1.0}
    with stopping_at(3), pytest.raises(Stopped):
        train_here(searched(base_model), tmp_path / "two")
    train_here(searched(base_model, **longer), tmp_path / "two")
    assert (
        "the search begins anew, because it was interrupted" in capsys.readouterr().out
    )
    train_here(searched(base_model, **longer), tmp_path / "one")
    assert found(tmp_path / "one") == found(tmp_path / "two")


@pytest.mark.parametrize(
    ("steps", "rows", "is_kept"), [(12, 2, True), (13, 2, False), (12, 1, False)]
)
def test_an_interrupted_search_is_kept_if_its_size_is_the_same(
    tmp_path, steps, rows, is_kept
):
    place = tmp_path / "rate_search"
    place.mkdir()
    values = as_config(Settings(steps=12, data=DataSettings(batch_size=2)))
    (place / "settings.json").write_text(json.dumps(values))
    _discard_other_plan(place, SearchPlan(steps, rows, 0.1))
    assert place.exists() == is_kept


def test_a_record_of_other_texts_is_not_called_damaged(tmp_path):
    record = {"identity": {"inputs": {"data poet": "1"}}, "states": {"poet": {}}}
    (tmp_path / RECORD).write_text(json.dumps(record))
    now = {"inputs": {"data poet": "2", "data cook": "3"}}
    with pytest.raises(ValueError, match="whose `data poet` is 1; got 2"):
        _read_record(tmp_path / RECORD, ["poet", "cook"], now)


@pytest.mark.parametrize("steps", [12, 13])
def test_the_copy_of_a_search_of_another_size_is_discarded_too(tmp_path, steps):
    bucket = tmp_path / "bucket"
    values = as_config(Settings(steps=12, data=DataSettings(batch_size=2)))
    for name in ("checkpoints/3/files.json", "metrics.jsonl", "settings.json"):
        (bucket / name).parent.mkdir(parents=True, exist_ok=True)
        (bucket / name).write_text(json.dumps(values))
    store = ObjectStore(f"file://{bucket}")
    # Another machine, which has no folder of the search.
    _discard_other_plan(tmp_path / "none", SearchPlan(steps, 2, 0.1), store)
    assert bool(store.list()) == (steps == 12)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"steps": 3, "data": 1}'])
def test_a_search_without_readable_settings_is_kept(tmp_path, text):
    (tmp_path / "settings.json").write_text(text)
    _discard_other_plan(tmp_path, SearchPlan(12, 2, 0.1))
    _discard_other_plan(tmp_path / "none", SearchPlan(12, 2, 0.1))
    assert tmp_path.exists()


@pytest.mark.slow
def test_if_no_rate_beats_no_state_nothing_is_tuned_or_saved(
    tmp_path, base_model, monkeypatch, capsys
):
    graded(monkeypatch, [1.0, 1.1, 1.2, 1.0])
    train_here(searched(base_model), tmp_path)
    assert "nothing is tuned, and no state is saved" in capsys.readouterr().out
    assert not (tmp_path / "state.pth").exists()
    # Given again, the command says the same without a second search: its losses are used up.
    train_here(searched(base_model), tmp_path)
    assert "nothing is tuned, and no state is saved" in capsys.readouterr().out


@pytest.mark.slow
def test_each_of_several_states_uses_its_own_searched_rate(
    tmp_path, base_model, monkeypatch, capsys
):
    graded(monkeypatch, [2.0, 1.5, 1.0, 3.0, 2.0, 2.5, 3.0, 3.0])
    texts = {"poet": "task:mapping", "cook": "task:facts-8"}
    settings = searched(base_model, data__path="", tuning__states=texts)
    train_here(settings, tmp_path)
    rates = {name: one["rate"] for name, one in found(tmp_path).items()}
    assert rates == {"poet": 0.1, "cook": None}
    # What guessing gets is of the windows that judge; nothing is nearly as good as .1 here.
    assert all(0 < one["guess"] < 8 for one in found(tmp_path).values())
    out = capsys.readouterr().out
    assert "is used from step 0 on: its loss is the lowest" in out
    assert "no state is saved for cook: no rate was found" in out
    assert [file.name for file in (tmp_path / "states").glob("*.pth")] == ["poet.pth"]
    rows = (tmp_path / "metrics.jsonl").read_text().splitlines()
    last = json.loads(rows[-2])
    assert last["cook/learning_rate"] == 0 and last["poet/learning_rate"] > 0


def ends_worse(monkeypatch):
    """Makes every evaluation worse than the one before."""
    count = iter(range(100))
    monkeypatch.setattr(
        StateTuningMode,
        "evaluate",
        lambda mode, params: {"held_out_nats": Metric.of(1.0 + next(count), "nats")},
    )


@pytest.mark.slow
def test_a_state_that_ends_worse_than_no_state_is_never_saved_silently(
    tmp_path, base_model, monkeypatch, capsys
):
    ends_worse(monkeypatch)
    graded(monkeypatch, [2.0, 1.5, 1.0, 3.0])
    train_here(searched(base_model), tmp_path / "found")
    assert "worse on held-out data than no state" in capsys.readouterr().out
    assert not (tmp_path / "found" / "state.pth").exists()
    # A rate that was named is what was asked for: the state is saved, with a warning.
    train_here(searched(base_model, optimizer__learning_rate=0.1), tmp_path / "named")
    assert "worse on held-out data than no state" in capsys.readouterr().err
    assert (tmp_path / "named" / "state.pth").exists()


@pytest.mark.slow
def test_a_resumed_run_keeps_its_rate_if_the_command_sets_none(
    tmp_path, base_model, capsys
):
    named = searched(base_model, optimizer__learning_rate=0.1, steps=2)
    train_here(named, tmp_path)
    train_here(searched(base_model), tmp_path)
    assert "resume    from step 2" in capsys.readouterr().out


def test_invalid_search_settings_are_rejected_in_one_sentence(tmp_path, base_model):
    with pytest.raises(ValueError, match=r"`config\.tuning\.rates` must hold learning"):
        searched(base_model, tuning__rates=())
    with pytest.raises(ValueError, match=r"`config\.tuning\.rates` must be above 0"):
        searched(base_model, tuning__rates=(0.0, 1.0))
    with pytest.raises(ValueError, match=r"`config\.tuning\.search_share` must be"):
        searched(base_model, tuning__search_share=0.0)
    (tmp_path / RECORD).write_text("{}")
    with pytest.raises(
        ValueError, match="must be the record of a learning-rate search"
    ):
        train_here(searched(base_model), tmp_path)


@pytest.mark.parametrize("mesh", ["data=2", "sequence=2"])
def test_a_search_on_a_mesh_needs_no_more_device_memory_than_the_run(
    tmp_path, base_model, mesh
):
    def at_once(mesh):
        settings = searched(base_model, mesh=mesh, data__batch_size=8)
        made = make_mode(settings, tmp_path, make_mesh_of(settings))
        return RateStackMode(made).at_once

    # Three rates of a few rows each: all of them, or one at a time.
    assert at_once("data=1") == 3
    assert at_once(mesh) == 1


def test_only_tuning_states_on_text_searches_for_a_rate(base_model):
    assert searched(base_model).finds_rate
    assert not mode_settings("state", base_model).finds_rate
    pretrain = mode_settings("pretrain", base_model, optimizer__learning_rate=None)
    assert not pretrain.finds_rate and pretrain.optimizer.learning_rate == 6e-4
    assert RateStackMode.measures_start is False
