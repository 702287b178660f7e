"""The harness's own GSM8K on local files, and names and files that are refused."""

from pathlib import Path

import pytest
from local_questions import write_questions
from tiny_models import lively

from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.text.tokenizer import Tokenizer

pytest.importorskip("lm_eval", reason="lm-eval is not installed: rwkv7_jax[harness]")

from rwkv7_jax.evaluation.harness import StateLM
from rwkv7_jax.evaluation.harness_tasks import load_tasks, measure

CONFIG = RWKV7Config(
    vocab_size=257, num_layers=1, width=32, head_size=16, implementation="scan"
)
BYTES = Tokenizer.bytes()


@pytest.fixture(scope="module")
def manager():
    """Knows GSM8K alone: all tasks of the harness would take ten seconds to list."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    folder = Path(lm_eval.__file__).parent / "tasks" / "gsm8k"
    return TaskManager(include_path=folder, include_defaults=False)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gsm8k")
    write_questions(folder / "train.jsonl", 10, 4)
    write_questions(folder / "test.jsonl", 20, 4)
    (folder / "empty.jsonl").write_text("")
    (folder / "other.jsonl").write_text('{"text": "no question"}\n')
    return folder


class Knowing(StateLM):
    """Knows all answers but one."""

    def generate_until(self, requests, disable_tqdm=False):
        answers = []
        for index, request in enumerate(requests):
            context, options = request.args
            assert options["until"][0] == "Question:"
            assert context.count("Question:") == 3
            number = int(context.split(" pears")[-2].split()[-1])
            answers.append(f" Easy.\n#### {2 * number + 3 + (index == 2)}")
        return answers


def test_gsm8k_of_the_harness_runs_on_local_files(
    manager, files, tmp_path, monkeypatch
):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    data = {"gsm8k": [str(files / "train.jsonl"), str(files / "test.jsonl")]}
    loaded = load_tasks(["gsm8k"], data, tmp_path, manager=manager)
    params = lively(CONFIG)
    base = StateLM(RWKV7(CONFIG), params, BYTES, rows=4, max_tokens=8)
    scores = measure(base, loaded, shots=2, limit=3)["gsm8k"]
    assert list(scores) == [
        "exact_match,strict-match",
        "exact_match,flexible-extract",
        "bits_per_byte",
    ]
    assert scores["exact_match,strict-match"].value == 0
    # The reference answers, after the blank that the harness puts before them.
    task = loaded.tasks["gsm8k"]
    answers = [" " + doc["answer"] for doc in list(task.test_docs())[:3]]
    assert scores["bits_per_byte"].weights.tolist() == [
        len(a.encode()) for a in answers
    ]
    knowing = Knowing(RWKV7(CONFIG), params, BYTES, rows=4)
    right = measure(knowing, loaded, shots=2, limit=3)["gsm8k"]
    assert right["exact_match,strict-match"].totals.tolist() == [1, 1, 0]
    assert right["bits_per_byte"].difference(scores["bits_per_byte"]) == (0, 0)


@pytest.mark.parametrize(
    ("names", "data", "sentence"),
    [
        (["gsm8kk"], {}, r"must name tasks .*; got 'gsm8kk'; the nearest is gsm8k"),
        (["gsm8k"], {"gsm8k": ["none.jsonl"]}, r"there is no 'none.jsonl'"),
        (
            ["gsm8k"],
            {"gsm8k": ["test.jsonl"] * 3},
            r"train.jsonl,test.jsonl .* 3 files",
        ),
        (["gsm8k"], {"gsm8k": ["empty.jsonl"]}, r"gsm8k could not be loaded"),
        (["gsm8k"], {"gsm8k": ["other.jsonl"]}, r"gsm8k could not be loaded"),
        (
            ["gsm8k"],
            {"gsm8k": ["a.jsonl"]},
            r"`config.task_data.gsm8k` must name files",
        ),
    ],
)
def test_what_cannot_be_loaded_is_one_sentence(
    manager, files, tmp_path, monkeypatch, names, data, sentence
):
    monkeypatch.chdir(files)
    with pytest.raises(ValueError, match=sentence) as caught:
        load_tasks(names, data, tmp_path / "tasks", manager=manager)
    assert "\n" not in str(caught.value)
