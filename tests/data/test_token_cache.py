"""The cache of a source has the same batches and hash, in files that other tools read."""

import contextlib
import dataclasses
import errno
import json
import os
import subprocess
import sys
import types

import binidx_files
import numpy as np
import pytest
from run_programs import ROOT

from rwkv7_jax.data import binidx, token_cache
from rwkv7_jax.data.binidx import read_binidx
from rwkv7_jax.data.loading import batch_at, data_hash, packed, token_stream, windows
from rwkv7_jax.data.token_cache import CacheMetadata, cache_file, read_card, write_cache
from rwkv7_jax.text.tokenizer import Tokenizer

BYTES = Tokenizer.bytes()
WORLD = Tokenizer.world()
CHOICES = [{}, {"order": "cubic"}, {"packing": "documents"}]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Write texts and answered questions, including edge cases."""
    random = np.random.default_rng(0)
    lines = []
    for i in range(300):
        text = "".join(random.choice(list("abc \n"), random.integers(0, 90)))
        answered = {"prompt": text, "answer": f" {i}"}
        lines.append(json.dumps(answered if i % 3 == 0 else {"text": text}))
    path = tmp_path_factory.mktemp("source") / "x.jsonl"
    path.write_text("\n".join([*lines, "bad", ""]))
    return path


@pytest.fixture(scope="module", params=[BYTES, WORLD], ids=["bytes", "world"])
def pair(request, source, tmp_path_factory):
    """Return a source, its cache and their tokenizer."""
    cache = tmp_path_factory.mktemp("cache") / "x.bin"
    write_cache([source], cache, request.param, on_bad="skip")
    return source, cache, request.param


def streams(pair, **choices):
    *paths, tokenizer = pair
    with pytest.warns(UserWarning, match="1 lines of"):
        source = token_stream(paths[0], tokenizer, on_bad="skip", **choices)
    return source, token_stream(paths[1], tokenizer, **choices)


def assert_equal(one, two):
    for name in ("tokens", "mask"):
        np.testing.assert_array_equal(one[name], two[name])


@pytest.mark.parametrize("split", ["all", "train", "held_out"])
def test_a_cache_gives_the_batches_of_its_source(pair, split):
    one, two = streams(pair, split=split, held_out=0.2)
    assert len(one) == len(two) and one.masked and two.masked
    for choices in CHOICES:
        for step in (0, 1, 30, 1000):
            sizes = {"batch_size": 5, "length": 24, "seed": 2}
            assert_equal(
                batch_at(one, step, **sizes, **choices),
                batch_at(two, step, **sizes, **choices),
            )
    for packing in ("stream", "documents"):
        assert_equal(
            windows(one, 24, 9, packing=packing), windows(two, 24, 9, packing=packing)
        )


@pytest.mark.parametrize("split", ["all", "train"])
def test_a_cache_has_the_hash_of_its_source(pair, split):
    one, two = streams(pair, split=split, held_out=0.2)
    assert data_hash(one) == data_hash(two)


def test_a_share_of_0_or_1_holds_out_nothing_or_everything(pair):
    everything = streams(pair, split="all")
    for split, share in (("train", 0.0), ("held_out", 1.0)):
        for one, whole in zip(
            streams(pair, split=split, held_out=share), everything, strict=True
        ):
            np.testing.assert_array_equal(one[:], whole[:])


def test_packed_accepts_a_cache(pair):
    _, cache, tokenizer = pair
    batch = next(packed(cache, batch_size=2, length=16, seed=0, tokenizer=tokenizer))
    assert batch.tokens.shape == (2, 17)
    assert batch.mask.shape == (2, 16)


def test_the_card_counts_the_contents_of_the_files(pair):
    _, cache, tokenizer = pair
    card = read_card(cache)
    ids, starts = read_binidx(cache)
    assert (card.documents, card.tokens, card.skipped) == (
        300,
        len(ids),
        1,
    ) and card.tokens > 5000
    assert card.vocabulary == tokenizer.name and len(starts) == 301
    assert (
        card.learnt
        == int((cache.with_suffix(".mask").read_bytes()).count(1))
        < card.tokens
    )
    assert card.bytes == len(tokenizer.decode_bytes(ids.tolist()))


def test_a_cache_of_texts_has_no_masks_and_removes_old_ones(tmp_path, pair):
    *_, tokenizer = pair
    (tmp_path / "a.txt").write_bytes(b"abc")
    (tmp_path / "x.mask").write_bytes(b"old")
    card, _ = write_cache([tmp_path / "a.txt"], tmp_path / "x.bin", tokenizer)
    assert card.learnt == card.tokens and not (tmp_path / "x.mask").exists()
    assert not token_stream(tmp_path / "x.bin", tokenizer).masked
    assert sorted(p.suffix for p in tmp_path.glob("x.*")) == [
        ".bin",
        ".idx",
        ".json",
        ".keys",
    ]


def test_sources_and_caches_can_be_mixed(tmp_path, pair, source):
    _, cache, tokenizer = pair
    (tmp_path / "a.txt").write_bytes(b"abc")
    write_cache(
        [source, tmp_path / "a.txt"], tmp_path / "x.bin", tokenizer, on_bad="skip"
    )
    one = token_stream([cache, tmp_path / "a.txt"], tokenizer)
    two = token_stream(tmp_path / "x.bin", tokenizer)
    assert data_hash(one) == data_hash(two)
    np.testing.assert_array_equal(one[:], two[:])


def test_a_failed_write_keeps_the_old_cache(tmp_path, source):
    (tmp_path / "a.txt").write_bytes(b"abc")
    write_cache([tmp_path / "a.txt"], tmp_path / "x.bin", BYTES)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"x\.jsonl:301: not one JSON object"):
        write_cache([source], tmp_path / "x.bin", BYTES)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"empty\.jsonl` has no document"):
        write_cache([tmp_path / "empty.jsonl"], tmp_path / "x.bin", BYTES)
    (tmp_path / "empty.jsonl").unlink()
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_disk_that_fills_up_last_keeps_the_old_cache(tmp_path, monkeypatch):
    """What is buffered is written before the first file is replaced."""
    (tmp_path / "a.txt").write_bytes(b"abc")
    write_cache([tmp_path / "a.txt"], tmp_path / "x.bin", BYTES)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    write = binidx.atomic_write

    def fail():
        raise OSError(errno.ENOSPC, "No space left on device")

    @contextlib.contextmanager
    def write_to_full_disk(path):
        with write(path) as file:
            flush = fail if path.suffix == ".bin" else file.flush
            yield types.SimpleNamespace(write=file.write, flush=flush)

    monkeypatch.setattr(binidx, "atomic_write", write_to_full_disk)
    with pytest.raises(OSError, match=r"No space left on device: .*x\.bin'"):
        write_cache([tmp_path / "a.txt"], tmp_path / "x.bin", BYTES)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_links_to_the_files_of_a_cache_are_kept(tmp_path):
    (tmp_path / "store").mkdir()
    for suffix in token_cache.SUFFIXES:
        (tmp_path / f"x{suffix}").symlink_to(tmp_path / "store" / f"y{suffix}")
    for text in (b"abc", b"de"):
        (tmp_path / "a.txt").write_bytes(text)
        write_cache([tmp_path / "a.txt"], tmp_path / "x.bin", BYTES)
        assert BYTES.decode_bytes(token_stream(tmp_path / "x.bin", BYTES)[:]) == text
    assert (tmp_path / "x.idx").is_symlink()


def test_another_writer_may_remove_the_mask_first(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_bytes(b"abc")
    finish = binidx.BinidxWriter.__exit__

    def finish_as_the_second(self, *error):
        finish(self, *error)
        (tmp_path / "x.mask").unlink()

    monkeypatch.setattr(binidx.BinidxWriter, "__exit__", finish_as_the_second)
    card, _ = write_cache([tmp_path / "a.txt"], tmp_path / "x.bin", BYTES)
    assert card == read_card(tmp_path / "x.bin")


MEMORY = """
import resource, sys
from rwkv7_jax.data.token_cache import write_cache
from rwkv7_jax.text.tokenizer import Tokenizer

for path in sys.argv[1:]:
    write_cache([path], "x.bin", Tokenizer.bytes())
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("suffix", "text"), [("txt", "x" * 999), ("jsonl", '{"text": "a b"}')]
)
def test_memory_does_not_grow_with_the_text_size(tmp_path, suffix, text):
    """Measure in a separate process, without the overhead of the type checks of the tests."""
    paths = [tmp_path / f"{lines}.{suffix}" for lines in (3_000, 60_000)]
    for path in paths:
        with path.open("w") as file:
            file.writelines(f"{text}\n" for _ in range(int(path.stem)))
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, *map(str, paths)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    small, large = map(int, done.stdout.split())
    assert large < small + 2_000, "KiB; the index takes four bytes a document"


def test_a_card_round_trips(tmp_path):
    (tmp_path / "a.txt").write_bytes("é".encode())
    card, stats = write_cache([tmp_path / "a.txt"], tmp_path / "x.bin", BYTES)
    bare = dataclasses.replace(card, blocks={}, digest="")
    assert bare == CacheMetadata(
        "bytes", documents=1, tokens=3, learnt=3, bytes=2, skipped=0
    )
    assert sorted(card.blocks) == [".bin", ".idx", ".keys"]
    assert stats.bytes == 2 and read_card(tmp_path / "x.bin") == card


@pytest.fixture
def cache(tmp_path, source):
    """Write a cache with a mask and blocks of 100 bytes."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (binidx, token_cache):
            patch.setattr(module, "DIGEST_BLOCK", 100)
        write_cache([source], tmp_path / "x.bin", BYTES, on_bad="skip")
        yield tmp_path / "x.bin"


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".keys", ".mask"])
@pytest.mark.parametrize("place", [0, 1, 777, -100, -1])
def test_a_flipped_bit_in_any_cache_file_is_detected(cache, monkeypatch, suffix, place):
    monkeypatch.setattr(token_cache, "_CHECKED_BLOCKS", 10**6)
    file = cache.with_suffix(suffix)
    data = bytearray(file.read_bytes())
    data[place] ^= 4
    file.write_bytes(data)
    with pytest.raises(ValueError, match=rf"x\{suffix}`"):
        token_stream(cache, BYTES)


def test_the_first_and_last_blocks_of_a_large_cache_are_verified(cache, monkeypatch):
    monkeypatch.setattr(token_cache, "_CHECKED_BLOCKS", 3)
    good = cache.read_bytes()
    found = []
    # The first byte of each block; the last one is shorter.
    for place in range(0, len(good), 100):
        data = bytearray(good)
        data[place] ^= 1
        cache.write_bytes(data)
        try:
            token_stream(cache, BYTES)
        except ValueError:
            found.append(place)
    assert len(found) == 3
    assert found[0] == 0
    assert found[-1] == (len(good) - 1) // 100 * 100


@pytest.mark.parametrize(
    ("entry", "value"),
    [("vocabulary", "world"), ("skipped", 0), ("bytes", 1), ("blocks", {})],
)
def test_a_hand_edited_card_is_rejected(cache, entry, value):
    file = cache.with_suffix(".card.json")
    card = json.loads(file.read_text())
    file.write_text(json.dumps(card | {entry: value}))
    with pytest.raises(ValueError, match=r"x\.card\.json` .* was changed after"):
        token_stream(cache, BYTES)


def test_a_cache_of_an_earlier_version_opens_without_digests(cache):
    before = data_hash(token_stream(cache, BYTES))
    file = cache.with_suffix(".card.json")
    card = json.loads(file.read_text())
    del card["blocks"]
    del card["digest"]
    file.write_text(json.dumps(card))
    assert data_hash(token_stream(cache, BYTES)) == before


def test_file_and_cache_hold_out_the_end_of_a_single_document(tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("It was a day like others, and longer. " * 50)
    write_cache([book], tmp_path / "book.bin", BYTES)
    for source in (book, tmp_path / "book.bin"):
        parts = [
            token_stream(source, BYTES, split=split, held_out=0.1)[:]
            for split in ("train", "held_out")
        ]
        whole = token_stream(source, BYTES)[:]
        np.testing.assert_array_equal(np.concatenate(parts), whole)
        assert len(parts[1]) == len(whole) // 10


@pytest.mark.parametrize(
    "name", ["demo_text_document", "v1.5_text_document", "stdlib2"]
)
def test_a_cache_can_be_named_without_its_suffix(tmp_path, monkeypatch, name):
    path = tmp_path / f"{name}.bin"
    (tmp_path / "a.txt").write_bytes(b"abc" * 20)
    write_cache([tmp_path / "a.txt"], path, BYTES)
    monkeypatch.chdir(tmp_path)
    for split in ("all", "train", "held_out"):
        whole = token_stream(path, BYTES, split=split, held_out=0.3)
        for source in (tmp_path / name, str(tmp_path / name), name):
            stream = token_stream(source, BYTES, split=split, held_out=0.3)
            assert data_hash(stream) == data_hash(whole)


@pytest.mark.parametrize("missing", [".bin", ".idx"])
def test_a_missing_cache_file_is_named_without_the_suffix_too(tmp_path, missing):
    binidx_files.write(tmp_path, [[1, 0]])
    (tmp_path / f"x{missing}").unlink()
    with pytest.raises(ValueError, match=rf"x\{missing}` does not exist"):
        token_stream(tmp_path / "x", BYTES)


def test_an_existing_file_or_corpus_takes_precedence_over_a_cache(
    tmp_path, monkeypatch
):
    for name in ("x", "stdlib"):
        binidx_files.write(tmp_path, [[1, 0]])
        for suffix in (".bin", ".idx"):
            (tmp_path / f"x{suffix}").rename(tmp_path / f"{name}{suffix}")
    (tmp_path / "x").write_bytes(b"ab")
    assert token_stream(tmp_path / "x", BYTES)[:].tolist() == [98, 99, 0]
    monkeypatch.chdir(tmp_path)
    assert cache_file("stdlib") is None
    assert cache_file("x.idx").name == "x.idx"


def test_a_single_path_is_not_a_list_of_sources(tmp_path):
    with pytest.raises(TypeError, match="`sources` must be a list of paths; got str"):
        write_cache("stdlib", tmp_path / "x.bin", BYTES)
