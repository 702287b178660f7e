"""Traces: files that survive a kill, batches and budgets; rewards and advantages."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import SMALLEST

from rwkv7_jax.model.state import init_state
from rwkv7_jax.test_time.completion_cache import CompletionCache
from rwkv7_jax.test_time.distillation import TraceBatches
from rwkv7_jax.test_time.rewards import advantages, evaluate_rewards
from rwkv7_jax.test_time.traces import (
    TokenBudget,
    Trace,
    completion_rows,
    gradient_tokens,
    read_traces,
    trace_batch,
    write_traces,
)

TRACES = [
    Trace((1, 2), (3, 4, 0), 0.5, "large"),
    Trace((5,), (6,)),
    Trace((7, 8, 9), (1, 0), 2.0),
]


def test_traces_round_trip_through_a_file(tmp_path):
    path = tmp_path / "traces.jsonl"
    write_traces(path, TRACES)
    assert read_traces(path) == TRACES
    assert len(path.read_text().splitlines()) == len(TRACES)


def test_ids_of_any_integer_type_give_the_same_trace():
    ids = np.array([1, 2], np.uint16)
    assert Trace(ids, [3, np.int64(4), 0], 0.5, "large") == TRACES[0]


def test_an_incomplete_last_line_is_dropped_with_a_warning(tmp_path):
    path = tmp_path / "traces.jsonl"
    write_traces(path, TRACES)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.warns(UserWarning, match=r"traces\.jsonl:3: dropped"):
        assert read_traces(path) == TRACES[:2]


@pytest.mark.parametrize(
    "line, reason",
    [
        ("{", "not one JSON object"),
        ("[1]", "must be an object; got list"),
        ('{"prompt": [1]}', "must have the field 'completion'"),
        ('{"prompt": [], "completion": [1]}', "`prompt` must hold at least one id"),
        ('{"prompt": [1.5], "completion": [1]}', "`prompt` must hold only integers"),
        ('{"prompt": [1], "completion": [-1]}', "`completion` must hold only integers"),
        (
            '{"prompt": [9223372036854775808], "completion": [1]}',
            "`prompt` must hold only integers of at least 0 and below 2,147,483,648",
        ),
        (
            '{"prompt": "a", "completion": [1]}',
            "`prompt` must be a list of ids; got str",
        ),
        (
            '{"prompt": [1], "completion": [1], "weight": NaN}',
            "`weight` must be finite",
        ),
        (
            '{"prompt": [1], "completion": [1], "weight": "1"}',
            "`weight` must be a number",
        ),
        (
            '{"prompt": [1], "completion": [1], "weight": true}',
            "`weight` must be a number; got bool",
        ),
        (
            '{"prompt": [1], "completion": [1], "weight": 1' + 400 * "0" + "}",
            "`weight` must be finite and at least 0; got inf",
        ),
        (
            '{"prompt": [1], "completion": [1], "source": 3}',
            "`source` must be a str; got int",
        ),
        (
            '{"prompt": [1], "completion": [1], "wieght": 1}',
            "must have only the fields .*; got 'wieght'",
        ),
    ],
)
def test_a_line_that_is_not_a_trace_is_named_with_its_reason(tmp_path, line, reason):
    path = tmp_path / "traces.jsonl"
    good = json.dumps(dataclasses.asdict(TRACES[0]))
    path.write_text(f"{good}\n{line}\n{good}\n")
    with pytest.raises(ValueError, match=rf"traces\.jsonl:2: .*{reason}"):
        read_traces(path)


def test_the_cache_appends_after_an_incomplete_line(tmp_path):
    path = tmp_path / "cache.jsonl"
    cache = CompletionCache(path)
    cache.put("a", (1, 2), [(3, 0), (4, 5)])
    cache.put("b", (6,), [(7,)])
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.warns(UserWarning, match=r"cache\.jsonl:2: dropped"):
        again = CompletionCache(path)
    assert again.get("a") == [(3, 0), (4, 5)] and again.get("b") is None
    again.put("b", (6,), [(8,)])
    assert CompletionCache(path).get("b") == [(8,)]


def test_a_missing_final_newline_loses_nothing(tmp_path):
    path = tmp_path / "cache.jsonl"
    CompletionCache(path).put("a", (1,), [(2,)])
    path.write_bytes(path.read_bytes()[:-1])
    CompletionCache(path).put("b", (1,), [(3,)])
    both = CompletionCache(path)
    assert both.get("a") == [(2,)] and both.get("b") == [(3,)]


@pytest.mark.parametrize("line", ['[1, "key"]', '"key"', "3", "null"])
def test_a_line_of_the_cache_that_is_not_an_object_is_named(tmp_path, line):
    path = tmp_path / "cache.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match=r"cache\.jsonl:1: .*must be an object; got"):
        CompletionCache(path)


@pytest.mark.parametrize("key", [["a"], {}, 3, None])
def test_a_key_that_is_not_a_string_is_rejected_with_its_line(tmp_path, key):
    path = tmp_path / "cache.jsonl"
    entry = {"key": key, "prompt": [1], "completions": [[2]]}
    path.write_text(json.dumps(entry) + "\n")
    with pytest.raises(ValueError, match=r"cache\.jsonl:1: `key` must be a string"):
        CompletionCache(path)


def test_an_incomplete_line_of_brackets_is_dropped(tmp_path):
    path = tmp_path / "cache.jsonl"
    CompletionCache(path).put("a", (1,), [(2,)])
    before = path.read_bytes()
    path.write_bytes(before + b"[" * 100_000)
    with pytest.warns(UserWarning, match=r"cache\.jsonl:2: dropped"):
        assert CompletionCache(path).get("a") == [(2,)]
    assert path.read_bytes() == before


def test_a_file_that_is_not_a_cache_is_rejected_unchanged(tmp_path):
    path = tmp_path / "traces.jsonl"
    write_traces(path, TRACES)
    before = path.read_bytes()
    with pytest.raises(
        ValueError, match=r"traces\.jsonl:1: an entry must have the fields key"
    ):
        CompletionCache(path)
    assert path.read_bytes() == before
    with pytest.raises(ValueError, match=r"the folder of .* does not exist"):
        CompletionCache(tmp_path / "none" / "cache.jsonl")


def test_the_mask_is_the_weight_at_completion_targets():
    batch = completion_rows(
        [(1, 2), (5,)], [(3, 4, 0), (6,)], length=5, weights=[0.5, 2]
    )
    assert batch["tokens"].tolist() == [[1, 2, 3, 4, 0, 0], [5, 6, 0, 0, 0, 0]]
    assert batch["mask"].tolist() == [[0, 0.5, 0.5, 0.5, 0], [2, 0, 0, 0, 0]]
    assert gradient_tokens(batch) == 4 + 1
    one_row = batch.replace(mask=batch["mask"] * np.float32([[1], [0]]))
    assert gradient_tokens(one_row) == 4


def test_targets_with_a_share_of_the_loss_count_like_those_of_the_mask():
    batch = completion_rows([(1, 2), (5,)], [(3, 4, 0), (6,)], length=5)
    # A share may be negative, such as one of a reward below the mean.
    shares = batch["mask"] * np.float32([[-0.25], [0.5]])
    assert gradient_tokens(batch.replace(mask=None, weights=shares)) == 4 + 1
    # As in a loss, weights take the place of the mask.
    assert gradient_tokens(batch.replace(weights=shares * np.float32([[1], [0]]))) == 4
    with pytest.raises(ValueError, match="must hold 'mask' or 'weights'; it has token"):
        gradient_tokens(batch.replace(mask=None))


def test_epochs_have_each_trace_once_and_batches_depend_only_on_the_step():
    sizes = {"batch_size": 2, "length": 4, "seed": 3}
    rows = [
        row for step in range(3) for row in trace_batch(TRACES, step, **sizes)["tokens"]
    ]
    epochs = [sorted(tuple(map(int, row)) for row in rows[i : i + 3]) for i in (0, 3)]
    assert epochs[0] == epochs[1] and len(set(epochs[0])) == 3
    again = trace_batch(TRACES, 1, **sizes)["tokens"]
    np.testing.assert_array_equal(again, np.stack(rows[2:4]))


def test_traces_without_weight_make_no_batch():
    silent = [dataclasses.replace(trace, weight=0.0) for trace in TRACES[:2]]
    source = TraceBatches([*silent, TRACES[2]], batch_size=1)
    state = init_state(SMALLEST)
    made = [source.batch(state, step) for step in range(3)]
    (batch,) = [batch for batch in made if batch is not None]
    assert batch.tokens[0, :5].tolist() == [7, 8, 9, 1, 0]


def test_traces_longer_than_a_row_are_named():
    with pytest.raises(
        ValueError, match=r"`length` must be at least 4 for trace \d; got 3"
    ):
        trace_batch(TRACES, 0, batch_size=3, length=3)
    with pytest.raises(ValueError, match="`traces` must hold at least one trace"):
        trace_batch([], 0, batch_size=3, length=3)
    with pytest.raises(ValueError, match="`batch_size` must be at least 1"):
        trace_batch(TRACES, 0, batch_size=0, length=3)


def test_budgets_add_and_format_on_one_line():
    total = TokenBudget(1, 2, 3) + TokenBudget(guide_tokens=10_000)
    assert total == TokenBudget(10_001, 2, 3)
    assert str(total) == "10,001 teacher, 2 rollout and 3 gradient tokens"


def test_advantages_are_normalized_and_zero_in_uniform_groups():
    # In float64, the mean of five numbers 0.11 is another number.
    rewards = np.array([[0.0, 1, 0, 0, 1], [0.11] * 5, [3.0, -7, 2, 2, 0]])
    found = advantages(rewards)
    np.testing.assert_allclose(found.sum(1), 0, atol=1e-12)
    np.testing.assert_array_equal(found[1], 0)
    np.testing.assert_allclose(found[[0, 2]].std(1), 1, atol=1e-3)
    np.testing.assert_allclose(advantages(rewards + 5), found, atol=1e-9)
    np.testing.assert_allclose(found[0, 1], 0.6 / (np.sqrt(0.24) + 1e-4))


def test_small_differences_between_large_rewards_count(unchecked):
    rewards = [[1e8, 1e8 + 1], [1e8, 1e8]]
    for given in (rewards, np.array(rewards), [tuple(row) for row in rewards]):
        found = advantages(given)
        np.testing.assert_allclose(found, [[-1, 1], [0, 0]], atol=1e-3)


@pytest.mark.parametrize("completions", ["5", "null", "[]", "{}", '"ab"', '{"a": [1]}'])
def test_an_entry_without_completions_is_named(tmp_path, completions):
    path = tmp_path / "cache.jsonl"
    path.write_text(f'{{"key": "a", "prompt": [1], "completions": {completions}}}\n')
    sentence = (
        r"cache\.jsonl:1: `completions` must be a list of at least one completion"
    )
    with pytest.raises(ValueError, match=sentence):
        CompletionCache(path)


@pytest.mark.parametrize(
    "value",
    [1, True, 0.5, 10**300, np.float32(2), np.uint8(2), np.bool_(True), np.array(3.0)],
)
def test_any_number_type_is_a_valid_reward(value):
    assert evaluate_rewards(lambda p, c: value, [(1,)], [(2,)], name="f: `reward`") == [
        float(value)
    ]


def test_device_arrays_are_valid_rewards():
    assert evaluate_rewards(
        lambda p, c: jnp.float32(2), [(1,)], [(2,)], name="f: `reward`"
    ) == [2.0]


@pytest.mark.parametrize(
    "value, reason",
    [
        (float("nan"), "must be finite; got nan"),
        (float("inf"), "must be finite; got inf"),
        (10**400, "must be finite; got inf"),
        (-(10**400), "must be finite; got -inf"),
        (np.complex64(1), "must be a number; got complex64"),
        (None, "must be a number; got NoneType"),
        ("1", "must be a number; got str"),
        (np.zeros(2), "must be a number; got ndarray"),
    ],
)
def test_an_invalid_reward_is_reported_with_its_prompt(value, reason):
    def reward(prompt, completion):
        return value if prompt == (4,) else 0.0

    with pytest.raises(ValueError, match=rf"f: `reward` of prompt 1 {reason}"):
        evaluate_rewards(
            reward, [(1,), (1,), (4,)], [(2,)] * 3, name="f: `reward`", group=2
        )


def test_a_raising_reward_is_reported_with_its_prompt():
    with pytest.raises(
        ValueError, match="prompt 7 raised ZeroDivisionError: division by zero"
    ):
        evaluate_rewards(
            lambda p, c: 1 / 0, [(1,)], [(2,)], name="f: `reward`", first=7
        )
