"""Runs with their own vocabulary: trained, resumed only with the same one, evaluated."""

import json
import math

import pytest
from run_programs import MODEL, train_here
from small_vocabularies import DIGITS

from rwkv7_jax.data.token_cache import write_cache
from rwkv7_jax.runs.settings import Settings, read_settings
from rwkv7_jax.text.vocabularies import load_vocabulary

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("unchecked")]


@pytest.fixture
def files(tmp_path):
    """Holds a text of numbers, its vocabulary, and another one of the same size."""
    (tmp_path / "digits.txt").write_text(DIGITS)
    other = DIGITS.replace("'8'", "'x'").replace("'9'", "'8'").replace("'x'", "'9'")
    (tmp_path / "other.txt").write_text(other)
    lines = [json.dumps({"text": f"{i},{str(i)[::-1]}#"}) for i in range(300, 900)]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    return tmp_path


def settings(files, *, steps: int, prompt: str = "12,", **data) -> Settings:
    """Makes the settings of a small run from scratch on the model's 12 ids."""
    return read_settings(
        {
            "mode": "pretrain",
            "model": {**MODEL, "vocab_size": 12},
            "steps": steps,
            "save_every": 2,
            "log_every": 1,
            "data": {
                "path": str(files / "x.jsonl"),
                "vocabulary": str(files / "digits.txt"),
                "length": 16,
                "batch_size": 2,
                **data,
            },
            "evaluation": {"windows": 2, "length": 16},
            "sample": {"prompts": (prompt,), "tokens": 4},
        }
    )


def test_a_run_resumes_with_the_same_vocabulary_under_any_path(files, capsys):
    run = files / "run"
    train_here(settings(files, steps=2), run)
    rows = [
        json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()
    ]
    # Twelve ids of a byte each, and a model that has learnt nothing yet.
    assert rows[-1]["held_out_bits_per_byte"] == pytest.approx(math.log2(12), abs=0.3)
    other = str(files / "other.txt")
    with pytest.raises(
        ValueError, match=r"`data.vocabulary` is .*digits.txt; got .*oth"
    ):
        train_here(settings(files, steps=4, vocabulary=other), run)
    (files / "moved.txt").write_text("\n" + DIGITS)
    moved = str(files / "moved.txt")
    capsys.readouterr()
    train_here(settings(files, steps=4, vocabulary=moved), run)
    assert "from step 2" in capsys.readouterr().out


def test_a_changed_vocabulary_of_the_same_name_is_rejected(files):
    train_here(settings(files, steps=2), files / "run")
    (files / "digits.txt").write_text((files / "other.txt").read_text())
    with pytest.raises(ValueError, match=r"`tokenizer` is file \w+; got file \w+"):
        train_here(settings(files, steps=4), files / "run")


def test_a_cache_of_another_vocabulary_is_rejected(files):
    tokenizer = load_vocabulary(files / "other.txt")
    write_cache([files / "x.jsonl"], files / "y.bin", tokenizer)
    with pytest.raises(
        ValueError, match=r"must be of the model's vocabulary, file \w+;"
    ):
        train_here(settings(files, steps=2, path=str(files / "y.bin")), files / "run")


def test_numbers_are_trained_on_as_they_are(files):
    lines = [
        json.dumps({"text": f"1 2 {i % 12}, 11 {i // 12 % 12} {i // 144}"})
        for i in range(900)
    ]
    (files / "n.jsonl").write_text("\n".join(lines))
    choices = {"vocabulary": "ids", "path": str(files / "n.jsonl")}
    train_here(settings(files, steps=2, prompt="1 2", **choices), files / "run")
    (sample, *_) = (files / "run" / "samples.jsonl").read_text().splitlines()
    text = json.loads(sample)["text"]
    assert all(0 <= int(number) < 12 for number in text.split())
