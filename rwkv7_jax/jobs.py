"""What each mode of train.py trains, and what is measured of it. Level 9."""

from collections.abc import Callable

from .evaluation import answers, score
from .job import Job
from .job_data import held_out, task_of
from .job_tuning import pretrain_job, state_job, upscaled_job
from .settings import Settings
from .shapes import Params
from .state import RWKV7State

MODES = {"pretrain": pretrain_job, "state": state_job, "upscaled_state": upscaled_job}


def make_job(settings: Settings) -> Job:
    """The work of `settings.mode`.

    Raises:
        ValueError: an unknown mode, or settings that the mode cannot work with.
    """
    if settings.mode not in MODES:
        raise ValueError(f"`config.mode` must be one of {', '.join(MODES)}; got {settings.mode!r}.")
    return MODES[settings.mode](settings)


Measure = Callable[[Params, RWKV7State], float]


def _measure(settings: Settings, job: Job, name: str, path: str) -> tuple[str, Measure]:
    """A number's name and the number, for one path that evaluation reads."""
    batch = held_out(settings, job.tokenizer, path=path)
    if task_of(path or settings.data.evaluation or settings.data.path):
        return (
            f"{name}_accuracy",
            lambda params, state: answers(job.model, params, state, batch).accuracy,
        )
    return (
        f"{name}_bits_per_byte",
        lambda params, state: score(job.model, params, state, batch, job.tokenizer).bits_per_byte,
    )


def measures(settings: Settings, job: Job) -> dict[str, Measure]:
    """What a run watches, by name, each a function of weights and start state (batch 1).

    Of text it is bits per byte, of a synthetic task the accuracy of its answers: `held_out_` of the
    run's own data, `retention_` of `config.evaluation.retention`. There a list of tasks such as
    "task:dictionary,task:mapping" gives a number each, called `dictionary_accuracy` and so on.
    """
    numbers = [_measure(settings, job, "held_out", "")]
    paths = [path for path in settings.evaluation.retention.split(",") if path]
    numbers += [_measure(settings, job, task_of(path), path) for path in paths if task_of(path)]
    if text := ",".join(path for path in paths if not task_of(path)):
        numbers.append(_measure(settings, job, "retention", text))
    return dict(numbers)
