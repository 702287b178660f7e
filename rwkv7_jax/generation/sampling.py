"""Sampling of the next token: penalties, top-p, top-k and temperature, as pure functions.

The order is that of the official package, because users compare outputs: top-p and top-k use the
probabilities at temperature 1, temperature comes last. Cutoffs are searched for bit by bit in the
probabilities: a sort of 65,536 of them costs 20 times as much on a CPU.
Source: BlinkDL's `rwkv` 0.8.32 on PyPI, rwkv/utils.py:55-88 and 113-143.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import platforms
from rwkv7_jax.checks import check_count, check_ids, check_number, prefix_errors
from rwkv7_jax.text.detokenizer import Vocabulary, spell

Scores = Float[Array, "B V"]

Number = float | int | Array | np.ndarray | np.number

Ids = Sequence[int] | Array | np.ndarray

# Options are made on the host; inside a compiled program they are tracers.
HostOrDevice = Array | np.ndarray | np.number

# Penalized logits are clipped to this: if all of them were infinite, their softmax would be NaN.
_LOGIT_LIMIT = 1e30

# Below this a temperature is greedy: 1 / temperature would leave float32's range.
_COLDEST = 1e-6

# Of a float32 below 2 that is not negative, so many bits differ from 0.
_BITS = 30


class Occurrences(NamedTuple):
    """Ids that each row has generated so far, for the penalties.

    Attributes:
        seen: [B V], ids that were generated, whatever they add to the counts.
        counts: [B V] float32, how often, decayed.
    """

    seen: Array
    counts: Array


class SamplingParams(NamedTuple):
    """Sampling options as arrays, so that changing one compiles nothing; from `make_options`.

    The numbers are scalars, or [B 1] where each row has its own (`options_by_row`).

    Attributes:
        temperature: exponent 1/temperature; 0 takes the most probable token.
        top_p: probability mass to keep.
        top_k: tokens to keep; 0 keeps all.
        presence_penalty: subtracted from the logit of every id that was generated.
        frequency_penalty: subtracted once more for every time it was generated.
        penalty_decay: factor on all counts at every token.
        weights: [V], the number an id adds to its count.
        banned: [V], ids that are never generated.
        stops: [V], ids that end a row.
    """

    temperature: HostOrDevice
    top_p: HostOrDevice
    top_k: HostOrDevice
    presence_penalty: HostOrDevice
    frequency_penalty: HostOrDevice
    penalty_decay: HostOrDevice
    weights: HostOrDevice
    banned: HostOrDevice
    stops: HostOrDevice


class ModelScores(NamedTuple):
    """What the model itself says of tokens: before penalties, cutoffs and temperature.

    Attributes:
        drawn: [B ...] float32, log-probabilities of the tokens that were drawn.
        ids: [B ... K] int32, the most probable ids, best first.
        logps: [B ... K] float32, their log-probabilities.
    """

    drawn: Array
    ids: Array
    logps: Array


# Fields of `SamplingParams` that are numbers; the others are vectors over the vocabulary.
_NUMBERS = (
    "temperature",
    "top_p",
    "top_k",
    "presence_penalty",
    "frequency_penalty",
    "penalty_decay",
)


def make_options(
    vocab_size: int,
    *,
    temperature: Number = 1.0,
    top_p: Number = 1.0,
    top_k: Number = 0,
    presence_penalty: Number = 0.0,
    frequency_penalty: Number = 0.0,
    penalty_decay: Number = 0.996,
    penalty_exempt: Ids = (),
    banned: Ids = (),
    stop_ids: Ids = (0,),
) -> SamplingParams:
    """Checks the options and makes arrays of fixed dtypes of them.

    Args:
        vocab_size: ids of the model.
        temperature: at least 0.
        top_p: between 0 and 1; 0 keeps the most probable token and its equals.
        top_k: at least 0; 0 means no limit.
        presence_penalty: any finite number; negative ones encourage repetition.
        frequency_penalty: any finite number.
        penalty_decay: between 0 and 1.
        penalty_exempt: ids that add 0 to their count, such as `exempt_ids(tokenizer)`; the presence
            penalty applies to them all the same.
        banned: ids that are never generated; at least one other has to be left.
        stop_ids: ids that end a row.

    Raises:
        ValueError: a number out of its range, or an id outside the vocabulary.
        TypeError: ids that are not integers.
    """
    highest = float(jnp.finfo(jnp.float32).max)
    with prefix_errors("make_options"):
        check_count(vocab_size, 1, "`vocab_size`")
        check_number(temperature, 0.0, highest, "`temperature`")
        check_number(top_p, 0.0, 1.0, "`top_p`")
        check_number(presence_penalty, -highest, highest, "`presence_penalty`")
        check_number(frequency_penalty, -highest, highest, "`frequency_penalty`")
        check_number(penalty_decay, 0.0, 1.0, "`penalty_decay`")
        top_k = check_count(top_k, 0, "`top_k`")
        is_exempt = _mask(penalty_exempt, vocab_size, "`penalty_exempt`")
        is_banned = _mask(banned, vocab_size, "`banned`")
        is_stop = _mask(stop_ids, vocab_size, "`stop_ids`")
        if is_banned.all():
            raise ValueError(f"`banned` must leave one id; got all {vocab_size}.")
    return SamplingParams(
        temperature=np.float32(temperature),
        top_p=np.float32(top_p),
        # More than the vocabulary may not fit into int32.
        top_k=np.int32(min(top_k, vocab_size)),
        presence_penalty=np.float32(presence_penalty),
        frequency_penalty=np.float32(frequency_penalty),
        penalty_decay=np.float32(penalty_decay),
        weights=np.where(is_exempt, 0, 1).astype(np.float32),
        banned=is_banned,
        stops=is_stop,
    )


def options_by_row(rows: Sequence[SamplingParams]) -> SamplingParams:
    """Makes options of which each row of a batch has its own numbers, and the first one's ids."""
    numbers = {}
    for name in _NUMBERS:
        column = [getattr(row, name) for row in rows]
        numbers[name] = np.array(column)[:, None]
    return rows[0]._replace(**numbers)


def _mask(ids: Ids, vocab_size: int, argument: str) -> np.ndarray:
    """Returns a vector that is True at the ids."""
    mask = np.zeros(vocab_size, bool)
    mask[check_ids(ids, vocab_size, argument)] = True
    return mask


def exempt_ids(tokenizer: Vocabulary) -> tuple[int, ...]:
    """Returns the ids that the official penalty does not count: blanks, tabs and digits."""
    marks = " \t0123456789"
    exempt: set[int] = set()
    # Officially an id is exempt if its text lies inside this string, so "12" is and "21" is not.
    for start in range(len(marks)):
        for stop in range(start + 1, len(marks) + 1):
            ids = spell(marks[start:stop], tokenizer)
            if len(ids) == 1:
                exempt.add(ids[0])
    return tuple(sorted(exempt))


def no_occurrences(batch: int, vocab_size: int) -> Occurrences:
    """Starts a count with no id generated."""
    shape = (batch, vocab_size)
    return Occurrences(
        seen=jnp.zeros(shape, bool), counts=jnp.zeros(shape, jnp.float32)
    )


def count(
    occurrences: Occurrences,
    tokens: Int[Array, " B"],
    options: SamplingParams,
    *,
    counted: Bool[Array, " B"] | bool = True,
) -> Occurrences:
    """Decays the counts and adds the weight of the token in rows that are `counted`."""
    rows = jnp.arange(tokens.shape[0])
    weights = jnp.asarray(options.weights)[tokens]
    counted = jnp.broadcast_to(counted, tokens.shape)
    decay = jnp.where(counted[:, None], options.penalty_decay, 1)
    # An update beyond the vocabulary is dropped. A select would copy the counts at every token.
    tokens = jnp.where(counted, tokens, occurrences.counts.shape[1])
    return Occurrences(
        # Exempt ids are seen too: the presence penalty applies to them.
        seen=occurrences.seen.at[rows, tokens].set(True, mode="drop"),
        counts=(occurrences.counts * decay).at[rows, tokens].add(weights, mode="drop"),
    )


def apply_penalties(
    logits: Scores, occurrences: Occurrences, options: SamplingParams
) -> Scores:
    """Subtracts the penalties; banned ids are at minus infinity, all others stay finite."""
    penalty = options.presence_penalty + occurrences.counts * options.frequency_penalty
    logits = logits - jnp.where(occurrences.seen, penalty, 0)
    logits = jnp.clip(logits, -_LOGIT_LIMIT, _LOGIT_LIMIT)
    return jnp.where(jnp.asarray(options.banned)[None], -jnp.inf, logits)


def _cutoff(
    probs: Scores, enough: Callable[[Bool[Array, "B C V"]], Bool[Array, "B C"]]
) -> Array:
    """Finds each row's largest c such that the probabilities >= c are enough.

    Args:
        probs: no negative number.
        enough: from masks of kept ids, C a row, to which of them keep enough.

    Returns:
        [B 1]; 0 where even all probabilities are not enough.
    """
    # The bits of floats that are not negative are ordered like the numbers.
    bits = jax.lax.bitcast_convert_type(probs, jnp.int32)
    on_cpu = platforms.target_platform() == "cpu"
    # A CPU's time is the reading of the probabilities, an accelerator's the number of kernels:
    # there, a pass compares with seven numbers, and the loop is no loop.
    digit = 1 if on_cpu else 3
    digits = jnp.arange(1, 1 << digit, dtype=jnp.int32)[None]

    # `low` is 0 or keeps enough. So do all digits up to the largest that does.
    def find_digit(index, low):
        shift = _BITS - digit * (index + 1)
        kept = enough(bits[:, None] >= (low + (digits << shift))[:, :, None])
        return low + (jnp.sum(kept, axis=-1, keepdims=True, dtype=jnp.int32) << shift)

    low = jnp.zeros((probs.shape[0], 1), jnp.int32)
    low = jax.lax.fori_loop(0, _BITS // digit, find_digit, low, unroll=not on_cpu)
    return jax.lax.bitcast_convert_type(low, jnp.float32)


def _most_mass(probs: Scores, top_p: Number) -> Bool[Array, "B V"]:
    """Returns a mask of the most probable tokens that together have a mass of `top_p`."""
    cutoff = _cutoff(
        probs,
        lambda kept: jnp.sum(jnp.where(kept, probs[:, None], 0), axis=-1) >= top_p,
    )
    # With `top_p` 0 every cutoff is enough, even one above the most probable token, which stays.
    most = probs >= jnp.minimum(cutoff, jnp.max(probs, axis=-1, keepdims=True))
    # Rounding can give a part of the tokens all the mass, so 1 has to mean no limit at all.
    return most | (jnp.asarray(top_p) >= 1)


def _highest_ranks(probs: Scores, top_k: Number) -> Bool[Array, "B V"]:
    """Returns a mask of the `top_k` most probable tokens."""
    cutoff = _cutoff(probs, lambda kept: jnp.sum(kept, axis=-1) >= top_k)
    above = probs > cutoff
    equal = probs == cutoff
    # Of equal probabilities at the cutoff only as many stay as there is room for.
    room = top_k - jnp.sum(above, axis=-1, keepdims=True)
    highest = above | (equal & (jnp.cumsum(equal, axis=-1) <= room))
    return highest | (jnp.asarray(top_k) == 0)


def log_probabilities(
    logits: Scores,
    *,
    temperature: Number,
    top_p: Number = 1.0,
    top_k: Number = 0,
) -> Scores:
    """Computes the log distribution of the next token; dropped tokens are at minus infinity.

    Softmax in float32 at temperature 1. The cutoff is the probability at which the descending
    cumulative sum reaches `top_p`; lower probabilities are dropped (equal ones stay). Then all but
    the `top_k` most probable tokens are dropped (of equal ones the lower ids stay). The rest is
    raised to 1/temperature and normalised. Where the official code lets rounding decide, this does
    not: `top_p` 1 keeps all tokens (officially one, if the sum stays below 1), and temperature 0
    takes the lowest id of equal ones.

    Args:
        logits: float32, with penalties already applied.
        temperature: 0 puts all mass on the most probable token; like the others one number, or
            [B 1].
        top_p: between 0 and 1.
        top_k: 0 for no limit.
    """
    logp = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    probs = jnp.exp(logp)
    everything = jnp.ones(probs.shape, bool)
    # The searches are most of the cost, so each is skipped at run time where it would cut nothing.
    kept = jax.lax.cond(
        jnp.all(jnp.asarray(top_p) >= 1),
        lambda: everything,
        lambda: _most_mass(probs, top_p),
    )
    kept &= jax.lax.cond(
        jnp.all(jnp.asarray(top_k) == 0),
        lambda: everything,
        lambda: _highest_ranks(probs, top_k),
    )
    is_best = jnp.arange(logits.shape[1])[None] == _best_ids(logits)[:, None]
    greedy = jnp.asarray(temperature) < _COLDEST
    # Relative to the maximum, so that a low temperature cannot overflow.
    scaled = (logp - jnp.max(logp, axis=-1, keepdims=True)) / jnp.maximum(
        temperature, _COLDEST
    )
    scaled = jnp.where(kept & (is_best | ~greedy), scaled, -jnp.inf)
    return jax.nn.log_softmax(scaled, axis=-1)


def sample_with_logp(
    keys: Array, logits: Scores, options: SamplingParams
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Draws one id for each row with the row's own key, so that rows are independent.

    Args:
        keys: [B] random keys, each used once.
        logits: float32, with penalties already applied.
        options: temperature, top-p and top-k are used.

    Returns:
        The ids, and the log-probability of each draw, 0 of a greedy one.
    """
    if jnp.ndim(options.temperature) and platforms.target_platform() == "cpu":
        return _sample_in_turns(keys, logits, options)
    return _sample_together(keys, logits, options)


def _sample_in_turns(
    keys: Array, logits: Scores, options: SamplingParams
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Draws row by row, so that one which samples costs nothing in rows that are free or greedy."""

    def sample_row(row):
        # With a batch of one again.
        key, scores, *numbers = jax.tree.map(lambda array: array[None], row)
        own = options._replace(**dict(zip(_NUMBERS, numbers, strict=True)))
        ids, logps = _sample_together(key, scores, own)
        return ids[0], logps[0]

    numbers = [getattr(options, name) for name in _NUMBERS]
    return jax.lax.map(sample_row, (keys, logits, *numbers))


def _sample_together(
    keys: Array, logits: Scores, options: SamplingParams
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Draws for all rows at once."""

    def draw():
        logp = log_probabilities(
            logits,
            temperature=options.temperature,
            top_p=options.top_p,
            top_k=options.top_k,
        )
        ids = jax.vmap(jax.random.categorical)(keys, logp).astype(jnp.int32)
        return ids, jnp.take_along_axis(logp, ids[:, None], axis=-1)[:, 0]

    def greedy():
        ids = _best_ids(logits)
        return ids, jnp.zeros(ids.shape, jnp.float32)

    all_greedy = jnp.all(jnp.asarray(options.temperature) < _COLDEST)
    return jax.lax.cond(all_greedy, greedy, draw)


def score_tokens(
    logits: Scores, tokens: Int[Array, " B"], alternatives: int
) -> ModelScores:
    """Returns what the model says of each row's token and of so many most probable ones."""
    logps = jax.nn.log_softmax(logits, axis=-1)
    best, ids = jax.lax.top_k(logps, alternatives)
    drawn = jnp.take_along_axis(logps, tokens[:, None], axis=-1)[:, 0]
    return ModelScores(drawn, ids.astype(jnp.int32), best)


def _best_ids(logits: Scores) -> Int[Array, " B"]:
    """Returns the id of each row's largest logit, the first one of those that are equal."""
    # `argmax` reduces pairs, which CPUs do one by one: it takes six times as long for 8 rows.
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    is_less = logits < jnp.max(logits, axis=-1, keepdims=True)
    return jnp.min(jnp.where(is_less, logits.shape[1], ids), axis=-1)
