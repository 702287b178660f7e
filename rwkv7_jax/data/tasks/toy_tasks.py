"""Rows of toy tasks over 32 symbols, for small models to learn and to be tuned on.

Everything is in the ids of single bytes (byte + 1; 0 fills a row), so that every model can read it.
Symbols are the digits of base 32, instructions are capitals and punctuation. A generator is called
as (rng, rows, length) and returns ids and 1 for each scored id, both [rows, length + 1].

The order of the random draws is part of each task: another order makes other examples.
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
    """Returns the ids of ASCII text, which are those of its bytes in both vocabularies."""
    return np.frombuffer(text, np.uint8).astype(np.int64) + 1


# The id of each symbol by its value: indexed with numbers, it spells them.
_SYMBOL = _ids(SYMBOLS)

# Masks of one example, by the ids that it consists of.
_SCORE_SECOND = np.array([0, 1])
_SCORE_THIRD = np.array([0, 0, 1])
_SCORE_FOURTH = np.array([0, 0, 0, 1])


def _repeat_lead(letter: bytes, rows: int) -> np.ndarray:
    """Returns the same lead [B K] for every row."""
    return np.tile(_ids(letter), (rows, 1))


def _layout(
    lead: np.ndarray,
    examples: np.ndarray,
    scored: np.ndarray,
    length: int,
) -> Rows:
    """Lays out rows: the lead, all examples, and 0 up to the end.

    Args:
        lead: [B K], not scored.
        examples: [B E M], E examples of M ids each.
        scored: 1 or 0, broadcast to the examples' shape.
        length: inputs of a row (T).
    """
    rows, begin = lead.shape
    _, count, size = examples.shape
    end = begin + count * size
    # Sizes spelled out: -1 is not allowed where there are no rows.
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
    """Draws `count` different numbers below `below` in each row."""
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
        rows: B.
        count: examples of a row (E).
        keys: [B], how many keys a row has.

    Returns:
        Numbers of keys [B E], and whether the row had the key before [B E].
    """
    keys_of = rng.integers(0, keys[:, None], (rows, count))
    # Sorted, equal keys stand side by side in the order of the examples.
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
    """Makes 2 to 8 keys of two symbols and their values; values of keys seen before count."""
    # Every row draws 8 keys, of which it uses as many as its size says.
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
    """Makes a random function of one symbol at 4 to 13 places; places seen before count."""
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
    """Makes rows of the lead (letter and modulus), then `ab=c` again and again."""
    count = (length - 1) // 4
    by_row = modulus[:, None]
    left, right = rng.integers(0, by_row, (2, len(lead), count))
    result = operation(left, right) % by_row
    equals = np.full_like(left, _ids(b"=")[0])
    parts = [_SYMBOL[left], _SYMBOL[right], equals, _SYMBOL[result]]
    examples = np.stack(parts, axis=-1)  # [B E 4]
    return _layout(lead, examples, _SCORE_FOURTH, length)


def modular(rng: Generator, rows: int, length: int) -> Rows:
    """Makes additions (A) or subtractions (S) by one modulus a row, of `MODULI`."""
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
    """Makes one operation by one modulus, in every row."""
    lead = np.tile([*_ids(letter), _SYMBOL[modulus]], (rows, 1))
    return _arithmetic(rng, lead, np.full(rows, modulus), operation, length)


def _sequences(
    rng: Generator,
    letter: np.ndarray,
    change: Change,
    length: int,
) -> Rows:
    """Makes rows of a letter, six symbols, `>` and the changed symbols, again and again."""
    count = (length + 1) // (2 * ITEMS + 2)
    shape = (len(letter), count, ITEMS)
    symbols = rng.integers(0, len(SYMBOLS), shape)
    mark = np.full_like(symbols[..., :1], _ids(b">")[0])
    first = np.broadcast_to(letter[:, None, None], mark.shape)
    parts = [first, _SYMBOL[symbols], mark, _SYMBOL[change(symbols)]]
    scored = np.repeat([0, 1], [ITEMS + 2, ITEMS])
    # The letter belongs to every example, so the row itself has no lead.
    no_lead = np.zeros((len(letter), 0), np.int64)
    return _layout(no_lead, np.concatenate(parts, axis=-1), scored, length)


def next_symbol(symbols: np.ndarray) -> np.ndarray:
    """Replaces each symbol by its successor, the last one by the first."""
    return (symbols + 1) % len(SYMBOLS)


def reversed_symbols(symbols: np.ndarray) -> np.ndarray:
    """Reverses the symbols."""
    return symbols[..., ::-1]


def sequence(rng: Generator, rows: int, length: int) -> Rows:
    """Makes copy (C), reverse (R) or next symbol (N), one a row; "?" hides which in some rows."""
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
    """Makes one letter that always means the same change."""
    return _sequences(rng, np.repeat(_ids(letter), rows), change, length)


def mixture(rng: Generator, rows: int, length: int) -> Rows:
    """Makes a quarter of the rows each: dictionary, mapping, modular, sequence, in this order."""
    quarter = rows // 4
    # The last part takes what the division leaves.
    parts = [
        dictionary(rng, quarter, length),
        mapping(rng, quarter, length),
        modular(rng, quarter, length),
        sequence(rng, rows - 3 * quarter, length),
    ]
    tokens, scored = zip(*parts, strict=True)
    return np.concatenate(tokens), np.concatenate(scored)


def fact_table(count: int, seed: int) -> Rows:
    """Draws the first `count` facts of a seed: different keys below `KEYS`, and their values."""
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
    """Makes fixed facts as key and value, none twice in a row; all values count.

    The rows of a batch go through all facts in a random order, again and again.
    """
    keys, values = fact_table(count, seed)
    facts_a_row = min(length // 3, count)
    # One walk through a permutation, cut into rows: a row is shorter than the walk's period.
    places = np.arange(rows * facts_a_row).reshape(rows, facts_a_row)
    picked = rng.permutation(count)[places % count]
    examples = np.stack([*_spell_keys(keys[picked]), values[picked]], axis=-1)
    return _layout(_repeat_lead(b"F", rows), _SYMBOL[examples], _SCORE_THIRD, length)


def pairs(rng: Generator, rows: int, length: int) -> Rows:
    """Makes pairs of a key and a value, `>`, then queries whose values count.

    Half of the row is pairs, 32 at most; queries fill the rest. It is easier than multi-query
    associative recall: a key may be asked again, and its value has then been answered in the row.
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
    """Makes swaps of two places each, `=` and the order of 0, 1, 2 ... after them; it counts.

    A row has 1 swap or more, up to as many as fit: later answers come after more swaps.
    """
    most = (length - 1 - objects) // 2
    count = rng.integers(1, most + 1, rows)
    all_rows = np.arange(rows)
    order = np.tile(np.arange(objects), (rows, 1))
    tokens = np.zeros((rows, length + 1), np.int64)
    scored = np.zeros((rows, length + 1), np.int64)
    tokens[:, 0] = _ids(b"W")
    for number in range(most):
        # Drawn for all rows, so that a row's swaps do not depend on how many others have.
        pairs = _distinct(rng, rows, 2, objects)
        active = all_rows[number < count]
        pair = pairs[active]
        place = 1 + 2 * number
        tokens[active, place : place + 2] = _SYMBOL[pair]
        # A column of row numbers next to [B 2] places: NumPy pairs each row with its two places.
        row = active[:, None]
        order[row, pair] = order[row, pair[:, ::-1]]
    end = 1 + 2 * count
    tokens[all_rows, end] = _ids(b"=")
    places = end[:, None] + 1 + np.arange(objects)
    row = all_rows[:, None]
    tokens[row, places] = _SYMBOL[order]
    scored[row, places] = 1
    return tokens, scored
