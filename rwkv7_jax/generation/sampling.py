"""Sampling of the next token: penalties, top-p, top-k and temperature, as pure functions.

The order is that of the official package, because users compare outputs: top-p and top-k use the
probabilities at temperature 1, and temperature comes last. Cutoffs are found by a binary search on
the bits of the probabilities; sorting 65,536 of them costs 20 times as much on a CPU.
Source: BlinkDL's `rwkv` 0.8.32 on PyPI, rwkv/utils.py:55-88 and 113-143.
"""

import functools
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

# Options are NumPy values on the host and tracers inside a compiled program.
HostOrDevice = Array | np.ndarray | np.number

# Penalised logits are clipped to this magnitude: the softmax of all-infinite logits would be NaN.
_LOGIT_LIMIT = 1e30

# Lower temperatures are greedy, because 1 / temperature would overflow float32.
_COLDEST = 1e-6

# The number of bits that can be set in a non-negative float32 below 2.
_BITS = 30


class Occurrences(NamedTuple):
    """Ids that each row has generated so far, for the penalties.

    Attributes:
        seen: [B V] mask of the generated ids, including exempt ones.
        counts: [B V] float32, decayed counts.
    """

    seen: Array
    counts: Array


class SamplingParams(NamedTuple):
    """Sampling options as arrays, so that changing one does not recompile; see `make_options`.

    Numeric options are scalars, or [B 1] if each row has its own (see `options_by_row`).

    Attributes:
        temperature: sampling temperature; 0 is greedy.
        top_p: probability mass to keep.
        top_k: number of tokens to keep; 0 keeps all.
        presence_penalty: subtracted from the logit of each id that was generated.
        frequency_penalty: subtracted again for every time that the id was generated.
        penalty_decay: factor on all counts at every token.
        weights: [V], the weight of each id in the counts.
        banned: [V] mask of ids that are never generated.
        stops: [V] mask of ids that end a row.
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
    """The model's own log-probabilities, before penalties, cutoffs and temperature.

    Attributes:
        drawn: [B ...] float32, log-probabilities of the sampled tokens.
        ids: [B ... K] int32, the most probable ids, best first.
        logps: [B ... K] float32, their log-probabilities.
    """

    drawn: Array
    ids: Array
    logps: Array


# The numeric fields of `SamplingParams`; the others are vectors over the vocabulary.
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
    """Checks the options and converts them to arrays of fixed dtypes.

    Args:
        vocab_size: vocabulary size of the model.
        temperature: at least 0.
        top_p: between 0 and 1; 0 keeps the most probable token and ties with it.
        top_k: at least 0; 0 means no limit.
        presence_penalty: any finite number; negative ones encourage repetition.
        frequency_penalty: any finite number.
        penalty_decay: between 0 and 1.
        penalty_exempt: ids that are not counted, such as `exempt_ids(tokenizer)`; the presence
            penalty still applies to them.
        banned: ids that are never generated; must leave at least one id.
        stop_ids: ids that end a row.

    Raises:
        ValueError: a number is out of range, or an id is outside the vocabulary.
        TypeError: ids are not integers.
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
        # A larger number might not fit into int32.
        top_k=np.int32(min(top_k, vocab_size)),
        presence_penalty=np.float32(presence_penalty),
        frequency_penalty=np.float32(frequency_penalty),
        penalty_decay=np.float32(penalty_decay),
        weights=np.where(is_exempt, 0, 1).astype(np.float32),
        banned=is_banned,
        stops=is_stop,
    )


def options_by_row(rows: Sequence[SamplingParams]) -> SamplingParams:
    """Combines options so that each row has its own numbers; all rows use the first one's ids."""
    numbers = {}
    for name in _NUMBERS:
        column = [getattr(row, name) for row in rows]
        numbers[name] = np.array(column)[:, None]
    return rows[0]._replace(**numbers)


def select_options(
    options: SamplingParams, rows: Int[np.ndarray, " S"]
) -> SamplingParams:
    """Selects the rows of options, whose numbers may also be the same for all rows."""
    numbers = {}
    for name in _NUMBERS:
        number = getattr(options, name)
        numbers[name] = number[rows] if number.ndim else number
    return options._replace(**numbers)


def _mask(ids: Ids, vocab_size: int, argument: str) -> np.ndarray:
    """Returns a mask over the vocabulary that is True at the ids."""
    mask = np.zeros(vocab_size, bool)
    mask[check_ids(ids, vocab_size, argument)] = True
    return mask


def exempt_ids(tokenizer: Vocabulary) -> tuple[int, ...]:
    """Returns the ids that the official penalty does not count: spaces, tabs and digits."""
    marks = " \t0123456789"
    exempt: set[int] = set()
    # Officially an id is exempt if its text is a substring of this string: "12" is, "21" is not.
    for start in range(len(marks)):
        for stop in range(start + 1, len(marks) + 1):
            ids = spell(marks[start:stop], tokenizer)
            if len(ids) == 1:
                exempt.add(ids[0])
    return tuple(sorted(exempt))


def fold_keys(key: Array, numbers: Array) -> Array:
    """Returns a random key for each number."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, numbers)


def no_occurrences(batch: int, vocab_size: int) -> Occurrences:
    """Returns counts with no id generated."""
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
    """Decays the counts and adds each token's weight, in the rows that are `counted`."""
    rows = jnp.arange(tokens.shape[0])
    weights = jnp.asarray(options.weights)[tokens]
    counted = jnp.broadcast_to(counted, tokens.shape)
    decay = jnp.where(counted[:, None], options.penalty_decay, 1)
    # Out-of-range updates are dropped; a select would copy the counts at every token.
    tokens = jnp.where(counted, tokens, occurrences.counts.shape[1])
    return Occurrences(
        # Includes exempt ids, because the presence penalty applies to them.
        seen=occurrences.seen.at[rows, tokens].set(True, mode="drop"),
        counts=(occurrences.counts * decay).at[rows, tokens].add(weights, mode="drop"),
    )


def apply_penalties(
    logits: Scores, occurrences: Occurrences, options: SamplingParams
) -> Scores:
    """Subtracts the penalties and sets banned ids to minus infinity; all others stay finite."""
    penalty = options.presence_penalty + occurrences.counts * options.frequency_penalty
    logits = logits - jnp.where(occurrences.seen, penalty, 0)
    logits = jnp.clip(logits, -_LOGIT_LIMIT, _LOGIT_LIMIT)
    return jnp.where(jnp.asarray(options.banned)[None], -jnp.inf, logits)


def _cutoff(
    probs: Scores, enough: Callable[[Bool[Array, "B C V"]], Bool[Array, "B C"]]
) -> Array:
    """Finds each row's largest c such that the probabilities >= c are enough.

    Args:
        probs: non-negative probabilities.
        enough: maps C masks of kept ids per row to whether each mask keeps enough.

    Returns:
        [B 1]; 0 where even all probabilities are not enough.
    """
    # The bits of non-negative floats have the same order as their values.
    bits = jax.lax.bitcast_convert_type(probs, jnp.int32)
    on_cpu = platforms.target_platform() == "cpu"
    # A CPU is limited by reading the probabilities, an accelerator by the number of kernels. So an
    # accelerator compares with seven values per pass, in an unrolled loop.
    digit = 1 if on_cpu else 3
    digits = jnp.arange(1, 1 << digit, dtype=jnp.int32)[None]

    # `low` is 0 or keeps enough. If a digit keeps enough, so do all smaller digits.
    def find_digit(index, low):
        shift = _BITS - digit * (index + 1)
        kept = enough(bits[:, None] >= (low + (digits << shift))[:, :, None])
        return low + (jnp.sum(kept, axis=-1, keepdims=True, dtype=jnp.int32) << shift)

    low = jnp.zeros((probs.shape[0], 1), jnp.int32)
    low = jax.lax.fori_loop(0, _BITS // digit, find_digit, low, unroll=not on_cpu)
    return jax.lax.bitcast_convert_type(low, jnp.float32)


def _top_p_mask(probs: Scores, top_p: Number) -> Bool[Array, "B V"]:
    """Returns a mask of the most probable tokens whose total probability reaches `top_p`."""
    cutoff = _cutoff(
        probs,
        lambda kept: jnp.sum(jnp.where(kept, probs[:, None], 0), axis=-1) >= top_p,
    )
    # With `top_p` 0 even a cutoff above the largest probability is enough, so it is limited.
    most = probs >= jnp.minimum(cutoff, jnp.max(probs, axis=-1, keepdims=True))
    # With rounding, some of the tokens may sum to 1, so `top_p` 1 must mean no limit.
    return most | (jnp.asarray(top_p) >= 1)


def _top_k_mask(probs: Scores, top_k: Number) -> Bool[Array, "B V"]:
    """Returns a mask of the `top_k` most probable tokens."""
    count = functools.partial(jnp.sum, axis=-1, dtype=jnp.int32)
    cutoff = _cutoff(probs, lambda kept: count(kept) >= top_k)
    above = probs > cutoff
    equal = probs == cutoff
    # Of the ties at the cutoff, only as many as there is room for are kept.
    room = top_k - count(above, keepdims=True)
    places = jnp.cumsum(equal, axis=-1, dtype=jnp.int32)
    highest = above | (equal & (places <= room))
    return highest | (jnp.asarray(top_k) == 0)


def log_probabilities(
    logits: Scores,
    *,
    temperature: Number,
    top_p: Number = 1.0,
    top_k: Number = 0,
) -> Scores:
    """Computes the log-probabilities of the next token; dropped tokens get minus infinity.

    1. Softmax in float32 at temperature 1.
    2. Top-p: the cutoff is the probability at which the descending cumulative sum reaches `top_p`.
       Lower probabilities are dropped; ties are kept.
    3. Top-k: all but the `top_k` most probable tokens are dropped; of ties the lower ids are kept.
    4. The rest is raised to 1/temperature and normalised.

    Unlike in the official code, rounding does not matter in two cases. `top_p` 1 keeps all tokens
    (officially one, if the sum stays below 1), and temperature 0 selects the lowest id of ties.

    Args:
        logits: float32, with penalties already applied.
        temperature: 0 puts all mass on the most probable token. Like `top_p` and `top_k`, a scalar
            or [B 1].
        top_p: between 0 and 1.
        top_k: 0 for no limit.
    """
    logp = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    probs = jnp.exp(logp)
    everything = jnp.ones(probs.shape, bool)
    # The searches dominate the cost, so each is skipped at run time if it would drop nothing.
    kept = jax.lax.cond(
        jnp.all(jnp.asarray(top_p) >= 1),
        lambda: everything,
        lambda: _top_p_mask(probs, top_p),
    )
    kept &= jax.lax.cond(
        jnp.all(jnp.asarray(top_k) == 0),
        lambda: everything,
        lambda: _top_k_mask(probs, top_k),
    )
    ids = jnp.arange(logits.shape[1], dtype=jnp.int32)
    is_best = ids[None] == _best_ids(logits)[:, None]
    greedy = jnp.asarray(temperature) < _COLDEST
    # Relative to the maximum, so that a low temperature does not overflow.
    scaled = (logp - jnp.max(logp, axis=-1, keepdims=True)) / jnp.maximum(
        temperature, _COLDEST
    )
    scaled = jnp.where(kept & (is_best | ~greedy), scaled, -jnp.inf)
    return jax.nn.log_softmax(scaled, axis=-1)


def sample_with_logp(
    keys: Array, logits: Scores, options: SamplingParams
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Samples one id per row with the row's own key, so that rows are independent.

    Args:
        keys: [B] random keys, each used once.
        logits: float32, with penalties already applied.
        options: sampling options; only temperature, top-p and top-k are used.

    Returns:
        The ids and their log-probabilities, which are 0 for greedy rows.
    """
    if jnp.ndim(options.temperature) and platforms.target_platform() == "cpu":
        return _sample_row_by_row(keys, logits, options)
    return _sample_rows(keys, logits, options)


def _sample_row_by_row(
    keys: Array, logits: Scores, options: SamplingParams
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Samples row by row, so that a sampling row does not slow down free or greedy rows."""

    def sample_row(row):
        # Restores a batch axis of size 1.
        key, scores, *numbers = jax.tree.map(lambda array: array[None], row)
        own = options._replace(**dict(zip(_NUMBERS, numbers, strict=True)))
        ids, logps = _sample_rows(key, scores, own)
        return ids[0], logps[0]

    numbers = [getattr(options, name) for name in _NUMBERS]
    return jax.lax.map(sample_row, (keys, logits, *numbers))


def _sample_rows(
    keys: Array, logits: Scores, options: SamplingParams
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Samples all rows at once."""

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
    """Returns the log-probability of each row's token and the `alternatives` most probable ids."""
    logps = jax.nn.log_softmax(logits, axis=-1)
    best, ids = jax.lax.top_k(logps, alternatives)
    drawn = jnp.take_along_axis(logps, tokens[:, None], axis=-1)[:, 0]
    return ModelScores(drawn, ids.astype(jnp.int32), best)


def _best_ids(logits: Scores) -> Int[Array, " B"]:
    """Returns the id of each row's largest logit, the lowest id of ties."""
    # `argmax` reduces pairs, which is not vectorised on CPUs: it is six times slower for 8 rows.
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    is_less = logits < jnp.max(logits, axis=-1, keepdims=True)
    return jnp.min(jnp.where(is_less, logits.shape[1], ids), axis=-1)
