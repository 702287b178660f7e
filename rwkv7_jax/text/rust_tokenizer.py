"""The package pyrwkv-tokenizer, where it is installed: the same ids of World, ten times as fast."""

from collections.abc import Callable, Mapping

TextEncoder = Callable[[str], list[int]]


def rust_encoder(ids: Mapping[bytes, int]) -> TextEncoder | None:
    """Returns the package's `encode`; None where it is missing or has another vocabulary.

    Its `decode` is never called: an id outside its table ends in a panic, which is no `Exception`.

    Args:
        ids: of every entry.
    """
    # Optional: an extra.
    try:
        import pyrwkv_tokenizer
    except ImportError:
        return None
    tokenizer = pyrwkv_tokenizer.RWKVTokenizer()
    # It lists the entries that are text, and one name in place of all the others: single bytes and
    # parts of characters.
    listed = {text.encode(): number for text, number in tokenizer.get_vocab().items()}
    ours = {entry: number for entry, number in ids.items() if is_text(entry)}
    is_same = ours.items() <= listed.items() and len(listed) <= len(ours) + 1
    return tokenizer.encode if is_same else None


def is_text(entry: bytes) -> bool:
    """Tells whether an entry is UTF-8: others are single bytes and parts of characters."""
    try:
        entry.decode()
    except UnicodeDecodeError:
        return False
    return True


def text_before_cut(data: bytes) -> str:
    """Decodes bytes up to the first that are not UTF-8, such as half a character at the end."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        return data[: error.start].decode()
