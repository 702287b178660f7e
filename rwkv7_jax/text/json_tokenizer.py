"""Vocabularies from a `tokenizer.json`, through the package `tokenizers` (extra `tokenizers`)."""

import contextlib
import functools
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rwkv7_jax.checks import first_line
from rwkv7_jax.json_files import parse_json
from rwkv7_jax.text.fast_tokenizer import bytes_of_characters
from rwkv7_jax.text.rust_tokenizer import is_text
from rwkv7_jax.text.tokenizer import Tokenizer, text_bytes, text_digest

KIND = "tokenizer.json"

# Next to `tokenizer.json` in model folders; names the end-of-text token.
_CONFIG_FILE = "tokenizer_config.json"

# SentencePiece's symbol for a space.
_LOW_LINE = "\u2581"

# Number of entries that are checked to survive a round-trip.
_PROBES = 200


class JsonTokenizer(Tokenizer):
    """A vocabulary that the package `tokenizers` encodes.

    Special tokens are never encoded from text and decode to nothing; other added tokens decode to
    themselves. A document is encoded as a whole, because its word splitting may depend on all of
    it. BPE dropout in the file is disabled, so encoding is deterministic.
    """

    def __init__(self, backend: Any, *, name: str, end_of_text: str | None = None):
        """Wraps a tokenizer of the package.

        Args:
            backend: a `tokenizers.Tokenizer`, which is modified.
            name: name for messages.
            end_of_text: the end-of-text token; None selects token 0 if it is special.

        Raises:
            ValueError: the decoder is of an unsupported kind, ids do not round-trip, or the
                end-of-text token is unknown.
        """
        # The file may configure truncation and padding.
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        # BPE dropout, a training setting, would make encoding random.
        if getattr(backend.model, "dropout", None) is not None:
            backend.model.dropout = None
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        spell = _speller(json.loads(backend.to_str()), name)
        vocabulary = backend.get_vocab(with_added_tokens=True)
        # SentencePiece writes spaces as low lines, which decode to spaces.
        self._has_low_lines = spell is _with_byte_fallback
        entries: dict[int, bytes] = {}
        for token, number in vocabulary.items():
            if number not in added:
                entries[number] = spell(token)
            elif added[number].special:
                entries[number] = b""
            else:
                entries[number] = self._plain(token)
        super().__init__(
            entries, vocab_size=max(entries, default=0) + 1, name=name, kind=KIND
        )
        self.end_of_text = 0 if 0 in added and added[0].special else None
        if end_of_text is not None:
            self.end_of_text = vocabulary.get(end_of_text)
            if self.end_of_text is None:
                raise ValueError(
                    f"`{name}` must have the end-of-text token {end_of_text!r} that the "
                    f"{_CONFIG_FILE} next to it names."
                )
        self._check_spelling()

    def _plain(self, token: str) -> bytes:
        """Returns the bytes of an added token, which is matched literally in a text."""
        # Unlike in other tokens, its characters never stand for bytes.
        return (
            token.replace(_LOW_LINE, " ") if self._has_low_lines else token
        ).encode()

    @classmethod
    def from_text(
        cls, content: bytes, *, name: str, end_of_text: str | None = None
    ) -> "JsonTokenizer":
        """Builds a vocabulary from the content of a `tokenizer.json`.

        Raises:
            ValueError: the file is damaged or of an unsupported kind.
            ImportError: the extra `tokenizers` is not installed.
        """
        try:
            import tokenizers
        except ImportError:
            raise ImportError(
                f"a {KIND} needs the package tokenizers (the extra `tokenizers`): "
                'pip install "rwkv7_jax[tokenizers]".'
            ) from None
        with _package_errors(f"`{name}` must be a tokenizer.json"):
            backend = tokenizers.Tokenizer.from_str(content.decode("utf-8-sig"))
        return cls(backend, name=name, end_of_text=end_of_text)

    @functools.cached_property
    def digest(self) -> str:
        """The digest of the file's content, regardless of formatting, and of the end-of-text id."""
        content = json.loads(self._backend.to_str())
        return text_digest(json.dumps([content, self.end_of_text], sort_keys=True))

    def end_token(self) -> str | None:
        """Returns the end-of-text token; None if there is none."""
        if self.end_of_text is None:
            return None
        return self._backend.id_to_token(self.end_of_text)

    def file_text(self) -> str:
        """Writes the content of a `tokenizer.json`."""
        return self._backend.to_str()

    def encode(self, text: str | bytes) -> list[int]:
        """Encodes a text with the package, without special tokens.

        Raises:
            TypeError: `text` is neither str nor bytes.
            ValueError: `text` is not UTF-8, or has characters that no token covers.
        """
        try:
            decoded = text_bytes(text).decode()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"Tokenizer.encode: `text` must be UTF-8 for {self.name}; it is not at byte "
                f"{error.start}."
            ) from None
        # A regular expression in the file may exceed its step limit on some texts.
        with _package_errors(
            f"Tokenizer.encode: `text` must be text that {self.name} can encode"
        ):
            ids = self._backend.encode(decoded, add_special_tokens=False).ids
            normalizer = self._backend.normalizer
            if normalizer is not None:
                decoded = normalizer.normalize_str(decoded)
        self._check_spelled(ids, decoded)
        return ids

    def _check_spelled(self, ids: list[int], text: str) -> None:
        """Raises unless ids decode to the text: no unknown tokens, no dropped characters.

        Args:
            ids: ids of the text.
            text: the text after the file's normalizer.
        """
        if self._has_low_lines:
            text = text.replace(_LOW_LINE, " ")
        expected = text.encode()
        spelled = self.decode_bytes(ids)
        if spelled == expected:
            return
        pairs = itertools.zip_longest(spelled, expected)
        position = next(
            place for place, (came, wanted) in enumerate(pairs) if came != wanted
        )
        raise ValueError(
            f"Tokenizer.encode: `text` must consist of tokens of {self.name}; it does not at byte "
            f"{position}, {expected[position : position + 16]!r}."
        )

    def encode_chunks(self, chunks: Iterable[bytes]) -> Iterator[np.ndarray]:
        """Encodes the joined chunks, all of which are in memory at once."""
        ids = self.encode(b"".join(chunks))
        if ids:
            yield np.asarray(ids, self.dtype)

    def _check_spelling(self) -> None:
        """Raises unless entries survive a round-trip, so that each stands for its own bytes."""
        texts = [entry for entry in self._ids if is_text(entry)]
        for entry in texts[:: max(1, len(texts) // _PROBES)]:
            text = entry.decode()
            with _package_errors(f"`{self.name}` must encode its own tokens"):
                ids = self._backend.encode(text, add_special_tokens=False).ids
            spelled = self.decode_bytes(ids)
            if spelled != entry:
                raise ValueError(
                    f"`{self.name}` must have tokens that round-trip; {text!r} comes "
                    f"back as {spelled.decode(errors='replace')!r}."
                )


@contextlib.contextmanager
def _package_errors(sentence: str) -> Iterator[None]:
    """Turns the package's errors into one sentence.

    The package raises bare `Exception`, or a panic, which is not a subclass of `Exception`.

    Args:
        sentence: beginning of the message; the package's reason follows.

    Raises:
        ValueError: the block raised such an error.
    """
    try:
        yield
    except BaseException as error:
        is_panic = type(error).__name__ == "PanicException"
        if not isinstance(error, Exception) and not is_panic:
            raise
        reason = first_line(error) if str(error) else "damaged"
        raise ValueError(f"{sentence}; `tokenizers` says: {reason}.") from None


def end_token_beside(path: Path) -> str | None:
    """Reads the end-of-text token from the `tokenizer_config.json` next to a `tokenizer.json`.

    Returns:
        None if there is no such file or it names no token.

    Raises:
        ValueError: the file does not hold a JSON object.
    """
    config = path.with_name(_CONFIG_FILE)
    if not config.is_file():
        return None
    try:
        token = parse_json(config.read_bytes()).get("eos_token")
    except (ValueError, AttributeError):
        raise ValueError(f"`{config}` must hold a JSON object.") from None
    # Older files describe the token by a JSON object.
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _speller(content: dict[str, Any], name: str) -> Any:
    """Returns the function from a token to its bytes, as given by the decoder in the file.

    Raises:
        ValueError: the decoder is of an unsupported kind.
    """
    decoder = content.get("decoder") or {}
    steps = decoder.get("decoders", [decoder])
    kinds = {step.get("type") for step in steps}
    if "ByteLevel" in kinds:
        return functools.partial(_byte_level, bytes_of_characters())
    if kinds and kinds <= {"Replace", "ByteFallback", "Fuse", "Metaspace", "Strip"}:
        return _with_byte_fallback
    raise ValueError(
        f"`{name}` must have a decoder of the kinds ByteLevel, or Replace with ByteFallback; got "
        f"{', '.join(sorted(str(kind) for kind in kinds))}."
    )


def _byte_level(table: dict[str, int], token: str) -> bytes:
    """Returns the bytes that a token's characters stand for, or else the token's UTF-8."""
    if any(character not in table for character in token):
        return token.encode()
    return bytes([table[character] for character in token])


def _with_byte_fallback(token: str) -> bytes:
    """Returns the bytes of a SentencePiece token: a low line is a space, `<0x0A>` a byte."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:
            pass
    return token.replace(_LOW_LINE, " ").encode()
