"""What each mode of train.py trains, and what is measured of it."""

from collections.abc import Callable
from typing import Any

from rwkv7_jax.evaluation.scoring import score, score_answers
from rwkv7_jax.runs.datasets import held_out, task_of
from rwkv7_jax.runs.modes.base import Job
from rwkv7_jax.runs.settings import Settings

# From trainables to numbers by name.
Evaluator = Callable[[Any], dict[str, float]]


def _look(settings: Settings, job: Job, name: str, path: str) -> Evaluator:
    """How well one path that evaluation reads is predicted."""
    batch = held_out(settings, job.tokenizer, path=path)
    task = task_of(path or settings.data.evaluation or settings.data.path)

    def look(trained: Any) -> dict[str, float]:
        weights, start = job.weights(trained), job.start(trained)
        if task:
            return {f"{name}_accuracy": score_answers(job.model, weights, start, batch).accuracy}
        found = score(job.model, weights, start, batch, job.tokenizer)
        return {f"{name}_bits_per_byte": found.bits_per_byte}

    return look


def make_evaluators(settings: Settings, job: Job) -> list[Evaluator]:
    """What a run watches.

    Of text it is bits per byte, of a synthetic task the accuracy of its answers: `held_out_` of the
    run's own data, `retention_` of `config.evaluation.retention`. There a list of tasks such as
    "task:dictionary,task:mapping" gives a number each, called `dictionary_accuracy` and so on. An
    observer is watched by what its proposals are worth, test-time tuning by its reward.
    """
    if job.measured is None:
        found = [_look(settings, job, "held_out", "")]
    else:
        data = None if job.batch else held_out(settings, job.tokenizer)
        found = [job.measured(data)]
    paths = [path for path in settings.evaluation.retention.split(",") if path]
    found += [_look(settings, job, task_of(path), path) for path in paths if task_of(path)]
    if text := ",".join(path for path in paths if not task_of(path)):
        found.append(_look(settings, job, "retention", text))
    return found
