"""The number of targets of a stream that count in the loss once it is cut into rows."""

import dataclasses

import numpy as np

from rwkv7_jax.data.choices import Packing
from rwkv7_jax.data.token_streams import TokenStream

# Number of ids that are counted at once.
_CHUNK = 1 << 22

# Number of documents that are searched for a counting target, to suggest a length.
_LOOKED_AT = 1000


@dataclasses.dataclass(frozen=True)
class TargetCounts:
    """The targets of all rows of a stream.

    Attributes:
        targets: number of targets in all rows, without padding.
        in_loss: number of targets that count.
        rows: number of documents; 0 for packing "stream", whose rows shift.
        empty_rows: number of documents without a counting target within a row.
    """

    targets: int
    in_loss: int
    rows: int = 0
    empty_rows: int = 0

    @property
    def share(self) -> float:
        """The share of targets that count; 0 if there are none."""
        return self.in_loss / self.targets if self.targets else 0.0


def count_targets(
    stream: TokenStream, *, length: int, packing: Packing
) -> TargetCounts:
    """Counts the targets of a stream in rows of `length` inputs.

    Args:
        stream: the stream of the run.
        length: number of inputs per row (T).
        packing: "stream" reads everything, the others the first T + 1 ids of each document.
    """
    if packing == "stream":
        return TargetCounts(len(stream), stream.count_in_loss())
    firsts = stream.starts[stream.documents]
    ends = stream.starts[stream.documents + 1]
    ends = np.minimum(ends, firsts + length + 1)
    # The first id of a document is only an input.
    sizes = ends - firsts - 1
    targets = int(sizes.sum())
    if not stream.masked:
        return TargetCounts(targets, targets, len(firsts))
    counts = _cumulative(stream, ends) - _cumulative(stream, firsts + 1)
    return TargetCounts(
        targets=targets,
        in_loss=int(counts.sum()),
        rows=len(firsts),
        empty_rows=int(np.count_nonzero(counts == 0)),
    )


def _cumulative(stream: TokenStream, places: np.ndarray) -> np.ndarray:
    """Counts the ids in the loss before each of some ascending positions of the stream."""
    counts = np.zeros(len(places), np.int64)
    total = 0
    position = 0
    for first in range(0, len(stream), _CHUNK):
        for ids, in_loss in stream.pieces(first, min(first + _CHUNK, len(stream))):
            flags = (
                np.ones(len(ids), np.int64)
                if in_loss is None
                else np.not_equal(in_loss, 0)
            )
            # Entry i is the number of ids in the loss before position + i.
            running = np.concatenate([[0], np.cumsum(flags)]) + total
            low, high = np.searchsorted(places, [position, position + len(ids)], "left")
            counts[low:high] = running[places[low:high] - position]
            total = int(running[-1])
            position += len(ids)
    # The remaining positions are at the end of the stream.
    counts[np.searchsorted(places, position, "left") :] = total
    return counts


def shortest_useful_length(stream: TokenStream) -> int | None:
    """Finds the shortest row length with which any of the first documents has a counting target.

    Returns:
        The number of inputs per row; None if no document has such a target.
    """
    shortest: int | None = None
    for number in stream.documents[:_LOOKED_AT]:
        first, end = stream.starts[number : number + 2].tolist()
        counts = np.zeros(end - first - 1, bool)
        stream.fill(first, np.zeros(end - first, np.int64), counts)
        places = np.flatnonzero(counts)
        if len(places) and (shortest is None or places[0] + 1 < shortest):
            shortest = int(places[0]) + 1
    return shortest
