"""The entries of a vocabulary, for files that hold it next to a model."""

from collections.abc import Mapping

from rwkv7_jax.text.tokenizer import Tokenizer

# Of World's vocabulary; its table has ids without one as well.
WORLD_ENTRIES = 65529

# What files call the end of text, which has no bytes.
END_OF_TEXT_NAME = "<|endoftext|>"


def fitting_vocabulary(
    tokenizer: Tokenizer | None, vocab_size: int
) -> Tokenizer | None:
    """Returns the vocabulary of a model, which is that of its size if none is named.

    Args:
        tokenizer: the one that was named.
        vocab_size: of the model. It may be larger than the vocabulary: models have unused ids.

    Returns:
        None where none was named, and the size tells none.

    Raises:
        ValueError: an id of the vocabulary is no row of the model.
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
    """Returns the bytes of every id of a model that has some."""
    entries = {}
    for number in range(min(tokenizer.vocab_size, vocab_size)):
        token = tokenizer.token_bytes(number)
        if token:
            entries[number] = token
    return entries


def built_in_vocabulary(entries: Mapping[int, bytes]) -> Tokenizer | None:
    """Returns the built-in vocabulary that has these entries and no others; None where none has."""
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
