"""The mode that tunes start states for several texts in one program, with one file each."""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from rwkv7_jax import sharding
from rwkv7_jax.array_types import Params
from rwkv7_jax.checkpoints.model_files import model_hash
from rwkv7_jax.data.batch import Batch
from rwkv7_jax.evaluation.metric import Metrics
from rwkv7_jax.local_paths import local_path
from rwkv7_jax.model.state import RWKV7State
from rwkv7_jax.runs.early_stopping import Progress
from rwkv7_jax.runs.evaluators import PredictionEvaluator
from rwkv7_jax.runs.input_pipeline import BatchSource, PrefetchedBatches
from rwkv7_jax.runs.modes.base import TrainingMode
from rwkv7_jax.runs.modes.scheduled_optimizer import (
    RateAt,
    schedule_and_optimizer,
    with_rate,
)
from rwkv7_jax.runs.modes.state_tuning import StateTuningMode, UpscaledStateMode
from rwkv7_jax.runs.resume.run_identity import json_digest
from rwkv7_jax.sharding import own_rows
from rwkv7_jax.training.costs import Memory, tree_bytes
from rwkv7_jax.training.stacked_step import (
    create_stack,
    make_stacked_step,
    params_of,
    stack_params,
)
from rwkv7_jax.training.train_step import TrainState, TrainStep

# The folder of the results, in the run directory.
RESULTS = "states"

# Names are parts of file names and of columns, in which "/" is a separator.
_NAME = re.compile(r"\w[\w.-]*")


def if_named(text: str, name: str) -> str:
    """Inserts the name of a state into a text; returns "" for a run's only state.

    Args:
        text: text with {} for the name.
        name: name of the state, or "".
    """
    return text.format(name) if name else ""


def state_sources(states: str | Mapping[str, str]) -> dict[str, str]:
    """Returns the texts of `config.tuning.states` by the names of their states.

    Args:
        states: the setting; in a folder, each file is a text, and its stem names the state.

    Raises:
        ValueError: there is no text, or a name is not allowed.
    """
    if isinstance(states, str):
        found = _files_by_stem(states)
    else:
        found = dict(states)
    if not found:
        raise ValueError(
            f"`config.tuning.states` must name texts, or a folder of texts; got {states!r}."
        )
    for name, path in found.items():
        if not _NAME.fullmatch(name):
            raise ValueError(
                "`config.tuning.states` must have only names of letters, digits, dots, dashes and "
                f"underscores; got {name!r}."
            )
        if not isinstance(path, str) or not path.strip():
            raise ValueError(
                f"`config.tuning.states.{name}` must name a text; got {path!r}."
            )
    return found


def _files_by_stem(folder: str) -> dict[str, str]:
    place = local_path(folder, "`config.tuning.states`")
    if not place.is_dir():
        raise ValueError(
            f"`config.tuning.states` must be texts by name, or a folder; got {folder!r}."
        )
    found: dict[str, str] = {}
    for file in sorted(place.iterdir()):
        if not file.is_file() or file.name.startswith("."):
            continue
        if file.stem in found:
            raise ValueError(
                "`config.tuning.states` must be a folder of files with different stems; "
                f"{file.name} and {Path(found[file.stem]).name} would be the same state."
            )
        found[file.stem] = str(file)
    return found


class StackMode(TrainingMode):
    """Tunes one start state for each of several texts, as separate runs would.

    Attributes:
        members: the mode of each state in a separate run, by name.
    """

    gradients_of = "state"

    result_names = (RESULTS,)

    frozen: Params
    members: dict[str, StateTuningMode]

    def set_up(self) -> None:
        """Loads the frozen model once, and opens the texts of all states."""
        settings = self.settings
        kind = (
            UpscaledStateMode if settings.mode == "upscaled_state" else StateTuningMode
        )
        assert settings.tuning.states is not None
        self.members = {}
        base = self._base
        for name, path in state_sources(settings.tuning.states).items():
            own = dataclasses.replace(
                settings,
                data=dataclasses.replace(settings.data, path=path),
                tuning=dataclasses.replace(settings.tuning, states=None),
            )
            try:
                member = kind(own, self.folder, base=base, mesh=self.mesh)
            except ValueError as error:
                raise ValueError(f"`config.tuning.states.{name}`: {error}") from None
            base = (member.model, member.frozen)
            self.members[name] = member
        self.adopt()

    def adopt(self) -> None:
        """Takes the attributes that all members share from the first one."""
        first = self._first
        self.model = first.model
        self.frozen = first.frozen
        self.tokenizer = first.tokenizer
        self.loss = first.loss
        self.decorrelator = first.decorrelator

    @property
    def _first(self) -> StateTuningMode:
        return next(iter(self.members.values()))

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the states, in stack order."""
        return tuple(self.members)

    @property
    def at_once(self) -> int:
        """The most states that a device computes at the same time."""
        return len(self.names)

    def rates(self) -> np.ndarray | None:
        """Returns each state's found learning rate, or 0; None if the settings name the rate."""
        if not self.settings.finds_rate:
            return None
        found = [member.found_rate or 0.0 for member in self.members.values()]
        return np.asarray(found, np.float32)

    def optimizer(self) -> tuple[RateAt, optax.GradientTransformation]:
        """Makes the learning rate schedule of each state, and the optimizer."""
        rates = self.rates()
        if rates is None:
            return super().optimizer()
        # The schedule has a peak of 1; each state multiplies it by its rate.
        schedule, tx = schedule_and_optimizer(
            with_rate(self.settings.optimizer, 1.0), total_steps=self.settings.steps
        )

        def rates_at(updates: Any) -> Any:
            return schedule(updates) * rates

        return rates_at, self.decorrelator.wrap(tx)

    def make_params(self) -> RWKV7State:
        """Makes the start states, stacked along a leading axis."""
        return stack_params([one.init_params() for one in self.members.values()])

    def _describe_params(self) -> Any:
        """Returns the shapes and dtypes of a member, stacked."""
        count = len(self.names)
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype),
            self._first.abstract_params,
        )

    def release_initial(self) -> None:
        """Frees the parameters of the members' `set_up`."""
        for member in self.members.values():
            member.release_initial()

    def by_name(self, params: RWKV7State) -> Iterator[tuple[str, StateTuningMode, Any]]:
        """Yields each state's name, mode and parameters."""
        for index, (name, member) in enumerate(self.members.items()):
            yield name, member, params_of(params, index)

    def trained_count(self, params: RWKV7State) -> int:
        """Counts the trained numbers of all states."""
        return sum(mode.trained_count(own) for _, mode, own in self.by_name(params))

    def start_state(self, params: RWKV7State) -> RWKV7State:
        """Returns the first state."""
        return params_of(params, 0)

    def train_state(self, params: Any, tx: optax.GradientTransformation) -> TrainState:
        """Makes the training state before the first step, with moments for each start state."""
        return create_stack(params, tx)

    def update_step(
        self, tx: optax.GradientTransformation, mesh: Mesh | None
    ) -> TrainStep:
        """Makes the compiled step of all states."""
        rates = self.rates()
        return make_stacked_step(
            self.loss,
            tx,
            np.ones(len(self.names), np.float32) if rates is None else rates,
            statistics=self.decorrelator.statistics,
            accumulate=self.settings.optimizer.accumulate,
            at_once=self.at_once,
            mesh=mesh,
        )

    def new_progress(self) -> Progress:
        """Makes the progress of each state before the first step."""
        return Progress.of_states(self.names)

    def step_metrics(self, metrics: Mapping[str, Any]) -> dict[str, float]:
        """Prefixes metrics with the states' names; `loss_nats` is the mean of finite losses."""
        numbers: dict[str, float] = {}
        for metric, values in metrics.items():
            values = np.broadcast_to(values, len(self.names))
            for name, value in zip(self.names, values, strict=True):
                numbers[f"{name}/{metric}"] = float(value)
            if metric == "loss_nats" and np.any(np.isfinite(values)):
                numbers[metric] = float(np.mean(values[np.isfinite(values)]))
        return numbers

    @property
    def tokens_per_step(self) -> int:
        """The tokens that a step reads for all states."""
        data = self.settings.data
        return len(self.names) * data.batch_size * data.length

    def memory_estimate(self, mesh: Mesh | None = None) -> Memory:
        """Estimates a step's memory on one device, which computes its share of the states."""
        states = len(self.names)
        sizes = sharding.sizes_of(mesh)
        own = sharding.share_of_sets(states, sizes)
        rows = self.settings.rows_per_step * min(own, self.at_once)
        # All rows of a state are on one device.
        whole_rows = {**sizes, sharding.SEQUENCE: 1}
        one = self._first.step_memory(rows, whole_rows)
        # Every device holds all states and their moments.
        return dataclasses.replace(
            one,
            parameters=one.parameters
            + (states - 1) * tree_bytes(self._first.abstract_params),
            moments=states * one.moments,
            gradients=states * one.gradients,
        )

    def readers(self) -> list[tuple[StateTuningMode, int]]:
        """Returns the modes whose texts are read, and the number of states that share each text."""
        return [(member, 1) for member in self.members.values()]

    def batches(self, start_step: int, mesh: Mesh | None) -> BatchSource:
        """Makes batches of all texts, with adjacent rows for each state.

        Each process makes its own rows.
        """
        count = len(self.names) * self.settings.data.batch_size
        own = range(count)[own_rows(mesh, count)]
        return PrefetchedBatches(
            self._joined_batches(start_step, own), mesh, rows=count
        )

    def _joined_batches(self, start_step: int, own: range) -> Iterator[Batch]:
        """Makes some of the rows of all states.

        Args:
            start_step: step of the first batch, from 0.
            own: range of the rows over all states.
        """
        rows = self.settings.data.batch_size
        # Over the texts of all processes, so that their rows have equal shapes.
        sequences = max(mode.data.sequences for mode, _ in self.readers())
        sources = []
        pieces = []
        first = 0
        for mode, states in self.readers():
            found = []
            for number in range(first, first + states * rows, rows):
                piece = slice(max(own.start - number, 0), min(own.stop - number, rows))
                if piece.start < piece.stop:
                    found.append(piece)
            first += states * rows
            if found:
                # A text is read once for all states that share it.
                sources.append(
                    mode.data.batches(start_step=start_step, rows=slice(0, rows))
                )
                pieces.append(found)
        for batches in zip(*sources, strict=True):
            joined = []
            for batch, found in zip(batches, pieces, strict=True):
                if sequences:
                    batch = batch.with_sequences(sequences)
                joined += [batch.select_rows(piece) for piece in found]
            yield jax.tree.map(lambda *rows: np.concatenate(rows), *joined)

    def retention_evaluators(self) -> list[PredictionEvaluator]:
        """Makes none: each member has its own evaluators."""
        return []

    def _check_evaluations(self) -> None:
        """Checks nothing: each member has checked the settings."""

    def held_out_metrics(self, params: RWKV7State) -> Metrics:
        """Measures each state on its held-out text and on retention data."""
        metrics: Metrics = {}
        for name, member, own in self.by_name(params):
            for metric, value in member.evaluate(own).items():
                metrics[f"{name}/{metric}"] = value
        return metrics

    def sample_texts(self, params: RWKV7State) -> Iterator[tuple[str, str]]:
        """Yields prompts, prefixed with the state's name, and the text generated from the state."""
        for name, member, own in self.by_name(params):
            for prompt, text in member.sample_texts(own):
                yield f"[{name}] {prompt}", text

    def input_digests(self) -> dict[str, str]:
        """Hashes each text, and all of them as "data"."""
        digests: dict[str, str] = {}
        for name, member in self.members.items():
            for kind, digest in member.input_digests().items():
                # All states share the anchor.
                digests[kind if kind == "anchor" else f"{kind} {name}"] = digest
        return {"data": json_digest(digests), **digests}

    def describe_data(self) -> str:
        """Describes the texts and their sizes."""
        texts = []
        for name, member in self.members.items():
            texts.append(f"{name}: {member.describe_data()}")
        return "; ".join(texts)

    def save(
        self, folder: Path, params: RWKV7State, *, without: Sequence[str] = ()
    ) -> Path:
        """Writes one file per state, except those in `without`, and returns their folder."""
        # Collective work of all processes comes first, because a process may fail to write.
        base_model = model_hash(self.frozen, self.model.config)
        states = list(self.by_name(params))
        files = self.state_files(folder)
        place = folder / RESULTS
        place.mkdir(exist_ok=True)
        for name, member, own in states:
            if name not in without:
                member.save_state(files[name], own, base_model=base_model)
        return place

    def state_files(self, folder: Path) -> dict[str, Path]:
        """Returns the file of each state, by name."""
        files = {}
        for name, member in self.members.items():
            suffix = Path(member.result_name).suffix
            files[name] = folder / RESULTS / f"{name}{suffix}"
        return files

    def member(self, name: str) -> StateTuningMode:
        """Returns the mode of a state in a separate run."""
        return self.members[name]
