"""Streams: one sequence of ids in any storage, and a hash that detects every change."""

import numpy as np
import pytest

from rwkv7_jax.data import token_streams
from rwkv7_jax.data.batching import batch_at, left_out, windows
from rwkv7_jax.data.token_streams import TokenArray, TokenStream, as_stream, data_hash

IDS = np.arange(1, 41, dtype=np.uint16)
STARTS = np.array([0, 4, 4, 5, 17, 40])


def joined_stream(in_loss=None):
    """Join the middle of another array and documents 0, 2 and 4 of five, one of them empty."""
    tokens = TokenArray(IDS, in_loss, STARTS)
    chosen = TokenStream.of_documents(
        tokens, np.array([True, False, True, False, True])
    )
    return TokenStream.concatenate(
        [TokenStream.of_range(TokenArray(IDS + 100), 3, 9), chosen]
    )


EXPECTED = [*range(104, 110), 1, 2, 3, 4, 5, *range(18, 41)]


def test_a_stream_reads_like_one_array():
    stream = joined_stream()
    assert (
        stream[:].tolist() == np.asarray(stream).tolist() == EXPECTED
        and len(stream) == 34
    )
    for first in range(len(EXPECTED) + 1):
        for end in range(len(EXPECTED) + 2):
            assert stream[first:end].tolist() == EXPECTED[first:end]
    assert stream[-5:].tolist() == EXPECTED[-5:]
    with pytest.raises(ValueError, match="a slice must have no step; got 2"):
        stream[::2]


def test_documents_start_at_their_old_starts_and_at_span_cuts():
    assert joined_stream().starts.tolist() == [0, 6, 10, 11, 34]
    assert joined_stream().documents.tolist() == [0, 1, 3]
    cut = TokenStream.of_range(TokenArray(IDS, starts=STARTS), 2, 20)
    assert cut.starts.tolist() == [0, 2, 3, 15, 18]
    nothing = TokenStream.of_range(TokenArray(IDS, starts=STARTS), 2, 2)
    assert TokenStream.concatenate([nothing, cut]).starts.tolist() == [0, 2, 3, 15, 18]


def test_document_starts_are_inferred_from_token_0(monkeypatch):
    monkeypatch.setattr(token_streams, "_CHUNK", 3)
    ids = np.array([5, 0, 0, 7, 8, 9, 0, 3])
    assert as_stream(ids).starts.tolist() == [0, 2, 3, 7, 8]
    assert as_stream(ids[:-1]).starts.tolist() == [0, 2, 3, 7]


def test_only_flat_integers_are_ids():
    assert as_stream([5, 0]).starts.tolist() == [0, 2]
    for ids, error, reason in (
        (np.array([0.5, 1.5]), TypeError, "`stream` must hold integers; got float64"),
        (
            np.zeros((2, 3), int),
            ValueError,
            r"`stream` must be flat; got shape \(2, 3\)",
        ),
        ("abc", TypeError, "`stream` must be an array; got str"),
    ):
        for function, choices in (
            (batch_at, {"step": 0, "batch_size": 1, "length": 1}),
            (windows, {"length": 1, "count": 1}),
            (left_out, {"length": 1}),
            (data_hash, {}),
        ):
            with pytest.raises(error, match=f"^{function.__name__}: {reason}"):
                function(ids, **choices)


def test_fill_writes_the_mask_of_the_tokens():
    in_loss = (IDS % 3 > 0).astype(np.uint8)
    stream = joined_stream(in_loss)
    wanted = [1] * 6 + [i % 3 > 0 for i in EXPECTED[6:]]
    for first in range(34):
        for size in range(1, 34 - first):
            tokens = np.zeros(size, np.int32)
            mask = np.full(size - 1, 7.0)
            stream.fill(first, tokens, mask)
            assert tokens.tolist() == EXPECTED[first : first + size]
            assert mask.tolist() == wanted[first + 1 : first + size]
    assert (
        stream.count_in_loss() == sum(wanted) and joined_stream().count_in_loss() == 34
    )


def test_the_hash_does_not_depend_on_the_storage():
    one = TokenStream.of_array(
        TokenArray(np.array(EXPECTED, np.int64), starts=joined_stream().starts)
    )
    assert data_hash(one) == data_hash(joined_stream())
    ones = TokenStream.of_array(TokenArray(one[:], np.ones(34, bool), one.starts))
    assert data_hash(one) == data_hash(ones)


def test_the_hash_is_that_of_earlier_runs():
    in_loss = (IDS % 3 > 0).astype(np.uint8)
    assert data_hash(joined_stream(in_loss)) == "90368b6cc22c125010d344b9df1de346"


@pytest.mark.parametrize("chunk", [7, 1 << 20])
def test_the_hash_covers_every_id_mask_and_document_start(monkeypatch, chunk):
    monkeypatch.setattr(token_streams, "_CHUNK", chunk)
    ids = np.arange(30)
    in_loss = np.ones(30, np.uint8)
    starts = np.array([0, 9, 30])
    seen = [data_hash(TokenStream.of_array(TokenArray(ids, in_loss, starts)))]
    for place in range(30):
        other = ids.copy()
        mask = in_loss.copy()
        border = starts.copy()
        other[place] += 1
        mask[place] = 0
        border[1] = place
        for tokens in (
            (other, in_loss, starts),
            (ids, mask, starts),
            (ids, in_loss, border),
        ):
            seen.append(data_hash(TokenStream.of_array(TokenArray(*tokens))))
    seen.append(data_hash(TokenStream.of_array(TokenArray(ids[:-1], in_loss, starts))))
    # One of the changed borders is the old one.
    assert len(set(seen)) == len(seen) - 1


def test_large_data_is_hashed_by_size_and_sampled_blocks(monkeypatch):
    for name, value in (("_CHUNK", 8), ("HASHED_IN_FULL", 99), ("_HASHED_BLOCKS", 3)):
        monkeypatch.setattr(token_streams, name, value)
    ids = np.arange(1, 101)
    own = data_hash(ids)
    changed = set()
    for place in range(100):
        other = ids.copy()
        other[place] += 500
        if data_hash(other) != own:
            changed.add(place)
    assert changed == {*range(8), *range(46, 54), *range(92, 100)}
    assert data_hash(np.append(ids, 7)) != own
