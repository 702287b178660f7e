"""Metrics logger that reads metrics two steps late, so that the host never blocks on the device."""

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
from rwkv7_jax.runs.exit_codes import NotFinite, warn
from rwkv7_jax.runs.input_pipeline import BatchSource
from rwkv7_jax.runs.modes.base import TrainingMode
from rwkv7_jax.runs.modes.scheduled_optimizer import RateAt, copy_updates_made
from rwkv7_jax.runs.monitoring.progress_bar import ProgressBar
from rwkv7_jax.runs.run_directory import RunDirectory
from rwkv7_jax.sharding import to_host
from rwkv7_jax.training.costs import mfu

# Steps that may be under way on the device while an older one is logged.
_LAG = 2


@dataclasses.dataclass
class _Step:
    """A step under way.

    Attributes:
        number: of the step, counted from 1.
        metrics: of its update, on the device.
        batch: of the step; None where it had nothing to learn from.
        targets: how many count in the loss; None where no line needs it.
        updates: made before it, of each state; None where no line needs it.
        ended: when the device was done with it; not a number until then.
    """

    number: int
    metrics: Mapping[str, Any]
    batch: Batch | None
    targets: Any = None
    updates: Any = None
    ended: float = math.nan

    def is_ready(self) -> bool:
        """Returns whether the device is done with it, without waiting."""
        arrays: list[Any] = jax.tree.leaves(self.metrics)
        # NumPy's arrays have no such method, and JAX's stubs leave it out.
        return all(x.is_ready() for x in arrays if hasattr(x, "is_ready"))


# Of a sharded mask every process gets the sum.
_count_on_device = jax.jit(jnp.count_nonzero)


def _count_targets(mask: Any) -> Any:
    """Counts the targets of a mask where it lies, without waiting for a device."""
    if isinstance(mask, np.ndarray):
        return np.count_nonzero(mask)
    return _count_on_device(mask)


class MetricsLogger:
    """Logs steps and evaluations, and counts updates that were skipped.

    Attributes:
        progress: of the run, up to the last step that was logged.
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
            directory: takes the metrics.
            mode: of the run.
            progress: as it was restored.
            start_step: where the run begins or goes on.
            batches: knows how long they were waited for.
            rates: from the updates made to the learning rate of the next one.
            devices: how many share the rows of a step.
        """
        self.progress = progress
        self._directory = directory
        self._mode = mode
        self._settings = mode.settings
        self._start_step = start_step
        self._batches = batches
        self._rates = rates
        self._devices = devices
        self._bar = ProgressBar(self._settings.steps - start_step, self._settings.mode)
        self._compile_clock = CompileClock()
        self._pending: collections.deque[_Step] = collections.deque()
        self._updates: Any = None
        self._warned = False
        self._last_end = time.monotonic()
        # Since the last line of the log:
        self._began = self._last_end
        self._paused = 0.0
        self._compiled_in_pauses = 0.0
        self._tokens = 0
        self._waited_before = 0.0
        self._compiled_before = 0.0

    def before_step(self, number: int, opt_state: Any) -> None:
        """Notes at which learning rate a step is made, if that is logged.

        Args:
            number: of the step, counted from 1.
            opt_state: before the step, which donates it.
        """
        is_written = self._is_written(number)
        self._updates = copy_updates_made(opt_state) if is_written else None

    def log_step(
        self, number: int, metrics: Mapping[str, Any], batch: Batch | None
    ) -> None:
        """Takes a step that is under way, and logs an older one.

        Args:
            number: of the step, counted from 1.
            metrics: of its update, on the device.
            batch: of the step; None where it had nothing to learn from.

        Raises:
            NotFinite: too many updates in a row were skipped.
        """
        step = _Step(number, metrics, batch, updates=self._updates)
        if self._is_written(number) and batch is not None and batch.mask is not None:
            # Now, before later steps: a count that is asked for when the line is written would
            # wait behind them.
            step.targets = _count_targets(batch.mask)
        self._pending.append(step)
        self._note_ends()
        while len(self._pending) > _LAG:
            self._log_oldest()

    def drain(self) -> None:
        """Logs all steps that were taken, which waits for the device."""
        while self._pending:
            self._log_oldest()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Logs all steps; the time of the block does not count as training."""
        self.drain()
        began = time.monotonic()
        compiled = self._compile_clock.seconds
        try:
            yield
        finally:
            self._last_end = time.monotonic()
            self._paused += self._last_end - began
            self._compiled_in_pauses += self._compile_clock.seconds - compiled

    def _note_ends(self) -> None:
        """Notes which steps the device is done with.

        Steps are logged late, and where the host and the device are one they have long ended by
        then: the time between two lines is that between the ends of their steps. Ends that are seen
        together are spread over the time since the one before.
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
            # The last id of a row is only a target.
            rows, length = step.batch.tokens.shape
            self._tokens += rows * (length - 1)
            self._count_skipped(step.number, step.metrics, step.batch)
        if self._is_written(step.number):
            self._write(step)

    def _is_written(self, number: int) -> bool:
        """Returns whether a step has a line in the log."""
        settings = self._settings
        return number % settings.log_every == 0 or number >= settings.steps

    def _count_skipped(
        self, number: int, metrics: Mapping[str, Any], batch: Batch
    ) -> None:
        """Counts how many updates in a row were skipped, and ends the run after too many."""
        # Waits for the device, but only for a step that is `_LAG` steps old.
        updated = to_host(metrics["updated"]) != 0
        limit = self._settings.stop_after_bad
        before = self.progress
        self.progress = before.with_update(updated, limit)
        skipped = before.skipped(updated, limit)
        if not skipped:
            return
        # Of a stack, the first of the states that were left out.
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
            warn(
                f"state {name} is given up at step {number}: {limit} updates in a row were not "
                "finite; the other states go on"
            )
        if self.progress.is_given_up(limit):
            raise NotFinite(
                f"{self.progress.bad} updates in a row, up to step {number}, had a loss or "
                f"gradient that is not finite (loss {loss}, gradient norm {grad_norm}); none "
                f"was made. Their batches are in {self._directory.path / 'bad_batches.jsonl'}."
            )

    def _write(self, step: _Step) -> None:
        """Writes one line of the log and moves the progress bar."""
        number = step.number
        batch = step.batch
        numbers = self._mode.step_metrics(to_host(step.metrics))
        if batch is not None and batch.mask is not None:
            share = int(step.targets) / batch.mask.size
            # Of text all targets count at every step, which needs no column.
            if share < 1.0:
                numbers["targets_in_loss"] = share
        rates = self._rates(to_host(step.updates))
        numbers |= self._mode.step_metrics({"learning_rate": rates})
        numbers |= self._speed(step.ended)
        numbers |= self._use_of_devices(numbers["tokens_per_second"])
        self._directory.log(number, numbers)
        self._show(number, numbers)
        self._warn_of_large_state(numbers)

    def _speed(self, now: float) -> dict[str, float]:
        """Returns what the clocks say since the last line, and restarts them.

        Args:
            now: when the line's step ended.
        """
        # A clock may not have moved since the last line.
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
        """Returns what was spent on steps, pauses and compiling.

        Args:
            seconds: since the last line, without pauses.
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
        """Returns the peak of memory, and the share of the peak FLOPs where it is known."""
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
        # A loss that is no cross entropy, such as an observer's without answers, has no bits.
        loss = numbers.get("loss", math.nan)
        if not math.isnan(bits):
            text = f"loss {bits:.3f} bits"
        elif not math.isnan(loss):
            text = f"loss {loss:.3f}"
        else:
            text = "nothing to learn"
        speed = f"{numbers['tokens_per_second']:.0f} tokens/s"
        self._bar.update(number - self._start_step, f"{text}  {speed}")

    def _warn_of_large_state(self, numbers: Mapping[str, float]) -> None:
        # Of a stack the names have those of the states before them.
        sizes = [numbers[name] for name in numbers if name.endswith("state_max")]
        largest = max(sizes, default=0.0)
        if self._warned or not largest > self._settings.tuning.warn_above:
            return
        self._warned = True
        warn(
            f"the state's largest entry is {largest:.0f}; lower the learning rate, set "
            "config.tuning.alpha below 1 or add an anchor"
        )

    def log_evaluation(self, number: int, metrics: Mapping[str, Metric]) -> None:
        """Logs an evaluation, and notes whether it is the best so far.

        Args:
            number: the step that was evaluated.
            metrics: of the evaluation, by name.

        Raises:
            ValueError: the metric that counts is not among them.
        """
        self._directory.log(
            number, {name: metric.value for name, metric in metrics.items()}
        )
        self.progress = self.progress.with_evaluation(
            number, metrics, self._settings.evaluation, kept=self._settings.kept_best
        )

    def close(self) -> None:
        """Ends the line of the progress bar."""
        self._bar.close()
