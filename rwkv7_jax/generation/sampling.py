"""From logits to the next token: penalties, top-p, top-k, temperature, as pure functions.

The order is that of the official package, because users compare outputs: top-p and top-k look at
the probabilities at temperature 1, temperature comes last. Cutoffs are found by bisection over the
bits of the probabilities: a sort of 65,536 of them costs 20 times as much on a CPU.
Source: BlinkDL's `rwkv` 0.8.32 on PyPI, rwkv/utils.py:55-88 and 113-143.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from rwkv7_jax.checks import _check_number, check_count, check_ids
from rwkv7_jax.text.detokenizer import Vocabulary

Scores = Float[Array, "B V"]

Number = float | int | Array | np.ndarray | np.generic

Ids = Sequence[int] | Array | np.ndarray

# Penalised logits stay inside: beyond, all of them could be infinite, and a softmax of that is NaN.
_LOGIT_LIMIT = 1e30

# Below this a temperature is greedy: 1 / temperature would leave float32's range.
_COLDEST = 1e-6

_BITS_ABOVE_ONE = 0x3F800001


class Occurrences(NamedTuple):
    """What each row has generated so far, for the penalties.

    Attributes:
        seen: [B V], ids that came up, whatever they add to the counts.
        counts: [B V] float32, how often, decayed.
    """

    seen: Array
    counts: Array


class SamplingParams(NamedTuple):
    """The choices of one run as arrays: changing one compiles nothing; from `make_options`.

    Attributes:
        temperature: exponent 1/temperature; 0 takes the most probable token.
        top_p: mass to keep.
        top_k: tokens to keep; 0 keeps all.
        presence_penalty: taken off the logit of every id that came up.
        frequency_penalty: taken off once more for every time it did.
        penalty_decay: factor on all counts at every token.
        weights: [V], what an id adds to its count.
        banned: [V], ids that are never generated.
        stops: [V], ids that end a row.
    """

    temperature: Array
    top_p: Array
    top_k: Array
    presence_penalty: Array
    frequency_penalty: Array
    penalty_decay: Array
    weights: Array
    banned: Array
    stops: Array


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
    caller: str = "make_options",
) -> SamplingParams:
    """Checked options, as arrays of fixed dtypes.

    Args:
        vocab_size: ids of the model.
        temperature: at least 0.
        top_p: between 0 and 1; 0 keeps the most probable token and its equals.
        top_k: at least 0; 0 means no limit.
        presence_penalty: any finite number; negative ones encourage repetition.
        frequency_penalty: likewise.
        penalty_decay: between 0 and 1.
        penalty_exempt: ids that add 0 to their count, such as `exempt_ids(tokenizer)`; the presence
            penalty applies to them all the same.
        banned: ids that are never generated; at least one other has to be left.
        stop_ids: ids that end a row.
        caller: the public function's name, for messages.

    Raises:
        ValueError: a number out of its range, or an id outside the vocabulary.
        TypeError: ids that are no integers.
    """
    highest = float(jnp.finfo(jnp.float32).max)
    numbers = {
        "temperature": (temperature, 0.0, highest),
        "top_p": (top_p, 0.0, 1.0),
        "presence_penalty": (presence_penalty, -highest, highest),
        "frequency_penalty": (frequency_penalty, -highest, highest),
        "penalty_decay": (penalty_decay, 0.0, 1.0),
    }
    for name, (value, low, high) in numbers.items():
        _check_number(value, low, high, subject=f"{caller}: `{name}`")
    top_k = check_count(top_k, 0, f"{caller}: `top_k`")
    sets = {"penalty_exempt": penalty_exempt, "banned": banned, "stop_ids": stop_ids}
    masks = {name: _mask(ids, vocab_size, f"{caller}: `{name}`") for name, ids in sets.items()}
    if masks["banned"].all():
        raise ValueError(f"{caller}: `banned` must leave one id; got all {vocab_size}.")
    return SamplingParams(
        **{name: np.float32(value) for name, (value, _, _) in numbers.items()},
        top_k=np.int32(min(top_k, vocab_size)),
        weights=np.where(masks["penalty_exempt"], 0, 1).astype(np.float32),
        banned=masks["banned"],
        stops=masks["stop_ids"],
    )


def _mask(ids: Ids, vocab_size: int, subject: str) -> np.ndarray:
    """True at the ids; `subject` begins the message about a bad one."""
    mask = np.zeros(vocab_size, bool)
    if len(ids):
        mask[check_ids(ids, vocab_size, subject)] = True
    return mask


def exempt_ids(tokenizer: Vocabulary) -> tuple[int, ...]:
    """The ids that the official penalty does not count: what is spelled inside " \\t0123456789"."""
    marks = " \t0123456789"
    runs = {marks[i:j] for i in range(len(marks)) for j in range(i + 1, len(marks) + 1)}
    spelled = (tokenizer.encode(run) for run in runs)
    return tuple(sorted(ids[0] for ids in spelled if len(ids) == 1))


def no_occurrences(batch: int, vocab_size: int) -> Occurrences:
    """Nothing has come up."""
    shape = (batch, vocab_size)
    return Occurrences(seen=jnp.zeros(shape, bool), counts=jnp.zeros(shape, jnp.float32))


def count(
    occurrences: Occurrences, tokens: Int[Array, " B"], options: SamplingParams
) -> Occurrences:
    """The occurrences one token later: all counts decay, then each row's token adds its weight."""
    rows = jnp.arange(tokens.shape[0])
    weights = jnp.asarray(options.weights)[tokens]
    return Occurrences(
        seen=occurrences.seen.at[rows, tokens].set(True),
        counts=(occurrences.counts * options.penalty_decay).at[rows, tokens].add(weights),
    )


def apply_penalties(logits: Scores, occurrences: Occurrences, options: SamplingParams) -> Scores:
    """Logits less the penalties; banned ids are at minus infinity, all others finite."""
    penalty = options.presence_penalty + occurrences.counts * options.frequency_penalty
    logits = logits - jnp.where(occurrences.seen, penalty, 0)
    logits = jnp.clip(logits, -_LOGIT_LIMIT, _LOGIT_LIMIT)
    return jnp.where(jnp.asarray(options.banned)[None], -jnp.inf, logits)


def _cutoff(probs: Scores, enough: Callable[[Bool[Array, "B V"]], Bool[Array, " B"]]) -> Array:
    """Each row's largest c such that the probabilities >= c are enough, 0 if all are not; [B 1]."""
    bits = jax.lax.bitcast_convert_type(
        probs, jnp.int32
    )  # ordered like the numbers: none is negative

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        kept = enough(bits >= middle)[:, None]
        return jnp.where(kept, middle, low), jnp.where(kept, high, middle)

    low = jnp.zeros((probs.shape[0], 1), jnp.int32)
    low, _ = jax.lax.fori_loop(0, 31, halve, (low, jnp.full_like(low, _BITS_ABOVE_ONE)))
    return jax.lax.bitcast_convert_type(low, jnp.float32)


def _truncate(probs: Scores, top_p: Number, top_k: Number) -> Bool[Array, "B V"]:
    """Which tokens may be drawn."""
    by_mass = _cutoff(probs, lambda kept: jnp.sum(jnp.where(kept, probs, 0), axis=-1) >= top_p)
    # Rounding lets part of the tokens have all the mass, so 1 is no limit at all.
    by_mass = jnp.where(top_p >= 1, 0, by_mass)
    kept = probs >= jnp.minimum(by_mass, jnp.max(probs, axis=-1, keepdims=True))
    top_k = jnp.where(top_k == 0, probs.shape[1], top_k)
    by_rank = _cutoff(probs, lambda kept: jnp.sum(kept, axis=-1) >= top_k)
    above, equal = probs > by_rank, probs == by_rank
    room = top_k - jnp.sum(above, axis=-1, keepdims=True)
    return kept & (above | (equal & (jnp.cumsum(equal, axis=-1) <= room)))


def log_probabilities(
    logits: Scores, *, temperature: Number, top_p: Number = 1.0, top_k: Number = 0
) -> Scores:
    """The distribution that the next token is drawn from; dropped tokens are at minus infinity.

    Softmax in float32 at temperature 1; the cutoff is the probability at which the descending
    cumulative sum reaches `top_p`, and what lies below it is dropped (equals stay); then all but
    the `top_k` most probable are dropped (of equals the lower ids stay); what is left is raised to
    1/temperature and normalised. Where the official code lets rounding decide, this does not:
    `top_p` 1 keeps all tokens (officially one, if the sum stays below 1), and temperature 0 takes
    the lowest id of equals.

    Args:
        logits: float32; penalties are already in them.
        temperature: 0 puts all mass on the most probable token.
        top_p: between 0 and 1.
        top_k: 0 for no limit.
    """
    logp = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    probs = jnp.exp(logp)
    keep_all = (jnp.asarray(top_p) >= 1) & (jnp.asarray(top_k) == 0)
    kept = jax.lax.cond(
        keep_all, lambda: jnp.ones(probs.shape, bool), lambda: _truncate(probs, top_p, top_k)
    )
    best = jnp.argmax(logits, axis=-1, keepdims=True)
    one = jnp.arange(logits.shape[1])[None] == best
    cold = jnp.asarray(temperature) < _COLDEST
    scaled = (logp - jnp.max(logp, axis=-1, keepdims=True)) / jnp.maximum(temperature, _COLDEST)
    scaled = jnp.where(kept & (one | ~cold), scaled, -jnp.inf)
    return jax.nn.log_softmax(scaled, axis=-1)


def sample(keys: Array, logits: Scores, options: SamplingParams) -> Int[Array, " B"]:
    """One id a row, drawn with the row's own key, so that no row's draw depends on another's.

    Args:
        keys: [B] random keys, each used once.
        logits: float32, penalised.
        options: temperature, top-p and top-k are read.
    """

    def draw():
        logp = log_probabilities(
            logits, temperature=options.temperature, top_p=options.top_p, top_k=options.top_k
        )
        return jax.vmap(jax.random.categorical)(keys, logp).astype(jnp.int32)

    def greedy():
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    return jax.lax.cond(options.temperature < _COLDEST, greedy, draw)
