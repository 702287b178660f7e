"""The entries of a vocabulary, for files that hold it next to a model."""

from rwkv7_jax.text.tokenizer import Tokenizer

# What files call the end of text, which has no bytes.
END_OF_TEXT_NAME = "<|endoftext|>"


def has_vocabulary(vocab_size: int) -> bool:
    """Returns whether a vocabulary that is known here has this size."""
    try:
        Tokenizer.for_vocabulary(vocab_size)
    except ValueError:
        return False
    return True


def vocabulary_entries(
    tokenizer: Tokenizer | None, vocab_size: int, function: str
) -> dict[int, bytes]:
    """Returns the bytes of every id that has an entry.

    Args:
        tokenizer: the vocabulary; None takes that of the size.
        vocab_size: of the model. It may be larger than the vocabulary: models have unused ids.
        function: the public function, for messages.

    Raises:
        ValueError: no vocabulary has that size, or an entry's id is no row of the model.
    """
    if tokenizer is None:
        if not has_vocabulary(vocab_size):
            raise ValueError(
                f"{function}: `tokenizer` must be given for a vocabulary of {vocab_size} ids, "
                "which is neither that of bytes (257) nor World's."
            )
        tokenizer = Tokenizer.for_vocabulary(vocab_size)
    entries = {}
    for number in range(tokenizer.vocab_size):
        token = tokenizer.token_bytes(number)
        if token:
            entries[number] = token
    largest = max(entries, default=0)
    if largest >= vocab_size:
        raise ValueError(
            f"{function}: `tokenizer` must have ids below the model's {vocab_size}; got {largest}."
        )
    return entries
