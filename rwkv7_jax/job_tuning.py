"""The modes that train weights, a start state or an upscaled state. Level 8."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

from .checkpoint import save_model
from .job import Job, count, frozen_model, load, saver, start_state
from .job_data import calibration_text
from .model import RWKV7
from .optim.decorrelation import decorrelate
from .settings import Settings
from .shapes import Params
from .state import RWKV7State, init_state
from .state_tuning import LEAVES, moving, state_loss, state_statistics, upscale
from .tokenizer import Tokenizer
from .training import pretrain_loss


def pretrain_job(settings: Settings) -> Job:
    """Weights are trained, from new ones or a checkpoint's."""
    model, params = load(settings)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)

    def save(folder: Path, trained: Params) -> Path:
        save_model(folder / "model.pth", trained, model.config)
        return folder / "model.pth"

    return Job(
        model=model,
        tokenizer=Tokenizer.for_vocabulary(model.config.vocab_size),
        trainables=params,
        trained=count(params),
        loss=pretrain_loss(model, l2wrap=settings.optimizer.l2wrap),
        weights=lambda trained: trained,
        start=lambda trained: init_state(model.config),
        save=save,
    )


def _optimizer(settings: Settings, start: RWKV7State, leaves: tuple[str, ...]):
    """What wraps the optimizer: it sees the tuned arrays alone, decorrelated if that is asked."""
    mask, numbers = moving(start, leaves), settings.decorrelation
    mode = {"dbp": "online", "whiten": "whiten"}.get(settings.tuning.decorrelate)
    if mode is None or (mode == "whiten" and "memory" in leaves):
        return lambda tx: optax.masked(tx, mask)
    choices = {
        name: getattr(numbers, name)
        for name in ("rate", "balance", "iterations", "damping", "average")
    }
    read = moving(start, tuple(set(leaves) & {"wkv", "memory"}))
    if "memory" in leaves:
        read = read.replace(upscaled=read.upscaled.replace(write=False))
    return lambda tx: optax.masked(decorrelate(tx, mode=mode, mask=read, **choices), mask)


def _tuning(settings: Settings, model: RWKV7, params: Params, start, leaves) -> Job:
    parts = moving(start, leaves)
    trained = sum(x.size for x, on in zip(*map(jax.tree.leaves, (start, parts)), strict=True) if on)
    wide = start.upscaled is not None
    decorrelated = settings.tuning.decorrelate == "dbp" or (
        settings.tuning.decorrelate == "whiten" and not wide
    )
    rows, tuning = settings.decorrelation.rows, settings.tuning
    return Job(
        model=model,
        tokenizer=Tokenizer.for_vocabulary(model.config.vocab_size),
        trainables=start,
        trained=trained,
        loss=state_loss(
            model,
            params,
            leaves=leaves,
            anchor=tuning.anchor,
            l2wrap=settings.optimizer.l2wrap,
        ),
        weights=lambda tuned: params,
        start=lambda tuned: tuned,
        save=saver(settings, model, params, "state.safetensors" if wide else "state.pth"),
        optimizer=_optimizer(settings, start, leaves),
        statistics=state_statistics(model, params, leaves=leaves, rows=rows)
        if decorrelated
        else None,
    )


def state_job(settings: Settings) -> Job:
    """A start state is tuned."""
    model, params = frozen_model(settings)
    leaves = LEAVES[:3] if settings.tuning.leaves == "all" else ("wkv",)
    return _tuning(settings, model, params, start_state(model), leaves)


def upscaled_job(settings: Settings) -> Job:
    """A memory read through kernel features is tuned; the start state itself stays zero."""
    model, params = frozen_model(settings)
    tokenizer = Tokenizer.for_vocabulary(model.config.vocab_size)
    choices = dataclasses.asdict(settings.upscaling)
    choices.pop("rows")
    literal = choices["dynamics"].startswith("replace")
    whiten = settings.tuning.decorrelate == "whiten" and not literal
    choices["prepare"] = choices["prepare"] or ("whiten" if whiten else "none")
    raw = choices["prepare"] == "none"
    choices["widths"] = choices["widths"] or ((1.0,) if raw else (1.0, 4.0, 16.0))
    text = calibration_text(settings, tokenizer)
    state = upscale(model, params, text, seed=settings.seed, **choices)
    start = start_state(model).replace(upscaled=state.upscaled)
    return _tuning(settings, model, params, start, ("memory",))
