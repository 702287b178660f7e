"""Damaged files of text and JSON: each is read, or refused by one sentence with its path.

The values in them are of other kinds, of absurd sizes or missing, and digests are left out where a
file need not have one: a digest would find the damage before anything else is looked at.
"""

import json
import random
import warnings

import pytest

from rwkv7_jax.data.token_cache import open_cache, write_cache
from rwkv7_jax.json_files import read_object
from rwkv7_jax.reports.html_report import write_report
from rwkv7_jax.runs.learnt_questions import tuning_records
from rwkv7_jax.runs.rate_record import RECORD, _read_record
from rwkv7_jax.runs.settings import Settings, as_config, read_settings
from rwkv7_jax.test_time.completion_cache import CompletionCache
from rwkv7_jax.test_time.traces import read_traces
from rwkv7_jax.text.tokenizer import Tokenizer
from rwkv7_jax.text.vocabularies import load_vocabulary

pytestmark = pytest.mark.usefixtures("unchecked")

BYTES = Tokenizer.bytes()

# Files that are damaged in each form.
COUNT = 150

VALUES = [
    None,
    True,
    -1,
    0,
    2.5,
    2**31,
    10**30,
    10**400,
    1e300,
    float("nan"),
    "",
    "junk",
    "\ud800",
    [],
    {},
    [1],
    [[]],
    {"a": [1]},
]

TEXTS = [
    b"",
    b"\n",
    b"null",
    b"[]",
    b"\xff\xfe",
    b"[" * 100_000,
    b"9" * 5000,
]

TRACES = [
    {"prompt": [1, 2], "completion": [3], "weight": 0.5, "source": "x"},
    {"prompt": [1], "completion": [4, 5]},
]

COMPLETIONS = [
    {"key": "a", "prompt": [1, 2], "completions": [[3], [4, 5]]},
    {"key": "b", "prompt": [1], "completions": [[9]]},
]

METRICS = [
    {"step": 1, "seconds": 1.5, "loss_nats": 2.0, "step_seconds": 0.5},
    {"step": 2, "seconds": 2.5, "grad_norm": 1.0, "compile_seconds": 2.0},
]

EVENTS = [
    {"step": 0, "event": "start", "detail": "", "time": 1.0},
    {"step": 2, "event": "finished", "detail": "", "time": 3.0},
]

SYSTEM = {
    "platform": "x",
    "memory_bytes": 3,
    "devices": [{"kind": "cpu", "count": 1}],
    "versions": {"python": "3"},
}

RATES = {
    "states": {
        "": {
            "rate": 0.1,
            "edge": "",
            "near": [0.1, 0.2],
            "measure": "m",
            "base": {"m": 1.0},
            "curve": [{"rate": 0.1, "m": 0.5}, {"rate": 0.2, "m": 0.6}],
        }
    },
    "identity": {"settings": {"a": "1"}},
}

VOCABULARY = "1 'a' 1\n2 'ab' 2\n3 b'\\xff' 1\n"


def damaged_value(value, rng):
    """Replaces a value at one place of nested lists and objects, or removes it."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.15:
        return rng.choice(VALUES)
    places = list(value) if isinstance(value, dict) else range(len(value))
    place = rng.choice(places)
    changed = dict(value) if isinstance(value, dict) else list(value)
    if rng.random() < 0.1:
        del changed[place]
    else:
        changed[place] = damaged_value(value[place], rng)
    return changed


def damaged_json(value, rng):
    """Damages a value and writes it."""
    if rng.random() < 0.1:
        return rng.choice(TEXTS)
    return json.dumps(damaged_value(value, rng)).encode()


def damaged_lines(values, rng):
    """Damages one of some values and writes them, each on a line."""
    at = rng.randrange(len(values))
    lines = [json.dumps(value).encode() for value in values]
    lines[at] = damaged_json(values[at], rng)
    return b"\n".join(lines) + b"\n"


def damaged_vocabulary(text, rng):
    """Damages a number or a literal of a vocabulary."""
    numbers = ("-1", "99999999999", "4294967295", "9" * 5000, "")
    words = text.split(" ")
    at = rng.randrange(len(words))
    words[at] = rng.choice((*numbers, "'\\ud800'", "(" * 3000, "f()"))
    return " ".join(words).encode()


def use_vocabulary(path):
    """Reads a vocabulary, and what cards and runs say of it."""
    vocabulary = load_vocabulary(path)
    assert vocabulary.identity
    assert vocabulary.file_text()


def read_cache(path):
    """Reads all of the tokens that lie next to a card."""
    cache = path.with_name("c.bin")
    stream = open_cache(cache, BYTES, split="train", held_out=0.5)
    list(stream.pieces(0, len(stream)))


def read_run(path):
    """Reads the settings of a run as one that goes on does, and as an evaluation does."""
    read_object(path)
    state = str(path.with_name("state.pth"))
    tuning_records(read_settings({"mode": "state", "state": state}))


def read_rates(path):
    """Reads the record of a search."""
    _read_record(path, [""], {"settings": {"a": "1"}})


def report(path):
    """Writes the report of a run."""
    write_report(path.parent)


# What is written undamaged, how it is damaged, and what reads it.
FORMS = {
    "v.txt": (VOCABULARY, damaged_vocabulary, use_vocabulary),
    "t.jsonl": (TRACES, damaged_lines, read_traces),
    "completions.jsonl": (COMPLETIONS, damaged_lines, CompletionCache),
    "metrics.jsonl": (METRICS, damaged_lines, report),
    "events.jsonl": (EVENTS, damaged_lines, report),
    "system.json": (SYSTEM, damaged_json, report),
    RECORD: (RATES, damaged_json, read_rates),
    "settings.json": (as_config(Settings()), damaged_json, read_run),
}


def assert_read_or_refused(path, read):
    """Reads a file that may be damaged."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            read(path)
        except ValueError as error:
            assert str(path.parent) in str(error), path.read_bytes()[:300]
            assert "\n" not in str(error)


@pytest.mark.parametrize("name", FORMS)
def test_a_damaged_text_is_read_or_rejected_by_its_path(tmp_path, name):
    good, damage, read = FORMS[name]
    path = tmp_path / name
    rng = random.Random(name)
    for _ in range(COUNT):
        path.write_bytes(damage(good, rng))
        assert_read_or_refused(path, read)


def test_a_damaged_token_card_is_rejected_by_its_path(tmp_path):
    (tmp_path / "source.txt").write_text("abc")
    write_cache([tmp_path / "source.txt"], tmp_path / "c.bin", BYTES)
    path = tmp_path / "c.card.json"
    good = json.loads(path.read_bytes())
    del good["digest"]
    rng = random.Random(5)
    for _ in range(COUNT):
        path.write_bytes(damaged_json(good, rng))
        assert_read_or_refused(path, read_cache)
