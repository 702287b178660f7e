"""The data of a run: what it trains on, and what it is measured on. Level 7."""

import functools
import itertools
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int

from .data import packed, token_stream, windows
from .settings import Settings
from .tasks import task_batch
from .token_streams import TokenStream, as_stream
from .tokenizer import Tokenizer


def stream_of(settings: Settings, path: str, tokenizer: Tokenizer, split: str) -> TokenStream:
    """The ids of one part of what a path names.

    Raises:
        ValueError: no path.
    """
    if not path:
        raise ValueError("`config.data.path` must name what to read.")
    data = settings.data
    return token_stream(
        path.split(","), tokenizer, split=split, held_out=data.held_out, on_bad=data.on_bad
    )


def task_of(path: str) -> str:
    """The synthetic task that a path names, or nothing."""
    return path.removeprefix("task:") if path.startswith("task:") else ""


def training_stream(settings: Settings, tokenizer: Tokenizer) -> TokenStream:
    """The ids that a run trains on; of a synthetic task, which has no end, some examples.

    `data.data_hash` of it is what a run can store, to know its data again.
    """
    data = settings.data
    if task := task_of(data.path):
        some = task_batch(task, 0, batch_size=64, length=data.length, seed=settings.seed)
        return as_stream(some["tokens"].reshape(-1))
    return stream_of(settings, data.path, tokenizer, "train")


def calibration_text(settings: Settings, tokenizer: Tokenizer) -> Int[np.ndarray, "R T"]:
    """Rows of what a run trains on, for features to be fitted to."""
    rows, data = settings.upscaling.rows, settings.data
    if task := task_of(data.path):
        some = task_batch(task, 0, batch_size=rows, length=data.length, seed=settings.seed)
    else:
        some = windows(training_stream(settings, tokenizer), data.length, rows)
    return some["tokens"][:, :-1]


def batches(
    settings: Settings,
    stream: TokenStream,
    tokenizer: Tokenizer,
    *,
    start_step: int = 0,
    rows: slice = slice(None),
) -> Iterator[dict]:
    """The batches from `start_step` on: a pure function of the seed and the step.

    Args:
        settings: of the run.
        stream: what it trains on, from `training_stream`.
        tokenizer: of the model's vocabulary.
        start_step: of the first batch, from 0.
        rows: those of the global batch that this host makes; see `data.host_rows`.
    """
    data, general = settings.data, settings.tuning.anchor_path
    sizes = {"batch_size": data.batch_size, "length": data.length}
    choices = {"packing": data.packing, "order": data.order}
    pack = functools.partial(packed, tokenizer=tokenizer, start_step=start_step, rows=rows, **sizes)

    def examples(task: str, seed: int) -> Iterator[dict]:
        whole = (task_batch(task, step, seed=seed, **sizes) for step in itertools.count(start_step))
        return ({name: array[rows] for name, array in batch.items()} for batch in whole)

    seed, task = settings.seed, task_of(data.path)
    main = examples(task, seed) if task else pack(stream, seed=seed, **choices)
    if not settings.tuning.anchor:
        return main
    if task := task_of(general):
        anchor = examples(task, seed + 1)
    else:
        anchor = pack(stream_of(settings, general, tokenizer, "train"), seed=seed + 1)
    return (one | {"anchor": two["tokens"]} for one, two in zip(main, anchor, strict=True))


def held_out(settings: Settings, tokenizer: Tokenizer, *, path: str = "") -> dict:
    """Rows of `path`, else of `config.data.evaluation`, else of the held-out documents.

    They are packed as the run packs.
    """
    measure, own = settings.evaluation, settings.data.evaluation
    if task := task_of(path or own or settings.data.path):
        sizes = {"batch_size": measure.windows, "length": measure.length}
        return task_batch(task, 0, seed=settings.seed, held_out=True, **sizes)
    if not path and own:
        stream = stream_of(settings, own, tokenizer, "all")
    else:
        stream = stream_of(settings, path or settings.data.path, tokenizer, "held_out")
    return windows(stream, measure.length, measure.windows, packing=settings.data.packing)
