"""Questions of files: which are asked, and the accuracy from every state."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from random_checkpoints import random_params, random_state

from rwkv7_jax.data.documents import held_out_threshold
from rwkv7_jax.data.records.record import parse_record
from rwkv7_jax.evaluation.task_scores import score_table
from rwkv7_jax.generation.generate import generate
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import init_state
from rwkv7_jax.runs.comparison import Comparison
from rwkv7_jax.runs.learnt_questions import tuning_records
from rwkv7_jax.runs.question_answers import AskedQuestions
from rwkv7_jax.runs.settings import as_config, read_settings
from rwkv7_jax.test_time.questions import QuestionSet
from rwkv7_jax.text.tokenizer import Tokenizer

# One layer compiles fastest.
CONFIG = RWKV7Config(
    vocab_size=257, num_layers=1, width=32, head_size=16, implementation="scan"
)
TOKENIZER = Tokenizer.bytes()
COUNT = 10


@pytest.fixture(scope="module")
def comparison():
    params = random_params(CONFIG, dtype=jnp.float32)
    starts = {"base": init_state(CONFIG), "tuned state": random_state(CONFIG)}
    return Comparison(RWKV7(CONFIG), params, TOKENIZER, starts)


def record(number, answer="1"):
    return {"prompt": f"Question {number}? ", "answer": answer}


def write(path, records):
    path.write_text("".join(json.dumps(one) + "\n" for one in records))


def settings_of(path, **more):
    values = {"questions": str(path), **more}
    values["test_time"] = {"tokens": 4, "at_once": 4, **more.get("test_time", {})}
    return read_settings(values)


def ids(number):
    return tuple(TOKENIZER.encode(record(number)["prompt"]))


def test_the_accuracy_is_that_of_the_models_own_answers(comparison, tmp_path):
    prompts = [ids(number) for number in range(COUNT)]
    drawn = generate(
        comparison.model, comparison.params, prompts, tokens=4, temperature=0
    ).drawn
    said = [TOKENIZER.decode([id for id in one if id]).strip() for one in drawn]
    # The base's own words are the answers of the first six.
    known = [said[number] if number < 6 else "other" for number in range(COUNT)]
    assert all(said)
    path = tmp_path / "qa.jsonl"
    write(path, [record(number, known[number]) for number in range(COUNT)])
    asked = AskedQuestions.read(settings_of(path), TOKENIZER)
    assert asked.prompts == prompts
    done = []
    rows = {
        name: {
            "questions": asked.answer(
                comparison, start, on_progress=lambda *shape: done.append(shape)
            )
        }
        for name, start in comparison.starts.items()
    }
    # Four are answered at once.
    assert done == [(4, COUNT), (8, COUNT), (10, COUNT)] * 2
    base = rows["base"]["questions"]
    assert base["accuracy"].totals.tolist() == [1] * 6 + [0] * 4
    assert base["accuracy"].standard_error == pytest.approx(
        np.std([1] * 6 + [0] * 4, ddof=1) / np.sqrt(COUNT)
    )
    cut = [len(one) == 4 and one[-1] != 0 for one in drawn]
    assert base["cut off"].totals.tolist() == cut
    _, first, second = score_table("questions", rows).splitlines()
    assert first.split()[:3] == ["base", "0.6000", "+-0.1633"]
    assert len(second) <= 100


def test_a_limit_selects_the_first_questions(tmp_path):
    path = tmp_path / "qa.jsonl"
    write(path, [record(number) for number in range(COUNT)])
    asked = AskedQuestions.read(settings_of(path, limit=3), TOKENIZER)
    assert asked.prompts == [ids(0), ids(1), ids(2)]
    assert asked.notes[0].startswith("3 questions of ")


def test_questions_without_a_known_answer_are_counted(tmp_path):
    path = tmp_path / "qa.jsonl"
    write(path, [record(0, "1"), record(1, "no number")])
    settings = settings_of(path, test_time={"verifier": "last_number"})
    asked = AskedQuestions.read(settings, TOKENIZER)
    assert any("no known answer to 1 of them" in note for note in asked.notes)


def held_out_ids(count):
    """Returns the questions that text data holds out with a share of 0.3."""
    threshold = held_out_threshold(0.3)
    hashes = [parse_record(record(number)).content_hash() for number in range(count)]
    return [ids(number) for number in range(count) if hashes[number] < threshold]


def run_folder(folder, settings):
    """Writes the settings of a run; returns the path of a state."""
    folder.mkdir()
    (folder / "settings.json").write_text(json.dumps(as_config(settings)))
    return str(folder / "state.pth")


def test_training_questions_of_a_run_on_text_are_left_out(tmp_path):
    trained = tmp_path / "qa.jsonl"
    records = [record(number) for number in range(40)]
    write(trained, records)
    data = {"path": str(trained), "held_out": 0.3}
    settings = read_settings({"mode": "state", "data": data})
    state = run_folder(tmp_path / "run", settings)
    held_out = held_out_ids(40)
    assert 0 < len(held_out) < 40
    # By what they are, and not by the file's name.
    copy = tmp_path / "copy.jsonl"
    write(copy, [*records, record(40)])
    asked = AskedQuestions.read(settings_of(copy, state=state), TOKENIZER)
    assert asked.prompts == [*held_out, ids(40)]
    assert f"left out: {40 - len(held_out)} in the training part" in asked.notes[1]
    # The same without a run, where the settings name the data.
    asked = AskedQuestions.read(settings_of(copy, data=data, state="a.pth"), TOKENIZER)
    assert asked.prompts == [*held_out, ids(40)]


def test_training_questions_of_a_run_on_questions_are_left_out(tmp_path):
    path = tmp_path / "qa.jsonl"
    write(path, [record(number) for number in range(COUNT)])
    data = {"path": str(path), "held_out": 0.3}
    settings = read_settings({"mode": "test_time", "seed": 3, "data": data})
    state = run_folder(tmp_path / "run", settings)
    questions = QuestionSet(str(path), TOKENIZER, seed=3, held_out=0.3)
    measured = questions.prompts(0, 3, held_out=True)
    asked = AskedQuestions.read(settings_of(path, state=state), TOKENIZER)
    assert sorted(asked.prompts) == sorted(map(tuple, measured))


def test_one_of_several_states_is_compared_with_its_own_text(tmp_path):
    path = tmp_path / "qa.jsonl"
    write(path, [record(number) for number in range(40)])
    states = {"one": str(path), "two": "elsewhere.txt"}
    settings = read_settings(
        {"mode": "state", "tuning": {"states": states}, "data": {"held_out": 0.3}}
    )
    run_folder(tmp_path / "run", settings)
    state = str(tmp_path / "run" / "states" / "one.pth")
    asked = AskedQuestions.read(settings_of(path, state=state), TOKENIZER)
    assert asked.prompts == held_out_ids(40)


@pytest.mark.parametrize("place", ["~/texts", "~/texts/one.jsonl"])
def test_texts_in_the_home_folder_are_found(tmp_path, monkeypatch, place):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "texts").mkdir()
    path = tmp_path / "texts" / "one.jsonl"
    write(path, [record(number) for number in range(40)])
    texts = {"tuning": {"states": place}}
    if place.endswith(".jsonl"):
        texts = {"data": {"path": place}}
    settings = read_settings({"mode": "state", **texts})
    settings = dataclasses.replace(
        settings, data=dataclasses.replace(settings.data, held_out=0.3)
    )
    run_folder(tmp_path / "run", settings)
    state = str(tmp_path / "run" / "states" / "one.pth")
    asked = AskedQuestions.read(settings_of(path, state=state), TOKENIZER)
    assert asked.prompts == held_out_ids(40)


def test_a_state_whose_texts_are_gone_gets_a_note(tmp_path):
    path = tmp_path / "qa.jsonl"
    write(path, [record(0), record(1)])
    texts = {"two": "elsewhere.txt"}
    for states in (str(tmp_path / "gone"), texts):
        settings = read_settings({"mode": "state", "tuning": {"states": states}})
        folder = tmp_path / f"run-{len(states)}"
        run_folder(folder, settings)
        state = str(folder / "states" / "one.pth")
        asked = AskedQuestions.read(settings_of(path, state=state), TOKENIZER)
        assert asked.notes[1].startswith("unknown: whether some are in the training")


def test_a_state_of_unknown_origin_gets_a_note(tmp_path):
    path = tmp_path / "qa.jsonl"
    write(path, [record(0), record(1)])
    asked = AskedQuestions.read(settings_of(path, state="a.pth"), TOKENIZER)
    assert len(asked.prompts) == 2
    assert asked.notes[1].startswith("unknown: whether a.pth was tuned on some")
    gone = read_settings({"mode": "state", "data": {"path": "gone.jsonl"}})
    state = run_folder(tmp_path / "run", gone)
    asked = AskedQuestions.read(settings_of(path, state=state), TOKENIZER)
    assert asked.notes[1].startswith("unknown: whether some are in the training part")


@pytest.mark.parametrize(
    "other",
    [
        {"data": {"path": 3}},
        {"data": {"path": ["a"]}},
        {"data": {"path": "", "held_out": "much"}},
        {"data": {"path": "", "held_out": 7}},
        {"data": {"path": ""}, "tuning": 3},
        {"data": {"path": ""}, "test_time": {"method": []}},
        {"data": {"path": ""}, "seed": -1.5},
    ],
)
def test_settings_of_another_program_are_ignored(tmp_path, other):
    (tmp_path / "settings.json").write_text(json.dumps(other))
    settings = read_settings({"state": str(tmp_path / "state.pth")})
    assert tuning_records(settings) == {settings.state: None}


def test_a_file_that_was_all_trained_on_is_rejected(tmp_path):
    path = tmp_path / "qa.jsonl"
    write(path, [record(0), record(1)])
    settings = settings_of(path, data={"path": str(path), "held_out": 0.0})
    with pytest.raises(ValueError, match=r"`config\.questions` must hold a question"):
        AskedQuestions.read(settings, TOKENIZER)
