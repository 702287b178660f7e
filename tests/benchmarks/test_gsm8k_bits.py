"""The GSM8K table, on synthetic questions of the same form."""

import json
import sys
from fractions import Fraction

import numpy as np
import pytest
from local_questions import write_questions
from tiny_models import lively

from benchmarks import gsm8k, gsm8k_bits
from rwkv7_jax.checkpoints.model_files import save_model
from rwkv7_jax.evaluation.scoring import token_nats
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.model.state import init_state
from rwkv7_jax.training.costs import tree_size

CONFIG = RWKV7Config(vocab_size=256, num_layers=1, width=32, head_size=16)


@pytest.mark.parametrize(
    ("sum_text", "result", "expected"),
    [
        ("48/2", "24", True),
        ("12/60", "0.2", True),
        ("1/3", ".33", True),
        ("2/3", "0.67", True),
        ("2/3", "0.65", False),
        ("1/3", "0", False),
        ("$1,200+50", "1250", True),
        ("20%*50", "10", True),
        ("(2+3)*4-1", "19", True),
        ("-3+5", "2", True),
        ("+8", "8", True),
        ("010+1", "11", True),
        ("0.1+0.2", "0.3", True),
        ("7//2", "3", True),
        ("5/0", "1", False),
        ("2**9", "512", False),
        ("abs(3)", "3", False),
        ("3+", "3", False),
        ("", "", False),
        ("1+" * 100 + "1", "101", False),
    ],
)
def test_an_annotation_is_valid_if_its_result_is_correct(sum_text, result, expected):
    assert gsm8k.holds(sum_text, result) is expected


def test_annotations_are_found_in_their_text():
    text = "She has 2+3=<<2+3=5>>5 pears, 5*2=<<5*2=11>>11 with <<no>> more."
    assert gsm8k.annotations(text) == [True, False]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("It is 3.\n#### 3", True),
        ("#### -1,200.5\n", True),
        ("It is 3. #### 3", False),
        ("#### three", False),
        ("#### 3\nNo.", False),
        ("", False),
    ],
)
def test_an_answer_is_well_formed_if_its_last_line_is_a_number(answer, expected):
    assert gsm8k.is_well_formed(answer) is expected


def test_arithmetic_is_exact():
    assert gsm8k._value("0.1+0.2") == Fraction(3, 10)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of two layers, and two files of questions."""
    place = tmp_path_factory.mktemp("gsm8k")
    save_model(place / "m.pth", lively(CONFIG), CONFIG)
    write_questions(place / "train.jsonl", 10, 24)
    write_questions(place / "test.jsonl", 60, 5)
    return place


@pytest.fixture(scope="module")
def subject(folder):
    return gsm8k.Subject(
        str(folder / "m.pth"),
        str(folder / "train.jsonl"),
        str(folder / "test.jsonl"),
        retention="charmaps",
        steps=2,
        rows=2,
        length=160,
        questions=4,
        tokens=8,
    )


def test_bits_cover_only_the_answer(subject):
    state = init_state(subject.config)
    bits, sizes = subject.bits(subject.measured, subject.params, state)
    for row, one in enumerate(subject.measured):
        ids = np.array([[*one.prompt, *one.completion]])
        nats = token_nats(subject.model, subject.params, state, ids)[0]
        ends = len(subject.tokenizer.stop_ids)
        of_answer = nats[len(one.prompt) - 1 : len(nats) - ends]
        assert len(of_answer) == sizes[row] == len(f" {one.answer}")
        np.testing.assert_allclose(bits[row], of_answer.sum() / np.log(2), rtol=1e-5)


def test_validation_and_test_questions_are_not_trained_on(subject):
    learnt = set()
    for seed in range(3):
        for step in range(20):
            learnt |= {one.text for one in subject.training_rows(step, seed)}
    assert len(learnt) == 24 - gsm8k.JUDGES
    assert not learnt & {one.text for one in subject.judges}
    assert not learnt & {one.text for one in subject.measured}


def test_lora_has_at_most_as_many_parameters_as_the_state(subject):
    for like, kind in (
        (gsm8k_bits.START, gsm8k_bits.SMALL_LORA),
        (gsm8k_bits.UPSCALED, gsm8k_bits.LORA),
    ):
        size = gsm8k_bits.state_method(like, subject).size
        lora = gsm8k_bits.low_rank_method(size, subject)
        assert 0.5 * size < lora.size <= size, kind
        assert lora.size == tree_size(lora.start(0))


def test_an_invalid_file_is_rejected_with_the_line(tmp_path, subject):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({"question": "a", "answer": "b"}) + "\n{}\n")
    with pytest.raises(ValueError, match=r"bad.jsonl:2: must be an object"):
        gsm8k.read_questions(str(path), subject.tokenizer)


@pytest.mark.slow
def test_every_row_is_measured_on_the_same_questions(folder, monkeypatch):
    words = ["--train", folder / "train.jsonl", "--test", folder / "test.jsonl"]
    words += ["--model", folder / "m.pth", "--retention", "charmaps", "--steps", 2]
    words += [
        "--rows",
        2,
        "--length",
        160,
        "--questions",
        4,
        "--tokens",
        8,
        "--seeds",
        2,
    ]
    words += ["--kinds", gsm8k_bits.START, gsm8k_bits.SMALL_LORA]

    def run(*more):
        monkeypatch.setattr(sys, "argv", ["gsm8k_bits", *map(str, (*words, *more))])
        gsm8k_bits.main()

    # Each row by itself; the prompts are still missing when they are gathered.
    for row in ("base", "start"):
        run("--only", row, "--cells", folder / row)
    gathered = ("--gather", folder / "base", folder / "start")
    run(*gathered, "--cells", folder / "gathered", "--json", folder / "g.json")
    assert set(json.loads((folder / "g.json").read_text())["rows_of_the_table"]) == {
        "base",
        "reference answers",
        gsm8k_bits.START,
    }
    run("--cells", folder / "start", "--json", folder / "r.json")
    rows = json.loads((folder / "r.json").read_text())["rows_of_the_table"]
    assert rows["base"]["bits_per_byte"]["difference"] == 0
    assert rows["reference answers"]["well_formed"] == 1
    assert rows["reference answers"]["annotations_that_hold"] == 4
    found = rows[gsm8k_bits.START]
    bits = found["bits_per_byte"]
    assert len(bits["by_seed"]) == 2
    assert bits["value"] == pytest.approx(np.mean(bits["by_seed"]))
    base = rows["base"]["bits_per_byte"]["value"]
    assert bits["difference"] == pytest.approx(bits["value"] - base)
    assert found["search"]["rate"] in gsm8k_bits.RATES
