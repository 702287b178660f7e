"""Features of a call drawn together: each sequence gives what it gives in a plain row of its own.

The draws join what other tests look at alone: forms and features of an upscaled memory, packed
rows, padding, several states under `vmap`, implementations and rematerialisation.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import TINIEST, lively, random_state
from tolerances import SAME, assert_trees_close
from upscaled_states import empty_state, filled, noise

from rwkv7_jax.model.kernel_features import KINDS
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import RWKV7State, repeat
from rwkv7_jax.model.upscaled_memory import DYNAMICS

ROWS, T = 3, 21
PLAIN = dataclasses.replace(TINIEST, remat="block")


class Draw(NamedTuple):
    """One combination.

    Attributes:
        config: of the call.
        start: one state, from which every sequence starts.
        tokens: [B T].
        lengths: [B].
        segment_ids: [B T]; zeros where a row is one sequence.
        sequences: of a row (K).
    """

    config: object
    start: RWKV7State
    tokens: np.ndarray
    lengths: np.ndarray
    segment_ids: np.ndarray
    sequences: int


def draw(seed):
    choose = np.random.default_rng(seed)
    # In the paper's form values may grow, and rounding with them.
    kinds = [None, *DYNAMICS[: DYNAMICS.index("replace") + 1]]
    dynamics = kinds[seed % len(kinds)]
    config = dataclasses.replace(
        PLAIN,
        # Most of what the features share shows in one layer, which compiles faster.
        num_layers=1 if seed < 2 else 2,
        implementation=choose.choice(["scan", "chunked"]),
        remat=choose.choice(["none", "op"]),
    )
    start = random_state(config, seed=seed)
    if dynamics is not None:
        upscaled = filled(empty_state(config, dynamics), seed, write=0.3).upscaled
        features = upscaled.features.replace(kind=choose.choice(KINDS))
        if choose.random() < 0.5:
            features = features.replace(map=None)
        start = start.replace(upscaled=upscaled.replace(features=features))
    may_pack = dynamics in (None, "static")
    sequences = int(choose.integers(2, 4)) if may_pack else 1
    ids = np.sort(choose.integers(0, sequences, (ROWS, T)), axis=1)
    return Draw(
        config=config,
        start=start,
        tokens=choose.integers(0, config.vocab_size, (ROWS, T)),
        # One row is full and one has no token that counts.
        lengths=choose.permutation([T, 0, int(choose.integers(1, T))]),
        segment_ids=ids,
        sequences=sequences,
    )


def value(call, start, weights):
    """A number in which every logit that counts and every end state has a weight of its own."""
    logits, end = call(start)
    total = jnp.sum(logits * weights)
    for index, leaf in enumerate(jax.tree.leaves(end)):
        total += jnp.sum(leaf * noise(leaf.shape, seed=index))
    return total, (logits, end)


def gradient(call, start, weights):
    function = functools.partial(value, call, weights=weights)
    (_, results), slope = jax.jit(jax.value_and_grad(function, has_aux=True))(start)
    return results, slope


@pytest.mark.parametrize(
    "seed", [0, 1, 2, *(pytest.param(n, marks=pytest.mark.slow) for n in range(3, 7))]
)
def test_combined_features_match_plain_rows(seed):
    one = draw(seed)
    params = lively(one.config)
    model = RWKV7(dataclasses.replace(PLAIN, num_layers=one.config.num_layers))
    states = ROWS * one.sequences
    counts = np.arange(T)[None] < one.lengths[:, None]
    weights = np.asarray(noise((ROWS, T, PLAIN.vocab_size), seed)) * counts[..., None]

    # Each sequence in a row of its own, its tokens moved to the left.
    places = []
    for row in range(ROWS):
        for k in range(one.sequences):
            mine = np.flatnonzero(counts[row] & (one.segment_ids[row] == k))
            places.append((row, mine))
    alone = np.zeros((states, T), int)
    own_weights = np.zeros((states, T, PLAIN.vocab_size), np.float32)
    for index, (row, mine) in enumerate(places):
        alone[index, : len(mine)] = one.tokens[row, mine]
        own_weights[index, : len(mine)] = weights[row, mine]
    sizes = np.array([len(mine) for _, mine in places])

    def plain(start):
        state = repeat(start, states)
        return model.apply({"params": params}, alone, state, sizes)

    def drawn(start):
        def call(start):
            ids = one.segment_ids if one.sequences > 1 else None
            return RWKV7(one.config).apply(
                {"params": params},
                one.tokens,
                repeat(start, states),
                one.lengths,
                segment_ids=ids,
            )

        # Another state beside it changes nothing.
        both = jax.tree.map(lambda leaf: jnp.stack([leaf, 0.5 * leaf]), start)
        return jax.tree.map(lambda leaf: leaf[0], jax.vmap(call)(both))

    (expected, end), slope = gradient(plain, one.start, own_weights)
    (found, same_end), same_slope = gradient(drawn, one.start, weights)
    for index, (row, mine) in enumerate(places):
        assert_trees_close(
            found[row, mine], expected[index, : len(mine)], SAME["model"]
        )
    assert_trees_close(same_end, end, SAME["model"])
    assert_trees_close(same_slope, slope, SAME["model"])
