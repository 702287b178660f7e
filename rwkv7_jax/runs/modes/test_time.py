"""The mode that tunes a state by rewards, by a larger model's traces or by a prompt."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from rwkv7_jax import sharding
from rwkv7_jax.array_types import Params
from rwkv7_jax.checkpoints.model_files import load_model, model_hash
from rwkv7_jax.checkpoints.model_vocabulary import kept_vocabulary
from rwkv7_jax.checks import prefix_errors
from rwkv7_jax.data.batch import Batch
from rwkv7_jax.evaluation.metric import Metric, Metrics, log_name
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import RWKV7State
from rwkv7_jax.runs.datasets import digest_of
from rwkv7_jax.runs.input_pipeline import BatchSource, DrawnBatches
from rwkv7_jax.runs.modes.dataset import DatasetMode
from rwkv7_jax.runs.modes.single_state import SingleStateMode
from rwkv7_jax.runs.modes.start_state import read_prompt
from rwkv7_jax.runs.monitoring.progress_bar import ProgressBar
from rwkv7_jax.runs.process_group import group_of_run
from rwkv7_jax.runs.resume.run_identity import content_digests
from rwkv7_jax.runs.settings import TestTimeSettings
from rwkv7_jax.test_time.distillation import TraceBatches
from rwkv7_jax.test_time.expert_iteration import ExpertBatches
from rwkv7_jax.test_time.grpo import PolicyBatches
from rwkv7_jax.test_time.losses import (
    context_distillation,
    distillation_loss,
    policy_loss,
)
from rwkv7_jax.test_time.prompt_share import PromptShare
from rwkv7_jax.test_time.questions import QuestionSet, find_verifier
from rwkv7_jax.test_time.rewards import AdvantageRule
from rwkv7_jax.test_time.rollouts import RolloutSampler
from rwkv7_jax.test_time.teacher import collect_traces
from rwkv7_jax.test_time.traces import (
    Trace,
    check_trace_tokens,
    read_traces,
    write_traces,
)
from rwkv7_jax.test_time.tuning_loop import StateBatchSource
from rwkv7_jax.test_time.verifiers import VERIFIERS
from rwkv7_jax.text.tokenizer import Tokenizer
from rwkv7_jax.training.train_step import TrainState, TrainStep

_REWARD = log_name("held_out", "reward")

# The standard error of that mean, which decides nothing: it is not among the names of a mode.
_REWARD_ERROR = f"{_REWARD}_error"


class ContextMode(DatasetMode, SingleStateMode):
    """Turns a long prompt into a state; its rows are the run's text."""

    takes_upscaled_start = True

    def set_up(self) -> None:
        """Loads the model, reads the prompt and opens the data."""
        self.load_frozen_model()
        context = self.settings.test_time.context
        if context is None:
            raise ValueError(
                "`config.test_time.context` must name the file that becomes a state."
            )
        self._context = context
        with prefix_errors("config.test_time.context"):
            prompt = read_prompt(context, self.model, self.frozen, self.tokenizer)
        self.make_initial()
        # The state after the prompt: the loss compares with the model that starts from it.
        self.loss = context_distillation(
            self.model, self.frozen, prompt, leaves=self.tuned_leaves()
        )
        self.decorrelator = self.make_decorrelator()
        self.open_data()

    def input_digests(self) -> dict[str, str]:
        """Hashes the data and the prompt."""
        return {
            **self.data.digests(),
            # The digest that older records have; it contains the path.
            "context": digest_of(self._context, None),
            **content_digests({"context": self._context}),
        }


class TestTimeMode(SingleStateMode):
    """Tunes a start state on questions, by the method that `config.test_time.method` names."""

    # The name begins with "Test"; pytest must not collect it.
    __test__ = False

    takes_upscaled_start = True

    def set_up(self) -> None:
        """Loads the model and the questions; for "distil", lets the teacher answer."""
        settings = self.settings
        self.load_frozen_model()
        # Weights that are only described write nothing.
        if not sharding.is_abstract(self.frozen):
            self._open_questions()
        self.make_initial()
        self.decorrelator = self.make_decorrelator()
        self.updates_per_step = settings.test_time.updates
        if settings.test_time.method == "grpo":
            self.loss = policy_loss(
                self.model,
                self.frozen,
                temperature=settings.test_time.temperature,
                kl=settings.test_time.kl,
                # Where tuning starts: of a distilled state the rewards keep what it learnt. Copied,
                # for the first step consumes the state itself.
                reference=jax.tree.map(jnp.copy, self._initial),
                leaves=self.tuned_leaves(),
                epsilon_low=settings.test_time.epsilon_low,
                epsilon_high=settings.test_time.epsilon_high,
            )
        else:
            self.loss = distillation_loss(
                self.model, self.frozen, leaves=self.tuned_leaves()
            )

    def _open_questions(self) -> None:
        """Opens the questions and what makes batches of their answers."""
        settings = self.settings
        processes = group_of_run()
        self._share = PromptShare(
            index=jax.process_index(),
            count=processes.size,
            drawn_together=sharding.is_shared(self.mesh),
            gather=processes.allgather_results,
        )
        verifier = settings.test_time.verifier
        is_own = verifier not in VERIFIERS
        self._questions = QuestionSet(
            settings.data.path,
            self.tokenizer,
            seed=settings.seed,
            held_out=settings.data.held_out,
            verifier=None if is_own else verifier,
            evaluation=settings.data.evaluation,
        )
        self._reward = find_verifier(verifier) if is_own else self._questions.reward
        learns_from_rewards = (
            settings.test_time.method != "distil"
            or settings.test_time.keep == "verified"
        )
        if learns_from_rewards and not (is_own or self._questions.can_be_answered):
            raise ValueError(
                f"`config.test_time.verifier` {verifier!r} must find the answer of a question of "
                f"`{settings.data.path}`; it finds none, and no completion could earn a reward."
            )
        self._held_out = self._questions.prompts(
            0, settings.evaluation.windows, held_out=True
        )
        # "distil" lets the teacher answer here, which takes long: before the first step, not in it.
        self._source = self._make_source()

    @property
    def tokens_per_step(self) -> int | None:
        """None: completions end where they end."""
        return None

    def batches(self, start_step: int, mesh: Mesh | None) -> BatchSource:
        """Makes batches of the teacher's traces, or of what the model writes from its state.

        Of several processes, each draws the completions of its own rows.

        Raises:
            ValueError: rows or prompts that the processes do not divide evenly.
        """
        # All rows are known here, in a single process or because all of them draw every row.
        draws_all = self._share.count == 1 or self._share.drawn_together
        if self.settings.test_time.method == "distil" or draws_all:
            return DrawnBatches(self._source, mesh)
        prompts = self.settings.test_time.prompts
        group = self.settings.test_time.group
        rows = prompts * group
        own = self._share.drawn(prompts)
        expected = slice(own.start * group, own.stop * group)
        if sharding.own_rows(mesh, rows) != expected:
            raise ValueError(
                f"`config.test_time.prompts` must give each of {self._share.count} processes as "
                f"many prompts, and each of their devices as many rows; got {prompts} prompts of "
                f"{group} rows."
            )
        return DrawnBatches(self._source, mesh, rows=rows)

    def example_batch(self) -> Batch:
        """Returns a batch of zeros, of rows as long as `config.data.length` says."""
        settings = self.settings.test_time
        rows = settings.prompts * settings.group
        if settings.method == "distil":
            rows = self.settings.data.batch_size
        of_targets = np.zeros((rows, self.settings.data.length), np.float32)
        batch = Batch(
            tokens=np.zeros((rows, self.settings.data.length + 1), np.int32),
            mask=of_targets,
        )
        if settings.method != "grpo":
            return batch
        return batch.replace(
            advantages=of_targets[:, 0],
            old_logp=of_targets if settings.updates > 1 else None,
            importance=None if settings.importance_cap is None else of_targets,
        )

    def _make_source(self) -> StateBatchSource:
        """Makes the method's source; its draws depend on the seed, the step and the state alone."""
        settings = self.settings.test_time
        if settings.method == "distil":
            return TraceBatches(
                self._traces(),
                batch_size=self.settings.data.batch_size,
                seed=self.settings.seed,
            )
        sampler = self._sampler(self._drawing_model(), self.frozen)
        key = jax.random.key(self.settings.seed)
        if settings.method == "grpo":
            rule = AdvantageRule(
                baseline=settings.baseline,
                scale=settings.scale,
                average=settings.average,
            )
            return PolicyBatches(
                sampler,
                self._prompts_at,
                self._reward,
                key=key,
                rule=rule,
                redraws=settings.redraws,
                several_updates=settings.updates > 1,
                importance_cap=settings.importance_cap,
                trainer=self.model,
            )
        # Without replay, which a checkpoint would have to hold to be resumed.
        return ExpertBatches(sampler, self._prompts_at, self._reward, key=key)

    def _sampler(self, model: RWKV7, params: Params) -> RolloutSampler:
        """Makes what draws completions of a model, the student or the teacher."""
        settings = self.settings.test_time
        return RolloutSampler(
            model,
            params,
            group=settings.group,
            tokens=settings.tokens,
            temperature=settings.temperature,
            stop_ids=self._questions.stop_ids,
            stop_strings=settings.stop,
            tokenizer=self.tokenizer,
            share=self._share,
        )

    def _drawing_model(self) -> RWKV7:
        """Returns the model that draws; in another dtype it still reads the same weights."""
        dtype = self.settings.test_time.sampling_dtype
        if dtype is None:
            return self.model
        return RWKV7(dataclasses.replace(self.model.config, dtype=dtype))

    def train_step(
        self, tx: optax.GradientTransformation, mesh: Mesh | None
    ) -> TrainStep:
        """Makes the step: as many updates as are set, with the same completions.

        They are one step of the run, so a run never ends between them: the state that the
        completions were drawn from would be lost.
        """
        update = self.update_step(tx, mesh)
        updates = self.updates_per_step

        def step(train: TrainState, batch: Any) -> tuple[TrainState, dict[str, Any]]:
            metrics: dict[str, Any] = {}
            for _ in range(updates):
                train, metrics = update(train, batch)
            if updates > 1:
                # Each update has counted itself.
                train = dataclasses.replace(train, step=train.step - (updates - 1))
            # Of the same names, what the update says comes first.
            return train, {**self._source.metrics, **metrics}

        return step

    def _prompts_at(self, step: int) -> list[list[int]]:
        return self._questions.prompts(step, self.settings.test_time.prompts)

    def held_out_names(self) -> tuple[str, ...]:
        """Names the mean reward."""
        return (_REWARD,)

    def held_out_metrics(self, params: RWKV7State) -> Metrics:
        """Measures the mean reward of the most probable answers to held-out questions.

        With its standard error, sqrt(p (1 - p) / n) where a share p of n answers is right.
        """
        # The tuned model itself, whatever dtype draws the completions.
        sampler = self._sampler(self.model, self.frozen)
        rewards, _ = sampler.greedy_rewards(params, self._held_out, self._reward)
        error = rewards.std() / math.sqrt(len(rewards))
        return {
            _REWARD: Metric.of(rewards.mean(), "reward"),
            _REWARD_ERROR: Metric(float(error), "reward", higher_is_better=False),
        }

    def input_digests(self) -> dict[str, str]:
        """Hashes the questions."""
        path = self.settings.data.path
        contents = {"data": path, "guide": self.settings.test_time.guide}
        # The first digest is the one that older records have; it contains the path.
        return {"data": digest_of(path, None), **content_digests(contents)}

    def describe_data(self) -> str:
        """Names the questions, and how many of them are measured."""
        described = self._questions.describe(len(self._held_out))
        return f"{self.settings.data.path}: {described}"

    def _traces(self) -> list[Trace]:
        """Lets the teacher answer, or reads what it has answered elsewhere."""
        guide = self.settings.test_time.guide
        if guide is None:
            raise ValueError(
                "`config.test_time.guide` must name the larger model's checkpoint."
            )
        # Traces of an earlier run need no teacher.
        if guide.endswith(".jsonl"):
            traces = read_traces(guide)
            with prefix_errors("config.test_time.guide"):
                check_trace_tokens(traces, self.model.config.vocab_size)
            return traces
        traces = self._collect_traces(guide)
        if not traces:
            raise ValueError(
                "`config.test_time.keep` must leave a trace to learn from; got none."
            )
        # Another run reads them as its guide, and needs no teacher.
        write_traces(self.folder / "kept_traces.jsonl", traces)
        return traces

    def _collect_traces(self, guide: str) -> list[Trace]:
        """Lets the teacher answer; its completions stay in the run's folder."""
        settings = self.settings.test_time
        params, config = load_model(
            guide, allow_nan=self.settings.allow_nan, mesh=self.mesh
        )
        _require_same_vocabulary(guide, config.vocab_size, self.model, self.tokenizer)
        chains = settings.chains_of_prompt
        sampler = self._sampler(RWKV7(config), params)
        teacher = dataclasses.replace(sampler, group=chains)
        vote = None
        if settings.keep == "majority":
            # Two completions agree where they give the same answer, in whatever words.
            vote = (self._questions.given_answer, settings.vote_margin)
        self.folder.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(ProgressBar(settings.traces, "teacher")) as bar:
            traces, budget = collect_traces(
                teacher,
                self._questions.prompts(0, settings.traces),
                key=jax.random.key(self.settings.seed),
                template=_teacher_template(settings, self.tokenizer),
                verify=self._reward if settings.keep == "verified" else None,
                vote=vote,
                source=guide,
                cache=self.folder / "traces.jsonl",
                teacher_hash=model_hash(params, config),
                at_once=settings.at_once,
                on_progress=lambda done, total: bar.update(done, "prompts"),
            )
        of_each = f" x {chains}" if chains > 1 else ""
        print(
            f"teacher   kept {len(traces)} traces of {settings.traces} prompts{of_each}; {budget}"
        )
        return traces


def _require_same_vocabulary(
    guide: str, size: int, model: RWKV7, tokenizer: Tokenizer
) -> None:
    """Raises if a guide's ids mean other texts than the model's, as far as the guide says.

    Args:
        guide: path of its checkpoint.
        size: ids of the guide.
        model: that learns from it.
        tokenizer: of the run.
    """
    own = model.config.vocab_size
    if size != own:
        raise ValueError(
            f"`config.test_time.guide` must have the model's vocabulary of {own:,} ids; `{guide}` "
            f"has {size:,}."
        )
    kept = kept_vocabulary(guide, size)
    if kept is not None and kept.digest != tokenizer.digest:
        raise ValueError(
            f"`config.test_time.guide` must have the run's vocabulary, {tokenizer.identity}; "
            f"`{guide}` has {kept.identity}."
        )


def _teacher_template(
    settings: TestTimeSettings, tokenizer: Tokenizer
) -> Callable[[Sequence[int]], list[int]]:
    """Makes the function from a prompt to what the teacher reads in its place.

    The hint comes before the prompt, and in it one text is replaced by another.

    Raises:
        ValueError: `substitute` is not two texts.
    """
    if len(settings.substitute) not in (0, 2):
        raise ValueError(
            "`config.test_time.substitute` must be two texts, what and with what; "
            f"got {settings.substitute}."
        )
    hint = tokenizer.encode(settings.hint)

    def template(prompt: Sequence[int]) -> list[int]:
        if not settings.substitute:
            return [*hint, *prompt]
        old, new = settings.substitute
        text = tokenizer.decode(list(prompt)).replace(old, new)
        return [*hint, *tokenizer.encode(text)]

    return template
