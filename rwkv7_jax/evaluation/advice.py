"""What was measured of a tuned start state, and what to do about it in sentences."""

import dataclasses
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

PerHead = Float[np.ndarray, "L H"]

PerTarget = Float[np.ndarray, " T"]

# A state is large where its norm is this many times that of a state made by reading. Behind the
# read-out a norm per head hides the size: beyond it early tokens hear the start state alone. The
# quickstart's rate of 1 made a third of the heads 5 to 7 times as large and cost other text 14 %;
# a quarter of that state, and tuning at a tenth of the rate, are below 2 times and cost 3 %.
LARGE = 5.0

# Retention is lost where the loss of other text rises by more than this share, and by more than
# this many nats: between those 14 and 3 %. The nats keep tasks out that are solved so well that
# any change is a large share.
LOST_SHARE, LOST_NATS = 0.05, 0.01

# A memory has faded where less than this share of the first read's square is left, and fades early
# where that happens in the first half of the rows: most of the text is then read without it.
FADED, EARLY = 0.1, 0.5

# A memory is badly conditioned where the median head reads through less than this share of its
# channels. In the toy models the median was 3.5 of 32 and decorrelated updates halved the loss; the
# quickstart's is 5 of 32, that of 64 whitened features 53.
NARROW = 0.25


@dataclasses.dataclass(frozen=True, eq=False)
class MemoryStatistics:
    """One memory of a start state: the WKV state, or the upscaled one.

    Attributes:
        dynamics: "recurrent" for the WKV state, else of `state.DYNAMICS`.
        spectrum: singular values, largest first.
        norms: Frobenius norms.
        typical: those of the base model's state behind the rows, root mean square; None where
            nothing compares.
        rank: effective rank, (sum s^2)^2 / sum s^4 of the singular values.
        read_rank: effective rank of E[psi psi^T], the vectors that it is read with.
        reads: mean |psi|^2 per head at every position: how much of it is still read.
        channels: columns that it is read through: N, or M features.
    """

    dynamics: str
    spectrum: Float[np.ndarray, "L H R"]
    norms: PerHead
    typical: PerHead | None
    rank: PerHead
    read_rank: PerHead
    reads: Float[np.ndarray, "L T"]
    channels: int

    @property
    def empty(self) -> bool:
        """Whether it holds nothing."""
        return not np.any(self.norms)

    @property
    def fading(self) -> PerTarget:
        """How much is read at every position, all layers together, as a share of the first."""
        mean = self.reads.mean(0)
        return mean / (mean[0] or 1.0)

    @property
    def faded(self) -> int | None:
        """The first position at which `fading` is below `FADED`, or None."""
        below = np.flatnonzero(self.fading < FADED)
        return int(below[0]) if len(below) else None


@dataclasses.dataclass(frozen=True)
class RetentionScore:
    """What a model makes of some text, from nothing (base) and from a start state (tuned).

    Attributes:
        name: of the text.
        base_nats: mean loss of the targets that count.
        tuned_nats: the same from the start state.
        base_accuracy: share of targets that are the likeliest id.
        tuned_accuracy: the same from the start state.
        divergence: mean KL(base || tuned) in nats.
        tokens: targets that count.
    """

    name: str
    base_nats: float
    tuned_nats: float
    base_accuracy: float
    tuned_accuracy: float
    divergence: float
    tokens: int

    @property
    def lost(self) -> bool:
        """Whether the loss has risen by more than `LOST_SHARE` and `LOST_NATS`."""
        rise = self.tuned_nats - self.base_nats
        return rise > LOST_NATS and rise > LOST_SHARE * self.base_nats


@dataclasses.dataclass(frozen=True, eq=False)
class Diagnosis:
    """What `diagnosis.diagnose` found.

    Attributes:
        memories: "wkv" and, of an upscaled state, "memory"; only those that are read.
        base_nats: mean loss at every position, NaN where no target counts.
        tuned_nats: the same from the start state.
        counts: targets that count at every position.
        own: the text that the state is for.
        generic: other text, or None.
        advice: sentences; none where nothing is wrong.
    """

    memories: Mapping[str, MemoryStatistics]
    base_nats: PerTarget
    tuned_nats: PerTarget
    counts: PerTarget
    own: RetentionScore
    generic: RetentionScore | None
    advice: tuple[str, ...] = ()


def advise(found: Diagnosis) -> tuple[str, ...]:
    """A sentence for everything that is wrong, in the order in which to try."""
    sentences = [_useless(found.own), _large(found), _forgetful(found.generic), _fading(found)]
    sentences += [_narrow(name, memory) for name, memory in found.memories.items()]
    return tuple(sentence for sentence in sentences if sentence)


def _useless(own: RetentionScore) -> str:
    if own.tuned_nats < own.base_nats:
        return ""
    return (
        f"The state does not help here: {own.tuned_nats:.3f} nats per token with it, "
        f"{own.base_nats:.3f} without. Tune it on such text, or look for another base model's file."
    )


def _large(found: Diagnosis) -> str:
    memory = found.memories.get("wkv")
    if memory is None or memory.typical is None:
        return ""
    times = memory.norms / np.maximum(memory.typical, 1e-9)
    layer, head = np.unravel_index(np.argmax(times), times.shape)
    if times[layer, head] <= LARGE:
        return ""
    return (
        f"{int((times > LARGE).sum())} of {times.size} heads hold more than {LARGE:g} times the "
        f"norm of a state made by reading (most: layer {layer} head {head}, "
        f"{times[layer, head]:.0f} times). Scale the state by an alpha of 0.25 to 0.5, or tune "
        "with a lower learning rate."
    )


def _forgetful(generic: RetentionScore | None) -> str:
    if generic is None or not generic.lost:
        return ""
    return (
        f"Other text has become harder: {generic.base_nats:.3f} nats per token before, "
        f"{generic.tuned_nats:.3f} now. Scale the state by an alpha of 0.25 to 0.5, or tune with "
        "an anchor to the base model on such text."
    )


def _fading(found: Diagnosis) -> str:
    wkv, other = found.memories.get("wkv"), found.memories.get("memory")
    lasting = other is not None and other.dynamics == "static" and not other.empty
    if wkv is None or wkv.empty or lasting or wkv.faded is None:
        return ""
    length = wkv.reads.shape[1]
    if wkv.faded >= EARLY * length:
        return ""
    return (
        f"The start state fades early: at position {wkv.faded} of {length} less than {FADED:.0%} "
        "of the first read is left. A static upscaled memory does not fade."
    )


def _narrow(name: str, memory: MemoryStatistics) -> str:
    share = float(np.median(memory.read_rank)) / memory.channels
    if memory.empty or share >= NARROW:
        return ""
    what = {"wkv": "WKV state"}.get(name, "upscaled memory")
    return (
        f"The {what} is read through few directions: {share * memory.channels:.1f} of "
        f"{memory.channels} in the median head, so that tuning is badly conditioned. "
        "Tune with decorrelated updates."
    )
