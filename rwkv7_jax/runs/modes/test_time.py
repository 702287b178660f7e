"""The mode that tunes a state by rewards, by a larger model's traces or by a prompt."""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from rwkv7_jax.checkpoints.model_files import load_model
from rwkv7_jax.data.batch import Batch
from rwkv7_jax.data.readers import documents
from rwkv7_jax.generation.prefill import prefill_state
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import RWKV7State
from rwkv7_jax.runs.datasets import digest_of
from rwkv7_jax.runs.input_pipeline import BatchSource, DrawnBatches
from rwkv7_jax.runs.modes.base import DatasetMode, StateTuningMode
from rwkv7_jax.runs.progress_bar import ProgressBar
from rwkv7_jax.runs.settings import TestTimeSettings
from rwkv7_jax.test_time.losses import context_distillation, distillation_loss, policy_loss
from rwkv7_jax.test_time.questions import QuestionSet, find_verifier
from rwkv7_jax.test_time.rollouts import held_out_reward, policy_batch, rollouts
from rwkv7_jax.test_time.teacher import collect_traces
from rwkv7_jax.test_time.traces import Trace, completion_rows, trace_batch
from rwkv7_jax.text.tokenizer import Tokenizer

# Share of a question's votes by which its majority answer must lead.
_VOTE_MARGIN = 0.25

# Prompts that the teacher answers at the same time.
_TEACHER_ROWS = 64


class ContextMode(DatasetMode, StateTuningMode):
    """Turns a long prompt into a state; its rows are the run's text."""

    def set_up(self) -> None:
        """Loads the model, reads the prompt and opens the data."""
        self.load_frozen_model()
        path = self.settings.test_time.context
        if not path:
            raise ValueError("`config.test_time.context` must name the file that becomes a state.")
        ids: list[int] = []
        for document in documents(path):
            ids += self.tokenizer.encode(document.text())
        prompt = prefill_state(self.model, self.frozen, np.asarray(ids))
        self.loss = context_distillation(self.model, self.frozen, prompt)
        self.open_data()
        self._held_out = self.prediction_evaluator("held_out")

    def input_digests(self) -> dict[str, str]:
        """Hashes the data and the prompt."""
        context = digest_of(self.settings.test_time.context, None)
        return {**self.data.digests(), "context": context}

    def held_out_metrics(self, trainables: RWKV7State) -> dict[str, float]:
        """Measures how well the held-out rows are predicted from the tuned state."""
        return self._held_out(self.frozen, trainables)


class TestTimeMode(StateTuningMode):
    """Tunes a start state on questions, by the method that `config.test_time.method` names."""

    # The name begins with "Test"; pytest must not collect it.
    __test__ = False

    def set_up(self) -> None:
        """Loads the model and the questions; for "distil", lets the teacher answer."""
        settings = self.settings
        self.load_frozen_model()
        self._questions = QuestionSet(
            settings.data.path,
            self.tokenizer,
            seed=settings.seed,
            held_out=settings.data.held_out,
        )
        verifier = settings.test_time.verifier
        self._reward = self._questions.reward if verifier == "exact" else find_verifier(verifier)
        self._held_out = self._questions.prompts(0, settings.evaluation.windows, held_out=True)
        self._traces: list[Trace] = []
        if settings.test_time.method == "distil":
            self._traces = self._collect_traces()
        if settings.test_time.method == "grpo":
            self.loss = policy_loss(
                self.model,
                self.frozen,
                temperature=settings.test_time.temperature,
                kl=settings.test_time.kl,
            )
        else:
            self.loss = distillation_loss(self.model, self.frozen)

    @property
    def rows_per_step(self) -> int:
        """The rows that a step computes at once."""
        test_time = self.settings.test_time
        if test_time.method == "distil":
            return super().rows_per_step
        return test_time.prompts * test_time.group

    @property
    def tokens_per_step(self) -> int | None:
        """None: completions end where they end."""
        return None

    def batches(self, start_step: int, mesh: Mesh | None) -> BatchSource:
        """Makes batches of the teacher's traces, or of what the model writes from its state."""
        draw = {
            "distil": self._trace_batch,
            "grpo": self._policy_batch,
            "expert": self._expert_batch,
        }[self.settings.test_time.method]
        return DrawnBatches(draw, mesh)

    def _policy_batch(self, state: RWKV7State, step: int) -> Batch | None:
        """Draws completions and their advantages; None where all of them earned the same."""
        settings = self.settings.test_time
        drawn = policy_batch(
            self.model,
            self.frozen,
            state,
            self._questions.prompts(step, settings.prompts),
            self._reward,
            group=settings.group,
            tokens=settings.tokens,
            key=self._key(step),
            temperature=settings.temperature,
        )
        # An update without advantages would only carry on with old momentum.
        return None if drawn.uniform else drawn.batch

    def _expert_batch(self, state: RWKV7State, step: int) -> Batch | None:
        """Draws completions, weighted by what they earned; None where none earned anything."""
        settings = self.settings.test_time
        drawn = rollouts(
            self.model,
            self.frozen,
            state,
            self._questions.prompts(step, settings.prompts),
            group=settings.group,
            tokens=settings.tokens,
            key=self._key(step),
            temperature=settings.temperature,
        )
        weights: list[float] = []
        for prompt, completion in zip(drawn.prompts, drawn.completions, strict=True):
            weights.append(float(self._reward(tuple(prompt), tuple(completion))))
        if not any(weights):
            return None
        return completion_rows(
            drawn.prompts,
            drawn.completions,
            length=drawn.tokens.shape[1] - 1,
            weights=weights,
        )

    def _trace_batch(self, state: RWKV7State, step: int) -> Batch:
        """Gives a batch of the teacher's traces."""
        longest = max(len(trace.prompt) + len(trace.completion) - 1 for trace in self._traces)
        return trace_batch(
            self._traces,
            step,
            batch_size=self.settings.data.batch_size,
            length=longest,
            seed=self.settings.seed,
        )

    def _key(self, step: int) -> jax.Array:
        return jax.random.fold_in(jax.random.key(self.settings.seed), step)

    def held_out_metrics(self, trainables: RWKV7State) -> dict[str, float]:
        """Measures the mean reward of the most probable answers to held-out questions."""
        reward, _ = held_out_reward(
            self.model,
            self.frozen,
            trainables,
            self._held_out,
            self._reward,
            tokens=self.settings.test_time.tokens,
        )
        return {"held_out_reward": reward}

    def input_digests(self) -> dict[str, str]:
        """Hashes the questions."""
        return {"data": digest_of(self.settings.data.path, None)}

    def describe_data(self) -> str:
        """Names the questions."""
        return f"{self.settings.data.path}: made as it goes"

    def _collect_traces(self) -> list[Trace]:
        """Lets the teacher answer; its completions stay in the run's folder."""
        settings = self.settings.test_time
        if not settings.guide:
            raise ValueError("`config.test_time.guide` must name the larger model's checkpoint.")
        teacher_params, config = load_model(settings.guide, allow_nan=self.settings.allow_nan)
        verified = settings.keep == "verified"
        majority = settings.keep == "majority"
        self.folder.mkdir(parents=True, exist_ok=True)
        bar = ProgressBar(settings.traces, "guide")
        traces, budget = collect_traces(
            RWKV7(config),
            teacher_params,
            self._questions.prompts(0, settings.traces),
            tokens=settings.tokens,
            key=jax.random.key(self.settings.seed),
            samples=settings.group if majority else 1,
            template=_teacher_template(settings, self.tokenizer),
            verify=self._reward if verified else None,
            vote=(tuple, _VOTE_MARGIN) if majority else None,
            temperature=settings.temperature,
            source=settings.guide,
            cache=self.folder / "traces.jsonl",
            at_once=_TEACHER_ROWS,
            on_progress=lambda done, total: bar.update(done, "prompts"),
        )
        bar.close()
        print(f"guide     kept {len(traces)} of {settings.traces} traces; {budget}")
        if not traces:
            raise ValueError("`config.test_time.keep` leaves no trace of the guide to learn from.")
        return traces


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
        text = tokenizer.decode(list(prompt)).replace(*settings.substitute)
        return [*hint, *tokenizer.encode(text)]

    return template
