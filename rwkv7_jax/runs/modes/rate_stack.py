"""The mode of a learning rate search: a stack of a run's start state, one member per rate."""

import dataclasses

import jax
import numpy as np

from rwkv7_jax import sharding
from rwkv7_jax.evaluation.metric import Metrics
from rwkv7_jax.model.state import RWKV7State
from rwkv7_jax.runs.held_out_rows import retention_paths
from rwkv7_jax.runs.modes.base import TrainingMode
from rwkv7_jax.runs.modes.stack import StackMode
from rwkv7_jax.runs.modes.state_tuning import StateTuningMode
from rwkv7_jax.runs.settings import Settings
from rwkv7_jax.training.costs import flops_per_token
from rwkv7_jax.training.stacked_step import params_of, stack_params
from rwkv7_jax.tuning.rate_search import SearchPlan, plan_search

# Held-out windows that measure a rate, the same for all rates.
_WINDOWS = 8

# The folder of the search in the run directory.
SEARCH_FOLDER = "rate_search"

# The part of a metric's name for the state before tuning, in place of a rate.
BASE = "base"

# Rows in memory of a search step, relative to a step of the run.
_SLACK = 1.25

# Checkpoints of a search, if the run itself has intermediate checkpoints.
_SAVES = 4


def subjects_of(mode: TrainingMode) -> dict[str, StateTuningMode]:
    """Returns the modes whose rates are searched, by their prefix in the names of the search."""
    if isinstance(mode, StackMode):
        return {f"{name}/": member for name, member in mode.members.items()}
    assert isinstance(mode, StateTuningMode)
    return {"": mode}


class RateStackMode(StackMode):
    """Tunes each start state of a run at many rates at once, at a small fraction of its cost.

    Attributes:
        plan: steps and rows of the search.
        subjects: the modes of the states, by the prefix of their names.
        results: the metrics of each subject by rate, and as `BASE` before tuning; empty until the
            last step is measured.
    """

    # Only the last step is compared.
    measures_start = False

    subjects: dict[str, StateTuningMode]
    results: dict[str, dict[str, Metrics]]

    def __init__(self, mode: TrainingMode):
        """Plans the search.

        Args:
            mode: mode of the run; the search uses its model and data.
        """
        self.subjects = subjects_of(mode)
        self.plan = _plan(mode)
        self._rates = mode.settings.tuning.rates
        self._rows_of_run = len(self.subjects) * mode.settings.rows_per_step
        self.results = {}
        settings = _search_settings(mode.settings, self.plan)
        if mode.settings.backup and sharding.is_shared(mode.mesh):
            # Processes without a shared folder write their shards there.
            place = f"{mode.settings.backup.rstrip('/')}/{SEARCH_FOLDER}"
            settings = dataclasses.replace(settings, backup=place)
        super().__init__(settings, mode.folder, mesh=mode.mesh)

    def set_up(self) -> None:
        """Makes one member per state and rate."""
        self.members = {}
        for subject, mode in self.subjects.items():
            for rate in self._rates:
                self.members[f"{subject}{rate:g}"] = mode
        self.adopt()

    @property
    def at_once(self) -> int:
        """The most states per device that need no more memory there than a step of the run.

        In the run, devices share the rows. In the search, a device has all rows of its states.
        """
        states = len(self.members)
        processes = 1 if sharding.is_shared(self.mesh) else jax.process_count()
        own = sharding.share_of_sets(self._rows_of_run, sharding.sizes_of(self.mesh))
        room = _SLACK * own / processes / self.plan.rows
        fitting = [n for n in range(1, states + 1) if states % n == 0 and n <= room]
        return max(fitting, default=1)

    def rates(self) -> np.ndarray:
        """Returns the rate of each member."""
        return np.asarray(self._rates * len(self.subjects), np.float32)

    def make_params(self) -> RWKV7State:
        """Makes the start state of each subject, once per rate."""
        states = []
        for mode in self.subjects.values():
            states += [self._start(mode)] * len(self._rates)
        return stack_params(states)

    def readers(self) -> list[tuple[StateTuningMode, int]]:
        """Returns the modes whose texts are read, once for all rates."""
        return [(mode, len(self._rates)) for mode in self.subjects.values()]

    def evaluate(self, params: RWKV7State) -> Metrics:
        """Measures each state at each rate, and before tuning, on some held-out windows."""
        metrics: Metrics = {}
        states = iter([params_of(params, index) for index in range(len(self.members))])
        for subject, mode in self.subjects.items():
            start = self._start(mode)
            results = {BASE: mode.losses(start, windows=_WINDOWS)}
            for rate in self._rates:
                results[f"{rate:g}"] = mode.losses(next(states), windows=_WINDOWS)
            self.results[subject] = results
            for name, measured in results.items():
                for metric, value in measured.items():
                    metrics[f"{subject}{name}/{metric}"] = value
        return metrics

    def guess(self, subject: str) -> float:
        """Computes the loss of frequency-based prediction on a subject's held-out windows."""
        return self.subjects[subject].guess(windows=_WINDOWS)

    def describe_data(self) -> str:
        """Describes the texts and their sizes, once for all rates."""
        return "; ".join(mode.describe_data() for mode in self.subjects.values())

    def _start(self, mode: StateTuningMode) -> RWKV7State:
        """Returns the state before tuning, and keeps it in its mode for the run."""
        start = mode.init_params()
        mode.keep_initial(start)
        return start

    def release_initial(self) -> None:
        """Keeps the states, because the run starts from them."""


def _plan(mode: TrainingMode) -> SearchPlan:
    settings = mode.settings
    flops = flops_per_token(mode.model.config)
    texts = 1 + len(retention_paths(settings.evaluation.retention))
    windows = min(_WINDOWS, settings.evaluation.windows)
    tokens = texts * windows * settings.evaluation.length
    return plan_search(
        len(settings.tuning.rates),
        steps=settings.steps,
        rows=settings.data.batch_size,
        share=settings.tuning.search_share,
        # An evaluation has no backward pass.
        measuring=tokens * flops.forward / (settings.data.length * flops.state),
    )


def _search_settings(settings: Settings, plan: SearchPlan) -> Settings:
    """Returns the settings of a search: those of the run, for fewer steps and rows."""
    warmup = min(settings.optimizer.warmup_steps, plan.steps // _SAVES)
    return dataclasses.replace(
        settings,
        steps=plan.steps,
        save_every=settings.save_every and max(plan.steps // _SAVES, 1),
        keep=1,
        keep_every=None,
        keep_best=0,
        profile_steps=None,
        # The result of the search is copied with the run's other files.
        backup=None,
        data=dataclasses.replace(settings.data, batch_size=plan.rows),
        optimizer=dataclasses.replace(
            settings.optimizer, warmup_steps=warmup, accumulate=1
        ),
        evaluation=dataclasses.replace(
            settings.evaluation,
            every=None,
            measure=None,
            patience=None,
            enough=None,
        ),
        sample=dataclasses.replace(settings.sample, prompts=()),
    )
