"""Measurements of a tuned start state, and written advice based on them."""

import dataclasses
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

from rwkv7_jax.checks import check_instance, prefix_errors
from rwkv7_jax.model.upscaled_memory import MEMORY_FORMS

PerHead = Float[np.ndarray, "L H"]

PerTarget = Float[np.ndarray, " T"]

# A state is large if its norm is this many times the norm of a state made by reading. The read-out
# is normalised per head, which hides the size: the start state dominates early tokens. The
# quickstart's learning rate of 1 made a third of the heads 5 to 7 times as large, and the loss of
# other text rose by 14 %. A quarter of that state, or a tenth of the rate, stays below 2 times and
# costs 3 %.
LARGE = 5.0

# Retention is lost if the loss of other text rises by more than this fraction (between the 14 and
# the 3 % above) and by more than this many nats: on a solved task any change is a large fraction.
LOST_SHARE = 0.05
LOST_NATS = 0.01

# A memory has faded once less than this fraction of the first read's square is left.
FADED = 0.1

# It fades early if that happens in the first half of the rows: most text is read without it.
EARLY = 0.5

# A memory is badly conditioned if the median head reads through less than this fraction of its
# channels. In the toy models the median was 3.5 of 32, and decorrelated updates halved the loss.
# In the quickstart it is 5 of 32; with 64 whitened features it is 53.
NARROW = 0.25


@dataclasses.dataclass(frozen=True, eq=False)
class MemoryStatistics:
    """One memory of a start state: the WKV state, or the upscaled one.

    Attributes:
        dynamics: "recurrent" for the WKV state, otherwise one of `model.MEMORY_FORMS`.
        spectrum: singular values, largest first.
        norms: Frobenius norms.
        reference_norm: root mean square norms of the base model's state after the rows; None for a
            memory that the base model does not have.
        rank: effective rank, (sum s^2)^2 / sum s^4 of the singular values.
        read_rank: effective rank of E[psi psi^T] of the read vectors psi.
        reads: mean |psi|^2 per head at each position: how much of the memory is still read; NaN
            where all rows are padding.
        channels: number of columns that are read: N channels, or M features.
    """

    dynamics: str
    spectrum: Float[np.ndarray, "L H R"]
    norms: PerHead
    reference_norm: PerHead | None
    rank: PerHead
    read_rank: PerHead
    reads: Float[np.ndarray, "L T"]
    channels: int

    @property
    def empty(self) -> bool:
        """Whether the memory is all zero."""
        return not np.any(self.norms)

    @property
    def constant(self) -> bool:
        """Whether the memory stays the same while the model reads."""
        # The WKV state is "recurrent", which `MEMORY_FORMS` does not list.
        form = MEMORY_FORMS.get(self.dynamics)
        return form is not None and not form.has_own_rows

    @property
    def fading(self) -> PerTarget:
        """The fraction of the first read that is left at each position, over all layers."""
        mean = self.reads.mean(0)
        return mean / (mean[0] or 1.0)

    @property
    def faded(self) -> int | None:
        """The first position at which `fading` is below `FADED`; None if it never is."""
        below = np.flatnonzero(self.fading < FADED)
        return int(below[0]) if len(below) else None


@dataclasses.dataclass(frozen=True)
class RetentionScore:
    """The loss of a model on some text, from the zero state (base) and a start state (tuned).

    Attributes:
        name: name of the text.
        base_nats: mean loss of the targets that count, from the zero state.
        tuned_nats: the same from the start state.
        base_accuracy: fraction of the targets that are the most likely id, from the zero state.
        tuned_accuracy: the same from the start state.
        divergence: mean KL(base || tuned) in nats.
        tokens: number of targets that count.
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
    """The result of `state_diagnosis.diagnose`.

    Attributes:
        memories: "wkv" and, for an upscaled state, "memory"; only those that are read.
        base_nats: mean loss at each position from the zero state; NaN if no target counts.
        tuned_nats: the same from the start state.
        counts: number of targets that count at each position.
        own: score on the text that the state was tuned for.
        generic: score on other text, or None.
        advice: one sentence per problem; empty if there is none.
    """

    memories: Mapping[str, MemoryStatistics]
    base_nats: PerTarget
    tuned_nats: PerTarget
    counts: PerTarget
    own: RetentionScore
    generic: RetentionScore | None
    advice: tuple[str, ...] = ()


def advise(diagnosis: Diagnosis) -> tuple[str, ...]:
    """Returns a sentence of advice for each problem, in the order in which to try them.

    Raises:
        TypeError: `diagnosis` is not a `Diagnosis`.
    """
    with prefix_errors("advise"):
        check_instance(diagnosis, Diagnosis, "`diagnosis`")
    sentences = [
        _does_not_help(diagnosis.own),
        _too_large(diagnosis),
        _forgets(diagnosis.generic),
        _fades_early(diagnosis),
    ]
    for name, memory in diagnosis.memories.items():
        sentences.append(_badly_conditioned(name, memory))
    return tuple(sentence for sentence in sentences if sentence)


def _does_not_help(own: RetentionScore) -> str:
    if own.tuned_nats < own.base_nats:
        return ""
    return (
        f"The state does not help here: {own.tuned_nats:.3f} nats per token with it, "
        f"{own.base_nats:.3f} without. Tune it on text like this, or check that it was tuned with "
        "this base model."
    )


def _too_large(diagnosis: Diagnosis) -> str:
    memory = diagnosis.memories.get("wkv")
    if memory is None or memory.reference_norm is None:
        return ""
    times = memory.norms / np.maximum(memory.reference_norm, 1e-9)
    layer, head = np.unravel_index(np.argmax(times), times.shape)
    if times[layer, head] <= LARGE:
        return ""
    return (
        f"In {int((times > LARGE).sum())} of {times.size} heads the norm is more than {LARGE:g} "
        f"times that of a state made by reading (largest: layer {layer} head {head}, "
        f"{times[layer, head]:.0f} times). Scale the state by an alpha of 0.25 to 0.5, or tune "
        "with a lower learning rate."
    )


def _forgets(generic: RetentionScore | None) -> str:
    if generic is None or not generic.lost:
        return ""
    return (
        f"The loss on other text has risen: {generic.base_nats:.3f} nats per token before, "
        f"{generic.tuned_nats:.3f} now. Scale the state by an alpha of 0.25 to 0.5, or tune with "
        "an anchor to the base model on such text."
    )


def _fades_early(diagnosis: Diagnosis) -> str:
    wkv = diagnosis.memories.get("wkv")
    other = diagnosis.memories.get("memory")
    # A memory that never changes keeps what the WKV state forgets.
    lasting = other is not None and other.constant and not other.empty
    if wkv is None or wkv.empty or lasting or wkv.faded is None:
        return ""
    # Beyond the longest row there is only padding.
    length = np.count_nonzero(np.isfinite(wkv.fading))
    if wkv.faded >= EARLY * length:
        return ""
    return (
        f"The start state fades early: at position {wkv.faded} of {length} less than {FADED:.0%} "
        "of the first read is left. A static upscaled memory does not fade."
    )


def _badly_conditioned(name: str, memory: MemoryStatistics) -> str:
    share = float(np.median(memory.read_rank)) / memory.channels
    if memory.empty or share >= NARROW:
        return ""
    memory_name = "WKV state" if name == "wkv" else "upscaled memory"
    return (
        f"The {memory_name} is read through few directions: {share * memory.channels:.1f} of "
        f"{memory.channels} in the median head, so tuning is badly conditioned. "
        "Tune with decorrelated updates."
    )
