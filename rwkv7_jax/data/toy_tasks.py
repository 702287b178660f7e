"""Rows of toy tasks over 32 symbols, for small models to learn and to be tuned on.

Everything is in the ids of single bytes (byte + 1; 0 fills a row), so that every model can read it.
Symbols are the digits of base 32, instructions are capitals and punctuation. A generator is called
as (rng, rows, length) and returns ids and 1 for each scored id, both [rows, length + 1].

The order of the random draws is part of each task: another order makes other examples.
"""

from collections.abc import Callable

import numpy as np

Rows = tuple[np.ndarray, np.ndarray]

Operation = Callable[[np.ndarray, np.ndarray], np.ndarray]

Change = Callable[[np.ndarray], np.ndarray]

SYMBOLS = b"0123456789abcdefghijklmnopqrstuv"

MODULI = (5, 7, 11, 13)  # of the mixture; every other modulus is new to its models

ITEMS = 6  # symbols of one sequence

KEYS = len(SYMBOLS) ** 2  # two symbols each

_HIDDEN = 0.4  # share of sequence rows whose instruction is "?"


def _ids(text: bytes) -> np.ndarray:
    return np.frombuffer(text, np.uint8).astype(np.int64) + 1


_SYMBOL = _ids(SYMBOLS)


def _repeat_lead(letter: bytes, rows: int) -> np.ndarray:
    """Returns the same lead [B K] for every row."""
    return np.tile(_ids(letter), (rows, 1))


def _layout(lead: np.ndarray, examples: np.ndarray, scored: np.ndarray, length: int) -> Rows:
    """Lays out rows: the lead, all examples, and 0 up to the end.

    Args:
        lead: [B K], not scored.
        examples: [B E M], E examples of M ids each.
        scored: 1 or 0, broadcast to the examples' shape.
        length: inputs of a row (T).
    """
    rows, columns = lead.shape
    end = columns + examples.shape[1] * examples.shape[2]
    tokens = np.zeros((rows, length + 1), np.int64)
    counts = np.zeros((rows, length + 1), np.int64)
    tokens[:, :columns] = lead
    tokens[:, columns:end] = examples.reshape(rows, end - columns)
    counts[:, columns:end] = np.broadcast_to(scored, examples.shape).reshape(rows, end - columns)
    return tokens, counts


def _distinct(rng: np.random.Generator, rows: int, count: int, below: int) -> np.ndarray:
    """Draws `count` different numbers below `below` in each row."""
    return np.argsort(rng.random((rows, below)), axis=1)[:, :count]


def _visits(rng: np.random.Generator, rows: int, count: int, keys: np.ndarray) -> Rows:
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
    same = keys_of[:, :, None] == keys_of[:, None, :]
    return keys_of, np.tril(same, -1).any(axis=2)


def dictionary(rng: np.random.Generator, rows: int, length: int) -> Rows:
    """Makes 2 to 8 keys of two symbols and their values; values of keys seen before count."""
    keys = _distinct(rng, rows, 8, KEYS)
    values = rng.integers(0, len(SYMBOLS), keys.shape)
    sizes = rng.integers(2, 9, rows)
    visited, repeated = _visits(rng, rows, length // 3, sizes)
    key = np.take_along_axis(keys, visited, axis=1)
    value = np.take_along_axis(values, visited, axis=1)
    examples = _SYMBOL[np.stack([*np.divmod(key, len(SYMBOLS)), value], axis=-1)]
    scored = repeated[..., None] * np.array([0, 0, 1])
    return _layout(_repeat_lead(b"D", rows), examples, scored, length)


def mapping(rng: np.random.Generator, rows: int, length: int) -> Rows:
    """Makes a random function of one symbol at 4 to 13 places; places seen before count."""
    places = _distinct(rng, rows, 13, len(SYMBOLS))
    images = rng.integers(0, len(SYMBOLS), places.shape)
    sizes = rng.integers(4, 14, rows)
    visited, repeated = _visits(rng, rows, length // 2, sizes)
    place = np.take_along_axis(places, visited, axis=1)
    image = np.take_along_axis(images, visited, axis=1)
    examples = _SYMBOL[np.stack([place, image], axis=-1)]
    scored = repeated[..., None] * np.array([0, 1])
    return _layout(_repeat_lead(b"M", rows), examples, scored, length)


def _arithmetic(
    rng: np.random.Generator, lead: np.ndarray, modulus: np.ndarray, operation: Operation, length
) -> Rows:
    """Makes rows of the lead (letter and modulus), then `ab=c` again and again."""
    left, right = rng.integers(0, modulus[:, None], (2, len(lead), (length - 1) // 4))
    result = _SYMBOL[operation(left, right) % modulus[:, None]]
    equals = np.full_like(left, _ids(b"=")[0])
    examples = np.stack([_SYMBOL[left], _SYMBOL[right], equals, result], axis=-1)
    return _layout(lead, examples, np.array([0, 0, 0, 1]), length)


def modular(rng: np.random.Generator, rows: int, length: int) -> Rows:
    """Makes additions (A) or subtractions (S) by one modulus a row, of `MODULI`."""
    modulus = np.array(MODULI)[rng.integers(0, len(MODULI), rows)]
    subtracts = rng.integers(0, 2, rows)
    lead = np.stack([_ids(b"AS")[subtracts], _SYMBOL[modulus]], axis=1)
    sign = 1 - 2 * subtracts[:, None]
    return _arithmetic(rng, lead, modulus, lambda a, b: a + sign * b, length)


def one_modulus(
    rng: np.random.Generator,
    rows: int,
    length: int,
    *,
    modulus: int,
    letter: bytes,
    operation: Operation,
) -> Rows:
    """Makes one operation by one modulus, in every row."""
    lead = np.tile([_ids(letter)[0], _SYMBOL[modulus]], (rows, 1))
    return _arithmetic(rng, lead, np.full(rows, modulus), operation, length)


def _sequences(rng: np.random.Generator, letter: np.ndarray, change: Change, length: int) -> Rows:
    """Makes rows of a letter, six symbols, `>` and the changed symbols, again and again."""
    count = (length + 1) // (2 * ITEMS + 2)
    symbols = rng.integers(0, len(SYMBOLS), (len(letter), count, ITEMS))
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


def sequence(rng: np.random.Generator, rows: int, length: int) -> Rows:
    """Makes copy (C), reverse (R) or next symbol (N), one a row; "?" hides which in some rows."""
    task = rng.integers(0, 3, rows)
    letter = np.where(rng.random(rows) < _HIDDEN, _ids(b"?"), _ids(b"CRN")[task])

    def change(symbols):
        changed = (symbols, reversed_symbols(symbols), next_symbol(symbols))
        return np.choose(task[:, None, None], changed)

    return _sequences(rng, letter, change, length)


def one_sequence(
    rng: np.random.Generator, rows: int, length: int, *, letter: bytes, change: Change
) -> Rows:
    """Makes one letter that always means the same change."""
    return _sequences(rng, np.repeat(_ids(letter), rows), change, length)


def mixture(rng: np.random.Generator, rows: int, length: int) -> Rows:
    """Makes a quarter of the rows each: dictionary, mapping, modular, sequence, in this order."""
    quarter = rows // 4
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


def facts(rng: np.random.Generator, rows: int, length: int, *, count: int, seed: int) -> Rows:
    """Makes fixed facts as key and value, none twice in a row; all values count.

    The rows of a batch go through all facts in a random order, again and again.
    """
    keys, values = fact_table(count, seed)
    facts_a_row = min(length // 3, count)
    places = np.arange(rows * facts_a_row).reshape(rows, facts_a_row)
    picked = rng.permutation(count)[places % count]
    examples = np.stack([*np.divmod(keys[picked], len(SYMBOLS)), values[picked]], axis=-1)
    return _layout(_repeat_lead(b"F", rows), _SYMBOL[examples], np.array([0, 0, 1]), length)


def mqar(rng: np.random.Generator, rows: int, length: int) -> Rows:
    """Makes multi-query associative recall: pairs, `>`, then queries whose values count.

    Half of the row is pairs, 32 at most; queries fill the rest.
    """
    pairs = min((length - 1) // 4, len(SYMBOLS))
    keys = _distinct(rng, rows, pairs, len(SYMBOLS))
    values = rng.integers(0, len(SYMBOLS), keys.shape)
    queried = rng.integers(0, pairs, (rows, (length - 1) // 2 - pairs))
    queries = np.stack(
        [np.take_along_axis(keys, queried, axis=1), np.take_along_axis(values, queried, axis=1)],
        axis=-1,
    )
    shown = _SYMBOL[np.stack([keys, values], axis=-1)].reshape(rows, 2 * pairs)
    parts = [_repeat_lead(b"Q", rows), shown, _repeat_lead(b">", rows)]
    lead = np.concatenate(parts, axis=1)
    return _layout(lead, _SYMBOL[queries], np.array([0, 1]), length)


def swaps(rng: np.random.Generator, rows: int, length: int, *, objects: int) -> Rows:
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
        tokens[active, 1 + 2 * number : 3 + 2 * number] = _SYMBOL[pair]
        order[active[:, None], pair] = order[active[:, None], pair[:, ::-1]]
    end = 1 + 2 * count
    tokens[all_rows, end] = _ids(b"=")
    places = end[:, None] + 1 + np.arange(objects)
    tokens[all_rows[:, None], places] = _SYMBOL[order]
    scored[all_rows[:, None], places] = 1
    return tokens, scored
