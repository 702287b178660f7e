"""Verifiers, which extract a normalised answer from text.

A verifier maps text to its answer, or to None if it has none. The reference answer goes through the
same function, so "#### 1,200" and "1200.0" are equal. A completion is correct only if both have an
answer and the answers are equal.
"""

import re
from collections.abc import Callable
from decimal import Decimal, InvalidOperation

Verifier = Callable[[str], str | None]

# A number with an optional sign, commas between thousands, and decimals.
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|[-+]?\.\d+")

# The mark before the final number in GSM8K's answers.
_HASHES = "####"

# A separate letter of a choice: "B", "(B)", "B." or "B)".
_LETTER = re.compile(r"(?<![A-Za-z])\(?([A-Z])(?:[).:]|(?![A-Za-z]))")

# Words before the letter in an answer's sentence.
_ANSWER = re.compile(r"answer(?: is|:)?\s*", re.IGNORECASE)


def exact(text: str) -> str | None:
    """Returns the whole text, stripped of surrounding whitespace; None if nothing is left."""
    return text.strip() or None


def hash_number(text: str) -> str | None:
    """Returns the number after the last "####", as in GSM8K; None if no number follows."""
    _, hashes, rest = text.rpartition(_HASHES)
    match = _NUMBER.search(rest) if hashes else None
    return None if match is None else _plain_number(match[0])


def last_number(text: str) -> str | None:
    """Returns the last number of the text; None if there is none."""
    numbers = _NUMBER.findall(text)
    return _plain_number(numbers[-1]) if numbers else None


def letter(text: str) -> str | None:
    """Returns the letter of a choice: the first one after the last "answer", or the first one."""
    said = list(_ANSWER.finditer(text))
    start = said[-1].end() if said else 0
    match = _LETTER.search(text, start) or _LETTER.search(text)
    return None if match is None else match[1]


def _plain_number(text: str) -> str | None:
    """Normalises a number: without separators, plus sign or redundant zeros."""
    try:
        number = Decimal(text.replace(",", ""))
    except InvalidOperation:
        return None
    # Not `normalize`, which rounds to 28 digits: longer numbers would count as equal.
    plain = format(number, "f")
    if "." in plain:
        plain = plain.rstrip("0").rstrip(".")
    return "0" if plain == "-0" else plain


VERIFIERS: dict[str, Verifier] = {
    "exact": exact,
    "hash_number": hash_number,
    "last_number": last_number,
    "letter": letter,
}
