"""What a run says of its steps, without ever waiting for the newest."""

import collections
import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np

from rwkv7_jax.data.batch import Batch
from rwkv7_jax.reports.system_info import peak_memory
from rwkv7_jax.runs.compilation_cache import CompileClock
from rwkv7_jax.runs.early_stopping import RunProgress
from rwkv7_jax.runs.exit_codes import NotFinite, warn
from rwkv7_jax.runs.input_pipeline import InputPipeline
from rwkv7_jax.runs.progress_bar import ProgressBar
from rwkv7_jax.runs.run_directory import RunDirectory
from rwkv7_jax.runs.settings import Settings
from rwkv7_jax.training.costs import mfu

# Steps that the device may be ahead of what is looked at: it never waits for the log.
_BEHIND = 2


class RunLog:
    """Metrics, progress and updates gone wrong; steps are looked at when later ones are under way.

    Attributes:
        course: where the run stands, up to the last step that was looked at.
    """

    def __init__(
        self,
        folder: RunDirectory,
        settings: Settings,
        course: RunProgress,
        *,
        start_step: int,
        feed: InputPipeline,
        rate: Callable[[int], float],
        flops: float | None = None,
        devices: int = 1,
    ):
        """Nothing has been said.

        Args:
            folder: takes the metrics.
            settings: of the run.
            course: as it was restored.
            start_step: where the run begins or goes on.
            feed: knows how long batches were waited for.
            rate: the learning rate at a step, counted from 0.
            flops: operations of a step per token; None where nobody counted them.
            devices: over which a step's rows are spread.
        """
        self.course, self._folder, self._settings = course, folder, settings
        self._start, self._feed, self._rate = start_step, feed, rate
        self._flops, self._devices = flops, devices
        self._bar = ProgressBar(settings.steps - start_step, settings.mode)
        self._pending, self._compiling = collections.deque(), CompileClock()
        self._tokens, self._paused, self._warned = 0, 0.0, False
        self._since, self._waited = time.monotonic(), 0.0

    def note(self, step: int, metrics: Mapping | None, batch: Batch | None) -> None:
        """The step is under way; an earlier one is looked at.

        Args:
            step: counted from 1.
            metrics: of its update, on the device; None where it had nothing to learn from.
            batch: on the host.

        Raises:
            NotFinite: too many updates in a row went wrong.
        """
        self._pending.append((step, metrics, batch))
        while len(self._pending) > _BEHIND:
            self._look(*self._pending.popleft())

    def drain(self) -> None:
        """All steps have been looked at."""
        while self._pending:
            self._look(*self._pending.popleft())

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """All steps have been looked at; the block's time is none of the training's."""
        self.drain()
        began = time.monotonic()
        try:
            yield
        finally:
            self._paused += time.monotonic() - began

    def _look(self, step: int, metrics: Mapping | None, batch: Batch | None) -> None:
        if metrics is not None:
            self._tokens += batch.tokens[:, 1:].size
            self._judge(step, metrics, batch)
        if step % self._settings.log_every == 0 or step == self._settings.steps:
            self._write(step, {"updated": 0.0} if metrics is None else jax.device_get(metrics))

    def _judge(self, step: int, metrics: Mapping, batch: Batch) -> None:
        """Count the update as good or bad."""
        if float(metrics["updated"]):
            if self.course.bad:
                self.course = dataclasses.replace(self.course, bad=0)
            return
        self.course = dataclasses.replace(self.course, bad=self.course.bad + 1)
        numbers = {name: float(metrics[name]) for name in ("loss", "grad_norm")}
        self._folder.log_bad(step, numbers, np.asarray(batch.tokens))
        if self.course.bad == self._settings.stop_after_bad:
            raise NotFinite(
                f"{self.course.bad} updates in a row, up to step {step}, had a loss or gradient "
                f"that is not finite (loss {numbers['loss']}, gradient norm "
                f"{numbers['grad_norm']}); none was made. Their batches are in "
                f"{self._folder.path / 'bad_batches.jsonl'}."
            )

    def _write(self, step: int, metrics: Mapping) -> None:
        """One line of the log."""
        numbers = {name: float(value) for name, value in metrics.items()}
        seconds = max(time.monotonic() - self._since - self._paused, 1e-9)
        waited, self._waited = self._feed.waited - self._waited, self._feed.waited
        numbers["learning_rate"] = float(self._rate(step - 1))
        numbers["tokens_per_second"] = self._tokens / seconds
        if self._devices > 1:
            numbers["tokens_per_second_per_device"] = self._tokens / seconds / self._devices
        numbers["waiting_share"] = min(waited / seconds, 1.0)
        numbers["compile_seconds"] = round(self._compiling.seconds, 3)
        numbers |= self._used(numbers["tokens_per_second"])
        self._since, self._paused, self._tokens = time.monotonic(), 0.0, 0
        self._folder.log(step, numbers)
        loss = numbers.get("loss_nats", math.nan) / math.log(2)
        text = "nothing to learn" if math.isnan(loss) else f"loss {loss:.3f} bits"
        self._bar.update(step - self._start, f"{text}  {numbers['tokens_per_second']:.0f} tokens/s")
        if numbers.get("state_max", 0.0) > self._settings.tuning.warn_above and not self._warned:
            self._warned = True
            warn(
                f"the state's largest entry is {numbers['state_max']:.0f}; lower the learning "
                "rate, set config.tuning.alpha below 1 or add an anchor"
            )

    def _used(self, tokens_per_second: float) -> dict[str, float]:
        """The share of the devices' peak where it is known, and the most memory ever in use."""
        peak = peak_memory()
        found = {f"{peak.of}_peak_mib": round(peak.bytes / 2**20, 1)}
        if self._flops is None:
            return found
        kind, count = jax.devices()[0].device_kind, self._devices
        share = mfu(tokens_per_second, self._flops, device_kind=kind, devices=count)
        return found if share is None else found | {"mfu": share}

    def evaluated(self, step: int, measures: Mapping[str, float]) -> None:
        """An evaluation is logged, and counts for what is best.

        Raises:
            ValueError: the measure that counts was not taken.
        """
        self._folder.log(step, measures)
        kept, evaluation = self._settings.kept_best, self._settings.evaluation
        self.course = self.course.after(step, measures, evaluation, kept=kept)

    def close(self) -> None:
        """The progress bar's line has ended."""
        self._bar.close()
