"""The logger's clock: a line has the speed of its own steps, even if it is written late."""

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rwkv7_jax.data.batch import Batch
from rwkv7_jax.runs.early_stopping import Progress
from rwkv7_jax.runs.exit_codes import NotFinite
from rwkv7_jax.runs.monitoring.metrics_logger import MetricsLogger
from rwkv7_jax.runs.settings import Settings
from rwkv7_jax.training.stacked_step import create_stack, make_stacked_step

_TOKENS = 8


def _half(updates: Any) -> Any:
    """Falls by half with every update, from 1."""
    return 0.5**updates


def _named(metrics: dict[str, Any]) -> dict[str, float]:
    """Names the metrics of a stack by the places of its states."""
    numbers = {}
    for metric, values in metrics.items():
        for place, value in np.ndenumerate(values):
            numbers["/".join((*map(str, place), metric))] = float(value)
    return numbers


class _Clock:
    """A clock that only a test advances."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 100.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


def _logger(
    steps: int,
    log_every: int,
    *,
    progress: Progress | None = None,
    rates: Callable[[Any], Any] = _half,
    stop_after_bad: int = Settings.stop_after_bad,
) -> tuple[MetricsLogger, dict[int, Any]]:
    """Returns a logger, and the metrics that it logs by their step."""
    lines: dict[int, Any] = {}
    settings = Settings(steps=steps, log_every=log_every, stop_after_bad=stop_after_bad)
    mode = SimpleNamespace(
        settings=settings,
        step_metrics=_named,
        flops_per_token=None,
    )
    logger = MetricsLogger(
        SimpleNamespace(log=lines.__setitem__, log_bad=lambda *_: None),  # type: ignore
        mode,  # type: ignore
        progress or Progress(),
        start_step=0,
        batches=SimpleNamespace(waited=0.0),  # type: ignore
        rates=rates,
    )
    return logger, lines


_SCHEDULE = optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))


def test_a_run_that_gives_up_names_the_batches_where_process_0_keeps_them(tmp_path):
    logger, _ = _logger(4, 1, stop_after_bad=2)
    # Another process has a temporary folder as `path`.
    logger._directory.workdir = tmp_path / "run"
    logger._directory.path = tmp_path / "temporary"
    _take(logger, 1, updated=0.0)
    _take(logger, 2, updated=0.0)
    with pytest.raises(NotFinite, match=f"are in {tmp_path}/run/bad_batches.jsonl"):
        logger.drain()


def test_a_large_state_is_a_warning_of_the_run(tmp_path):
    logger, _ = _logger(4, 1)
    said = []
    logger._directory.warn = said.append
    _take(logger, 1, state_max=1e6)
    _take(logger, 2, state_max=1e6)
    logger.drain()
    assert len(said) == 1 and said[0].startswith("the largest entry of the state is")


def _take(
    logger: MetricsLogger, number: int, *, updated: float = 1.0, state_max: float = 1.0
) -> None:
    one = jnp.float32(1)
    metrics = {"loss": one, "grad_norm": one, "updated": np.float32(updated)}
    metrics["state_max"] = np.float32(state_max)
    tokens = np.zeros((1, _TOKENS + 1), np.int32)
    logger.before_step(number, _SCHEDULE)
    logger.log_step(number, metrics, Batch(tokens=tokens))


def test_a_line_is_written_without_new_work_for_the_device():
    schedule = optax.cosine_decay_schedule(1.0, 10)
    logger, lines = _logger(5, 1, rates=schedule)
    for number in range(1, 4):
        _take(logger, number)
    # Work on the device would begin with a transfer of its arguments.
    with jax.transfer_guard_host_to_device("disallow_explicit"):
        logger.drain()
    assert lines[3]["learning_rate"] == pytest.approx(float(schedule(0)))


@pytest.mark.parametrize(("steps", "log_every"), [(12, 10), (5, 1), (7, 3), (2, 10)])
def test_every_logged_line_has_the_speed_of_its_own_steps(
    monkeypatch, unchecked, steps, log_every
):
    clock = _Clock(monkeypatch)
    logger, lines = _logger(steps, log_every)
    for number in range(1, steps + 1):
        clock.now += 2.0
        _take(logger, number)
    logger.drain()

    assert steps in lines
    for number, line in lines.items():
        assert line["tokens_per_second"] == pytest.approx(_TOKENS / 2), number


def test_the_bar_moves_with_every_step_and_has_the_newest_numbers(unchecked):
    logger, _ = _logger(6, 3)
    shown = []
    logger._bar = SimpleNamespace(update=lambda *shape: shown.append(shape))
    for number in range(1, 7):
        _take(logger, number)
    logger.drain()
    steps, texts = zip(*shown, strict=True)
    assert steps == (1, 2, 3, 4, 5, 6)
    assert texts[:2] == ("", "") and texts[2] == texts[3] == texts[4] != texts[5]
    assert texts[2].startswith("loss 1.000") and texts[2].endswith("tokens/s")


def test_the_line_of_the_bar_ends_before_a_pause_in_which_others_print():
    logger, _ = _logger(6, 3)
    events = []
    logger._bar = SimpleNamespace(close=lambda: events.append("ended"))
    with logger.paused():
        events.append("printed")
    assert events == ["ended", "printed"]


def test_time_outside_training_does_not_count(monkeypatch, unchecked):
    clock = _Clock(monkeypatch)
    logger, lines = _logger(6, 3)
    for number in range(1, 7):
        clock.now += 2.0
        _take(logger, number)
        if number == 4:
            with logger.paused():
                clock.now += 50.0
    logger.drain()

    speeds = [line["tokens_per_second"] for line in lines.values()]
    assert speeds == pytest.approx([_TOKENS / 2] * 2)
    assert lines[6]["paused_seconds"] == pytest.approx(50.0)


def test_targets_are_counted_at_their_step_and_not_behind_later_ones(unchecked):
    logger, lines = _logger(4, 1)
    tokens = np.zeros((2, _TOKENS + 1), np.int32)
    metrics = {"loss": jnp.float32(1), "updated": np.float32(1)}
    for number in range(1, 5):
        mask = np.zeros((2, _TOKENS), np.float32)
        mask[0, :number] = 0.5
        on_device = jnp.asarray(mask)
        is_even = number % 2 == 0
        batch = Batch(tokens=tokens, mask=on_device if is_even else mask)
        logger.before_step(number, _SCHEDULE)
        logger.log_step(number, metrics, batch)
        # What is asked for later finds no mask any more.
        on_device.delete()
    logger.drain()

    shares = [line["targets_in_loss"] for line in lines.values()]
    assert shares == [number / (2 * _TOKENS) for number in range(1, 5)]


def _loss(params, batch):
    return params * jnp.mean(batch["slope"]), {}


def test_the_logged_rate_of_each_state_is_the_one_of_its_update(unchecked):
    progress = Progress.of_states(["poet", "cook"])
    logger, lines = _logger(6, 1, progress=progress)
    tx = optax.chain(optax.clip(1.0), optax.scale_by_learning_rate(_half))
    step = make_stacked_step(_loss, tx, np.ones(2, np.float32))
    state = create_stack(jnp.zeros(2), tx)
    tokens = np.zeros((2, _TOKENS + 1), np.int32)
    mask = np.ones((2, _TOKENS), np.float32)
    params = [np.zeros(2)]
    for number in range(1, 7):
        slope = np.ones(2, np.float32)
        if number in (2, 3, 4):
            slope[1] = np.nan
        logger.before_step(number, state.opt_state)
        rows = {"tokens": tokens, "mask": mask, "slope": slope}
        state, metrics = step(state, rows)
        logger.log_step(number, metrics, Batch(tokens=tokens, mask=mask))
        params.append(np.asarray(state.params))
    logger.drain()

    # The slope is 1, so that an update is the rate itself.
    applied = -np.diff(params, axis=0)
    names = ("0/learning_rate", "1/learning_rate")
    logged = np.array([[line[name] for name in names] for line in lines.values()])
    assert (applied[1:4, 1] == 0).all()
    made = applied != 0
    np.testing.assert_array_equal(logged[made], applied[made])
