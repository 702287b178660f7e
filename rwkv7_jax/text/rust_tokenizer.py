"""World encoding by the optional package pyrwkv-tokenizer: the same ids, ten times as fast."""

from collections.abc import Callable, Mapping

TextEncoder = Callable[[str], list[int]]


def rust_encoder(ids: Mapping[bytes, int]) -> TextEncoder | None:
    """Returns the package's `encode`; None if it is not installed or has another vocabulary.

    Its `decode` is never used: on an unknown id it panics, which is not an `Exception`.

    Args:
        ids: the id of every entry.
    """
    try:
        import pyrwkv_tokenizer
    except ImportError:
        return None
    tokenizer = pyrwkv_tokenizer.RWKVTokenizer()
    # It lists the entries that are text, and one name for all others, which are single bytes and
    # parts of characters.
    listed = {text.encode(): number for text, number in tokenizer.get_vocab().items()}
    ours = {entry: number for entry, number in ids.items() if is_text(entry)}
    is_same = ours.items() <= listed.items() and len(listed) <= len(ours) + 1
    return tokenizer.encode if is_same else None


def is_text(entry: bytes) -> bool:
    """Returns whether an entry is UTF-8; the others are single bytes and parts of characters."""
    try:
        entry.decode()
    except UnicodeDecodeError:
        return False
    return True


def text_before_cut(data: bytes) -> str:
    """Decodes bytes up to the first that are not UTF-8, such as a truncated character."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        return data[: error.start].decode()
