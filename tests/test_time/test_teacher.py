"""Collecting a teacher's completions: selection, cost, and resuming after a kill."""

import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_checkpoints import random_params
from tiny_models import SMALLEST, random_state

from rwkv7_jax.checkpoints.model_files import model_hash
from rwkv7_jax.generation.generate import generate
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import select
from rwkv7_jax.test_time.rollouts import RolloutSampler
from rwkv7_jax.test_time.teacher import collect_traces
from rwkv7_jax.test_time.traces import TokenBudget

CONFIG = SMALLEST
TEACHER = RWKV7(CONFIG)
PROMPTS = [[1, 2], [3, 4, 5], [6], [1, 2]]
KEY = jax.random.key(4)


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG, dtype=jnp.float32, scale=0.3)


def run(params, prompts=PROMPTS, *, draws=None, **choices):
    choices = {"key": KEY, "at_once": 2} | choices
    if "cache" in choices and "teacher_hash" not in choices:
        choices["teacher_hash"] = model_hash(params, CONFIG)
    draws = {"tokens": 4, "group": 3} | (draws or {})
    teacher = RolloutSampler(TEACHER, params, **draws)
    return collect_traces(teacher, prompts, **choices)


@pytest.fixture(scope="module")
def plain(params):
    return run(params)


def by_prompt(traces, samples=3):
    return [traces[i : i + samples] for i in range(0, len(traces), samples)]


def test_without_a_judge_all_completions_are_kept_in_prompt_order(plain):
    traces, _ = plain
    assert [trace.prompt for trace in traces] == [
        tuple(p) for p in PROMPTS for _ in range(3)
    ]
    assert {trace.weight for trace in traces} == {1.0} and traces[0].source == "teacher"
    assert all(1 <= len(trace.completion) <= 4 for trace in traces)


def test_the_budget_counts_each_prompt_once_and_all_sampled_tokens(plain):
    traces, budget = plain
    drawn = sum(len(trace.completion) for trace in traces)
    assert budget == TokenBudget(guide_tokens=sum(map(len, PROMPTS)) + drawn)


def test_a_repeated_prompt_is_answered_anew(plain):
    first, *_, again = by_prompt(plain[0])
    assert [t.completion for t in first] != [t.completion for t in again]


def test_completions_do_not_depend_on_other_prompts(params, plain):
    others, _ = run(params, [PROMPTS[1], PROMPTS[0]])
    assert by_prompt(others) == by_prompt(plain[0])[1::-1]


def greedy(params, prompts, **choices):
    """Return the greedy completions, their prompts and the cost."""
    traces, budget = run(params, prompts, draws={"temperature": 0}, **choices)
    return (
        [trace.completion for trace in traces],
        [trace.prompt for trace in traces],
        budget,
    )


def test_the_teachers_template_is_not_part_of_the_traces(params):
    prompts = [[1, 2], [4]]
    drawn, kept, budget = greedy(params, prompts, template=lambda p: [9, 9, *p, 8])
    read = greedy(params, [[9, 9, 1, 2, 8], [9, 9, 4, 8]])
    assert (drawn, budget) == (read[0], read[2])
    assert drawn != greedy(params, prompts)[0]
    assert kept == [(1, 2)] * 3 + [(4,)] * 3


def test_the_teacher_starts_from_the_given_state(params):
    state = select(generate(TEACHER, params, [[9, 9, 9]] * 2, tokens=0).state, 0)
    drawn = greedy(params, [[1, 2], [4]], state=state)[0]
    assert drawn == greedy(params, [[9, 9, 9, 1, 2], [9, 9, 9, 4]])[0]


def test_a_verifier_keeps_positive_weights(params, plain):
    traces, budget = run(params, verify=lambda p, c: 0.5 * (c[0] % 2) * (p != (6,)))
    expected = [t for t in plain[0] if t.completion[0] % 2 and t.prompt != (6,)]
    assert [(t.prompt, t.completion) for t in traces] == [
        (t.prompt, t.completion) for t in expected
    ]
    assert 0 < len(expected) < len(plain[0]) and {t.weight for t in traces} == {0.5}
    assert budget == plain[1]


def test_a_vote_keeps_majorities_with_enough_margin(params, plain):
    groups = [[t.completion for t in group] for group in by_prompt(plain[0])]
    answers = [1, 1, 2, 1, 2, 3, 4, 4, 4, None, None, 5]

    def kept(margin):
        said = iter(answers)
        traces, _ = run(params, vote=(lambda completion: next(said), margin))
        return [trace.completion for trace in traces]

    assert kept(0.0) == [*groups[0][:2], *groups[2], groups[3][2]]
    assert kept(1 / 3) == kept(0.0)
    assert kept(0.5) == groups[2]


def test_a_killed_run_resumes_to_the_same_traces_and_budget(params, plain, tmp_path):
    cache = tmp_path / "cache.jsonl"
    seen = []

    def killed(done, total):
        seen.append((done, total))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(params, cache=cache, on_progress=killed)
    assert seen == [(2, 4)] and len(cache.read_text().splitlines()) == 2
    cache.write_bytes(cache.read_bytes()[:-7])
    with pytest.warns(UserWarning, match="dropped"):
        assert run(params, cache=cache) == plain
    lines = cache.read_bytes()
    assert run(params, cache=cache, at_once=4) == plain
    assert cache.read_bytes() == lines and len(lines.splitlines()) == 4


def test_the_cache_depends_on_settings_weights_state_and_key(params, tmp_path):
    cache = tmp_path / "cache.jsonl"
    start = random_state(CONFIG)
    changes = [
        {},
        {"draws": {"tokens": 3}},
        {"draws": {"temperature": 0.5}},
        {"state": start},
        {"source": "other"},
    ]
    changes += [
        {"key": jax.random.key(5)},
        {"draws": {"stop_ids": (0, 3)}},
        {"template": lambda p: [*p, 1]},
    ]
    for change in changes:
        run(params, PROMPTS[:2], cache=cache, **change)
    run(jax.tree.map(lambda x: x + 0.01, params), PROMPTS[:2], cache=cache)
    entries = [json.loads(line) for line in cache.read_text().splitlines()]
    # The name in the traces is no part of what was drawn.
    assert len(entries) == 2 * len(changes) == len({entry["key"] for entry in entries})


def test_a_cache_of_an_earlier_version_is_still_used(params, tmp_path):
    """The keys of the file are those of earlier versions, which computed the hash themselves."""
    cache = tmp_path / "cache.jsonl"
    state = random_state(CONFIG)
    run(params, PROMPTS[:1], cache=cache, state=state)
    options = {"samples": 3, "tokens": 4, "temperature": 1.0, "stop_ids": [0]}
    stamp = digest(
        model_hash(params, CONFIG).encode(),
        str(jax.tree.structure(state)).encode(),
        *(np.asarray(leaf, np.float32).tobytes() for leaf in jax.tree.leaves(state)),
        np.asarray(jax.random.key_data(KEY)).tobytes(),
        json.dumps(options, sort_keys=True).encode(),
    )
    question = digest(json.dumps([[1, 2], [1, 2]]).encode(), b"0")
    entry = json.loads(cache.read_text())
    assert entry["key"] == digest(stamp.encode(), question.encode())


def digest(*parts: bytes) -> str:
    """Hash the parts and their lengths."""
    hasher = hashlib.blake2b(digest_size=16)
    for part in parts:
        hasher.update(len(part).to_bytes(8, "big") + part)
    return hasher.hexdigest()


def test_a_failing_judge_names_its_prompt_and_loses_no_completion(params, tmp_path):
    cache = tmp_path / "cache.jsonl"
    for verify, reason in [
        (lambda p, c: float("nan") if p == (3, 4, 5) else 1, "must be finite; got nan"),
        (lambda p, c: c[9] if p == (3, 4, 5) else 1, "raised IndexError"),
        (lambda p, c: -1 if p == (3, 4, 5) else 1, "must be at least 0; got -1.0"),
    ]:
        with pytest.raises(
            ValueError, match=f"collect_traces: `verify` of prompt 1 {reason}"
        ):
            run(params, cache=cache, verify=verify)
        assert len(cache.read_text().splitlines()) == 2
    with pytest.raises(ValueError, match="`vote` of prompt 0 raised TypeError"):
        run(params, cache=cache, vote=(list, 0.5))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"at_once": 0}, ValueError, "`at_once` must be at least 1"),
        ({"prompts": []}, ValueError, "`prompts` must hold a prompt"),
        (
            {"prompts": [1, 2]},
            TypeError,
            "`prompts` row 0 must be a list of ids; got int",
        ),
        (
            {"prompts": "abc"},
            TypeError,
            "`prompts` must be a list of lists of ids; got str",
        ),
        ({"prompts": [[1], []]}, ValueError, "`prompts` row 1 must hold an id"),
        (
            {"prompts": [[1], [13]]},
            ValueError,
            "`prompts` row 1 must hold ids .* got 13",
        ),
        ({"template": lambda p: [99]}, ValueError, "`template` row 0 must hold ids"),
        (
            {"template": lambda p: p[5]},
            ValueError,
            "`template` of prompt 0 raised IndexError",
        ),
        ({"template": 3}, TypeError, "`template` must be a function; got int"),
        ({"verify": 3}, TypeError, "`verify` must be a function; got int"),
        ({"vote": len}, TypeError, "`vote` must be a function and a margin"),
        (
            {"vote": (len, 2)},
            ValueError,
            "the margin of `vote` must be from 0 to 1; got 2",
        ),
        (
            {"vote": (len, 0), "verify": len},
            ValueError,
            "`verify` and `vote` are mutually exclusive",
        ),
        ({"key": jax.random.split(KEY, 3)}, ValueError, "`key` must be one key"),
        ({"key": 3}, TypeError, "`key` must be a random key; got int"),
        (
            {"cache": "x.jsonl", "teacher_hash": None},
            ValueError,
            "`teacher_hash` must be given with `cache`; got None",
        ),
    ],
)
def test_invalid_arguments_are_rejected_in_one_sentence(
    params, unchecked, change, error, message
):
    with pytest.raises(error, match=rf"collect_traces: {message}"):
        run(params, **change)
