"""Packed rows: their documents, and how full they are."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from rwkv7_jax.data.batching import batch_at, host_rows, windows
from rwkv7_jax.data.packed_documents import pack_documents
from rwkv7_jax.data.token_streams import TokenArray, TokenStream


def stream_of(sizes):
    """Make a stream whose ids identify their document; every third id is masked."""
    ids = np.concatenate([np.full(size, n + 1) for n, size in enumerate(sizes)])
    starts = np.cumsum([0, *sizes])
    in_loss = np.arange(len(ids)) % 3 != 0
    return TokenStream.of_array(TokenArray(ids, in_loss=in_loss, starts=starts))


@hypothesis.given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=60),
    length=st.integers(1, 30),
)
def test_every_document_is_in_exactly_one_row_within_the_length(sizes, length):
    hypothesis.assume(max(sizes) > 1)
    packed = pack_documents(stream_of(sizes), length)
    cut = np.minimum(sizes, length + 1)
    assert sorted(packed.documents) == [n for n, size in enumerate(sizes) if size > 1]
    for row in range(packed.rows):
        numbers = packed.row(row)
        assert 0 < len(numbers) <= packed.sequences
        assert cut[numbers].sum() <= length + 1


def test_rows_are_almost_full():
    sizes = np.random.default_rng(1).lognormal(4, 1, 3000).astype(int) + 2
    packed = pack_documents(stream_of(sizes.tolist()), 1024)
    kept = np.minimum(sizes, 1025).sum()
    assert kept / packed.rows / 1025 > 0.97
    assert packed.sequences <= 2 * np.ceil(1025 / sizes.mean())


def test_documents_that_fill_a_row_exactly_share_it():
    assert pack_documents(stream_of([5, 6]), 10).rows == 1


def test_a_row_has_at_most_twice_the_mean_number_of_documents():
    # A row holds two documents of the mean size of 21, or twenty of the short ones.
    packed = pack_documents(stream_of([2] * 20 + [40] * 20), 39)
    assert (packed.sequences, packed.rows) == (4, 25)


def test_a_row_concatenates_its_documents():
    sizes = [5, 3, 9, 2, 4, 7, 30]
    stream = stream_of(sizes)
    length = 12
    alone = {}
    for step in range(len(sizes)):
        batch = batch_at(stream, step, batch_size=1, length=length, packing="documents")
        alone[int(batch.tokens[0, 0])] = batch
    seen = []
    for step in range(pack_documents(stream, length).rows):
        batch = batch_at(stream, step, batch_size=1, length=length, packing="packed")
        begins = [int(b) for b in batch.segments[0] if b < length]
        assert begins == sorted(set(begins))
        assert begins[0] == 0
        mask = np.array(batch.mask[0])
        for begin in begins:
            number = int(batch.tokens[0, begin])
            size = min(sizes[number - 1], length + 1)
            seen.append(number)
            document = alone[number]
            np.testing.assert_array_equal(
                batch.tokens[0, begin : begin + size], document.tokens[0, :size]
            )
            inside = slice(begin, begin + size - 1)
            np.testing.assert_array_equal(mask[inside], document.mask[0, : size - 1])
            mask[inside] = 0
        # The first id of the next document is no target, nor is what fills the row.
        assert not mask.any()
        ids = np.asarray(batch.segment_ids[0])
        np.testing.assert_array_equal(np.flatnonzero(np.diff(ids)) + 1, begins[1:])
    assert sorted(seen) == [1, 2, 3, 4, 5, 6, 7]


def test_hosts_together_make_the_global_batch():
    stream = stream_of([5, 3, 9, 2, 4, 7] * 4)
    make = {"batch_size": 4, "length": 12, "packing": "packed", "seed": 3}
    batch = batch_at(stream, 5, **make)
    for host in range(2):
        rows = host_rows(4, host, 2)
        part = batch_at(stream, 5, **make, rows=rows)
        for name in ("tokens", "mask", "segments"):
            np.testing.assert_array_equal(part[name], batch[name][rows])


def test_evaluation_reads_one_document_per_row():
    stream = stream_of([5, 3, 9])
    left = windows(stream, 6, 3, packing="packed")
    right = windows(stream, 6, 3, packing="documents")
    np.testing.assert_array_equal(left.tokens, right.tokens)
    assert left.segments is None


def test_the_cubic_order_is_rejected(unchecked):
    with pytest.raises(
        ValueError, match='`order` must be "shuffled" where `packing` is "packed"'
    ):
        batch_at(
            stream_of([9, 9]),
            0,
            batch_size=1,
            length=3,
            order="cubic",
            packing="packed",
        )
