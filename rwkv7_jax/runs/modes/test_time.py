"""The mode that tunes a state by rewards, by a larger model's traces or by a prompt."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rwkv7_jax.array_types import Params
from rwkv7_jax.checkpoints.model_files import load_model
from rwkv7_jax.data.batch import Batch
from rwkv7_jax.data.readers import documents
from rwkv7_jax.generation.prefill import prefill_state
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import RWKV7State
from rwkv7_jax.runs.modes.base import Job, frozen_model, saver, start_state
from rwkv7_jax.runs.progress_bar import ProgressBar
from rwkv7_jax.runs.settings import Settings
from rwkv7_jax.test_time.losses import context_distillation, distillation_loss, policy_loss
from rwkv7_jax.test_time.questions import QuestionSet, find_verifier
from rwkv7_jax.test_time.rewards import RewardFunction
from rwkv7_jax.test_time.rollouts import held_out_reward, policy_batch, rollouts
from rwkv7_jax.test_time.teacher import collect_traces
from rwkv7_jax.test_time.traces import Trace, completion_rows, trace_batch
from rwkv7_jax.text.tokenizer import Tokenizer
from rwkv7_jax.training.losses import Loss


def test_time_job(settings: Settings, folder: Path) -> Job:
    """A start state is tuned at test time, as `config.test_time.method` says."""
    model, params = frozen_model(settings)
    tokenizer = Tokenizer.for_vocabulary(model.config.vocab_size)
    if settings.test_time.method == "context":
        return _job(
            settings, model, params, tokenizer, _context(settings, model, params, tokenizer)
        )
    questions = QuestionSet(
        settings.data.path, tokenizer, seed=settings.seed, held_out=settings.data.held_out
    )
    verifier = settings.test_time.verifier
    judge = questions.reward if verifier == "exact" else find_verifier(verifier)
    asked = questions.prompts(0, settings.evaluation.windows, held_out=True)
    if settings.test_time.method == "distil":
        traces = _traces(settings, folder, tokenizer, questions, judge)
        batch = _of_traces(settings, traces)
    else:
        batch = functools.partial(_drawn, settings, model, params, questions, judge)
    loss = (
        policy_loss(
            model, params, temperature=settings.test_time.temperature, kl=settings.test_time.kl
        )
        if settings.test_time.method == "grpo"
        else distillation_loss(model, params)
    )

    def look(held_out: dict | None) -> Callable[[RWKV7State], dict[str, float]]:
        del held_out
        tokens = settings.test_time.tokens
        return lambda state: {
            "held_out_reward": held_out_reward(model, params, state, asked, judge, tokens=tokens)[0]
        }

    return _job(settings, model, params, tokenizer, loss, batch=batch, measured=look)


def _job(settings: Settings, model, params, tokenizer, loss: Loss, **more: Any) -> Job:
    start = start_state(model)
    return Job(
        model=model,
        tokenizer=tokenizer,
        trainables=start,
        trained=start.wkv.size,
        loss=loss,
        weights=lambda tuned: params,
        start=lambda tuned: tuned,
        save=saver(settings, model, params),
        **more,
    )


def _context(settings: Settings, model: RWKV7, params: Params, tokenizer: Tokenizer) -> Loss:
    """The loss that turns a long prompt into a state; its rows are the run's text."""
    path = settings.test_time.context
    if not path:
        raise ValueError("`config.test_time.context` must name the file that becomes a state.")
    ids = [i for document in documents(path) for i in tokenizer.encode(document.text())]
    return context_distillation(model, params, prefill_state(model, params, np.asarray(ids)))


def _drawn(
    settings: Settings,
    model,
    params,
    questions: QuestionSet,
    judge: RewardFunction,
    state,
    step: int,
) -> Batch | None:
    """What the model writes at a step from its present state, with what it earned.

    None where nothing tells better completions from worse ones: an update would only carry on with
    old momentum.
    """
    choices = settings.test_time
    prompts = questions.prompts(step, choices.prompts)
    key = jax.random.fold_in(jax.random.key(settings.seed), step)
    drawing = {
        "group": choices.group,
        "tokens": choices.tokens,
        "key": key,
        "temperature": choices.temperature,
    }
    if choices.method == "grpo":
        made = policy_batch(model, params, state, prompts, judge, **drawing)
        return None if made.uniform else made.batch
    drawn = rollouts(model, params, state, prompts, **drawing)
    pairs = list(zip(drawn.prompts, drawn.completions, strict=True))
    weights = [float(judge(tuple(prompt), tuple(done))) for prompt, done in pairs]
    if not any(weights):
        return None
    length = drawn.tokens.shape[1] - 1
    return completion_rows(drawn.prompts, drawn.completions, length=length, weights=weights)


def _template(settings: Settings, tokenizer: Tokenizer) -> Callable:
    """What the guide reads in place of a prompt: a hint before it, one text for another in it."""
    choices = settings.test_time
    if len(choices.substitute) not in (0, 2):
        raise ValueError(
            "`config.test_time.substitute` must be two texts, what and with what; "
            f"got {choices.substitute}."
        )
    hint = tokenizer.encode(choices.hint)

    def told(prompt) -> list[int]:
        if not choices.substitute:
            return [*hint, *prompt]
        text = tokenizer.decode(list(prompt)).replace(*choices.substitute)
        return [*hint, *tokenizer.encode(text)]

    return told


def _traces(
    settings: Settings,
    folder: Path,
    tokenizer: Tokenizer,
    questions: QuestionSet,
    judge: RewardFunction,
) -> list[Trace]:
    """What the guide wrote and was kept; what it wrote stays in the run's folder."""
    choices = settings.test_time
    if not choices.guide:
        raise ValueError("`config.test_time.guide` must name the larger model's checkpoint.")
    guide_params, config = load_model(choices.guide, allow_nan=settings.allow_nan)
    verify = judge if choices.keep == "verified" else None
    vote = (lambda completion: tuple(completion), 0.25) if choices.keep == "majority" else None
    folder.mkdir(parents=True, exist_ok=True)
    bar = ProgressBar(choices.traces, "guide")
    traces, budget = collect_traces(
        RWKV7(config),
        guide_params,
        questions.prompts(0, choices.traces),
        tokens=choices.tokens,
        key=jax.random.key(settings.seed),
        samples=choices.group if choices.keep == "majority" else 1,
        template=_template(settings, tokenizer),
        verify=verify,
        vote=vote,
        temperature=choices.temperature,
        source=choices.guide,
        cache=folder / "traces.jsonl",
        at_once=64,
        on_progress=lambda done, total: bar.update(done, "prompts"),
    )
    bar.close()
    print(f"guide     kept {len(traces)} of {choices.traces} traces; {budget}")
    if not traces:
        raise ValueError("`config.test_time.keep` leaves no trace of the guide to learn from.")
    return traces


def _of_traces(settings: Settings, traces: list[Trace]) -> Callable[[Any, int], Batch]:
    longest = max(len(trace.prompt) + len(trace.completion) - 1 for trace in traces)

    def batch(state: RWKV7State, step: int) -> Batch:
        del state
        rows = settings.data.batch_size
        return trace_batch(traces, step, batch_size=rows, length=longest, seed=settings.seed)

    return batch
