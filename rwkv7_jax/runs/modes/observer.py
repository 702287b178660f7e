"""The mode that trains an observer of a frozen teacher."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rwkv7_jax.array_types import Params
from rwkv7_jax.checkpoints.model_files import model_hash
from rwkv7_jax.data.batch import Batch
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.model.state import init_state
from rwkv7_jax.observer.evaluation import evaluate_handover
from rwkv7_jax.observer.files import save_observer
from rwkv7_jax.observer.loss import observer_loss
from rwkv7_jax.observer.observer import Observer, init_observer, propose, state_moments
from rwkv7_jax.observer.prompt_splits import add_prompt_splits
from rwkv7_jax.runs.datasets import calibration_text
from rwkv7_jax.runs.modes.base import Job, count, load
from rwkv7_jax.runs.settings import Settings
from rwkv7_jax.text.tokenizer import Tokenizer

# Numbers of a hand-over that the log holds, under these names.
_WATCHED = {"proposed": "proposal", "wkv": "own_state", "zero": "no_state"}


def observer_job(settings: Settings) -> Job:
    """A small model learns to propose start states of the one that `config.init` names."""
    if not settings.init:
        raise ValueError("`config.init` must name the checkpoint whose states are observed.")
    teacher, weights = load(settings)
    choices, tokenizer = settings.observer, Tokenizer.for_vocabulary(teacher.config.vocab_size)
    config = _sizes(settings, teacher.config)
    bias = state_moments(teacher, weights, calibration_text(settings, tokenizer)).mean
    key = jax.random.key(settings.seed)
    observer, params = init_observer(config, teacher.config, key, bias=bias)

    def save(folder: Path, trained: Params) -> Path:
        info = {"base_model": model_hash(weights, teacher.config)}
        save_observer(folder / "observer", observer, trained, info=info)
        return folder / "observer"

    return Job(
        model=teacher,
        tokenizer=tokenizer,
        trainables=params,
        trained=count(params),
        loss=observer_loss(
            observer,
            teacher,
            weights,
            variance=choices.variance,
            divergence=choices.divergence,
            answers=choices.answers,
        ),
        weights=lambda trained: weights,
        start=lambda trained: init_state(teacher.config),
        save=save,
        prepared=functools.partial(_split, settings),
        measured=functools.partial(_watch, settings, observer, teacher, weights),
    )


def _sizes(settings: Settings, teacher: RWKV7Config) -> RWKV7Config:
    if "vocab_size" in settings.observer.model:
        raise ValueError("`config.observer.model.vocab_size` is the teacher's; leave it out.")
    sizes = {"num_layers": 1, "width": teacher.width // 2, "head_size": teacher.head_size}
    try:
        return RWKV7Config(
            vocab_size=teacher.vocab_size,
            **{"dtype": teacher.dtype} | sizes | dict(settings.observer.model),
        )
    except TypeError as error:
        raise ValueError(f"`config.observer.model` has an unknown size: {error}.") from None


def _split(settings: Settings, batch: Batch, step: int) -> Batch:
    """The batch with the places at which its prompts end."""
    choices = settings.observer
    most = choices.most or batch.tokens.shape[1] - 2
    return add_prompt_splits(batch, settings.seed, step, least=choices.least, most=most)


def _watch(
    settings: Settings, observer: Observer, teacher, weights: Params, held_out: Batch
) -> Callable[[Any], dict[str, float]]:
    """What the teacher makes of the tails behind held-out prompts, by where it starts from."""
    batch = _split(settings, held_out, 0)
    prompts = np.asarray(batch.tokens)[:, :-1]

    def look(params: Params) -> dict[str, float]:
        proposal = propose(observer, params, prompts, batch.split)
        found = evaluate_handover(teacher, weights, proposal, batch)
        return {
            f"{label}_{field}": getattr(found[name], field)
            for name, label in _WATCHED.items()
            for field in ("accuracy", "nats")
        }

    return look
