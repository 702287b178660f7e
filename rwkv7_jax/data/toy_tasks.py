"""Rows of toy tasks over 32 symbols, for small models to learn and to be tuned on.

Everything is in the ids of single bytes (byte + 1; 0 fills up a row), so that every model can read
it. Symbols are the digits of base 32, instructions are capitals and punctuation. A generator takes
(rng, rows, length) and gives ids and what is scored, both [rows, length + 1].
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


def _laid_out(lead: np.ndarray, examples: np.ndarray, scored: np.ndarray, length: int) -> Rows:
    """Lead [B K] and examples [B E M] one after the other, filled up with 0; scored likewise."""
    rows, columns = len(lead), lead.shape[1]
    end = columns + examples.shape[1] * examples.shape[2]
    tokens, counts = np.zeros((2, rows, length + 1), np.int64)
    tokens[:, :columns] = lead
    tokens[:, columns:end] = examples.reshape(rows, end - columns)
    counts[:, columns:end] = np.broadcast_to(scored, examples.shape).reshape(rows, end - columns)
    return tokens, counts


def _distinct(rng: np.random.Generator, rows: int, count: int, among: int) -> np.ndarray:
    """`count` different numbers below `among` in each row."""
    return np.argsort(rng.random((rows, among)), axis=1)[:, :count]


def _visits(rng: np.random.Generator, rows: int, count: int, keys: np.ndarray) -> Rows:
    """Which of a row's `keys` is asked for at each example, and whether it was there before."""
    which = rng.integers(0, keys[:, None], (rows, count))
    same = which[:, :, None] == which[:, None, :]
    return which, np.tril(same, -1).any(axis=2)


def dictionary(rng: np.random.Generator, rows: int, length: int) -> Rows:
    """Keys of two symbols and their values, 2 to 8 in a row; values of keys seen before count."""
    keys = _distinct(rng, rows, 8, KEYS)
    values = rng.integers(0, len(SYMBOLS), keys.shape)
    which, repeated = _visits(rng, rows, length // 3, rng.integers(2, 9, rows))
    key, value = (np.take_along_axis(each, which, axis=1) for each in (keys, values))
    examples = _SYMBOL[np.stack([*np.divmod(key, len(SYMBOLS)), value], axis=-1)]
    lead = np.tile(_ids(b"D"), (rows, 1))
    return _laid_out(lead, examples, repeated[..., None] * np.array([0, 0, 1]), length)


def mapping(rng: np.random.Generator, rows: int, length: int) -> Rows:
    """A random function of one symbol, seen at 4 to 13 places; places seen before count."""
    places = _distinct(rng, rows, 13, len(SYMBOLS))
    images = rng.integers(0, len(SYMBOLS), places.shape)
    which, repeated = _visits(rng, rows, length // 2, rng.integers(4, 14, rows))
    pair = [np.take_along_axis(each, which, axis=1) for each in (places, images)]
    lead = np.tile(_ids(b"M"), (rows, 1))
    scored = repeated[..., None] * np.array([0, 1])
    return _laid_out(lead, _SYMBOL[np.stack(pair, axis=-1)], scored, length)


def _arithmetic(
    rng: np.random.Generator, lead: np.ndarray, modulus: np.ndarray, operation: Operation, length
) -> Rows:
    """Letter, modulus, then `ab=c` again and again."""
    one, two = rng.integers(0, modulus[:, None], (2, len(lead), (length - 1) // 4))
    result = _SYMBOL[operation(one, two) % modulus[:, None]]
    equals = np.full_like(one, _ids(b"=")[0])
    examples = np.stack([_SYMBOL[one], _SYMBOL[two], equals, result], axis=-1)
    return _laid_out(lead, examples, np.array([0, 0, 0, 1]), length)


def modular(rng: np.random.Generator, rows: int, length: int) -> Rows:
    """Addition (A) or subtraction (S) by one modulus a row, of `MODULI`."""
    modulus = np.array(MODULI)[rng.integers(0, len(MODULI), rows)]
    sign = rng.integers(0, 2, rows)
    lead = np.stack([_ids(b"AS")[sign], _SYMBOL[modulus]], axis=1)
    return _arithmetic(rng, lead, modulus, lambda a, b: a + (1 - 2 * sign[:, None]) * b, length)


def one_modulus(
    rng: np.random.Generator, rows: int, length: int, *, modulus: int, letter: bytes, operation
) -> Rows:
    """One operation by one modulus, in every row."""
    lead = np.tile([_ids(letter)[0], _SYMBOL[modulus]], (rows, 1))
    return _arithmetic(rng, lead, np.full(rows, modulus), operation, length)


def _sequences(rng: np.random.Generator, letter: np.ndarray, change: Change, length: int) -> Rows:
    """Letter, six symbols, `>` and what becomes of them, again and again."""
    symbols = rng.integers(0, len(SYMBOLS), (len(letter), (length + 1) // (2 * ITEMS + 2), ITEMS))
    mark = np.full_like(symbols[..., :1], _ids(b">")[0])
    first = np.broadcast_to(letter[:, None, None], mark.shape)
    examples = [first, _SYMBOL[symbols], mark, _SYMBOL[change(symbols)]]
    scored = np.repeat([0, 1], [ITEMS + 2, ITEMS])
    return _laid_out(letter[:, None][:, :0], np.concatenate(examples, axis=-1), scored, length)


def next_symbol(symbols: np.ndarray) -> np.ndarray:
    """Each symbol's successor, the first one's after the last."""
    return (symbols + 1) % len(SYMBOLS)


def reversed_symbols(symbols: np.ndarray) -> np.ndarray:
    """The symbols from the last to the first."""
    return symbols[..., ::-1]


def sequence(rng: np.random.Generator, rows: int, length: int) -> Rows:
    """Copy (C), reverse (R) or next symbol (N), one a row; some rows hide which behind "?"."""
    task = rng.integers(0, 3, rows)
    letter = np.where(rng.random(rows) < _HIDDEN, _ids(b"?"), _ids(b"CRN")[task])

    def change(symbols):
        outs = symbols, reversed_symbols(symbols), next_symbol(symbols)
        return np.choose(task[:, None, None], outs)

    return _sequences(rng, letter, change, length)


def one_sequence(
    rng: np.random.Generator, rows: int, length: int, *, letter: bytes, change: Change
) -> Rows:
    """One letter that always means the same change."""
    return _sequences(rng, np.repeat(_ids(letter), rows), change, length)


def mixture(rng: np.random.Generator, rows: int, length: int) -> Rows:
    """A quarter of the rows each: dictionary, mapping, modular, sequence, in this order."""
    quarter = rows // 4
    parts = [make(rng, quarter, length) for make in (dictionary, mapping, modular)]
    parts.append(sequence(rng, rows - 3 * quarter, length))
    tokens, scored = (np.concatenate(each) for each in zip(*parts, strict=True))
    return tokens, scored


def fact_table(count: int, seed: int) -> Rows:
    """Keys below `KEYS`, all different, and their values: the first `count` facts of a seed."""
    rng = np.random.default_rng([seed, 0, 0, 2])
    return rng.permutation(KEYS)[:count], rng.integers(0, len(SYMBOLS), KEYS)[:count]


def facts(rng: np.random.Generator, rows: int, length: int, *, count: int, seed: int) -> Rows:
    """Fixed facts as key and value, none twice in a row; all values count.

    The rows of a batch go through all facts in a random order, again and again.
    """
    keys, values = fact_table(count, seed)
    each = min(length // 3, count)
    which = rng.permutation(count)[np.arange(rows * each).reshape(rows, each) % count]
    examples = np.stack([*np.divmod(keys[which], len(SYMBOLS)), values[which]], axis=-1)
    lead = np.tile(_ids(b"F"), (rows, 1))
    return _laid_out(lead, _SYMBOL[examples], np.array([0, 0, 1]), length)


def mqar(rng: np.random.Generator, rows: int, length: int) -> Rows:
    """Multi-query associative recall: pairs, `>`, then queries whose values count.

    A half of the row is pairs, 32 at most; queries fill the rest.
    """
    pairs = min((length - 1) // 4, len(SYMBOLS))
    keys = _distinct(rng, rows, pairs, len(SYMBOLS))
    values = rng.integers(0, len(SYMBOLS), keys.shape)
    which = rng.integers(0, pairs, (rows, (length - 1) // 2 - pairs))
    asked = [np.take_along_axis(each, which, axis=1) for each in (keys, values)]
    known = _SYMBOL[np.stack([keys, values], axis=-1)].reshape(rows, 2 * pairs)
    ends = (np.tile(_ids(mark), (rows, 1)) for mark in (b"Q", b">"))
    lead = np.insert(np.concatenate(list(ends), axis=1), [1] * (2 * pairs), known, axis=1)
    return _laid_out(lead, _SYMBOL[np.stack(asked, axis=-1)], np.array([0, 1]), length)


def swaps(rng: np.random.Generator, rows: int, length: int, *, objects: int) -> Rows:
    """Swaps of two places each, `=` and the order that they leave of 0, 1, 2 ...; it counts.

    A row has 1 swap or more, as many as fit at most: later answers stand behind more swaps.
    """
    most = (length - 1 - objects) // 2
    count, all_rows = rng.integers(1, most + 1, rows), np.arange(rows)
    order = np.tile(np.arange(objects), (rows, 1))
    tokens, scored = np.zeros((2, rows, length + 1), np.int64)
    tokens[:, 0] = _ids(b"W")
    for number in range(most):
        here = all_rows[number < count]
        pair = _distinct(rng, rows, 2, objects)[here]
        tokens[here, 1 + 2 * number : 3 + 2 * number] = _SYMBOL[pair]
        order[here[:, None], pair] = order[here[:, None], pair[:, ::-1]]
    end = 1 + 2 * count
    tokens[all_rows, end] = _ids(b"=")
    places = end[:, None] + 1 + np.arange(objects)
    tokens[all_rows[:, None], places] = _SYMBOL[order]
    scored[all_rows[:, None], places] = 1
    return tokens, scored
