"""The choices a user has when reading data, each spelled once.

Public functions accept any string and check it, so that a misspelt one is refused with a sentence;
inside the room the `Literal` types are used.
"""

import typing
from typing import Literal

# In which order samples come: drawn from the seed and the epoch, or as RWKV's own trainer has them.
Order = Literal["shuffled", "cubic"]
ORDERS: tuple[Order, ...] = typing.get_args(Order)

# How rows are cut: from all documents joined, one row for each document, or rows that documents
# share without seeing each other.
Packing = Literal["stream", "documents", "packed"]
PACKINGS: tuple[Packing, ...] = typing.get_args(Packing)

# Which part of the documents is read.
Split = Literal["all", "train", "held_out"]
SPLITS: tuple[Split, ...] = typing.get_args(Split)

# What a bad line of a .jsonl file does: it raises, or it is left out and counted.
OnBad = Literal["error", "skip"]
ON_BAD: tuple[OnBad, ...] = typing.get_args(OnBad)
