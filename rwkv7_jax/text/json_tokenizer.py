"""Vocabularies of the `tokenizers` package, as `tokenizer.json` (extra `tokenizers`)."""

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

# Next to `tokenizer.json` in the folders of models; names the token that ends a text.
_CONFIG_FILE = "tokenizer_config.json"

# SentencePiece's sign for a blank.
_LOW_LINE = "\u2581"

# Entries that are encoded and decoded again, to see that ids spell the text.
_PROBES = 200


class JsonTokenizer(Tokenizer):
    """A vocabulary that the `tokenizers` package encodes.

    Special tokens are never encoded, whatever a text says, and spell nothing; other added tokens
    spell themselves. A document is encoded at once: how such a tokenizer splits words may depend on
    all of it. A dropout in the file is left out: equal texts have equal ids.
    """

    def __init__(self, backend: Any, *, name: str, end_of_text: str | None = None):
        """Takes a tokenizer over.

        Args:
            backend: a `tokenizers.Tokenizer`; it is changed.
            name: for people.
            end_of_text: the token that ends a text; None is token 0, where that is special.

        Raises:
            ValueError: its decoder is of another kind, its ids do not spell the text, or the token
                that ends a text is unknown.
        """
        # A file may say that long texts are cut, or short ones filled up.
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        # Of training: it draws how a text is split, so that equal texts would get other ids.
        if getattr(backend.model, "dropout", None) is not None:
            backend.model.dropout = None
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        spell = _speller(json.loads(backend.to_str()), name)
        vocabulary = backend.get_vocab(with_added_tokens=True)
        # SentencePiece's kind writes blanks as low lines; they come back as blanks.
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
                    f"`{name}` must have the token {end_of_text!r}, which ends texts by the "
                    f"{_CONFIG_FILE} next to it."
                )
        self._check_spelling()

    def _plain(self, token: str) -> bytes:
        """Returns the bytes of an added token, which is found in a text as it is written."""
        # Its letters may be characters that stand for bytes in other tokens.
        return (
            token.replace(_LOW_LINE, " ") if self._has_low_lines else token
        ).encode()

    @classmethod
    def from_text(
        cls, content: bytes, *, name: str, end_of_text: str | None = None
    ) -> "JsonTokenizer":
        """Reads the content of a `tokenizer.json`.

        Raises:
            ValueError: the file is damaged, or of a kind that is not read.
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
            backend = tokenizers.Tokenizer.from_str(content.decode())
        return cls(backend, name=name, end_of_text=end_of_text)

    @functools.cached_property
    def digest(self) -> str:
        """The digest of what the file says, however it is formatted, and of the end of texts."""
        content = json.loads(self._backend.to_str())
        return text_digest(json.dumps([content, self.end_of_text], sort_keys=True))

    def end_token(self) -> str | None:
        """Returns the token that ends texts; None where there is none."""
        if self.end_of_text is None:
            return None
        return self._backend.id_to_token(self.end_of_text)

    def file_text(self) -> str:
        """Writes the content of a `tokenizer.json`."""
        return self._backend.to_str()

    def encode(self, text: str | bytes) -> list[int]:
        """Encodes a text as the package does, without special tokens.

        Raises:
            TypeError: neither str nor bytes.
            ValueError: bytes that are not UTF-8, or characters that no token spells.
        """
        try:
            decoded = text_bytes(text).decode()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"Tokenizer.encode: `text` must be UTF-8 for {self.name}; it is not at byte "
                f"{error.start}."
            ) from None
        # A regular expression of the file may take too many steps for some texts.
        with _package_errors(f"Tokenizer.encode: `text` is none for {self.name}"):
            ids = self._backend.encode(decoded, add_special_tokens=False).ids
            normalizer = self._backend.normalizer
            if normalizer is not None:
                decoded = normalizer.normalize_str(decoded)
        self._check_spelled(ids, decoded)
        return ids

    def _check_spelled(self, ids: list[int], text: str) -> None:
        """Raises if a token stands for something unknown, or a character was left out.

        Args:
            ids: of the text.
            text: as it is after the file's normalizer.
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
            f"Tokenizer.encode: `text` must be spelled by tokens of {self.name}; it is not at byte "
            f"{position}, {expected[position : position + 16]!r}."
        )

    def encode_chunks(self, chunks: Iterable[bytes]) -> Iterator[np.ndarray]:
        """Encodes all chunks joined; all of them are in memory."""
        ids = self.encode(b"".join(chunks))
        if ids:
            yield np.asarray(ids, self.dtype)

    def _check_spelling(self) -> None:
        """Raises unless entries come back from their ids: each must stand for its bytes alone."""
        texts = [entry for entry in self._ids if is_text(entry)]
        for entry in texts[:: max(1, len(texts) // _PROBES)]:
            text = entry.decode()
            with _package_errors(f"`{self.name}` must encode its own tokens"):
                ids = self._backend.encode(text, add_special_tokens=False).ids
            spelled = self.decode_bytes(ids)
            if spelled != entry:
                raise ValueError(
                    f"`{self.name}` must have tokens that spell the text; {text!r} comes "
                    f"back as {spelled.decode(errors='replace')!r}."
                )


@contextlib.contextmanager
def _package_errors(sentence: str) -> Iterator[None]:
    """Makes one sentence of what the package raises: bare `Exception`, or a panic, which is none.

    Args:
        sentence: what it is about; the package's reason follows.

    Raises:
        ValueError: the block raises such an error.
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
    """Reads which token ends a text from the `tokenizer_config.json` next to a `tokenizer.json`.

    Returns:
        None where there is no such file, or it names none.

    Raises:
        ValueError: the file holds no JSON object.
    """
    config = path.with_name(_CONFIG_FILE)
    if not config.is_file():
        return None
    try:
        token = parse_json(config.read_bytes()).get("eos_token")
    except (ValueError, AttributeError):
        raise ValueError(f"`{config}` must hold a JSON object.") from None
    # Older files describe the token by an object.
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _speller(content: dict[str, Any], name: str) -> Any:
    """Returns the function from a token to its bytes, by the decoder of a `tokenizer.json`.

    Raises:
        ValueError: a decoder of another kind.
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
    """Returns the bytes of a token whose characters stand for bytes; of any other, its UTF-8."""
    if any(character not in table for character in token):
        return token.encode()
    return bytes([table[character] for character in token])


def _with_byte_fallback(token: str) -> bytes:
    """Returns the bytes of a token as SentencePiece has it: a low line for a blank, `<0x0A>`."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:
            pass
    return token.replace(_LOW_LINE, " ").encode()
