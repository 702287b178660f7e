"""The search for a learning rate: its size, its choice, and that it tunes as a run does."""

import math

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rwkv7_jax.training.train_step import TrainState, make_train_step
from rwkv7_jax.tuning.rate_search import (
    LEAST_STEPS,
    choose_rate,
    find_rate,
    plan_search,
)

NAN = float("nan")


@given(
    rates=st.integers(1, 12),
    steps=st.integers(1, 5000),
    rows=st.integers(1, 64),
    share=st.floats(0.01, 1.0),
    measuring=st.floats(0.0, 20.0),
)
def test_a_search_costs_its_share_or_has_the_minimum_of_steps(
    rates, steps, rows, share, measuring
):
    plan = plan_search(rates, steps=steps, rows=rows, share=share, measuring=measuring)
    spent = rates * (plan.steps * plan.rows + measuring) / (steps * rows)
    assert math.isclose(plan.share, spent)
    assert plan.share <= share + 1e-9 or plan.steps == min(LEAST_STEPS, steps)
    # A step is no larger than one of the run, unless the rates are more than its rows.
    assert plan.rows * rates <= max(rows, rates)


def test_the_rate_with_the_lowest_loss_is_chosen_and_an_edge_is_reported():
    assert choose_rate(2.0, {0.01: 1.9, 0.1: 1.5, 1.0: 3.0}).rate == 0.1
    assert choose_rate(2.0, {0.01: 1.9, 0.1: 1.5, 1.0: 3.0}).edge == ""
    assert choose_rate(2.0, {0.01: 1.2, 0.1: 1.5}).edge == "smallest"
    assert choose_rate(2.0, {0.01: 1.9, 0.1: 1.5}).edge == "largest"


def test_diverged_rates_are_ignored():
    assert choose_rate(2.0, {0.01: 1.9, 0.1: NAN, 1.0: math.inf}).rate == 0.01


@pytest.mark.parametrize("losses", [{0.1: 2.0, 1.0: 2.5}, {0.1: NAN}])
def test_no_rate_is_chosen_if_none_beats_no_tuning(losses):
    assert choose_rate(2.0, losses).rate is None


def test_a_nearly_equal_larger_rate_is_preferred():
    assert choose_rate(2.0, {0.1: 1.0, 0.3: 1.15, 1.0: 1.15}).rate == 0.3
    assert choose_rate(2.0, {0.1: 1.0, 0.3: 1.25, 1.0: 1.0}).rate == 0.1
    assert choose_rate(2.0, {0.1: 1.0, 0.3: NAN, 1.0: 1.0}).rate == 0.1
    # A smaller one never is.
    assert choose_rate(2.0, {0.1: 1.001, 0.3: 1.0, 1.0: 1.5}).rate == 0.3
    # The edge is that of the chosen rate, not of the one with the lowest loss.
    assert choose_rate(2.0, {0.1: 1.0, 0.3: 1.15, 1.0: 1.15}).edge == ""
    assert choose_rate(2.0, {0.1: 1.0, 0.3: 1.15}).edge == "largest"


def test_of_equal_gains_the_rate_that_forgets_least_is_chosen():
    losses = {0.1: 1.001, 0.3: 1.0, 1.0: 1.002}
    forgetting = {0.1: 3.0, 0.3: 2.0, 1.0: 1.0}
    assert choose_rate(2.0, losses, forgetting=forgetting).rate == 1.0
    equal = dict.fromkeys(forgetting, 1.0)
    assert choose_rate(2.0, losses, forgetting=equal).rate == 0.1
    # A loss that is NaN is the worst one, whatever its place.
    for rate in losses:
        broken = forgetting | {rate: NAN}
        expected = 0.3 if rate == 1.0 else 1.0
        assert choose_rate(2.0, losses, forgetting=broken).rate == expected
    # Better on what must not be forgotten is no excuse for learning less.
    losses[1.0] = 1.1
    assert choose_rate(2.0, losses, forgetting=forgetting).rate == 0.3


def test_a_model_worse_than_guessing_gets_the_smallest_nearly_equal_rate():
    losses = {0.01: 1.9, 0.03: 1.2, 0.1: 1.05, 0.3: 1.8, 1.0: 1.0, 3.0: 1.1}
    assert choose_rate(2.0, losses, guess=1.5).rate == 0.03
    # One that is better has the next larger rate, as where it is not known what guessing gets.
    for guess in (2.5, NAN, None):
        assert choose_rate(2.0, losses, guess=guess).rate == 3.0
    assert choose_rate(2.0, {0.1: 1.0, 0.3: 1.5}, guess=1.5).rate == 0.1
    # What is forgotten decides there, too.
    forgetting = dict.fromkeys(losses, 1.0)
    found = choose_rate(2.0, losses, forgetting=forgetting, guess=1.5)
    assert found.rate == 1.0


def test_the_choice_reports_its_reason_and_the_nearly_equal_rates():
    lowest = choose_rate(2.0, {0.1: 1.9, 0.3: 1.0, 1.0: 1.5})
    assert lowest.near == (0.3,) and lowest.why == "its loss is the lowest"
    larger = choose_rate(2.0, {0.1: 1.1, 0.3: 1.0, 1.0: 1.15, 3.0: NAN})
    assert larger.near == (0.1, 0.3, 1.0) and "next larger one than 0.3" in larger.why
    unsure = choose_rate(2.0, {0.1: 1.1, 0.3: 1.0}, guess=1.25)
    assert "worse than guessing by frequency (1.2500)" in unsure.why
    equal = {0.1: 1.001, 0.3: 1.0}
    kept = choose_rate(2.0, equal, forgetting={0.1: 1.0, 0.3: 2.0})
    assert "forgets least" in kept.why
    none = choose_rate(2.0, {0.1: 2.1, 0.3: NAN})
    assert none.near == () and none.why == ""


def square(params, batch):
    miss = params["x"] - jnp.mean(batch["tokens"])
    return jnp.sum(jnp.square(miss)), {}


def batches():
    while True:
        yield {
            "tokens": np.ones((2, 3), np.float32),
            "mask": np.ones((2, 2), np.float32),
        }


def test_each_rate_is_tuned_like_a_run_at_that_rate():
    start = {"x": jnp.zeros(3)}

    def measure(params):
        return float(jnp.sum(jnp.square(params["x"] - 1)))

    found = find_rate(
        square, optax.sgd(1.0), start, batches(), measure, steps=4, rates=(0.01, 0.4)
    )
    assert found.base == 3.0 and found.rate == 0.4
    for rate, loss in found.losses.items():
        tx = optax.sgd(rate)
        step = make_train_step(square, tx)
        train = TrainState.create(start, tx)
        source = batches()
        for _ in range(4):
            train, _ = step(train, next(source))
        assert math.isclose(measure(train.params), loss, rel_tol=1e-5)


@pytest.mark.parametrize("count", [0, 3])
def test_a_search_with_too_few_batches_is_rejected(count):
    few = [next(batches()) for _ in range(count)]
    sentence = (
        f"find_rate: `batches` must hold a batch for each of 4 steps; got {count}"
    )
    with pytest.raises(ValueError, match=sentence):
        find_rate(
            square,
            optax.sgd(1.0),
            {"x": jnp.zeros(3)},
            few,
            lambda _: 0.0,
            steps=4,
            rates=(0.01, 0.4),
        )


def test_invalid_rates_are_rejected():
    for rates, sentence in (((), "must hold a number"), ((0.0,), "must be positive")):
        with pytest.raises(ValueError, match=f"find_rate: `rates` {sentence}"):
            find_rate(
                square,
                optax.sgd(1.0),
                {"x": jnp.zeros(3)},
                batches(),
                lambda _: 0.0,
                steps=1,
                rates=rates,
            )


def test_a_search_without_steps_is_rejected():
    start = {"x": jnp.zeros(3)}
    sentence = "find_rate: `steps` must be at least 1; got 0"
    with pytest.raises(ValueError, match=sentence):
        find_rate(
            square,
            optax.sgd(1.0),
            start,
            batches(),
            lambda _: 0.0,
            steps=0,
            rates=np.array([0.1, 0.3]),
        )
