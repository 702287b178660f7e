"""Synthetic tasks: answers are correct, alone in the loss, and fixed by seed and step."""

import re
import tracemalloc

import numpy as np
import pytest

from rwkv7_jax.data.tasks.synthetic_tasks import (
    TASKS,
    find_task,
    question_batch,
    task_batch,
)
from rwkv7_jax.data.tasks.toy_tasks import fact_table

SIZES = {"batch_size": 4, "length": 120}
LINES = {
    "copy": lambda words: words[0],
    "recall": lambda words: dict(words[:-1])[words[-1]],
    "parity": lambda words: str(words[0].count("1") % 2),
    "addition": lambda words: str(int(words[0]) + int(words[1])),
}
SEQUENCES = {
    "C": lambda word: word,
    "R": lambda word: word[::-1],
    "N": lambda word: "".join(digit((number(s) + 1) % 32) for s in word),
    "X": lambda word: SEQUENCES["N"](word[::-1]),
}
ARITHMETIC = {
    "A": lambda a, b: a + b,
    "S": lambda a, b: a - b,
    "P": lambda a, b: a * b,
}
NAMES = [*TASKS, "modulus-9", "product-7", "facts-64", "swaps-3", "swaps-5"]


def text(ids) -> str:
    return bytes(i - 1 for i in ids if i).decode()


def number(symbol: str) -> int:
    return int(symbol, 32)


def digit(value: int) -> str:
    return "0123456789abcdefghijklmnopqrstuv"[value]


def rows(name, **changes):
    """Yield each row's text without padding, and whether each character is in the loss."""
    batch = task_batch(name, 3, **(SIZES | {"batch_size": 12} | changes))
    for ids, mask in zip(batch.tokens, batch.mask, strict=True):
        size = np.count_nonzero(ids)
        assert not ids[size:].any() and not mask[size - 1 :].any()
        yield text(ids), [False, *mask[: size - 1].astype(bool)]


@pytest.mark.parametrize("name", LINES)
def test_line_answers_are_correct_and_alone_in_the_loss(name):
    batch = task_batch(name, 3, **SIZES)
    assert batch.tokens.shape == (4, 121) and batch.mask.shape == (4, 120)
    for row, mask in zip(batch.tokens, batch.mask, strict=True):
        lines = text(row).split("\n")[:-1]
        assert len(lines) > 2
        answers = []
        for line in lines:
            question, answer = line.split(" = ")
            assert LINES[name](question.split(" ")[1:]) == answer
            answers.append(answer + "\n")
        counted = text(row[1:] * mask.astype(int))
        assert re.fullmatch(re.escape("".join(answers)) + r"\w*", counted)


@pytest.mark.parametrize(("name", "width"), [("dictionary", 2), ("mapping", 1)])
def test_a_key_keeps_its_value_and_counts_from_its_second_occurrence(name, width):
    sizes = set()
    for row, counts in rows(name, batch_size=200):
        assert row[0] == name[0].upper() and not counts[0]
        known = {}
        for first in range(1, len(row), width + 1):
            key = row[first : first + width]
            value = row[first + width]
            assert counts[first : first + width + 1] == [False] * width + [key in known]
            assert known.setdefault(key, value) == value
        sizes.add(len(known))
    assert sizes == set(range(2, 9) if name == "dictionary" else range(4, 14))


def check_arithmetic(row, counts):
    modulus = number(row[1])
    assert (len(row) - 2) % 4 == 0
    assert counts == [False] * 2 + [False, False, False, True] * ((len(row) - 2) // 4)
    for a, b, equals, c in zip(*(row[2 + i :: 4] for i in range(4)), strict=True):
        assert equals == "=" and max(number(a), number(b)) < modulus
        assert number(c) == ARITHMETIC[row[0]](number(a), number(b)) % modulus


@pytest.mark.parametrize(
    ("name", "leads"),
    [
        ("modular", {letter + modulus for letter in "AS" for modulus in "57bd"}),
        ("modulus-9", {"A9"}),
        ("product-7", {"P7"}),
    ],
)
def test_arithmetic_results_are_correct_and_alone_in_the_loss(name, leads):
    found = list(rows(name, batch_size=100))
    for row, counts in found:
        check_arithmetic(row, counts)
    assert {row[:2] for row, _ in found} == leads


@pytest.mark.parametrize(
    ("name", "changes"),
    [("sequence", "CRN"), ("steer", "R"), ("novel", "X"), ("reverse", "R")],
)
def test_sequences_are_transformed_by_their_letter(name, changes):
    letters = set()
    for row, counts in rows(name, batch_size=100):
        examples = re.findall(r"(.)(\w{6})>(\w{6})", row)
        assert len(examples) * 14 == len(row) == 112
        assert counts == ([False] * 8 + [True] * 6) * 8
        hidden = [
            c for c in changes if all(SEQUENCES[c](x) == y for _, x, y in examples)
        ]
        assert len(hidden) == 1
        assert {letter for letter, *_ in examples} in ({"?"}, {hidden[0]})
        letters.add(row[0])
    expected = {"sequence": set("?CRN"), "steer": {"?"}, "novel": {"?"}}
    assert letters == expected.get(name, set(changes))


def test_the_mixture_has_equal_shares():
    leads = [row[0] for row, _ in rows("mixture", batch_size=42)]
    assert leads[:20] == ["D"] * 10 + ["M"] * 10
    assert set(leads[20:30]) == set("AS") and set(leads[30:]) == set("?CRN")


def test_facts_depend_on_the_seed_and_occur_once_per_row():
    keys, values = fact_table(64, 0)
    facts = {
        digit(key // 32) + digit(key % 32): digit(value)
        for key, value in zip(keys, values, strict=True)
    }
    assert len(facts) == 64
    for changes in ({}, {"held_out": True}, {"length": 25, "batch_size": 8}):
        seen = []
        for row, counts in rows("facts-64", **changes):
            assert row[0] == "F" and counts == [False] + [False, False, True] * (
                len(row) // 3
            )
            found = re.findall(r"(\w\w)(\w)", row[1:])
            assert all(facts[key] == value for key, value in found)
            assert len({key for key, _ in found}) == len(found)
            assert len(found) == changes.get("length", 120) // 3
            seen += [key for key, _ in found]
        assert set(seen) == set(facts), (
            "every batch that is large enough goes through all facts"
        )
    assert set(fact_table(64, 1)[0]) != set(keys)
    assert all(fact_table(256, 0)[0][:64] == keys) and all(
        fact_table(256, 0)[1][:64] == values
    )


def test_few_facts_leave_the_rest_of_a_row_padded():
    assert all(len(row) == 1 + 3 * 5 for row, _ in rows("facts-5"))


def test_every_query_is_answered_by_its_pair():
    for row, counts in rows("pairs"):
        pairs, queries = row[1:].split(">")
        known = dict(zip(pairs[::2], pairs[1::2], strict=True))
        assert row[0] == "Q" and len(known) * 2 == len(pairs) == 58
        assert all(
            known[k] == v for k, v in zip(queries[::2], queries[1::2], strict=True)
        )
        assert counts == [False] * 60 + [False, True] * (len(queries) // 2)
        assert len(row) > 119


@pytest.mark.parametrize("objects", [3, 5])
def test_the_order_after_swaps_is_correct(objects):
    sizes = set()
    for row, counts in rows(f"swaps-{objects}", batch_size=200):
        swaps, answer = row[1:].split("=")
        order = list(range(objects))
        for one, two in zip(swaps[::2], swaps[1::2], strict=True):
            assert one != two
            one = int(one)
            two = int(two)
            order[one], order[two] = order[two], order[one]
        assert row[0] == "W" and answer == "".join(map(str, order))
        assert counts == [False] * (len(row) - objects) + [True] * objects
        sizes.add(len(swaps) // 2)
    assert min(sizes) == 1 and max(sizes) == (121 - 2 - objects) // 2


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_depends_on_seed_step_and_split(name):
    batches = {
        (seed, step, held): task_batch(
            name, step, seed=seed, held_out=held, **SIZES
        ).tokens
        for seed in (0, 1)
        for step in (0, 1)
        for held in (False, True)
    }
    assert len({batch.tobytes() for batch in batches.values()}) == 8
    again = task_batch(name, 1, seed=1, held_out=True, **SIZES).tokens
    np.testing.assert_array_equal(again, batches[1, 1, True])


@pytest.mark.parametrize("name", NAMES)
def test_memory_for_making_rows_is_linear_in_their_length(name):
    peaks = []
    for length in (1024, 4096):
        tracemalloc.start()
        task_batch(name, 0, batch_size=4, length=length)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 5 * peaks[0]


@pytest.mark.parametrize("name", NAMES)
def test_rows_too_short_for_one_example_are_rejected(name):
    shortest = find_task(name).shortest
    task_batch(name, 0, batch_size=2, length=shortest)
    if find_task(name).exact:
        questions, answers = question_batch(name, 0, batch_size=50)
        assert len(questions) == len(answers) == 50 and all(map(len, answers))
        assert all(
            len(q) + len(a) <= shortest + 1
            for q, a in zip(questions, answers, strict=True)
        )
    with pytest.raises(
        ValueError, match=f"`length` must be at least {shortest} for {name}; got"
    ):
        task_batch(name, 0, batch_size=2, length=shortest - 1)


@pytest.mark.parametrize(
    ("name", "question", "right"),
    [
        ("steer", r"\?(\w{6})>", lambda word: word[::-1]),
        ("reverse", r"R(\w{6})>", lambda word: word[::-1]),
        ("novel", r"\?(\w{6})>", SEQUENCES["X"]),
        ("modulus-9", r"A9(\d)(\d)=", lambda a, b: str((int(a) + int(b)) % 9)),
        ("product-7", r"P7(\d)(\d)=", lambda a, b: str(int(a) * int(b) % 7)),
        ("copy", r"copy (\w+) = ", lambda word: word + "\n"),
        ("addition", r"add (\d+) (\d+) = ", lambda a, b: f"{int(a) + int(b)}\n"),
    ],
)
def test_every_question_has_its_exact_answer(name, question, right):
    one = question_batch(name, 0, batch_size=20)
    two = question_batch(name, 1, batch_size=20)
    assert one != two and one == question_batch(name, 0, batch_size=20)
    for ids, answer in zip(*one, strict=True):
        assert text(answer) == right(*re.fullmatch(question, text(ids)).groups())


def test_longer_rows_give_harder_questions():
    short, _ = question_batch("swaps-5", 0, batch_size=50)
    long, _ = question_batch("swaps-5", 0, batch_size=50, length=60)
    assert max(map(len, short)) == 4 and max(map(len, long)) > 40


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("x", "one of copy, recall, .*, facts-1 to facts-1024, .*; got 'x'.$"),
        ("stear", r"got 'stear' \(the nearest is steer\).$"),
        ("facts-0", "facts-1 to facts-1024, .*; got 'facts-0'"),
        ("facts-1025", "got 'facts-1025'"),
        ("modulus-09", "got 'modulus-09'"),
        ("modulus-", "got 'modulus-'"),
        ("facts-" + "9" * 5000, "got 'facts-999"),
        ("swaps", r"got 'swaps' \(the nearest is swaps\)."),
    ],
)
def test_unknown_tasks_and_numbers_are_rejected(name, sentence):
    with pytest.raises(ValueError, match=sentence):
        task_batch(name, 0, **SIZES)


def test_a_task_without_exact_answers_has_no_questions():
    with pytest.raises(ValueError, match="one right answer; got mapping"):
        question_batch("mapping", 0, batch_size=1)


def test_a_deprecated_task_name_works_with_a_warning():
    with pytest.warns(UserWarning, match="^find_task: mqar is now called pairs"):
        old = task_batch("mqar", 3, batch_size=4, length=40)
    new = task_batch("pairs", 3, batch_size=4, length=40)
    np.testing.assert_array_equal(old.tokens, new.tokens)
    np.testing.assert_array_equal(old.mask, new.mask)
