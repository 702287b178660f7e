"""Answers in completions, and advantages from rewards."""

import dataclasses
import json

import numpy as np
import pytest

from rwkv7_jax.test_time import (
    VERIFIERS,
    AdvantageRule,
    QuestionSet,
    Rollouts,
    TokenBudget,
    advantages,
    make_policy_batch,
)
from rwkv7_jax.test_time.questions import find_verifier
from rwkv7_jax.test_time.rewarded_rollouts import replace_groups
from rwkv7_jax.text.tokenizer import Tokenizer


@pytest.mark.parametrize(
    ("verifier", "text", "answer"),
    [
        ("exact", " Paris \n", "Paris"),
        ("exact", "  ", None),
        ("hash_number", "so 3 + 4 = 7.\n#### 7", "7"),
        ("hash_number", "#### 1,200", "1200"),
        ("hash_number", "#### $1200.00", "1200"),
        ("hash_number", "#### -0.50 dollars", "-0.5"),
        ("hash_number", "#### 1\n#### 2", "2"),
        ("hash_number", "the answer is 7", None),
        ("hash_number", "####", None),
        ("last_number", "3 apples and 12 pears", "12"),
        ("last_number", "it costs 1,234,567.50.", "1234567.5"),
        ("last_number", "in 2,3 or 4", "4"),
        ("last_number", "none", None),
        # All digits count, however many there are.
        ("last_number", "=" + 30 * "1" + "2", 30 * "1" + "2"),
        ("last_number", "=" + 30 * "1" + "3.50", 30 * "1" + "3.5"),
        ("last_number", "007", "7"),
        ("last_number", "-0.00", "0"),
        ("last_number", "100", "100"),
        ("last_number", f"{10**40 + 1} or {10**40 + 2}", str(10**40 + 2)),
        ("letter", "The answer is (B).", "B"),
        ("letter", "B", "B"),
        ("letter", "C) because A is wrong", "C"),
        ("letter", "A good question. Answer: D", "D"),
        ("letter", "all of them", None),
    ],
)
def test_a_verifier_normalizes_the_answer(verifier, text, answer):
    assert VERIFIERS[verifier](text) == answer


@pytest.mark.parametrize(
    ("verifier", "completion", "reward"),
    [
        ("exact", "12", 1.0),
        ("exact", " 12\n", 1.0),
        ("exact", "123", 0.0),
        ("exact", "12 apples", 0.0),
        ("last_number", "12 apples", 1.0),
        ("last_number", "123", 0.0),
        ("last_number", "that makes 12.0", 1.0),
        ("hash_number", "#### 12", 1.0),
        ("hash_number", "12", 0.0),
    ],
)
def test_rewards_compare_the_whole_answer(tmp_path, verifier, completion, reward):
    path = tmp_path / "questions.jsonl"
    expected = "#### 12" if verifier == "hash_number" else "12"
    path.write_text(f'{{"prompt": "6 + 6 =", "answer": "{expected}"}}\n')
    tokenizer = Tokenizer.bytes()
    questions = QuestionSet(str(path), tokenizer, verifier=verifier)
    prompt = questions.prompts(0, 1)[0]
    ids = [*tokenizer.encode(completion), *questions.stop_ids[:1]]
    assert questions.reward(prompt, ids) == reward


def test_a_vote_compares_normalized_answers(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text('{"prompt": "6 + 6 =", "answer": "12"}\n')
    tokenizer = Tokenizer.bytes()
    questions = QuestionSet(str(path), tokenizer, verifier="last_number")
    answers = {
        questions.given_answer(tokenizer.encode(text))
        for text in ("12", "it is 12", "12.0", "so: 12")
    }
    assert answers == {"12"}
    assert questions.given_answer(tokenizer.encode("none")) is None


def test_an_empty_completion_has_no_vote():
    questions = QuestionSet("task:mapping", Tokenizer.bytes())
    assert questions.given_answer([0]) is None
    assert questions.given_answer([5, 0]) == (5,)


def write_questions(path, answers):
    lines = [json.dumps({"prompt": q, "answer": a}) for q, a in answers.items()]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def texts(questions, count, *, held_out):
    prompts = questions.prompts(0, count, held_out=held_out)
    return {Tokenizer.bytes().decode(prompt) for prompt in prompts}


def test_a_test_set_is_fully_evaluated_and_never_trained_on(tmp_path):
    train = write_questions(tmp_path / "a.jsonl", {f"q{n}": "1" for n in range(10)})
    test = write_questions(tmp_path / "b.jsonl", {"t1": "2", "t2": "2", "q3": "1"})
    with pytest.warns(UserWarning, match="1 questions are not trained on"):
        questions = QuestionSet(train, Tokenizer.bytes(), evaluation=test)
    assert texts(questions, 30, held_out=True) == {"t1", "t2", "q3"}
    trained = texts(questions, 30, held_out=False)
    assert len(trained) == 8 and "q3" not in trained
    prompt = Tokenizer.bytes().encode("t1")
    assert questions.reward(prompt, Tokenizer.bytes().encode("2")) == 1.0


def test_a_test_set_must_match_the_kind_of_training_data(tmp_path):
    train = write_questions(tmp_path / "a.jsonl", {"q1": "1", "q2": "1"})
    with pytest.raises(ValueError, match="`evaluation` must be a task if"):
        QuestionSet(train, Tokenizer.bytes(), evaluation="task:mapping")
    with pytest.raises(ValueError, match="`evaluation` must leave a question"):
        QuestionSet(train, Tokenizer.bytes(), evaluation=train)


def test_several_question_files_are_joined(tmp_path):
    one = write_questions(tmp_path / "a.jsonl", {"q1": "1", "q2": "1"})
    two = write_questions(tmp_path / "b.jsonl", {"r1": "1", "r2": "1"})
    questions = QuestionSet(f"{one},{two}", Tokenizer.bytes())
    found = texts(questions, 9, held_out=True) | texts(questions, 9, held_out=False)
    assert found == {"q1", "q2", "r1", "r2"}


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.mark.parametrize("seed", range(5))
def test_equal_prompts_stay_in_one_split(tmp_path, seed):
    lines = [{"prompt": f"q{n % 4}", "answer": "1"} for n in range(20)]
    path = write_lines(tmp_path / "q.jsonl", lines)
    questions = QuestionSet(path, Tokenizer.bytes(), seed=seed, held_out=0.5)
    measured = texts(questions, 40, held_out=True)
    trained = texts(questions, 40, held_out=False)
    assert measured and trained and not measured & trained
    assert measured | trained == {"q0", "q1", "q2", "q3"}


@pytest.mark.parametrize(("held_out", "part"), [(0, "held_out"), (1.0, "train")])
def test_a_share_that_leaves_a_split_empty_is_rejected(tmp_path, held_out, part):
    path = write_questions(tmp_path / "a.jsonl", {"q1": "1", "q2": "1"})
    with pytest.raises(ValueError, match=f"has no question in its part '{part}'"):
        QuestionSet(path, Tokenizer.bytes(), held_out=held_out)


def test_a_separate_test_set_leaves_all_questions_for_training(tmp_path):
    path = write_questions(tmp_path / "a.jsonl", {"q1": "1", "q2": "1"})
    test = write_questions(tmp_path / "b.jsonl", {"t1": "1"})
    questions = QuestionSet(path, Tokenizer.bytes(), held_out=0, evaluation=test)
    assert texts(questions, 9, held_out=False) == {"q1", "q2"}
    assert texts(questions, 9, held_out=True) == {"t1"}


def test_a_prompt_with_several_answers_is_rejected(tmp_path):
    lines = [{"prompt": "q", "answer": "1"}, {"prompt": "q", "answer": "2"}]
    path = write_lines(tmp_path / "q.jsonl", lines)
    with pytest.raises(ValueError, match="one answer per prompt; 'q' has '1' and '2'"):
        QuestionSet(path, Tokenizer.bytes())
    QuestionSet(path, Tokenizer.bytes(), verifier=None)


@pytest.mark.parametrize(
    ("verifier", "answer", "can"),
    [
        ("exact", "", False),
        ("exact", "12", True),
        ("hash_number", "12", False),
        ("hash_number", "#### 12", True),
        ("letter", "yes", False),
    ],
)
def test_unanswerable_questions_are_detected(tmp_path, verifier, answer, can):
    path = write_questions(tmp_path / "q.jsonl", {"q1": answer, "q2": answer})
    questions = QuestionSet(path, Tokenizer.bytes(), verifier=verifier)
    assert questions.can_be_answered is can


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("own_syntax", "def f(:\n", "own_syntax.py, line 1: SyntaxError: "),
        ("own_error", "\nraise RuntimeError('no')\n", "line 2: RuntimeError: no."),
        ("own_import", "import not_there_at_all\n", "line 1: ModuleNotFoundError: "),
        ("own_number", "reward = 3\n", "'reward' is of type int in `.*own_number.py`."),
        ("own_nothing", "", "'reward' is no such name in "),
        (None, "", "must be one of exact, .*: No module named 'own_absent'."),
    ],
)
def test_a_reward_that_cannot_be_imported_is_named(
    tmp_path, monkeypatch, name, text, sentence
):
    if name:
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match=sentence) as caught:
        find_verifier(f"{name or 'own_absent'}:reward")
    assert "\n" not in str(caught.value)


def test_a_module_without_a_file_is_named_by_its_name():
    with pytest.raises(ValueError, match=r"'reward' is no such name in `sys`\."):
        find_verifier("sys:reward")


def test_an_unknown_verifier_is_named(tmp_path):
    with pytest.raises(
        ValueError, match="QuestionSet: `verifier` must be one of exact"
    ):
        QuestionSet("task:mapping", Tokenizer.bytes(), verifier="best")


REWARDS = np.array([[0.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0], [3.0, 0.0, 0.0, 0.0]])


def test_leave_one_out_uses_the_mean_of_the_others():
    rule = AdvantageRule(baseline="leave_one_out", scale="none")
    found = advantages(REWARDS, rule)
    for row, column in np.ndindex(REWARDS.shape):
        others = np.delete(REWARDS[row], column).mean()
        np.testing.assert_allclose(found[row, column], REWARDS[row, column] - others)


def test_without_a_scale_advantages_are_reward_differences():
    found = advantages(REWARDS, AdvantageRule(scale="none"))
    np.testing.assert_allclose(found, REWARDS - REWARDS.mean(axis=1, keepdims=True))


@pytest.mark.parametrize("scale", ["std", "none"])
def test_advantages_of_a_group_sum_to_zero(scale):
    for baseline in ("mean", "leave_one_out"):
        rule = AdvantageRule(baseline=baseline, scale=scale)
        np.testing.assert_allclose(advantages(REWARDS, rule).sum(axis=1), 0, atol=1e-12)


def test_leave_one_out_needs_two_completions():
    rule = AdvantageRule(baseline="leave_one_out")
    with pytest.raises(ValueError, match="two completions per prompt"):
        advantages(np.ones((2, 1)), rule)


def drawn(lengths, first=1):
    """Return rollouts of one group whose completions have these lengths."""
    width = 8
    mask = (np.arange(width)[None] < np.array(lengths)[:, None]).astype(np.float32)
    return Rollouts(
        tokens=np.full((len(lengths), width + 1), first),
        mask=mask,
        prompts=[(1,)] * len(lengths),
        completions=[(first,) * length for length in lengths],
        budget=TokenBudget(rollout_tokens=sum(lengths)),
    )


def weights_of(average):
    """Return each row's share of the loss for completions of 1, 2 and 5 tokens of at most 10."""
    rule = AdvantageRule(scale="none", average=average)
    made = make_policy_batch(
        drawn([1, 2, 5]),
        lambda prompt, completion: float(len(completion)),
        group=3,
        rule=rule,
        tokens=10,
    )
    shares = made.batch.mask / made.batch.mask.sum()
    rewards = np.array([1.0, 2.0, 5.0])
    return shares.sum(axis=1) * made.batch.advantages / (rewards - rewards.mean())


def test_the_average_sets_the_weight_of_long_completions():
    np.testing.assert_allclose(weights_of("token"), np.array([1, 2, 5]) / 8, rtol=1e-6)
    np.testing.assert_allclose(weights_of("row"), np.full(3, 1 / 3), rtol=1e-6)
    np.testing.assert_allclose(
        weights_of("constant"), np.array([1, 2, 5]) / 30, rtol=1e-6
    )


def test_uniform_groups_are_replaced_and_both_draws_are_counted():
    first = drawn([2, 2, 3, 1], first=1)
    second = drawn([4, 1, 2, 2], first=2)
    first = dataclasses.replace(first, logps=-first.mask)
    second = dataclasses.replace(second, logps=-second.mask)
    mixed = replace_groups(first, second, np.array([True, False]), group=2)
    assert [len(row) for row in mixed.completions] == [4, 1, 3, 1]
    assert mixed.tokens[:, 0].tolist() == [2, 2, 1, 1]
    assert mixed.mask.sum(axis=1).tolist() == [4, 1, 3, 1]
    np.testing.assert_array_equal(mixed.logps, -mixed.mask)
    assert mixed.budget.rollout_tokens == 17
