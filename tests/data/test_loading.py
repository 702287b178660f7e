"""Batches depend only on seed and step; an epoch reads each token once; splits are disjoint."""

import itertools

import binidx_files
import jax.numpy as jnp
import numpy as np
import pytest

from rwkv7_jax.data.documents import Document, Segment, held_out_threshold
from rwkv7_jax.data.loading import batch_at, packed, token_stream, windows
from rwkv7_jax.text.tokenizer import Tokenizer

BYTES = Tokenizer.bytes()
STREAM = (np.arange(1000) % 257).astype(np.uint16)
SIZES = {"batch_size": 3, "length": 16}


def rows(steps, **changes):
    return [batch_at(STREAM, step, **SIZES | changes).tokens for step in steps]


def test_a_batch_depends_only_on_seed_and_step():
    walked = list(
        itertools.islice(packed(STREAM, tokenizer=BYTES, seed=5, **SIZES), 60)
    )
    jumped = next(packed(STREAM, tokenizer=BYTES, seed=5, start_step=57, **SIZES))
    np.testing.assert_array_equal(walked[57].tokens, jumped.tokens)
    on_device = packed(jnp.asarray(STREAM), tokenizer=BYTES, seed=5, **SIZES)
    np.testing.assert_array_equal(walked[0].tokens, next(on_device).tokens)
    np.testing.assert_array_equal(walked[57].tokens, rows([57], seed=5)[0])
    assert (rows([0], seed=5)[0] != rows([0], seed=6)[0]).any()


def test_a_row_has_consecutive_inputs_and_targets():
    for batch in rows(range(40)):
        assert batch.shape == (3, 17) and batch.dtype == np.int32
        assert ((batch[:, 1:] - batch[:, :-1]) % 257 == 1).all()


def test_an_epoch_reads_every_window_once_in_a_new_order():
    windows_ = (len(STREAM) - 16) // 16
    stream = np.arange(1000)
    read = [
        int(row[0])
        for step in range(2 * windows_)
        for row in batch_at(stream, step, batch_size=1, length=16).tokens
    ]
    first = read[:windows_]
    second = read[windows_:]
    for epoch in (first, second):
        assert sorted(epoch) == list(range(min(epoch), min(epoch) + 16 * windows_, 16))
    assert first != second


def test_a_stream_shorter_than_two_windows_is_rejected():
    with pytest.raises(ValueError, match="at least 32 tokens; got 31"):
        batch_at(STREAM[:31], 0, **SIZES)


def test_evaluation_windows_cover_the_whole_stream():
    batch = windows(np.arange(1000), 100, 4)
    assert batch.tokens[:, 0].tolist() == [0, 299, 599, 899]
    assert batch.tokens.shape == (4, 101) and batch.mask.shape == (4, 100)
    assert len(windows(np.arange(1000), 100, 99).tokens) == 9
    with pytest.raises(ValueError, match="more than 100 tokens; got 100"):
        windows(np.arange(100), 100, 4)


@pytest.fixture
def folder(tmp_path):
    for i in range(200):
        (tmp_path / f"{i:03}.txt").write_text(f"document {i}")
    return tmp_path


def text_of(stream) -> list[bytes]:
    return BYTES.decode_bytes([i or 11 for i in stream.tolist()]).split(b"\n")[:-1]


def test_documents_are_split_by_content_and_end_with_token_0(folder):
    whole, train, held = (
        token_stream(folder, BYTES, split=split, held_out=0.2)[:]
        for split in ("all", "train", "held_out")
    )
    assert whole[-1] == 0 and (whole == 0).sum() == 200
    assert sorted(text_of(train) + text_of(held)) == sorted(text_of(whole))
    assert 20 < len(text_of(held)) < 60
    # A renamed or a further document moves no other.
    (folder / "000.txt").rename(folder / "zzz.txt")
    (folder / "new.txt").write_text("new")
    again = text_of(token_stream(folder, BYTES, split="held_out", held_out=0.2)[:])
    assert set(text_of(held)) <= set(again) | {b"new"}
    content_hash = Document((Segment(b"new"),)).content_hash()
    assert held_out_threshold(0.0) <= content_hash < held_out_threshold(1.0)


def test_arrays_and_token_files_are_split_by_position(tmp_path):
    path = binidx_files.write(tmp_path, [STREAM])
    for source in (STREAM, jnp.asarray(STREAM), path):
        parts = [
            token_stream(source, BYTES, split=s, held_out=0.1)
            for s in ("train", "held_out")
        ]
        assert [len(p) for p in parts] == [900, 100]
        np.testing.assert_array_equal(np.concatenate(parts), STREAM)


def test_several_sources_are_concatenated(folder, tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "last"}\n')
    stream = token_stream([folder / "001.txt", tmp_path / "x.jsonl"], BYTES)
    assert text_of(stream[:]) == [b"document 1", b"last"]


def test_an_empty_source_is_not_blamed_on_the_held_out_share(tmp_path):
    (tmp_path / "picture.png").write_bytes(b"1")
    with pytest.warns(UserWarning, match="1 files below .* were ignored"):
        with pytest.raises(ValueError, match="holds no document"):
            token_stream(tmp_path, BYTES, split="train")


def test_unknown_and_empty_splits_are_rejected(folder):
    with pytest.raises(ValueError, match="`split` must be one of"):
        token_stream(folder, BYTES, split="test")
    with pytest.raises(ValueError, match="has no document in its split 'held_out'"):
        token_stream(folder, BYTES, split="held_out", held_out=0.0)
