"""Tasks of the harness on local files, and rejected names and files."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from local_questions import write_questions
from tiny_models import lively

from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.text.tokenizer import Tokenizer

pytest.importorskip("lm_eval", reason="lm-eval is not installed: rwkv7_jax[harness]")

from rwkv7_jax.evaluation.harness import StateLM
from rwkv7_jax.evaluation.harness_tasks import (
    _file_of_part,
    _local_settings,
    _own_metrics,
    _pool_parts,
    _scored_answer,
    load_tasks,
    measure,
)
from rwkv7_jax.evaluation.task_scores import QuestionScores

CONFIG = RWKV7Config(
    vocab_size=257, num_layers=1, width=32, head_size=16, implementation="scan"
)
BYTES = Tokenizer.bytes()


@pytest.fixture(scope="module")
def manager():
    """A task manager with a few tasks: listing all of them would take ten seconds."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    tasks = Path(lm_eval.__file__).parent / "tasks"
    folders = [tasks / name for name in ("gsm8k", "arc", "winogrande", "wikitext")]
    return TaskManager(include_path=folders, include_defaults=False)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gsm8k")
    write_questions(folder / "train.jsonl", 10, 4)
    write_questions(folder / "test.jsonl", 20, 4)
    (folder / "empty.jsonl").write_text("")
    (folder / "other.jsonl").write_text('{"text": "no question"}\n')
    return folder


class Knowing(StateLM):
    """A model that knows all answers but one."""

    def generate_until(self, requests, disable_tqdm=False):
        answers = []
        for index, request in enumerate(requests):
            context, options = request.args
            assert options["until"][0] == "Question:"
            assert context.count("Question:") == 3
            number = int(context.split(" pears")[-2].split()[-1])
            answers.append(f" Easy.\n#### {2 * number + 3 + (index == 2)}")
        return answers


@pytest.mark.slow
def test_gsm8k_runs_on_local_files(manager, files, tmp_path, monkeypatch):
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


def write_rows(path, rows):
    """Write a .jsonl file and return its path."""
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def test_bits_are_those_of_the_right_choice_context_or_text(manager, tmp_path):
    names = ["cold", "w\u00e4rm"]
    arc = []
    winogrande = []
    for number, answer in enumerate("AB"):
        choices = {"text": names, "label": ["A", "B"]}
        question = {"id": str(number), "question": f"Is {number} it?"}
        arc.append({**question, "choices": choices, "answerKey": answer})
        sentence = f"Of {number} the _ is it, says Ada."
        options = {"option1": "sea", "option2": "land", "answer": str(number + 1)}
        winogrande.append({"sentence": sentence, **options})
    pages = [{"page": " The sea , it is deep . "}, {"page": "Land"}]
    data = {
        "arc_easy": [write_rows(tmp_path / "arc.jsonl", arc)],
        "winogrande": [write_rows(tmp_path / "winogrande.jsonl", winogrande)],
        "wikitext": [write_rows(tmp_path / "wikitext.jsonl", pages)],
    }
    loaded = load_tasks(list(data), data, tmp_path / "tasks", manager=manager)
    lm = StateLM(RWKV7(CONFIG), lively(CONFIG), BYTES, rows=4)
    scores = measure(lm, loaded, shots=0)
    right = [(f"Question: Is {n} it?\nAnswer:", f" {names[n]}") for n in range(2)]
    assert_bits(scores["arc_easy"]["bits_per_byte"], lm, right)
    assert set(scores["arc_easy"]) == {"acc", "acc_norm", "bits_per_byte"}
    right = [
        ("Of 0 the sea", " is it, says Ada."),
        ("Of 1 the land", " is it, says Ada."),
    ]
    assert_bits(scores["winogrande"]["bits_per_byte"], lm, right)
    # The harness counts the bytes of the page as it was, with its blanks.
    sizes = [len(row["page"]) for row in pages]
    assert scores["wikitext"]["bits_per_byte"].weights.tolist() == sizes
    assert list(scores["wikitext"]) == ["bits_per_byte"]


def assert_bits(scores, lm, pairs):
    """Compare with the scores of these pairs of context and right answer."""
    bits = [-value / math.log(2) for value, _ in lm.score_pairs(pairs)]
    np.testing.assert_allclose(scores.totals, bits, rtol=1e-5)
    assert scores.weights.tolist() == [len(text.encode()) for _, text in pairs]


def test_a_text_is_measured_by_its_bytes_and_an_answer_outside_the_choices_is_not():
    text = SimpleNamespace(OUTPUT_TYPE="loglikelihood_rolling")
    page = {"metrics": [], "resps": [[-3.0]], "arguments": [("w\u00e4rm",)]}
    assert _scored_answer(text, page) == (-3.0, 5)
    choice = SimpleNamespace(
        OUTPUT_TYPE="multiple_choice", doc_to_choice=lambda document: ["a", "b"]
    )
    question = {"doc": {}, "arguments": [("Q", "a")] * 3, "resps": [[(-1.0, True)]] * 3}
    assert _scored_answer(choice, {**question, "target": 1}) == (-1.0, 1)
    # Whitespace at the end of a context is scored with the answer.
    padded = {**question, "target": 1, "arguments": [("Q: \n", "a")] * 3}
    assert _scored_answer(choice, padded) == (-1.0, 3)
    for outside in (-1, 2):
        assert _scored_answer(choice, {**question, "target": outside}) is None


def test_only_means_that_all_tasks_of_a_group_have_are_kept():
    one = QuestionScores(np.ones(2), np.ones(2), ("x", "y"))
    pooled = _pool_parts([{"acc": one, "acc_norm": one}, {"acc": one}])
    assert list(pooled) == ["acc"] and pooled["acc"].totals.tolist() == [1] * 4
    samples = []
    for value in (1.0, 0.0):
        sample = {"metrics": ["acc", "most"], "filter": "none", "prompt_hash": "h"}
        samples.append({**sample, "acc": value, "most": value})
    # The second one is their maximum.
    found = _own_metrics(samples, {"acc,none": 0.5, "most,none": 1.0})
    assert list(found) == ["acc"]


def test_local_files_give_the_examples_and_tell_where_their_records_are(tmp_path):
    train = write_rows(tmp_path / "train.jsonl", [{"a": 1}])
    test = tmp_path / "test.json"
    test.write_text(json.dumps({"canary": "c", "examples": [{"a": 2}]}))
    settings = _local_settings(tmp_path, [Path(train), test])
    assert settings["fewshot_split"] == settings["training_split"] == "train"
    assert settings["dataset_kwargs"]["field"] == "examples"
    assert _local_settings(tmp_path, [Path(train)])["fewshot_split"] == "test"
    # A task without a subset is named by itself.
    manager = SimpleNamespace(
        all_subtasks={"train"}, task_index={"train": SimpleNamespace(cfg={})}
    )
    file = _file_of_part("train", tmp_path, manager, "`x`")
    assert file == (tmp_path / "train.jsonl").resolve()


def test_a_group_weights_all_questions_equally(tmp_path):
    from lm_eval.tasks import TaskManager

    parts = {"one": 3, "two": 1}
    for name, count in parts.items():
        rows = [{"q": f"{name} {n}", "right": n % 2} for n in range(count)]
        path = write_rows(tmp_path / f"{name}.jsonl", rows)
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {
                "data_files": {"test": path},
                "cache_dir": str(tmp_path / "cache"),
            },
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{q}}",
            "doc_to_target": "right",
            "doc_to_choice": ["yes", "no"],
            "metric_list": [{"metric": "acc"}],
        }
        (tmp_path / f"{name}.yaml").write_text(json.dumps(task))
    group = {"group": "both", "task": list(parts)}
    (tmp_path / "both.yaml").write_text(json.dumps(group))
    manager = TaskManager(include_path=tmp_path, include_defaults=False)
    loaded = load_tasks(["both"], {}, tmp_path / "tasks", manager=manager)
    scores = measure(StateLM(RWKV7(CONFIG), lively(CONFIG), BYTES, rows=4), loaded)
    assert set(scores) == {"one", "two", "both"}
    assert len(scores["both"]["acc"].questions) == 4
    expected = (3 * scores["one"]["acc"].value + scores["two"]["acc"].value) / 4
    assert scores["both"]["acc"].value == pytest.approx(expected)
    data = {"both": [str(tmp_path / "one.jsonl")]}
    with pytest.raises(ValueError, match=r"config.task_data.both` must be the folder"):
        load_tasks(["both"], data, tmp_path / "tasks", manager=manager)


def hard_questions(count):
    """Return the content of a BIG-Bench Hard file, whose records are under a key."""
    examples = [
        {"input": f"not ( {n % 2} ) is", "target": str(1 - n % 2)} for n in range(count)
    ]
    return json.dumps({"canary": "never train on this", "examples": examples})


@pytest.fixture(scope="module")
def hard(tmp_path_factory):
    """Two BIG-Bench Hard tasks of the harness, and a folder in the published layout."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    folder = tmp_path_factory.mktemp("bbh")
    parts = []
    for name in ("boolean_expressions", "web_of_lies"):
        (folder / f"{name}.json").write_text(hard_questions(3))
        parts.append(f"bbh_zeroshot_{name}")
    (folder / "group.yaml").write_text(json.dumps({"group": "hard", "task": parts}))
    tasks = Path(lm_eval.__file__).parent / "tasks" / "bbh" / "zeroshot"
    return TaskManager(include_path=[tasks, folder], include_defaults=False), folder


def test_a_group_reads_a_folder_with_one_file_per_task(hard, tmp_path):
    manager, folder = hard
    data = {"hard": [str(folder)]}
    loaded = load_tasks(list(data), data, tmp_path / "tasks", manager=manager)
    assert len(loaded.tasks) == 2
    lm = StateLM(RWKV7(CONFIG), lively(CONFIG), BYTES, rows=4, max_tokens=2)
    scores = measure(lm, loaded, limit=2)
    assert len(scores["hard"]["bits_per_byte"].questions) == 4
    task = loaded.tasks["bbh_zeroshot_web_of_lies"]
    assert task.doc_to_text(list(task.test_docs())[1]).endswith("Q: not ( 1 ) is\nA:")
    pairs = []
    for doc in list(task.test_docs())[:2]:
        pairs.append(
            (task.config.description + task.doc_to_text(doc), " " + doc["target"])
        )
    assert_bits(scores["bbh_zeroshot_web_of_lies"]["bits_per_byte"], lm, pairs)


def test_a_task_reads_records_under_a_key(hard, tmp_path):
    manager, folder = hard
    name = "bbh_zeroshot_web_of_lies"
    data = {name: [str(folder / "web_of_lies.json")]}
    loaded = load_tasks([name], data, tmp_path / "tasks", manager=manager)
    assert len(list(loaded.tasks[name].test_docs())) == 3


def test_a_folder_that_lacks_a_tasks_file_is_rejected(hard, tmp_path):
    manager, _ = hard
    (tmp_path / "boolean_expressions.jsonl").write_text("{}\n")
    data = {"hard": [str(tmp_path)]}
    with pytest.raises(ValueError, match=r"has no web_of_lies\.json"):
        load_tasks(list(data), data, tmp_path / "tasks", manager=manager)


@pytest.mark.parametrize(
    ("names", "data", "sentence"),
    [
        (["gsm8kk"], {}, r"must name tasks .*; got 'gsm8kk'; the nearest is gsm8k"),
        (
            ["gsm8k"],
            {"gsm8k": ["none.jsonl"]},
            r"must name existing files; got 'none.jsonl'",
        ),
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
            r"`config.task_data.gsm8k` must name existing files",
        ),
    ],
)
def test_loading_errors_are_one_sentence(
    manager, files, tmp_path, monkeypatch, names, data, sentence
):
    monkeypatch.chdir(files)
    with pytest.raises(ValueError, match=sentence) as caught:
        load_tasks(names, data, tmp_path / "tasks", manager=manager)
    assert "\n" not in str(caught.value)
