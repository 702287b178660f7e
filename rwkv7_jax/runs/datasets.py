"""The data of a run: training batches and held-out rows."""

import hashlib
import itertools
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Int

from rwkv7_jax.data.batch import Batch
from rwkv7_jax.data.batching import fewest_windows
from rwkv7_jax.data.choices import Order, Packing
from rwkv7_jax.data.loading import batches_from, token_stream, windows
from rwkv7_jax.data.packed_documents import pack_documents
from rwkv7_jax.data.sources import Source, TaskSource, TextSource, parse_source
from rwkv7_jax.data.target_counts import (
    TargetCounts,
    count_targets,
    shortest_useful_length,
)
from rwkv7_jax.data.tasks.synthetic_tasks import task_batch
from rwkv7_jax.data.token_streams import TokenStream, as_stream, data_hash
from rwkv7_jax.runs.settings import DataSettings, Settings
from rwkv7_jax.runs.waiting import report_wait
from rwkv7_jax.text.tokenizer import Tokenizer

# The number of examples that stand for a synthetic task, which is infinite, in its digest.
_TASK_EXAMPLES = 64


def digest_of(path: str) -> str:
    """Hashes the path and, if it names a file, the file's bytes."""
    # It may name a task, which its name defines completely.
    digest = hashlib.blake2b(path.encode(), digest_size=16)
    file = Path(path).expanduser()
    if file.is_file():
        digest.update(file.read_bytes())
    return digest.hexdigest()


def read_stream(
    data: DataSettings,
    source: TextSource,
    tokenizer: Tokenizer,
    split: str,
    *,
    setting: str = "config.data.path",
) -> TokenStream:
    """Reads the token ids of one split of some texts, with messages while that takes long.

    Args:
        data: the group of settings.
        source: the texts.
        tokenizer: of the model's vocabulary.
        split: one of `data.choices.SPLITS`.
        setting: the setting that names the texts, for the error message.

    Raises:
        ValueError: the source has no path.
    """
    if not source.paths:
        raise ValueError(f"`{setting}` must name what to read.")
    # Files of ids are mapped at once. Text is tokenized, at a few megabytes per second.
    with report_wait(f"the text of `{setting}`"):
        return token_stream(
            source.paths,
            tokenizer,
            split=split,
            held_out=data.held_out,
            on_bad=data.on_bad,
            as_bytes=data.as_bytes,
            encoding=data.encoding,
        )


def packing_of(data: DataSettings, stream: TokenStream, answers: Packing) -> Packing:
    """Returns how rows are cut from a stream.

    Args:
        data: the group of settings.
        stream: the token ids. Those of questions with answers include some outside the loss.
        answers: what packing "auto" means for questions with answers; for other text it means
            "stream".
    """
    if data.packing != "auto":
        return data.packing
    # The cubic order is defined only for the windows of one long stream.
    return answers if stream.masked and data.order != "cubic" else "stream"


def _check_enough(
    stream: TokenStream, data: DataSettings, packing: Packing, setting: str
) -> None:
    """Checks that packing "stream" can cut a batch of rows.

    Raises:
        ValueError: the text has fewer than two rows, or three in the cubic order; the message names
            the settings.
    """
    windows_needed = fewest_windows(data.order)
    # The other packings pad rows.
    if packing != "stream" or len(stream) >= windows_needed * data.length:
        return
    share = {2: "half", 3: "a third"}[windows_needed]
    raise ValueError(
        f"`config.data.length` must be at most {share} of the {len(stream):,} tokens that "
        f"`{setting}` has for training; got {data.length}. "
        '`config.data.packing="documents"` pads short samples instead.'
    )


def _count_targets(
    stream: TokenStream, data: DataSettings, packing: Packing
) -> TargetCounts:
    """Counts the training targets, and warns about rows without any.

    Raises:
        ValueError: no target counts, so the loss would always be 0.
    """
    counts = count_targets(stream, length=data.length, packing=packing)
    if counts.targets and not counts.in_loss:
        useful = shortest_useful_length(stream)
        advice = "" if useful is None else f"; the shortest useful length is {useful}"
        raise ValueError(
            "`config.data.length` must be large enough to reach an answer: no target counts within "
            f"the first {data.length} tokens of any of {counts.rows:,} documents{advice}; with "
            '`config.data.packing="stream"` rows may begin within a prompt.'
        )
    if counts.empty_rows:
        warnings.warn(
            f"{counts.empty_rows:,} of {counts.rows:,} documents have no target that counts within "
            f"`config.data.length` = {data.length} tokens: the run learns nothing from them",
            stacklevel=3,
        )
    return counts


def training_stream(settings: Settings, tokenizer: Tokenizer) -> TokenStream:
    """Reads the token ids that a run trains on; for a synthetic task, some of its examples.

    A run stores `data_hash` of this stream to recognise its data.
    """
    data = settings.data
    source = parse_source(data.path, "`config.data.path`")
    if isinstance(source, TextSource):
        return read_stream(data, source, tokenizer, "train")
    examples = task_batch(
        source.name,
        0,
        batch_size=_TASK_EXAMPLES,
        length=data.length,
        seed=settings.seed,
    )
    # The digest of these examples changes with the task, the seed and the length, as intended.
    return as_stream(np.asarray(examples.tokens).reshape(-1))


class TrainingData:
    """The rows that a run trains on, and the general text of its anchor.

    Attributes:
        stream: the token ids to train on; see `training_stream`.
        anchor: the token ids of the anchor; None if there is none, or if it is a synthetic task.
        packing: how rows are cut from `stream`.
        targets: how many targets there are and how many count; None for a synthetic task.
    """

    def __init__(self, settings: Settings, tokenizer: Tokenizer):
        """Opens the data.

        Args:
            settings: of the run. If the anchor has a weight, each batch also gets rows of the
                anchor's text or task.
            tokenizer: of the model's vocabulary.

        Raises:
            ValueError: there is nothing to read, or no target counts.
        """
        data = settings.data
        tuning = settings.tuning
        self._data = data
        self._seed = settings.seed
        self._answers: Packing = settings.packing_of_answers
        self._source = parse_source(data.path, "`config.data.path`")
        self._anchor_source: Source | None = None
        # Without a weight the anchor is unused.
        if tuning.anchor and tuning.anchor_path is not None:
            self._anchor_source = parse_source(
                tuning.anchor_path, "`config.tuning.anchor_path`"
            )
        self.stream = training_stream(settings, tokenizer)
        self.packing = packing_of(data, self.stream, self._answers)
        self.targets: TargetCounts | None = None
        if isinstance(self._source, TextSource):
            self.targets = _count_targets(self.stream, data, self.packing)
        self.anchor = None
        if isinstance(self._anchor_source, TextSource):
            self.anchor = read_stream(
                data,
                self._anchor_source,
                tokenizer,
                "train",
                setting="config.tuning.anchor_path",
            )

    @property
    def sequences(self) -> int:
        """The largest number of sequences in a packed row; 0 if every row is one sequence."""
        if self.packing != "packed":
            return 0
        return pack_documents(self.stream, self._data.length).sequences

    def digests(self) -> dict[str, str]:
        """Hashes what the run reads: "data" and, if the anchor is a text, "anchor"."""
        digests = {"data": data_hash(self.stream)}
        if self.anchor is not None:
            digests["anchor"] = data_hash(self.anchor)
        return digests

    def describe(self) -> str:
        """Describes the data and its size."""
        if isinstance(self._source, TaskSource):
            return f"{self._data.path}: generated on the fly"
        tokens = f"{self._data.path}: {len(self.stream):,} tokens"
        if self.targets is None:
            return tokens
        shown = f"{tokens}, {self.targets.share:.1%} of targets count"
        # Show a packing only if the user did not choose it.
        if self._data.packing == "auto" and self.packing != "stream":
            shown += f', packing "{self.packing}"'
        return shown

    def calibration_text(self, rows: int) -> Int[np.ndarray, "R T"]:
        """Returns rows of the training text for fitting features and moments."""
        length = self._data.length
        if isinstance(self._source, TextSource):
            if len(self.stream) <= length:
                raise ValueError(
                    f"`config.data.length` must be below the {len(self.stream):,} tokens of "
                    f"`config.data.path`; got {length}."
                )
            batch = windows(self.stream, length, rows)
        else:
            batch = task_batch(
                self._source.name,
                0,
                batch_size=rows,
                length=length,
                seed=self._seed,
            )
        return np.asarray(batch.inputs)

    def batches(
        self, *, start_step: int = 0, rows: slice = slice(None)
    ) -> Iterator[Batch]:
        """Generates the batches from a step on, as a pure function of the seed and the step.

        Args:
            start_step: the step of the first batch, counted from 0.
            rows: the rows of the global batch that this host generates; see `data.host_rows`.
        """
        batches = self._batches_of(
            self._source,
            self.stream,
            "config.data.path",
            seed=self._seed,
            start_step=start_step,
            rows=rows,
            order=self._data.order,
        )
        if self._anchor_source is None:
            return batches
        anchors = self._batches_of(
            self._anchor_source,
            self.anchor,
            "config.tuning.anchor_path",
            # A different seed: an anchor of the same task must not repeat the training rows.
            seed=self._seed + 1,
            start_step=start_step,
            rows=rows,
            order="shuffled",
        )
        # Both are infinite, so `strict` only catches a bug.
        pairs = zip(batches, anchors, strict=True)
        return (batch.replace(anchor=anchor.tokens) for batch, anchor in pairs)

    def _batches_of(
        self,
        source: Source,
        stream: TokenStream | None,
        setting: str,
        *,
        seed: int,
        start_step: int,
        rows: slice,
        order: Order,
    ) -> Iterator[Batch]:
        """Generates batches of a task's examples, or of a text's token stream."""
        data = self._data
        if isinstance(source, TaskSource):
            return self._examples(source, seed=seed, start_step=start_step, rows=rows)
        assert stream is not None
        packing = packing_of(data, stream, self._answers)
        _check_enough(stream, data, packing, setting)
        return batches_from(
            stream,
            batch_size=data.batch_size,
            length=data.length,
            packing=packing,
            seed=seed,
            start_step=start_step,
            rows=rows,
            order=order,
        )

    def _examples(
        self, task: TaskSource, *, seed: int, start_step: int, rows: slice
    ) -> Iterator[Batch]:
        """Generates batches of a synthetic task."""
        for step in itertools.count(start_step):
            batch = task_batch(
                task.name,
                step,
                seed=seed,
                batch_size=self._data.batch_size,
                length=self._data.length,
            )
            # Generate all rows first: a row must not depend on the number of hosts.
            yield batch.select_rows(rows)


def held_out_source(data: DataSettings, path: str | None = None) -> Source:
    """Parses the source that `held_out` reads."""
    return parse_source(
        path or data.evaluation or data.path, f"`{_held_out_setting(data, path)}`"
    )


def _held_out_setting(data: DataSettings, path: str | None) -> str:
    """Returns the name of the setting that names the source of `held_out`."""
    if path:
        return "config.evaluation.retention"
    return "config.data.evaluation" if data.evaluation else "config.data.path"


def held_out(
    settings: Settings,
    tokenizer: Tokenizer,
    *,
    answers: Packing | None = None,
    path: str | None = None,
) -> Batch:
    """Returns the rows for evaluations, cut like the run's training rows.

    Documents that share a row in training get rows of their own here.

    Args:
        settings: of the run.
        tokenizer: of the model's vocabulary.
        answers: what packing "auto" means for questions with answers; None for the same as in
            training.
        path: what to read; None for `config.data.evaluation` or, if that is unset, the held-out
            documents of `config.data.path`.

    Raises:
        ValueError: there is nothing to read, there is too little, or no target counts.
    """
    data = settings.data
    evaluation = settings.evaluation
    source = held_out_source(data, path)
    if isinstance(source, TaskSource):
        return task_batch(
            source.name,
            0,
            seed=settings.seed,
            held_out=True,
            batch_size=evaluation.windows,
            length=evaluation.length,
        )
    # `config.data.evaluation` is read in full, because none of it is trained on.
    split = "all" if not path and data.evaluation else "held_out"
    setting = _held_out_setting(data, path)
    stream = read_stream(data, source, tokenizer, split, setting=setting)
    length = evaluation.length
    packing = packing_of(data, stream, answers or settings.packing_of_answers)
    if packing == "stream" and len(stream) <= length:
        share = f" (`config.data.held_out` is {data.held_out:g})"
        raise ValueError(
            f"`config.evaluation.length` must be below the {len(stream):,} tokens that "
            f"`{setting}` has for evaluation{share if split == 'held_out' else ''}; got {length}."
        )
    batch = windows(stream, length, evaluation.windows, packing=packing)
    if not np.any(batch.mask):
        raise ValueError(
            "`config.evaluation.length` must be large enough to reach an answer: no target of "
            f"`{setting}` counts within {length} tokens."
        )
    return batch
