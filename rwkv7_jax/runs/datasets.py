"""The data of a run: what it trains on, and what it is measured on."""

import functools
import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Int

from rwkv7_jax.data.batch import Batch
from rwkv7_jax.data.loading import packed, token_stream, windows
from rwkv7_jax.data.synthetic_tasks import task_batch
from rwkv7_jax.data.token_streams import TokenStream, as_stream, data_hash
from rwkv7_jax.runs.settings import Settings
from rwkv7_jax.text.tokenizer import Tokenizer


def digest_of(path: str, stream: TokenStream | None) -> str:
    """A digest of the ids that a run reads, or, where it reads none, of the file at `path`."""
    if stream is not None:
        return data_hash(stream)
    digest = hashlib.blake2b(path.encode(), digest_size=16)
    if Path(path).is_file():
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()


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
        return as_stream(some.tokens.reshape(-1))
    return stream_of(settings, data.path, tokenizer, "train")


def anchor_stream(settings: Settings, tokenizer: Tokenizer) -> TokenStream | None:
    """The general text that an anchored run reads; None for one without, or with a task's."""
    general = settings.tuning.anchor_path
    if not settings.tuning.anchor or task_of(general):
        return None
    return stream_of(settings, general, tokenizer, "train")


def what_is_read(
    settings: Settings, stream: TokenStream | None, anchor: TokenStream | None
) -> dict[str, str]:
    """Digests of what a run reads, by name.

    Args:
        settings: of the run.
        stream: from `training_stream`; None where the run reads no ids.
        anchor: from `anchor_stream`.
    """
    found = {"data": digest_of(settings.data.path, stream)}
    if anchor is not None:
        found["anchor"] = digest_of(settings.tuning.anchor_path, anchor)
    if settings.mode == "test_time" and settings.test_time.method == "context":
        found["context"] = digest_of(settings.test_time.context, None)
    return found


def calibration_text(settings: Settings, tokenizer: Tokenizer) -> Int[np.ndarray, "R T"]:
    """Rows of what a run trains on, for features to be fitted to."""
    rows, data = settings.upscaling.rows, settings.data
    if task := task_of(data.path):
        some = task_batch(task, 0, batch_size=rows, length=data.length, seed=settings.seed)
    else:
        some = windows(training_stream(settings, tokenizer), data.length, rows)
    return some.tokens[:, :-1]


def batches(
    settings: Settings,
    stream: TokenStream,
    tokenizer: Tokenizer,
    *,
    anchor: TokenStream | None = None,
    start_step: int = 0,
    rows: slice = slice(None),
) -> Iterator[Batch]:
    """The batches from `start_step` on: a pure function of the seed and the step.

    Args:
        settings: of the run.
        stream: what it trains on, from `training_stream`.
        tokenizer: of the model's vocabulary.
        anchor: what an anchored run reads beside it, from `anchor_stream`.
        start_step: of the first batch, from 0.
        rows: those of the global batch that this host makes; see `data.host_rows`.
    """
    data = settings.data
    sizes = {"batch_size": data.batch_size, "length": data.length}
    choices = {"packing": data.packing, "order": data.order}
    pack = functools.partial(packed, tokenizer=tokenizer, start_step=start_step, rows=rows, **sizes)

    def examples(task: str, seed: int) -> Iterator[Batch]:
        whole = (task_batch(task, step, seed=seed, **sizes) for step in itertools.count(start_step))
        return (batch.select_rows(rows) for batch in whole)

    seed, task = settings.seed, task_of(data.path)
    main = examples(task, seed) if task else pack(stream, seed=seed, **choices)
    if not settings.tuning.anchor:
        return main
    task = task_of(settings.tuning.anchor_path)
    beside = examples(task, seed + 1) if task else pack(anchor, seed=seed + 1)
    return (one.replace(anchor=two.tokens) for one, two in zip(main, beside, strict=True))


def held_out(settings: Settings, tokenizer: Tokenizer, *, path: str = "") -> Batch:
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
