"""The two orientations of the low-rank matrices in files.

Official files have `w1` as [D, R] and `w2` as [R, D]; web-rwkv and rwkv.cpp transpose them. If a
rank differs from the width, the shapes determine the orientation. If all ranks equal the width, the
names or the format must determine it. Otherwise the file is rejected, because a wrong guess would
load and silently give bad answers.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from rwkv7_jax.checkpoints.tensor_names import LOW_RANK, Index, Tensor, Tensors

LowRank = Literal["official", "transposed"]


def transposed(tensor: Tensor) -> Tensor:
    """Swaps the last two axes lazily, when the tensor is read; keeps vectors."""
    if len(tensor.shape) < 2:
        return tensor
    shape = (*tensor.shape[:-2], tensor.shape[-1], tensor.shape[-2])

    def read_part(index: Index) -> np.ndarray:
        *lead, first, last = index
        return tensor.part((*lead, last, first)).swapaxes(-1, -2)

    return Tensor(
        shape, tensor.dtype, lambda: tensor.read().swapaxes(-1, -2), read_part
    )


def with_official_low_rank(
    tensors: Tensors, said: LowRank | None, path: Path
) -> dict[str, Tensor]:
    """Returns the tensors with the low-rank matrices in official orientation.

    Args:
        tensors: tensors by official name.
        said: orientation according to the names or the format, used if the shapes are ambiguous.
        path: path of the file, for error messages.

    Raises:
        ValueError: the orientation cannot be determined.
    """
    official = dict(tensors)
    if low_rank_of(tensors, said, path) == "transposed":
        for name, tensor in tensors.items():
            if LOW_RANK.search(name):
                official[name] = transposed(tensor)
    return official


def low_rank_of(tensors: Tensors, said: LowRank | None, path: Path) -> LowRank:
    """Determines the orientation of a model's low-rank matrices.

    Args:
        tensors: tensors by official name.
        said: orientation according to the names or the format.
        path: path of the file, for error messages.

    Raises:
        ValueError: the orientation cannot be determined.
    """
    votes = set(_votes(tensors))
    if len(votes) == 1:
        return votes.pop()
    # If the shapes disagree or the width is unknown, nothing is transposed: `check_names` or
    # `infer_config` reports it.
    if votes or "emb.weight" not in tensors:
        return "official"
    if said is not None:
        return said
    if _is_decided_by_dtype(tensors):
        return "official"
    raise ValueError(
        f"`{path}` has square low-rank matrices, and nothing in it says whether they are "
        "oriented as in official files or transposed as in web-rwkv's; use the .pth that it "
        "was made from."
    )


def _votes(tensors: Tensors) -> Iterator[LowRank]:
    """Yields the orientation of each low-rank matrix that is not square."""
    if "emb.weight" not in tensors or not tensors["emb.weight"].shape:
        return
    width = tensors["emb.weight"].shape[-1]
    for name, tensor in tensors.items():
        if not LOW_RANK.search(name) or len(tensor.shape) != 2:
            continue
        # "1" maps from the width to the rank, "2" back.
        from_width = tensor.shape if name.endswith("1") else tensor.shape[::-1]
        rows, columns = from_width
        if rows == width != columns:
            yield "official"
        elif columns == width != rows:
            yield "transposed"


def _is_decided_by_dtype(tensors: Tensors) -> bool:
    """Returns whether the dtypes rule out web-rwkv, whose files are all float16."""
    is_half = all(tensor.dtype == np.float16 for tensor in tensors.values())
    has_low_rank = any(LOW_RANK.search(name) for name in tensors)
    return not (has_low_rank and is_half)
