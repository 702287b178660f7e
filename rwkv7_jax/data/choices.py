"""The named options for reading data.

Public functions accept any string and check it, so that a misspelt one gets a clear error message.
Internal functions use the `Literal` types.
"""

import typing
from typing import Literal

# The order of samples: shuffled by the seed and the epoch, or that of RWKV's own trainer.
Order = Literal["shuffled", "cubic"]
ORDERS: tuple[Order, ...] = typing.get_args(Order)

# How documents become rows: concatenated, one per row, or several per row without leakage.
Packing = Literal["stream", "documents", "packed"]
PACKINGS: tuple[Packing, ...] = typing.get_args(Packing)

# The part of the documents to read.
Split = Literal["all", "train", "held_out"]
SPLITS: tuple[Split, ...] = typing.get_args(Split)

# What happens to a bad line of a .jsonl file: it raises, or it is skipped and counted.
OnBad = Literal["error", "skip"]
ON_BAD: tuple[OnBad, ...] = typing.get_args(OnBad)
