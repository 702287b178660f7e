"""Batches of tokens whose order is a pure function of the seed and the step. Level 5."""

import functools
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from .binidx import read_binidx
from .sources import documents
from .tokenizer import Tokenizer

Source = str | Path | Sequence[str | Path] | np.ndarray
SPLITS = ("all", "train", "held_out")


def is_held_out(document: bytes, share: float) -> bool:
    """Whether a document belongs to the held-out part: decided by its bytes alone, in any order."""
    digest = hashlib.blake2b(document, digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def _checked(ids: np.ndarray, vocab_size: int, name: str) -> np.ndarray:
    """`ids`, if all are inside the vocabulary."""
    for first in range(0, len(ids), 1 << 24):
        piece = ids[first : first + (1 << 24)]
        wrong = np.flatnonzero((piece < 0) | (piece >= vocab_size))
        if len(wrong):
            place = first + int(wrong[0])
            raise ValueError(
                f"token_stream: `{name}` must hold ids below {vocab_size}; "
                f"got {int(ids[place])} at position {place}."
            )
    return ids


def _by_position(ids: np.ndarray, split: str, held_out: float) -> np.ndarray:
    border = len(ids) - int(len(ids) * held_out)
    return {"all": ids, "train": ids[:border], "held_out": ids[border:]}[split]


def _parts(source: str | Path, tokenizer: Tokenizer, split: str, held_out: float, on_bad: str):
    if Path(source).suffix in (".bin", ".idx"):
        ids = _checked(read_binidx(source), tokenizer.vocab_size, str(source))
        yield _by_position(ids, split, held_out)
        return
    for document in documents(source, on_bad=on_bad):
        if split == "all" or is_held_out(document, held_out) == (split == "held_out"):
            yield np.asarray([*tokenizer.encode(document), 0], np.uint16)


def token_stream(
    source: Source,
    tokenizer: Tokenizer,
    *,
    split: str = "all",
    held_out: float = 0.05,
    on_bad: str = "error",
) -> np.ndarray:
    """All ids of `source` in one row, token 0 behind every document.

    Args:
        source: what `sources.documents` reads, a `.bin` file, several of these, or an array of ids.
        tokenizer: makes ids of documents.
        split: "all"; or "train" and "held_out", which part whole documents by a hash of their bytes
            (an array or a .bin file by position: its end is held out).
        held_out: the share held out.
        on_bad: "error" or "skip", for bad lines of .jsonl files.

    Raises:
        ValueError: an unknown split, nothing to read, a bad line, or an id outside the vocabulary.
    """
    if split not in SPLITS:
        raise ValueError(f"token_stream: `split` must be one of {SPLITS}; got {split!r}.")
    if isinstance(source, np.ndarray):
        ids = _checked(source, tokenizer.vocab_size, "source")
        return _by_position(ids, split, held_out)
    sources = [source] if isinstance(source, (str, Path)) else list(source)
    parts = [p for s in sources for p in _parts(s, tokenizer, split, held_out, on_bad)]
    stream = parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, np.uint16), *parts])
    if not len(stream):
        names = ", ".join(map(str, sources))
        raise ValueError(f"token_stream: `{names}` has no document in its part {split!r}.")
    return stream


@functools.lru_cache(maxsize=4)
def _epoch(seed: int, epoch: int, windows: int, length: int) -> tuple[int, np.ndarray]:
    """Where an epoch's first window begins, and the order in which its windows come."""
    rng = np.random.default_rng([seed, epoch])
    return int(rng.integers(length)), rng.permutation(windows)


def batch_at(
    stream: np.ndarray, step: int, *, batch_size: int, length: int, seed: int = 0
) -> dict[str, np.ndarray]:
    """The batch of one step: tokens [B T+1] int32, mask [B T] of ones.

    In every epoch each window of `length` tokens comes once, in an order drawn from (seed, epoch);
    the windows' borders move from epoch to epoch.

    Args:
        stream: ids.
        step: from 0.
        batch_size: rows (B).
        length: inputs of a row (T); it also holds the last one's target.
        seed: of the order.

    Raises:
        ValueError: the stream is shorter than two windows.
    """
    windows = (len(stream) - length) // length
    if windows < 1:
        raise ValueError(
            f"batch_at: `stream` must have at least {2 * length} tokens; got {len(stream)}."
        )
    rows = []
    for index in range(step * batch_size, (step + 1) * batch_size):
        phase, order = _epoch(seed, index // windows, windows, length)
        first = phase + int(order[index % windows]) * length
        rows.append(stream[first : first + length + 1])
    mask = np.ones((batch_size, length), np.float32)
    return {"tokens": np.stack(rows).astype(np.int32), "mask": mask}


def packed(
    source: Source,
    *,
    batch_size: int,
    length: int,
    seed: int = 0,
    tokenizer: Tokenizer | None = None,
    split: str = "all",
    held_out: float = 0.05,
    start_step: int = 0,
) -> Iterator[dict[str, np.ndarray]]:
    """Batches without end, from `start_step` on; see `token_stream` and `batch_at`.

    Rows are cut from one row of all documents: a row may begin inside a document and hold the end
    of one and the start of the next, with token 0 between them.
    """
    tokenizer = tokenizer or Tokenizer.world()
    stream = token_stream(source, tokenizer, split=split, held_out=held_out)
    batch = functools.partial(batch_at, stream, batch_size=batch_size, length=length, seed=seed)
    batch(start_step)
    return map(batch, itertools.count(start_step))


def windows(stream: np.ndarray, length: int, count: int) -> dict[str, np.ndarray]:
    """At most `count` windows for evaluation, evenly spread over the stream, as one batch.

    Raises:
        ValueError: the stream is shorter than one window.
    """
    if len(stream) <= length:
        raise ValueError(
            f"windows: `stream` must have more than {length} tokens; got {len(stream)}."
        )
    count = max(1, min(count, (len(stream) - 1) // length))
    starts = np.linspace(0, len(stream) - length - 1, count).astype(int)
    tokens = np.stack([stream[i : i + length + 1] for i in starts]).astype(np.int32)
    return {"tokens": tokens, "mask": np.ones((count, length), np.float32)}
