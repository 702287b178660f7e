"""Toy tasks over 32 symbols, on which small models are trained and tuned.

Rows use the ids of single bytes (byte + 1; 0 is padding), so that every model can read them.
Symbols are the digits of base 32; instructions are capitals and punctuation. A generator is called
with (rng, rows, length) and returns the ids and the mask of scored ids, both [rows, length + 1].

The order of the random draws is part of each task; another order gives other examples.
"""

from collections.abc import Callable

import numpy as np
from numpy.random import Generator

Rows = tuple[np.ndarray, np.ndarray]

Operation = Callable[[np.ndarray, np.ndarray], np.ndarray]

Change = Callable[[np.ndarray], np.ndarray]

SYMBOLS = b"0123456789abcdefghijklmnopqrstuv"

MODULI = (5, 7, 11, 13)  # of the mixture; every other modulus is new to its models

ITEMS = 6  # symbols of one sequence

KEYS = len(SYMBOLS) ** 2  # two symbols each

_HIDDEN = 0.4  # share of sequence rows whose instruction is "?"


def _ids(text: bytes) -> np.ndarray:
    """Returns the ids of ASCII text, which are the same in World and in the byte vocabulary."""
    return np.frombuffer(text, np.uint8).astype(np.int64) + 1


# The id of each symbol, indexed by its value.
_SYMBOL = _ids(SYMBOLS)

# Masks of the scored ids in one example.
_SCORE_SECOND = np.array([0, 1])
_SCORE_THIRD = np.array([0, 0, 1])
_SCORE_FOURTH = np.array([0, 0, 0, 1])


def _repeat_lead(letter: bytes, rows: int) -> np.ndarray:
    """Returns the same prefix [B K] for every row."""
    return np.tile(_ids(letter), (rows, 1))


def _layout(
    lead: np.ndarray,
    examples: np.ndarray,
    scored: np.ndarray,
    length: int,
) -> Rows:
    """Builds rows from a prefix and examples, padded with 0.

    Args:
        lead: [B K] prefix, not scored.
        examples: [B E M], E examples of M ids each.
        scored: mask of scored ids, broadcast to the shape of the examples.
        length: number of inputs per row (T).
    """
    rows, begin = lead.shape
    _, count, size = examples.shape
    end = begin + count * size
    # Explicit sizes, because -1 is ambiguous if there are no rows.
    flat = examples.reshape(rows, count * size)
    flat_scored = np.broadcast_to(scored, examples.shape).reshape(rows, count * size)
    tokens = np.zeros((rows, length + 1), np.int64)
    counts = np.zeros((rows, length + 1), np.int64)
    tokens[:, :begin] = lead
    tokens[:, begin:end] = flat
    counts[:, begin:end] = flat_scored
    return tokens, counts


def _distinct(
    rng: Generator,
    rows: int,
    count: int,
    below: int,
) -> np.ndarray:
    """Draws `count` distinct numbers below `below` in each row."""
    # The ranks of random numbers are a permutation of each row.
    permutations = np.argsort(rng.random((rows, below)), axis=1)
    return permutations[:, :count]


def _visits(
    rng: Generator,
    rows: int,
    count: int,
    keys: np.ndarray,
) -> Rows:
    """Draws the key of each example.

    Args:
        rng: the generator.
        rows: number of rows (B).
        count: number of examples per row (E).
        keys: [B] number of keys of each row.

    Returns:
        Indices of keys [B E], and whether the key occurred earlier in the row [B E].
    """
    keys_of = rng.integers(0, keys[:, None], (rows, count))
    # A stable sort puts equal keys next to each other in the order of the examples.
    order = np.argsort(keys_of, axis=1, kind="stable")
    ordered = np.take_along_axis(keys_of, order, axis=1)
    repeated = np.zeros(keys_of.shape, bool)
    np.put_along_axis(repeated, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
    return keys_of, repeated


def _spell_keys(keys: np.ndarray) -> list[np.ndarray]:
    """Splits keys below `KEYS` into the values of their two symbols."""
    high, low = np.divmod(keys, len(SYMBOLS))
    return [high, low]


def dictionary(rng: Generator, rows: int, length: int) -> Rows:
    """Builds a dictionary of 2 to 8 two-symbol keys; values of keys seen before are scored."""
    # Every row draws 8 keys and uses the first `sizes` of them.
    keys = _distinct(rng, rows, 8, KEYS)
    values = rng.integers(0, len(SYMBOLS), keys.shape)
    sizes = rng.integers(2, 9, rows)
    visited, repeated = _visits(rng, rows, length // 3, sizes)
    key = np.take_along_axis(keys, visited, axis=1)
    value = np.take_along_axis(values, visited, axis=1)
    examples = np.stack([*_spell_keys(key), value], axis=-1)  # [B E 3]
    scored = repeated[..., None] * _SCORE_THIRD
    return _layout(_repeat_lead(b"D", rows), _SYMBOL[examples], scored, length)


def mapping(rng: Generator, rows: int, length: int) -> Rows:
    """Builds a random function on 4 to 13 symbols; values of symbols seen before are scored."""
    places = _distinct(rng, rows, 13, len(SYMBOLS))
    images = rng.integers(0, len(SYMBOLS), places.shape)
    sizes = rng.integers(4, 14, rows)
    visited, repeated = _visits(rng, rows, length // 2, sizes)
    place = np.take_along_axis(places, visited, axis=1)
    image = np.take_along_axis(images, visited, axis=1)
    examples = np.stack([place, image], axis=-1)  # [B E 2]
    scored = repeated[..., None] * _SCORE_SECOND
    return _layout(_repeat_lead(b"M", rows), _SYMBOL[examples], scored, length)


def _arithmetic(
    rng: Generator,
    lead: np.ndarray,
    modulus: np.ndarray,
    operation: Operation,
    length,
) -> Rows:
    """Builds rows of a prefix (letter and modulus) and repeated examples `ab=c`."""
    count = (length - 1) // 4
    by_row = modulus[:, None]
    left, right = rng.integers(0, by_row, (2, len(lead), count))
    result = operation(left, right) % by_row
    equals = np.full_like(left, _ids(b"=")[0])
    parts = [_SYMBOL[left], _SYMBOL[right], equals, _SYMBOL[result]]
    examples = np.stack(parts, axis=-1)  # [B E 4]
    return _layout(lead, examples, _SCORE_FOURTH, length)


def modular(rng: Generator, rows: int, length: int) -> Rows:
    """Builds additions (A) or subtractions (S) modulo one of `MODULI`, one kind per row."""
    number = rng.integers(0, len(MODULI), rows)
    modulus = np.array(MODULI)[number]
    subtracts = rng.integers(0, 2, rows)
    letter = _ids(b"AS")[subtracts]
    lead = np.stack([letter, _SYMBOL[modulus]], axis=1)
    sign = 1 - 2 * subtracts[:, None]
    return _arithmetic(rng, lead, modulus, lambda a, b: a + sign * b, length)


def one_modulus(
    rng: Generator,
    rows: int,
    length: int,
    *,
    modulus: int,
    letter: bytes,
    operation: Operation,
) -> Rows:
    """Builds rows with the same operation and modulus."""
    lead = np.tile([*_ids(letter), _SYMBOL[modulus]], (rows, 1))
    return _arithmetic(rng, lead, np.full(rows, modulus), operation, length)


def _sequences(
    rng: Generator,
    letter: np.ndarray,
    change: Change,
    length: int,
) -> Rows:
    """Builds rows of repeated examples: a letter, six symbols, `>` and the changed symbols."""
    count = (length + 1) // (2 * ITEMS + 2)
    shape = (len(letter), count, ITEMS)
    symbols = rng.integers(0, len(SYMBOLS), shape)
    mark = np.full_like(symbols[..., :1], _ids(b">")[0])
    first = np.broadcast_to(letter[:, None, None], mark.shape)
    parts = [first, _SYMBOL[symbols], mark, _SYMBOL[change(symbols)]]
    scored = np.repeat([0, 1], [ITEMS + 2, ITEMS])
    # Every example has the letter, so the row has no prefix.
    no_lead = np.zeros((len(letter), 0), np.int64)
    return _layout(no_lead, np.concatenate(parts, axis=-1), scored, length)


def next_symbol(symbols: np.ndarray) -> np.ndarray:
    """Replaces each symbol by its successor, cyclically."""
    return (symbols + 1) % len(SYMBOLS)


def reversed_symbols(symbols: np.ndarray) -> np.ndarray:
    """Reverses the symbols."""
    return symbols[..., ::-1]


def sequence(rng: Generator, rows: int, length: int) -> Rows:
    """Builds copy (C), reverse (R) or next symbol (N), one per row; some rows hide it with "?"."""
    task = rng.integers(0, 3, rows)
    hidden = rng.random(rows) < _HIDDEN
    letter = np.where(hidden, _ids(b"?"), _ids(b"CRN")[task])

    def change(symbols: np.ndarray) -> np.ndarray:
        changed = (symbols, reversed_symbols(symbols), next_symbol(symbols))
        return np.choose(task[:, None, None], changed)

    return _sequences(rng, letter, change, length)


def one_sequence(
    rng: Generator,
    rows: int,
    length: int,
    *,
    letter: bytes,
    change: Change,
) -> Rows:
    """Builds rows in which one letter always means the same change."""
    return _sequences(rng, np.repeat(_ids(letter), rows), change, length)


def mixture(rng: Generator, rows: int, length: int) -> Rows:
    """Builds a quarter of the rows each: dictionary, mapping, modular, sequence, in this order."""
    quarter = rows // 4
    # The last part takes the remainder.
    parts = [
        dictionary(rng, quarter, length),
        mapping(rng, quarter, length),
        modular(rng, quarter, length),
        sequence(rng, rows - 3 * quarter, length),
    ]
    tokens, scored = zip(*parts, strict=True)
    return np.concatenate(tokens), np.concatenate(scored)


def fact_table(count: int, seed: int) -> Rows:
    """Draws the first `count` facts of a seed: distinct keys below `KEYS`, and their values."""
    rng = np.random.default_rng([seed, 0, 0, 2])
    keys = rng.permutation(KEYS)
    values = rng.integers(0, len(SYMBOLS), KEYS)
    return keys[:count], values[:count]


def facts(
    rng: Generator,
    rows: int,
    length: int,
    *,
    count: int,
    seed: int,
) -> Rows:
    """Builds rows of fixed facts, a key and a value each, none twice in a row; scores all values.

    The rows of a batch cycle through all facts in a random order.
    """
    keys, values = fact_table(count, seed)
    facts_a_row = min(length // 3, count)
    # One cycle through a permutation, cut into rows, which are not longer than its period.
    places = np.arange(rows * facts_a_row).reshape(rows, facts_a_row)
    picked = rng.permutation(count)[places % count]
    examples = np.stack([*_spell_keys(keys[picked]), values[picked]], axis=-1)
    return _layout(_repeat_lead(b"F", rows), _SYMBOL[examples], _SCORE_THIRD, length)


def pairs(rng: Generator, rows: int, length: int) -> Rows:
    """Builds pairs of a key and a value, `>`, then queries whose values are scored.

    Pairs take half of the row, at most 32; queries fill the rest. The task is easier than
    multi-query associative recall: a key may be queried again after its value has been answered.
    """
    shown_pairs = min((length - 1) // 4, len(SYMBOLS))
    keys = _distinct(rng, rows, shown_pairs, len(SYMBOLS))
    values = rng.integers(0, len(SYMBOLS), keys.shape)
    count = (length - 1) // 2 - shown_pairs
    queried = rng.integers(0, shown_pairs, (rows, count))
    queried_keys = np.take_along_axis(keys, queried, axis=1)
    queried_values = np.take_along_axis(values, queried, axis=1)
    queries = np.stack([queried_keys, queried_values], axis=-1)  # [B E 2]
    shown = np.stack([keys, values], axis=-1).reshape(rows, 2 * shown_pairs)
    parts = [_repeat_lead(b"Q", rows), _SYMBOL[shown], _repeat_lead(b">", rows)]
    lead = np.concatenate(parts, axis=1)
    return _layout(lead, _SYMBOL[queries], _SCORE_SECOND, length)


def swaps(
    rng: Generator,
    rows: int,
    length: int,
    *,
    objects: int,
) -> Rows:
    """Builds swaps of two places each, `=`, and the scored resulting order of 0, 1, 2 ...

    Each row has a random number of swaps, from 1 to as many as fit.
    """
    most = (length - 1 - objects) // 2
    count = rng.integers(1, most + 1, rows)
    all_rows = np.arange(rows)
    order = np.tile(np.arange(objects), (rows, 1))
    tokens = np.zeros((rows, length + 1), np.int64)
    scored = np.zeros((rows, length + 1), np.int64)
    tokens[:, 0] = _ids(b"W")
    for number in range(most):
        # Drawn for all rows, so that a row's swaps do not depend on those of others.
        pairs = _distinct(rng, rows, 2, objects)
        active = all_rows[number < count]
        pair = pairs[active]
        place = 1 + 2 * number
        tokens[active, place : place + 2] = _SYMBOL[pair]
        # A column of row indices, which NumPy broadcasts against the [B 2] places.
        row = active[:, None]
        order[row, pair] = order[row, pair[:, ::-1]]
    end = 1 + 2 * count
    tokens[all_rows, end] = _ids(b"=")
    places = end[:, None] + 1 + np.arange(objects)
    row = all_rows[:, None]
    tokens[row, places] = _SYMBOL[order]
    scored[row, places] = 1
    return tokens, scored
