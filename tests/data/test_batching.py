"""Rows with masks, one document per row, and global batches of several hosts."""

import concurrent.futures

import numpy as np
import pytest

from rwkv7_jax.data.loading import (
    batch_at,
    host_rows,
    left_out,
    packed,
    token_stream,
    windows,
)
from rwkv7_jax.text.tokenizer import Tokenizer

BYTES = Tokenizer.bytes()
LINES = (
    '{"prompt": "ab", "answer": "cd"}\n{"text": "efghijkl"}\n{"text": ""}\n'
    '{"prompt": "m", "answer": "n"}\n{"messages": [{"role": "assistant", "content": "o"}]}\n'
)


@pytest.fixture
def stream(tmp_path):
    (tmp_path / "x.jsonl").write_text(LINES)
    return token_stream(tmp_path / "x.jsonl", BYTES)


def spelled(row):
    return "".join(chr(i - 1) if i else "." for i in row)


def read(batch):
    """Return each row's text and the targets in the loss."""
    rows = zip(batch.tokens, batch.mask, strict=True)
    return [
        (
            spelled(tokens),
            spelled(np.where(mask == 1, tokens[1:], 33 + 1)).replace("!", "-"),
        )
        for tokens, mask in rows
    ]


def test_masks_stay_aligned_with_tokens_in_every_window(stream):
    text = spelled(stream[:])
    counted = "--cd.efghijkl..-n.---------- o."
    assert text == "abcd.efghijkl..mn.Assistant: o."
    for step in range(20):
        for row, mask in read(batch_at(stream, step, batch_size=2, length=6)):
            place = text.index(row)
            assert mask == counted[place + 1 : place + 7]


def test_documents_packing_truncates_or_pads_one_document_per_row(stream):
    expected = {
        ("abcd...", "-cd.--"),
        ("efghijk", "fghijk"),
        ("mn.....", "n.----"),
        ("Assista", "------"),
    }
    epochs = [
        read(batch_at(stream, step, batch_size=4, length=6, packing="documents"))
        for step in range(5)
    ]
    assert all(set(epoch) == expected and len(epoch) == 4 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert set(read(windows(stream, 6, 9, packing="documents"))) == expected
    first_and_last = read(windows(stream, 6, 2, packing="documents"))
    assert first_and_last == [("abcd...", "-cd.--"), ("Assista", "------")]
    assert left_out(stream, 6) == (2, 2 + 6)


def test_documents_packing_warns_of_dropped_tokens(stream):
    sizes = {"batch_size": 2, "length": 6, "tokenizer": BYTES, "packing": "documents"}
    with pytest.warns(
        UserWarning, match="2 documents are longer than 7 tokens: 8 of 31 tokens"
    ):
        next(packed(stream, **sizes))
    next(packed(stream, **sizes | {"length": 30}))


@pytest.mark.parametrize(
    "choices",
    [{}, {"order": "cubic"}, {"packing": "documents"}],
    ids=["stream", "cubic", "docs"],
)
def test_hosts_together_make_the_global_batch(stream, choices):
    choices = {"batch_size": 6, "length": 7, "seed": 3, **choices}
    for step in (0, 7, 1000):
        whole = batch_at(stream, step, **choices)
        for hosts in (1, 2, 3, 6):
            parts = [
                batch_at(stream, step, rows=host_rows(6, host, hosts), **choices)
                for host in range(hosts)
            ]
            for name, array in whole.items():
                np.testing.assert_array_equal(
                    np.concatenate([p[name] for p in parts]), array
                )


@pytest.mark.parametrize("choices", [{}, {"order": "cubic"}, {"packing": "documents"}])
def test_several_prefetch_threads_keep_the_batch_order(stream, choices):
    def batch(step):
        return batch_at(stream, step, batch_size=4, length=6, seed=1, **choices)

    in_order = [batch(step) for step in range(50)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        ahead = list(pool.map(batch, reversed(range(50))))[::-1]
    for one, two in zip(in_order, ahead, strict=True):
        np.testing.assert_array_equal(one.tokens, two.tokens)
        np.testing.assert_array_equal(one.mask, two.mask)


def test_invalid_choices_and_sizes_are_rejected(stream):
    for choices, reason in (
        ({"order": "sorted"}, "`order` must be one of shuffled, cubic; got 'sorted'"),
        (
            {"packing": "none"},
            "`packing` must be one of stream, documents, packed; got 'none'",
        ),
        (
            {"order": "cubic", "packing": "documents"},
            '`order` must be "shuffled" where',
        ),
        (
            {"order": "cubic", "length": 11},
            "at least 33 tokens; got 31, too few for `length` 11",
        ),
    ):
        with pytest.raises(ValueError, match=reason):
            batch_at(stream, 0, **{"batch_size": 1, "length": 6} | choices)
    with pytest.raises(ValueError, match="a document of at least 2 tokens; got none"):
        batch_at(np.zeros(9, np.uint16), 0, batch_size=1, length=2, packing="documents")
    for host, hosts in ((0, 4), (2, 2)):
        with pytest.raises(ValueError, match="`hosts` must divide the batch of 6 rows"):
            host_rows(6, host, hosts)
    for host, hosts in ((-1, 2), (0, 0)):
        with pytest.raises(ValueError, match=r"^host_rows: `hosts?` must be at least"):
            host_rows(6, host, hosts)
