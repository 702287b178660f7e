"""Several start states in one run: equal to separate runs, and resumed bit-exactly."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from run_programs import stopping_at, train_here
from smallest_runs import mode_settings
from tolerances import SAME, assert_close

from rwkv7_jax.checkpoints.state_files import load_state
from rwkv7_jax.evaluation.metric import Metric
from rwkv7_jax.runs.exit_codes import NotFinite, Stopped
from rwkv7_jax.runs.modes.stack import StackMode, state_sources
from rwkv7_jax.runs.modes.state_tuning import StateTuningMode

# Without the checks of array shapes, as users run it.
pytestmark = pytest.mark.usefixtures("unchecked")

TEXTS = {
    "poet": "task:mapping",
    "cook": "task:facts-8",
    "judge": "task:dictionary",
}


def stack_settings(base_model, mode="state", texts=TEXTS, **changes):
    choices = {"data__path": "", "tuning__states": texts, "optimizer__eps": 1e-6}
    return mode_settings(mode, base_model, **(choices | changes))


def saved(folder, suffix=".pth"):
    """The tuned array of each state."""
    found = {}
    for name in TEXTS:
        state = load_state(folder / "states" / f"{name}{suffix}")
        found[name] = state.wkv if state.upscaled is None else state.upscaled.memory
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "suffix", "choices"),
    [
        ("state", ".pth", {}),
        # Not by DBP, which enlarges the rounding in which the programs differ.
        (
            "upscaled_state",
            ".safetensors",
            {"tuning__decorrelate": "whiten", "upscaling__size": 8},
        ),
    ],
)
def test_states_tuned_together_equal_states_of_separate_runs(
    tmp_path, base_model, mode, suffix, choices
):
    choices = {"evaluation__patience": 0, **choices}
    train_here(stack_settings(base_model, mode, **choices), tmp_path / "all")
    together = saved(tmp_path / "all", suffix)
    rows = (tmp_path / "all" / "metrics.jsonl").read_text().splitlines()
    for name, path in TEXTS.items():
        own = mode_settings(
            mode, base_model, data__path=path, optimizer__eps=1e-6, **choices
        )
        train_here(own, tmp_path / name)
        state = load_state(tmp_path / name / f"state{suffix}")
        expected = state.wkv if state.upscaled is None else state.upscaled.memory
        assert_close(together[name], expected, SAME["model"], name)
        first = (tmp_path / name / "metrics.jsonl").read_text().splitlines()[0]
        metric = "held_out_accuracy"
        assert json.loads(rows[0])[f"{name}/{metric}"] == json.loads(first)[metric]
    assert all(np.any(state) for state in together.values())


@pytest.mark.slow
def test_states_tuned_on_questions_and_on_text_equal_those_of_separate_runs(
    tmp_path, base_model
):
    lines = [
        json.dumps({"prompt": f"{i} + {i} =", "answer": f" {2 * i}"})
        for i in range(120)
    ]
    questions = tmp_path / "questions.jsonl"
    questions.write_text("\n".join(lines))
    # Fewer to a row than the questions.
    longer = tmp_path / "longer.jsonl"
    longer.write_text("\n".join(line.replace("=", "is the same as") for line in lines))
    text = tmp_path / "text.txt"
    text.write_text("".join(lines))
    texts = {"adder": str(questions), "talker": str(longer), "reader": str(text)}
    choices = {"evaluation__patience": 0, "steps": 2}
    choices |= {"data__held_out": 0.2, "data__length": 64, "evaluation__length": 48}
    settings = stack_settings(base_model, texts=texts, **choices)
    train_here(settings, tmp_path / "all")
    for name, path in texts.items():
        own = mode_settings(
            "state",
            base_model,
            data__path=path,
            optimizer__eps=1e-6,
            **choices,
        )
        train_here(own, tmp_path / name)
        alone = load_state(tmp_path / name / "state.pth").wkv
        together = load_state(tmp_path / "all" / "states" / f"{name}.pth").wkv
        assert_close(together, alone, SAME["model"], name)
        assert np.any(together)


@pytest.mark.slow
def test_the_result_of_each_state_is_its_own_best_step(
    tmp_path, base_model, monkeypatch, capsys
):
    # By the state's text: best at steps 2 and 0, and better to the end.
    values = {
        "task:mapping": [5.0, 4.0, 3.0, 6.0, 6.0, 1.0],
        "task:facts-8": [1.0, 2.0, 2.0, 2.0, 2.0, 0.0],
        "task:dictionary": [6.0, 5.0, 4.0, 3.0, 2.0, 1.0],
    }
    counts = dict.fromkeys(values, 0)

    def evaluate(mode, params):
        path = mode.settings.data.path
        counts[path] += 1
        value = values[path][counts[path] - 1]
        return {"held_out_nats": Metric.of(value, "nats")}

    monkeypatch.setattr(StateTuningMode, "evaluate", evaluate)
    choices = {"evaluation__every": 1, "evaluation__patience": 2, "keep_every": 1}
    train_here(stack_settings(base_model, **choices), tmp_path)
    found = saved(tmp_path)
    # In a run of its own it would have ended before its last value.
    assert "step 2 measured best for poet" in capsys.readouterr().out
    assert not np.any(found["cook"]) and np.any(found["judge"])
    steps = [int(place.name) for place in (tmp_path / "checkpoints").glob("[0-9]*")]
    assert 2 in steps


@pytest.mark.slow
def test_a_stack_stopped_by_a_signal_resumes_bit_exactly(tmp_path, base_model):
    settings = stack_settings(base_model)
    train_here(settings, tmp_path / "one")
    with stopping_at(3), pytest.raises(Stopped, match="step 3 is saved"):
        train_here(settings, tmp_path / "two")
    train_here(settings, tmp_path / "two")
    one = saved(tmp_path / "one")
    two = saved(tmp_path / "two")
    for name in TEXTS:
        np.testing.assert_array_equal(one[name], two[name])


@pytest.mark.slow
def test_a_non_finite_state_does_not_stop_the_others(
    tmp_path, base_model, monkeypatch, capsys
):
    settings = stack_settings(base_model, stop_after_bad=2)
    train_here(settings, tmp_path / "whole")
    made = StackMode.make_params

    def broken(mode):
        params = made(mode)
        return params.replace(wkv=params.wkv.at[1].set(jnp.nan))

    monkeypatch.setattr(StackMode, "make_params", broken)
    with pytest.raises(NotFinite, match="no state was saved for cook"):
        train_here(settings, tmp_path / "broken")
    assert "state cook is given up at step 2" in capsys.readouterr().err
    lines = (tmp_path / "broken" / "metrics.jsonl").read_text().splitlines()
    last = [row for row in map(json.loads, lines) if "poet/updated" in row][-1]
    # The rate of an update that is tried again and again.
    assert last["cook/learning_rate"] != last["poet/learning_rate"]
    assert not (tmp_path / "broken" / "states" / "cook.pth").exists()
    for name in ("poet", "judge"):
        np.testing.assert_array_equal(
            load_state(tmp_path / "broken" / "states" / f"{name}.pth").wkv,
            load_state(tmp_path / "whole" / "states" / f"{name}.pth").wkv,
        )


def test_a_folder_names_states_by_its_files(tmp_path):
    for name in ("poet.jsonl", "cook.txt", ".hidden"):
        (tmp_path / name).write_text("text")
    assert state_sources(str(tmp_path)) == {
        "cook": str(tmp_path / "cook.txt"),
        "poet": str(tmp_path / "poet.jsonl"),
    }


def test_invalid_states_are_rejected_in_one_sentence(tmp_path, base_model):
    (tmp_path / "poet.txt").write_text("text")
    (tmp_path / "poet.jsonl").write_text("{}")
    for states, sentence in (
        ({}, "must name texts, or a folder of texts"),
        ({"a/b": "x.txt"}, "must have only names of letters, digits"),
        ({"a": ""}, "`config.tuning.states.a` must name a text"),
        (str(tmp_path / "nowhere"), "must be texts by name, or a folder"),
        (str(tmp_path), "poet.txt and poet.jsonl would be the same state"),
    ):
        with pytest.raises(ValueError, match=sentence):
            state_sources(states)
    with pytest.raises(ValueError, match=r"`config\.data\.path` must be empty if"):
        stack_settings(base_model, data__path="task:mapping")
    with pytest.raises(
        ValueError,
        match=r"left out in mode .* \(modes that read it: state, upscaled_state\)",
    ):
        stack_settings(base_model, "observer")
    with pytest.raises(ValueError, match=r"`config\.tuning\.states\.b`: .*nowhere"):
        train_here(
            stack_settings(base_model, texts={"a": "task:mapping", "b": "nowhere.txt"}),
            tmp_path / "run",
        )
