"""The two ways in which files hold the low-rank matrices.

Official files have `w1` as [D, R] and `w2` as [R, D]; web-rwkv's and rwkv.cpp's have them
transposed. Where a rank differs from the width, the shapes tell. Where all ranks equal it, the
names or the format must, or the file is refused: a wrong guess would load, and only answer badly.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from rwkv7_jax.checkpoints.tensor_names import LOW_RANK, Index, Tensor, Tensors

LowRank = Literal["official", "transposed"]


def transposed(tensor: Tensor) -> Tensor:
    """Swaps the last two axes, now in the shape and later in the numbers; vectors stay."""
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
    """Returns the tensors with the low-rank matrices as official files have them.

    Args:
        tensors: by official name.
        said: how they lie by the names or the format, which counts where the shapes do not tell.
        path: for messages.

    Raises:
        ValueError: neither the shapes nor anything else tells how they lie.
    """
    official = dict(tensors)
    if low_rank_of(tensors, said, path) == "transposed":
        for name, tensor in tensors.items():
            if LOW_RANK.search(name):
                official[name] = transposed(tensor)
    return official


def low_rank_of(tensors: Tensors, said: LowRank | None, path: Path) -> LowRank:
    """Tells how the low-rank matrices of a model lie.

    Args:
        tensors: by official name.
        said: how they lie by the names or the format.
        path: for messages.

    Raises:
        ValueError: nothing tells.
    """
    votes = set(_votes(tensors))
    if len(votes) == 1:
        return votes.pop()
    # Some of each: as they are, so that the check of shapes reports those that do not fit.
    if votes:
        return "official"
    if said is not None:
        return said
    if _is_decided_by_dtype(tensors):
        return "official"
    raise ValueError(
        f"`{path}` has low-rank matrices of the model's width, and nothing in it says "
        "whether they lie as in official files or transposed as in web-rwkv's; take the .pth that "
        "it was made from."
    )


def _votes(tensors: Tensors) -> Iterator[LowRank]:
    """Yields what the shape of each low-rank matrix says, for those that are not square."""
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
    """Returns whether this is not web-rwkv's, which is all in half precision."""
    is_half = all(tensor.dtype == np.float16 for tensor in tensors.values())
    has_low_rank = any(LOW_RANK.search(name) for name in tensors)
    return not (has_low_rank and is_half)
