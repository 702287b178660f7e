"""The entries of a vocabulary, for files that store it with a model."""

from collections.abc import Mapping

from rwkv7_jax.text.tokenizer import Tokenizer

# The number of entries in World; some of its ids have none.
WORLD_ENTRIES = 65529

# The name of the end-of-text token in files; it has no bytes.
END_OF_TEXT_NAME = "<|endoftext|>"


def fitting_vocabulary(
    tokenizer: Tokenizer | None, vocab_size: int
) -> Tokenizer | None:
    """Returns the given vocabulary of a model, or else the built-in one of its size.

    Args:
        tokenizer: the given vocabulary; None if there is none.
        vocab_size: vocabulary size of the model; may exceed the vocabulary, as models have unused
            ids.

    Returns:
        None if no vocabulary is given and no built-in one has the size.

    Raises:
        ValueError: the vocabulary has ids beyond the model's.
    """
    if tokenizer is None:
        try:
            return Tokenizer.for_vocabulary(vocab_size)
        except ValueError:
            return None
    if tokenizer.largest_id >= vocab_size:
        raise ValueError(
            f"`tokenizer` must have ids below the model's {vocab_size}; got "
            f"{tokenizer.largest_id}."
        )
    return tokenizer


def vocabulary_entries(tokenizer: Tokenizer, vocab_size: int) -> dict[int, bytes]:
    """Returns the bytes of every id of a model that has any."""
    entries = {}
    for number in range(min(tokenizer.vocab_size, vocab_size)):
        token = tokenizer.token_bytes(number)
        if token:
            entries[number] = token
    return entries


def built_in_vocabulary(entries: Mapping[int, bytes]) -> Tokenizer | None:
    """Returns the built-in vocabulary with exactly these entries; None if there is none."""
    if len(entries) == 256:
        candidates = [Tokenizer.bytes256(), Tokenizer.bytes()]
    elif len(entries) == WORLD_ENTRIES:
        candidates = [Tokenizer.world()]
    else:
        candidates = []
    for candidate in candidates:
        if entries == vocabulary_entries(candidate, candidate.vocab_size):
            return candidate
    return None
