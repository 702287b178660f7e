"""Verifiers of answers: which answer a completion gives, in one spelling.

A verifier maps text to its answer, or to None where it gives none. The expected answer goes through
the same function, so that "#### 1,200" and "1200.0" are one number. A question counts as answered
only if both sides give an answer and the two are equal.
"""

import re
from collections.abc import Callable
from decimal import Decimal, InvalidOperation

Verifier = Callable[[str], str | None]

# A number with a sign, thousands separated by commas, decimals.
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|[-+]?\.\d+")

# What GSM8K's answers put before the final number.
_HASHES = "####"

# A letter of a choice that stands alone: "B", "(B)", "B." or "B)".
_LETTER = re.compile(r"(?<![A-Za-z])\(?([A-Z])(?:[).:]|(?![A-Za-z]))")

# Words that come before the letter in an answer's sentence.
_ANSWER = re.compile(r"answer(?: is|:)?\s*", re.IGNORECASE)


def exact(text: str) -> str | None:
    """Returns all of the text, without blanks at its ends; None if nothing else is there."""
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
    """Returns the letter of a choice: after "answer is" if that is written, else the first one."""
    said = list(_ANSWER.finditer(text))
    start = said[-1].end() if said else 0
    match = _LETTER.search(text, start) or _LETTER.search(text)
    return None if match is None else match[1]


def _plain_number(text: str) -> str | None:
    """Writes a number without separators, a plus sign or zeros that say nothing."""
    try:
        number = Decimal(text.replace(",", ""))
    except InvalidOperation:
        return None
    # "normalize" alone would write 1200 as 1.2E+3, and keeps the sign of a zero.
    return format(number.normalize() + 0, "f")


VERIFIERS: dict[str, Verifier] = {
    "exact": exact,
    "hash_number": hash_number,
    "last_number": last_number,
    "letter": letter,
}
