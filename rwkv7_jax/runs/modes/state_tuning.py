"""The modes that train weights, a start state or an upscaled state."""

import dataclasses

import jax
import optax

from rwkv7_jax.array_types import Params
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import RWKV7State
from rwkv7_jax.optim.decorrelation import decorrelate
from rwkv7_jax.runs.datasets import calibration_text
from rwkv7_jax.runs.modes.base import Job, frozen_model, saver, start_state
from rwkv7_jax.runs.settings import Settings
from rwkv7_jax.text.tokenizer import Tokenizer
from rwkv7_jax.tuning.read_statistics import state_statistics
from rwkv7_jax.tuning.state_tuning import LEAVES, state_loss, trainable_mask
from rwkv7_jax.tuning.upscaling import upscale


def _optimizer(settings: Settings, start: RWKV7State, leaves: tuple[str, ...]):
    """What wraps the optimizer: it sees the tuned arrays alone, decorrelated if that is asked."""
    mask, numbers = trainable_mask(start, leaves), settings.decorrelation
    mode = {"dbp": "online", "whiten": "whiten"}.get(settings.tuning.decorrelate)
    if mode is None or (mode == "whiten" and "memory" in leaves):
        return lambda tx: optax.masked(tx, mask)
    choices = {
        name: getattr(numbers, name)
        for name in ("rate", "balance", "iterations", "damping", "average")
    }
    read = trainable_mask(start, tuple(set(leaves) & {"wkv", "memory"}))
    if "memory" in leaves:
        read = read.replace(upscaled=read.upscaled.replace(write=False))
    return lambda tx: optax.masked(decorrelate(tx, mode=mode, mask=read, **choices), mask)


def _tuning(settings: Settings, model: RWKV7, params: Params, start, leaves) -> Job:
    parts = trainable_mask(start, leaves)
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
