"""Counts of targets in the loss equal those of a loop over all rows."""

import numpy as np
import pytest

from rwkv7_jax.data.batching import windows
from rwkv7_jax.data.target_counts import count_targets, shortest_useful_length
from rwkv7_jax.data.token_streams import TokenArray, TokenStream


def random_stream(seed, documents=30):
    """Join three arrays of documents of 1 to 19 ids; two have masks, all lack some documents."""
    random = np.random.default_rng(seed)
    streams = []
    for masked in (True, False, True):
        sizes = random.integers(1, 20, documents)
        starts = np.concatenate([[0], np.cumsum(sizes)])
        mask = (random.random(starts[-1]) < 0.1).astype(np.uint8) if masked else None
        tokens = TokenArray(random.integers(1, 9, starts[-1]), mask, starts)
        streams.append(TokenStream.of_documents(tokens, random.random(documents) < 0.7))
    return TokenStream.concatenate(streams)


@pytest.mark.parametrize("chunk", [1, 7, 1 << 22])
@pytest.mark.parametrize("length", [1, 5, 40])
@pytest.mark.parametrize("seed", range(3))
def test_document_counts_match_their_rows(seed, length, chunk, monkeypatch):
    monkeypatch.setattr("rwkv7_jax.data.target_counts._CHUNK", chunk)
    stream = random_stream(seed)
    rows = windows(stream, length, 1000, packing="documents")
    counts = count_targets(stream, length=length, packing="documents")
    assert counts.in_loss == rows.mask.sum()
    assert counts.rows == len(rows.mask)
    assert counts.empty_rows == (rows.mask.sum(1) == 0).sum()
    sizes = np.diff(stream.starts)[stream.documents]
    assert counts.targets == np.minimum(sizes - 1, length).sum()


def test_stream_packing_counts_every_id():
    stream = random_stream(0)
    counts = count_targets(stream, length=5, packing="stream")
    assert (counts.targets, counts.in_loss) == (len(stream), stream.count_in_loss())


def test_the_shortest_useful_length_is_the_first_with_targets_in_the_loss():
    mask = np.array([0, 0, 0, 1, 1, 1, 0, 0, 1], np.uint8)
    stream = TokenStream.of_array(
        TokenArray(np.ones(9, int), mask, np.array([0, 5, 9]))
    )
    assert shortest_useful_length(stream) == 3
    for length, expected in ((2, 0), (3, 2)):
        assert (
            count_targets(stream, length=length, packing="documents").in_loss
            == expected
        )
