"""The Rust package for World gives the ids of `Tokenizer` wherever it is used."""

import functools
import sys
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from run_programs import ROOT

from rwkv7_jax.text import tokenizer as module
from rwkv7_jax.text.rust_tokenizer import rust_encoder
from rwkv7_jax.text.tokenizer import Tokenizer

WORLD = Tokenizer.world()


@functools.cache
def entries() -> dict[bytes, int]:
    """Return World's entries, but not at import, which happens in every process."""
    return {WORLD.token_bytes(number): number for number in range(1, 65530)}


@pytest.fixture(scope="module")
def eager():
    """World with the package for every text; without the package the tests are skipped."""
    pytest.importorskip(
        "pyrwkv_tokenizer", reason="the package pyrwkv-tokenizer is not installed"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_LONG_TEXT", 0)
        patch.setattr(module, "_WORLD_BLOCK", 0)
        assert WORLD._text_encoder is not None
        yield WORLD


def plain_ids(data):
    """Return the ids by longest match, without the package."""
    known = entries()
    found = []
    while data:
        longest = max(size for size in range(1, 129) if data[:size] in known)
        found.append(known[data[:longest]])
        data = data[longest:]
    return found


@settings(max_examples=300)
@given(text=st.text(max_size=200))
def test_any_text_gets_the_same_ids(eager, text):
    assert eager.encode(text) == plain_ids(text.encode())


@settings(max_examples=300)
@given(parts=st.lists(st.one_of(st.binary(max_size=9), st.text().map(str.encode))))
def test_any_bytes_get_the_same_ids(eager, parts):
    data = b"".join(parts)
    assert eager.encode(data) == plain_ids(data)


@settings(max_examples=200)
@given(parts=st.lists(st.one_of(st.binary(max_size=3), st.text().map(str.encode))))
def test_ids_do_not_depend_on_the_chunks(eager, parts):
    # Blanks, so that there are ids to join.
    parts = [*parts, b" " * 200]
    found = np.concatenate(list(eager.encode_chunks(parts)))
    assert found.tolist() == plain_ids(b"".join(parts))


def test_whole_files_get_the_same_ids(eager):
    for path in sorted((ROOT / "docs").glob("*.md")):
        data = path.read_bytes()
        pieces = [data[at : at + 5000] for at in range(0, len(data), 5000)]
        found = np.concatenate(list(eager.encode_chunks(pieces)))
        assert found.tolist() == eager.encode(data) == plain_ids(data), path.name


def test_a_lone_surrogate_is_rejected(eager):
    with pytest.raises(ValueError, match="lone surrogate at character 1"):
        eager.encode("a\ud800")


def test_a_package_with_another_vocabulary_is_not_used(monkeypatch):
    texts = {}
    for entry, number in entries().items():
        try:
            texts[entry.decode()] = number
        except UnicodeDecodeError:
            continue

    class Package:
        def get_vocab(self):
            return texts

        def encode(self, text):
            return [len(text)]

    fake = types.SimpleNamespace(RWKVTokenizer=Package)
    monkeypatch.setitem(sys.modules, "pyrwkv_tokenizer", fake)
    assert rust_encoder(entries())("abc") == [3]
    texts["new"] = texts.pop("ab")
    assert rust_encoder(entries()) is None


def test_without_the_package_there_is_no_encoder(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyrwkv_tokenizer", None)
    assert rust_encoder(entries()) is None
