"""A metrics logger that reads metrics two steps late, so the host does not block on the device."""

import collections
import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rwkv7_jax.data.batch import Batch
from rwkv7_jax.evaluation.metric import Metric
from rwkv7_jax.reports.goodput import COMPILING, PAUSES, STEPS
from rwkv7_jax.reports.system_info import peak_memory
from rwkv7_jax.runs.compilation_cache import CompileClock
from rwkv7_jax.runs.early_stopping import Progress
from rwkv7_jax.runs.exit_codes import NotFinite
from rwkv7_jax.runs.input_pipeline import BatchSource
from rwkv7_jax.runs.modes.base import TrainingMode
from rwkv7_jax.runs.modes.scheduled_optimizer import RateAt, updates_made
from rwkv7_jax.runs.monitoring.progress_bar import ProgressBar
from rwkv7_jax.runs.run_directory import RunDirectory
from rwkv7_jax.sharding import to_host
from rwkv7_jax.training.costs import mfu

# How many steps may be in flight on the device while an older one is logged.
_LAG = 2


@dataclasses.dataclass
class _Step:
    """A step in flight.

    Attributes:
        number: the number of the step, counted from 1.
        metrics: the metrics of its update, on the device.
        batch: the batch of the step; None if it had nothing to learn from.
        targets: the number of targets in the loss; None if the step is not written to the log.
        rate: the learning rate of its update, of each state; None if the step is not written to the
            log.
        ended: the time at which the device finished it; NaN until then.
    """

    number: int
    metrics: Mapping[str, Any]
    batch: Batch | None
    targets: Any = None
    rate: Any = None
    ended: float = math.nan

    def is_ready(self) -> bool:
        """Returns whether the device has finished it, without waiting."""
        arrays: list[Any] = jax.tree.leaves(self.metrics)
        # NumPy arrays have no `is_ready`, and JAX's type stubs omit it.
        return all(x.is_ready() for x in arrays if hasattr(x, "is_ready"))


# The count over a sharded mask is replicated to every process.
_count_on_device = jax.jit(jnp.count_nonzero)


def _count_targets(mask: Any) -> Any:
    """Counts the targets of a mask on the host or device that holds it, without waiting."""
    if isinstance(mask, np.ndarray):
        return np.count_nonzero(mask)
    return _count_on_device(mask)


class MetricsLogger:
    """The log of steps and evaluations; also counts skipped updates.

    Attributes:
        progress: the progress of the run up to the last logged step.
    """

    def __init__(
        self,
        directory: RunDirectory,
        mode: TrainingMode,
        progress: Progress,
        *,
        start_step: int,
        batches: BatchSource,
        rates: RateAt,
        devices: int = 1,
    ):
        """Starts the clocks and the progress bar.

        Args:
            directory: receives the metrics.
            mode: the mode of the run.
            progress: the restored progress.
            start_step: the step at which the run starts or resumes.
            batches: the source of batches, which measures how long the loop waited for them.
            rates: maps the number of updates to the learning rate of the next one.
            devices: the number of devices that share the rows of a step.
        """
        self.progress = progress
        self._directory = directory
        self._mode = mode
        self._settings = mode.settings
        self._start_step = start_step
        self._batches = batches
        # One program, whose result stays when the step donates the count.
        self._rate_at = jax.jit(rates)
        self._devices = devices
        self._bar = ProgressBar(self._settings.steps - start_step, self._settings.mode)
        self._shown = ""
        self._compile_clock = CompileClock()
        self._pending: collections.deque[_Step] = collections.deque()
        self._rate: Any = None
        self._warned = False
        self._last_end = time.monotonic()
        # The following are measured since the last line of the log.
        self._began = self._last_end
        self._paused = 0.0
        self._compiled_in_pauses = 0.0
        self._tokens = 0
        self._waited_before = 0.0
        self._compiled_before = 0.0

    def before_step(self, number: int, opt_state: Any) -> None:
        """Computes the learning rate of a step, if it is logged.

        The device computes it before the step. If it did so when the line is written, the rate
        would queue behind later steps, and reading it would wait for them.

        Args:
            number: the number of the step, counted from 1.
            opt_state: the optimizer state before the step, which donates it.
        """
        self._rate = None
        if self._is_written(number):
            self._rate = self._rate_at(updates_made(opt_state))

    def log_step(
        self, number: int, metrics: Mapping[str, Any], batch: Batch | None
    ) -> None:
        """Adds a step in flight and logs an older one.

        Args:
            number: the number of the step, counted from 1.
            metrics: the metrics of its update, on the device.
            batch: the batch of the step; None if it had nothing to learn from.

        Raises:
            NotFinite: too many consecutive updates were skipped.
        """
        step = _Step(number, metrics, batch, rate=self._rate)
        if self._is_written(number) and batch is not None and batch.mask is not None:
            # Counted here, not when the line is written, for the same reason as the rate.
            step.targets = _count_targets(batch.mask)
        self._pending.append(step)
        self._note_ends()
        while len(self._pending) > _LAG:
            self._log_oldest()

    def drain(self) -> None:
        """Logs all steps in flight; this waits for the device."""
        while self._pending:
            self._log_oldest()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Logs all steps in flight and excludes the time of the block from training time.

        It ends the bar's line, because the block prints.
        """
        self.drain()
        self._bar.close()
        began = time.monotonic()
        compiled = self._compile_clock.seconds
        try:
            yield
        finally:
            self._last_end = time.monotonic()
            self._paused += self._last_end - began
            self._compiled_in_pauses += self._compile_clock.seconds - compiled

    def _note_ends(self) -> None:
        """Records when the device finished each step.

        The time between two lines of the log is the time between the ends of their steps. Steps are
        logged late, so an end must be recorded earlier: on CPUs a step has long ended by then. If
        several ends are seen at once, they are spread evenly over the time since the previous end.
        """
        ended = [x for x in self._pending if math.isnan(x.ended) and x.is_ready()]
        now = time.monotonic()
        share = (now - self._last_end) / max(len(ended), 1)
        for step in ended:
            self._last_end += share
            step.ended = self._last_end

    def _log_oldest(self) -> None:
        step = self._pending[0]
        if math.isnan(step.ended):
            jax.block_until_ready(step.metrics)
            self._note_ends()
        self._pending.popleft()
        if step.batch is not None:
            # The last token of a row is only a target.
            rows, length = step.batch.tokens.shape
            self._tokens += rows * (length - 1)
            self._count_skipped(step.number, step.metrics, step.batch)
        if self._is_written(step.number):
            self._write(step)
        else:
            # A step may take minutes.
            self._move_bar(step.number)

    def _is_written(self, number: int) -> bool:
        """Returns whether a step has a line in the log."""
        settings = self._settings
        return number % settings.log_every == 0 or number >= settings.steps

    def _count_skipped(
        self, number: int, metrics: Mapping[str, Any], batch: Batch
    ) -> None:
        """Counts consecutive skipped updates, and ends the run after too many."""
        # This waits for the device, but only for a step that is `_LAG` steps old.
        updated = to_host(metrics["updated"]) != 0
        limit = self._settings.stop_after_bad
        before = self.progress
        self.progress = before.with_update(updated, limit)
        skipped = before.skipped(updated, limit)
        if not skipped:
            return
        # In a stack, report the first state whose update was skipped.
        place, name = skipped[0]
        loss = float(np.ravel(to_host(metrics["loss"]))[place])
        grad_norm = float(np.ravel(to_host(metrics["grad_norm"]))[place])
        numbers: dict[str, Any] = {"loss": loss, "grad_norm": grad_norm}
        if name:
            numbers["states"] = " ".join(name for _, name in skipped)
        self._directory.log_bad(number, numbers, to_host(batch.tokens))
        for name in self.progress.given_up(limit):
            if name in before.given_up(limit):
                continue
            self._directory.warn(
                f"state {name} is given up at step {number}: {limit} consecutive updates were "
                "non-finite; training continues with the other states"
            )
        if self.progress.is_given_up(limit):
            raise NotFinite(
                f"{self.progress.bad} consecutive updates up to step {number} had a non-finite "
                f"loss or gradient (loss {loss}, gradient norm {grad_norm}) and were skipped. "
                f"Their batches are in {self._directory.workdir / 'bad_batches.jsonl'}."
            )

    def _write(self, step: _Step) -> None:
        """Writes one line of the log and moves the progress bar."""
        number = step.number
        batch = step.batch
        numbers = self._mode.step_metrics(to_host(step.metrics))
        if batch is not None and batch.mask is not None:
            share = int(step.targets) / batch.mask.size
            # In plain text all targets always count, so no column is needed.
            if share < 1.0:
                numbers["targets_in_loss"] = share
        numbers |= self._mode.step_metrics({"learning_rate": to_host(step.rate)})
        numbers |= self._speed(step.ended)
        numbers |= self._use_of_devices(numbers["tokens_per_second"])
        self._directory.log(number, numbers)
        self._show(number, numbers)
        self._warn_of_large_state(numbers)

    def _speed(self, now: float) -> dict[str, float]:
        """Returns the speed since the last line, and restarts the clocks.

        Args:
            now: the time at which the line's step ended.
        """
        # At least 1 ns: the clock may not have advanced since the last line.
        seconds = max(now - self._began - self._paused, 1e-9)
        waited = self._batches.waited - self._waited_before
        numbers = {"tokens_per_second": self._tokens / seconds}
        if self._devices > 1:
            numbers["tokens_per_second_per_device"] = (
                self._tokens / seconds / self._devices
            )
        numbers["waiting_share"] = min(waited / seconds, 1.0)
        numbers |= self._shares_of_time(seconds)
        self._began = now
        self._paused = 0.0
        self._compiled_in_pauses = 0.0
        self._tokens = 0
        self._waited_before = self._batches.waited
        self._compiled_before = self._compile_clock.seconds
        return numbers

    def _shares_of_time(self, seconds: float) -> dict[str, float]:
        """Returns the time spent compiling, in steps and in pauses.

        Args:
            seconds: the time since the last line, without pauses.
        """
        total = self._compile_clock.seconds
        in_pauses = self._compiled_in_pauses
        in_steps = total - self._compiled_before - in_pauses
        return {
            COMPILING: round(total, 3),
            STEPS: round(max(seconds - in_steps, 0.0), 3),
            PAUSES: round(max(self._paused - in_pauses, 0.0), 3),
        }

    def _use_of_devices(self, tokens_per_second: float) -> dict[str, float]:
        """Returns the peak memory, and the MFU if the peak FLOPs of the device are known."""
        peak = peak_memory()
        numbers = {f"{peak.of}_peak_mib": round(peak.bytes / 2**20, 1)}
        flops = self._mode.flops_per_token
        if flops is None:
            return numbers
        share = mfu(
            tokens_per_second,
            flops,
            device_kind=jax.devices()[0].device_kind,
            devices=self._devices,
        )
        if share is not None:
            numbers["mfu"] = share
        return numbers

    def _show(self, number: int, numbers: Mapping[str, float]) -> None:
        bits = numbers.get("loss_nats", math.nan) / math.log(2)
        # A loss that is not a cross-entropy, such as an observer's without answers, has no bits.
        loss = numbers.get("loss", math.nan)
        if not math.isnan(bits):
            text = f"loss {bits:.3f} bits"
        elif not math.isnan(loss):
            text = f"loss {loss:.3f}"
        else:
            text = "nothing to learn"
        speed = f"{numbers['tokens_per_second']:.0f} tokens/s"
        self._shown = f"{text}  {speed}"
        self._move_bar(number)

    def _move_bar(self, number: int) -> None:
        """Shows that a step is done, with the newest numbers of the log."""
        self._bar.update(number - self._start_step, self._shown)

    def _warn_of_large_state(self, numbers: Mapping[str, float]) -> None:
        # In a stack the name of the state precedes the name of the metric.
        sizes = [numbers[name] for name in numbers if name.endswith("state_max")]
        largest = max(sizes, default=0.0)
        if self._warned or not largest > self._settings.tuning.warn_above:
            return
        self._warned = True
        self._directory.warn(
            f"the largest entry of the state is {largest:.0f}; lower the learning rate, set "
            "config.tuning.alpha below 1 or add an anchor"
        )

    def log_evaluation(self, number: int, metrics: Mapping[str, Metric]) -> None:
        """Logs an evaluation and updates the best steps.

        Args:
            number: the evaluated step.
            metrics: the metrics of the evaluation, by name.

        Raises:
            ValueError: the metric that decides which step is best is missing.
        """
        self._directory.log(
            number, {name: metric.value for name, metric in metrics.items()}
        )
        self.progress = self.progress.with_evaluation(
            number, metrics, self._settings.evaluation, kept=self._settings.kept_best
        )

    def close(self) -> None:
        """Closes the progress bar."""
        self._bar.close()
