"""The settings of a run's data."""

import dataclasses
from typing import Literal

from rwkv7_jax.data.choices import OnBad, Order
from rwkv7_jax.runs.settings.fields import MOST_COUNT, number, optional, place


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """The data of a run.

    Attributes:
        path: a .jsonl file or a table of texts, questions with answers or conversations (see
            `data.records.record`); a text file; a folder of these; a built-in corpus; a .bin file
            of `rwkv7 data` or of RWKV's tools (also without its suffix, as RWKV-LM names it); a
            comma-separated list of these; or a synthetic task such as "task:copy" (see
            `data.synthetic_tasks`).
        held_out: fraction of the documents held out for evaluation, chosen by a hash of their
            bytes. Of a single document, the end is held out.
        batch_size: rows of a batch, over all hosts.
        length: tokens of a row.
        on_bad: "error" or "skip", for invalid lines of a .jsonl file.
        packing: how documents are packed into the rows of a batch.

            * "stream" cuts rows from the concatenated documents. It uses every token, and the state
              leaks from one document into the next in a row, as in RWKV's own training.
            * "documents" gives each document a separate row, truncated or padded to `length`.
              Nothing leaks.
            * "packed" packs the same documents into full rows. Nothing leaks.
            * "auto" is "stream". If mode "state" or "upscaled_state" tunes on questions with
              answers, it is "packed", or "documents" if the run cannot read packed rows.
        order: "shuffled" by the seed, differently in every epoch; or "cubic", the order of RWKV's
            own trainer, which has no seed and is the same in every epoch (for packing "stream").
        evaluation: data for evaluation in place of the held-out part of `path`; all of it is used.
            Set `held_out` to 0 to train on all of `path`.
        as_bytes: read files that are not text (tables, archives, pictures) or not UTF-8 as bytes.
        encoding: encoding of the text, such as "utf-16" or "gbk"; UTF-8 by default.
        vocabulary: "world", "bytes", "bytes256" (raw), "ids" (numbers), a vocabulary file in
            World's format or a tokenizer.json. By default the vocabulary of the checkpoint, or the
            one with its size.
    """

    path: str = place("", several=True)
    held_out: float = number(0.05, 0, 1)
    batch_size: int = number(8, 1, MOST_COUNT)
    length: int = number(512, 1, MOST_COUNT)
    on_bad: OnBad = "error"
    packing: Literal["auto", "stream", "documents", "packed"] = "auto"
    order: Order = "shuffled"
    evaluation: str | None = place(None, several=True)
    as_bytes: bool = False
    encoding: str | None = optional()
    vocabulary: str | None = place(None)
