"""Conditions under which advice on a state appears."""

import dataclasses
import re

import numpy as np
import pytest
from tiny_models import CONFIG

from rwkv7_jax.evaluation import advice

HEADS = (CONFIG.num_layers, CONFIG.num_heads)
# A diagnosis with nothing wrong, and what each advice takes.
WELL = advice.MemoryStatistics(
    dynamics="recurrent",
    spectrum=np.ones((*HEADS, 32)),
    norms=np.ones(HEADS),
    reference_norm=np.ones(HEADS),
    rank=np.ones(HEADS),
    read_rank=np.full(HEADS, 16.0),
    reads=np.ones((3, 20)),
    channels=32,
)
KEPT = advice.RetentionScore("own", 2.0, 1.0, 0.5, 0.6, 0.1, 100)
GOOD = advice.Diagnosis(
    memories={"wkv": WELL},
    base_nats=np.full(20, 2.0),
    tuned_nats=np.ones(20),
    counts=np.full(20, 5.0),
    own=KEPT,
    generic=dataclasses.replace(KEPT, tuned_nats=2.05),
)
FADING = dataclasses.replace(
    WELL, reads=np.where(np.arange(20) < 9, 1.0, 0.09) * np.ones((3, 1))
)
LATE = dataclasses.replace(
    WELL, reads=np.where(np.arange(20) < 10, 1.0, 0.09) * np.ones((3, 1))
)
# The same in rows of half the length with padding after them.
PADDED = dataclasses.replace(
    WELL, reads=np.pad(FADING.reads[:, 4:14], ((0, 0), (0, 10)), constant_values=np.nan)
)
NARROW = dataclasses.replace(WELL, read_rank=np.full(HEADS, 7.9))
LASTING = dataclasses.replace(WELL, dynamics="static", reference_norm=None)


def changed(**parts):
    return dataclasses.replace(GOOD, **parts)


def one_head(value):
    norms = np.ones(HEADS)
    norms[2, 1] = value
    return {"wkv": dataclasses.replace(WELL, norms=norms)}


@pytest.mark.parametrize(
    ("diagnosis", "words"),
    [
        (GOOD, []),
        (changed(generic=None), []),
        (
            changed(memories=one_head(5.1)),
            ["1 of 6 heads .* layer 2 head 1, 5 times.* alpha"],
        ),
        (changed(memories=one_head(4.9)), []),
        (
            changed(generic=dataclasses.replace(KEPT, tuned_nats=2.11)),
            ["risen: 2.000.* anchor"],
        ),
        (changed(generic=dataclasses.replace(KEPT, tuned_nats=2.09)), []),
        (
            changed(
                generic=dataclasses.replace(KEPT, base_nats=0.001, tuned_nats=0.005)
            ),
            [],
        ),
        (
            changed(memories={"wkv": FADING}),
            ["at position 9 of 20 .* static upscaled memory"],
        ),
        (changed(memories={"wkv": LATE}), []),
        (changed(memories={"wkv": PADDED}), []),
        (changed(memories={"wkv": FADING, "memory": LASTING}), []),
        (
            changed(
                memories={"wkv": dataclasses.replace(FADING, norms=np.zeros(HEADS))}
            ),
            [],
        ),
        (changed(memories={"wkv": NARROW}), ["WKV state .* 7.9 of 32 .* decorrelated"]),
        (
            changed(
                memories={
                    "wkv": WELL,
                    "memory": dataclasses.replace(NARROW, reference_norm=None),
                }
            ),
            ["The upscaled memory is read through few directions"],
        ),
        (
            changed(own=dataclasses.replace(KEPT, tuned_nats=2.0)),
            ["does not help here: 2.000"],
        ),
    ],
)
def test_advice_appears_when_and_only_when_its_condition_holds(diagnosis, words):
    said = advice.advise(diagnosis)
    assert len(said) == len(words), said
    for line, word in zip(said, words, strict=True):
        assert re.search(word, line), line
