"""The modes that tune a state from rewards, from a larger model's traces or from a prompt."""

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
from rwkv7_jax.runs.modes.single_state import SingleStateMode
from rwkv7_jax.runs.modes.start_state import read_prompt
from rwkv7_jax.runs.monitoring.progress_bar import count_progress
from rwkv7_jax.runs.process_group import group_of_run
from rwkv7_jax.runs.resume.run_identity import content_digests
from rwkv7_jax.runs.settings import TestTimeSettings
from rwkv7_jax.runs.settings.test_time import is_trace_file
from rwkv7_jax.runs.waiting import report_wait
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
from rwkv7_jax.training.losses import Loss
from rwkv7_jax.training.train_step import TrainState, TrainStep

_REWARD = log_name("held_out", "reward")

# The standard error of that mean. It selects no checkpoint, so `held_out_names` omits it.
_REWARD_ERROR = f"{_REWARD}_error"


class ContextMode(SingleStateMode):
    """Compresses a long prompt into a state, with rows of the run's text."""

    def set_up(self) -> None:
        """Loads the model and opens the data."""
        context = self.settings.test_time.context
        if context is None:
            raise ValueError(
                "`config.test_time.context` must name the file of the prompt; got none."
            )
        self._context = context
        super().set_up()

    def make_loss(self) -> Loss:
        """Reads the prompt and makes the loss."""
        with prefix_errors("config.test_time.context"):
            prompt = read_prompt(self._context, self.model, self.frozen, self.tokenizer)
        return context_distillation(
            self.model, self.frozen, prompt, leaves=self.tuned_leaves
        )

    def input_digests(self) -> dict[str, str]:
        """Hashes the data and the prompt."""
        return {
            **self.data.digests(),
            # The digest in older records, which includes the path.
            "context": digest_of(self._context),
            **content_digests({"context": self._context}),
        }


class TestTimeMode(SingleStateMode):
    """Tunes a start state on questions, with the method in `config.test_time.method`."""

    # Keeps pytest from collecting the class because of its name.
    __test__ = False

    def prepare(self) -> None:
        """Makes the initial state, the loss and the source of batches."""
        super().prepare()
        self.updates_per_step = self.settings.test_time.updates
        if not sharding.is_abstract(self.frozen):
            # For "distil", this samples all completions of the teacher, which takes long.
            self._source = self._make_source()

    def make_loss(self) -> Loss:
        """Makes the loss of the method."""
        settings = self.settings.test_time
        if settings.method != "grpo":
            return distillation_loss(self.model, self.frozen, leaves=self.tuned_leaves)
        return policy_loss(
            self.model,
            self.frozen,
            temperature=settings.temperature,
            kl=settings.kl,
            # The initial state, so that a distilled state keeps what it learnt. A copy, because the
            # first step donates the state.
            reference=jax.tree.map(jnp.copy, self._initial),
            leaves=self.tuned_leaves,
            epsilon_low=settings.epsilon_low,
            epsilon_high=settings.epsilon_high,
        )

    def read_data(self) -> None:
        """Reads the questions, and finds the reward of an answer."""
        # Abstract weights cannot generate.
        if sharding.is_abstract(self.frozen):
            return
        settings = self.settings
        if settings.test_time.method == "distil" and settings.test_time.guide is None:
            raise ValueError(
                "`config.test_time.guide` must name the larger model's checkpoint, or a file of "
                "traces; got none."
            )
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
        learns_from_rewards = settings.test_time.method != "distil" or (
            settings.test_time.keep == "verified"
            and not is_trace_file(settings.test_time.guide)
        )
        if learns_from_rewards and not (is_own or self._questions.can_be_answered):
            raise ValueError(
                f"`config.test_time.verifier` must find the answer of at least one question of "
                f"`{settings.data.path}`; {verifier!r} finds none, so no completion could earn a "
                "reward."
            )
        self._held_out_prompts = self._questions.prompts(
            0, settings.evaluation.windows, held_out=True
        )

    @property
    def tokens_per_step(self) -> int | None:
        """None: the lengths of completions are not known in advance."""
        return None

    def batches(self, start_step: int, mesh: Mesh | None) -> BatchSource:
        """Makes batches of the teacher's traces, or of the model's completions from its state.

        Each process samples the completions of its own rows.

        Raises:
            ValueError: the processes do not divide the rows or the prompts evenly.
        """
        # Whether this process has all rows.
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
                f"`config.test_time.prompts` must give each of {self._share.count} processes "
                "equally many prompts, and each of their devices equally many rows; got "
                f"{prompts} prompts of {group} rows."
            )
        return DrawnBatches(self._source, mesh, rows=rows)

    def example_batch(self) -> Batch:
        """Returns a batch of zeros, with rows of `config.data.length` tokens."""
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
        """Makes the source of batches, which depend only on the seed, the step and the state."""
        settings = self.settings.test_time
        if settings.method == "distil":
            return TraceBatches(
                self._traces(),
                batch_size=self.settings.data.batch_size,
                seed=self.settings.seed,
            )
        # Sampling may compute in another dtype.
        dtype = settings.sampling_dtype or self.model.config.dtype
        model = RWKV7(dataclasses.replace(self.model.config, dtype=dtype))
        sampler = self._sampler(model, self.frozen)
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
        # Without replay, because checkpoints do not hold earlier completions.
        return ExpertBatches(sampler, self._prompts_at, self._reward, key=key)

    def _sampler(self, model: RWKV7, params: Params) -> RolloutSampler:
        """Makes the sampler of the student or the teacher."""
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

    def train_step(
        self, tx: optax.GradientTransformation, mesh: Mesh | None
    ) -> TrainStep:
        """Makes the step: `config.test_time.updates` updates with the same completions.

        They are one step of the run, so a run never ends between them, which would lose the state
        that sampled the completions.
        """
        update = self.update_step(tx, mesh)
        updates = self.updates_per_step

        def step(train: TrainState, batch: Any) -> tuple[TrainState, dict[str, Any]]:
            metrics: dict[str, Any] = {}
            for _ in range(updates):
                train, metrics = update(train, batch)
            if updates > 1:
                # Each update has counted as a step.
                train = dataclasses.replace(train, step=train.step - (updates - 1))
            # Metrics of the update take precedence.
            return train, {**self._source.metrics, **metrics}

        return step

    def _prompts_at(self, step: int) -> list[list[int]]:
        return self._questions.prompts(step, self.settings.test_time.prompts)

    def held_out_names(self) -> tuple[str, ...]:
        """Returns the name of the mean reward."""
        return (_REWARD,)

    def held_out_metrics(self, params: RWKV7State) -> Metrics:
        """Measures the mean reward of greedy answers to held-out questions, and its standard error.

        For a fraction p of n correct answers, the error is sqrt(p (1 - p) / n).
        """
        # The tuned model, not the one for sampling, which may have another dtype.
        sampler = self._sampler(self.model, self.frozen)
        prompts = self._held_out_prompts
        rewards, _ = sampler.greedy_rewards(params, prompts, self._reward)
        error = rewards.std() / math.sqrt(len(rewards))
        return {
            _REWARD: Metric.of(rewards.mean(), "reward"),
            _REWARD_ERROR: Metric(float(error), "reward", higher_is_better=False),
        }

    def input_digests(self) -> dict[str, str]:
        """Hashes the questions."""
        path = self.settings.data.path
        contents = {"data": path, "guide": self.settings.test_time.guide}
        # The first digest is the one in older records, which includes the path.
        return {"data": digest_of(path), **content_digests(contents)}

    def describe_data(self) -> str:
        """Describes the questions, with the number that evaluations use."""
        described = self._questions.describe(len(self._held_out_prompts))
        return f"{self.settings.data.path}: {described}"

    def _traces(self) -> list[Trace]:
        """Samples the teacher's traces, or reads them from a file."""
        guide = self.settings.test_time.guide
        assert guide is not None
        if is_trace_file(guide):
            traces = read_traces(guide)
            with prefix_errors("config.test_time.guide"):
                check_trace_tokens(traces, self.model.config.vocab_size)
            return traces
        traces = self._collect_traces(guide)
        if not traces:
            raise ValueError(
                "`config.test_time.keep` must keep at least one trace to learn from; got none."
            )
        # Another run can use the file as its guide, without a teacher.
        write_traces(self.folder / "kept_traces.jsonl", traces)
        return traces

    def _collect_traces(self, guide: str) -> list[Trace]:
        """Samples the teacher's completions, which stay in the run directory."""
        settings = self.settings.test_time
        with report_wait(f"the weights of {guide}"):
            params, config = load_model(
                guide, allow_nan=self.settings.allow_nan, mesh=self.mesh
            )
        _require_same_vocabulary(guide, config.vocab_size, self.model, self.tokenizer)
        chains = settings.chains_of_prompt
        sampler = self._sampler(RWKV7(config), params)
        teacher = dataclasses.replace(sampler, group=chains)
        vote = None
        if settings.keep == "majority":
            vote = (self._questions.given_answer, settings.vote_margin)
        self.folder.mkdir(parents=True, exist_ok=True)
        with (
            report_wait("the teacher's completions"),
            count_progress("teacher", "prompts") as report,
        ):
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
                on_progress=report,
            )
        of_each = f" x {chains}" if chains > 1 else ""
        print(
            f"teacher   kept {len(traces)} traces of {settings.traces} prompts{of_each}; {budget}"
        )
        return traces


def _require_same_vocabulary(
    guide: str, size: int, model: RWKV7, tokenizer: Tokenizer
) -> None:
    """Raises if a guide has another vocabulary than the model, as far as its checkpoint shows.

    Args:
        guide: path of the guide's checkpoint.
        size: vocabulary size of the guide.
        model: the model that learns from it.
        tokenizer: tokenizer of the run.
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
    """Makes the function from a prompt to the teacher's prompt.

    It applies the substitution to the prompt and puts the hint before it.
    """
    hint = tokenizer.encode(settings.hint)

    def template(prompt: Sequence[int]) -> list[int]:
        if not settings.substitute:
            return [*hint, *prompt]
        old, new = settings.substitute
        text = tokenizer.decode(list(prompt)).replace(old, new)
        return [*hint, *tokenizer.encode(text)]

    return template
