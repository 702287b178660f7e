"""Each public function of the data room names an argument that it cannot use."""

import re
from pathlib import Path

import numpy as np
import pytest

from rwkv7_jax import data
from rwkv7_jax.text.tokenizer import Tokenizer
from rwkv7_jax.text.vocabularies import load_vocabulary

BYTES = Tokenizer.bytes()
IDS = np.arange(50)


def task(**changes):
    choices = {"name": "copy", "step": 0, "batch_size": 1, "length": 40, **changes}
    return data.task_batch(**choices)


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda: task(step=-1), ValueError, "task_batch: `step` must be at least 0"),
        (lambda: task(batch_size=0), ValueError, "task_batch: `batch_size` must be"),
        (lambda: task(length="40"), TypeError, "task_batch: `length` must be an int"),
        (lambda: task(seed=-1), ValueError, "task_batch: `seed` must be at least 0"),
        (lambda: task(name=5), TypeError, "task_batch: `name` must be a str; got int"),
        (
            lambda: data.question_batch("copy", 0, batch_size=-1),
            ValueError,
            "question_batch: `batch_size` must be at least 1",
        ),
        (
            lambda: data.question_batch("copy", 0, batch_size=1, length=-5),
            ValueError,
            "question_batch: `length` must be at least 1",
        ),
        (
            lambda: list(data.read_documents(["a"])),
            TypeError,
            "documents: `source` must be a path; got list",
        ),
        (
            lambda: list(data.read_jsonl(5, dict)),
            TypeError,
            "read_jsonl: `path` must be a path; got int",
        ),
        (lambda: data.read_log(5), TypeError, "read_log: `path` must be a path"),
        (lambda: data.read_card(5), TypeError, "read_card: `path` must be a path"),
        (
            lambda: data.host_rows(6, 0, 2.0),
            TypeError,
            "host_rows: `hosts` must be an integer; got float",
        ),
        (
            lambda: data.left_out(IDS, -3),
            ValueError,
            "left_out: `length` must be at least 1; got -3",
        ),
        (lambda: data.parse_source(Path("x")), TypeError, "`path` must be a str; got"),
        (lambda: data.parse_sources(None), TypeError, "`path` must be a str; got"),
        (
            lambda: data.write_cache([], "x.bin", BYTES),
            ValueError,
            "write_cache: `sources` must name something to read",
        ),
        (
            lambda: data.write_cache(["stdlib"], "corpus.v1", BYTES),
            ValueError,
            "write_cache: `path` must end in .bin; got 'corpus.v1'",
        ),
        (
            lambda: data.write_cache(["stdlib"], "x.bin", None),
            TypeError,
            "write_cache: `tokenizer` must be a Tokenizer; got NoneType",
        ),
        (
            lambda: data.as_stream(IDS)[2],
            TypeError,
            "an index must be a slice; got int",
        ),
        (
            lambda: data.Batch(tokens=IDS[None]).with_sequences(0),
            ValueError,
            "Batch.with_sequences: `count` must be at least 1; got 0",
        ),
        (
            lambda: load_vocabulary(5),
            TypeError,
            "load_vocabulary: `name` must be a name or a path; got int",
        ),
        (
            lambda: load_vocabulary("ids", -5),
            ValueError,
            "load_vocabulary: `vocab_size` must be at least 1; got -5",
        ),
    ],
)
def test_a_bad_argument_is_named(unchecked, call, error, sentence):
    with pytest.raises(error, match=re.escape(sentence)):
        call()
