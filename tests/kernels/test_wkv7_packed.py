"""Several sequences in one row of the op: each is what it would be in a row of its own."""

import functools
import itertools

import abstract_devices
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import wkv_reference
from jax.sharding import AxisType, PartitionSpec
from tolerances import WKV, assert_close
from wkv_inputs import INTERPRETED, op

import pallas_kernels
from pallas_kernels.cases import Case, make_inputs

# Sequences of a row.
K = 4
CASE = Case(2, 70, 2, key_size=32, value_size=64)
INPUTS, _ = make_inputs(CASE)
STATES = 0.3 * jax.random.normal(jax.random.key(3), (2 * K, 2, 64, 32))
# One sequence is longer than a chunk of 32, one is missing, some are single tokens.
SIZES = ((5, 33, 0, 32), (64, 1, 1, 2))
LENGTHS = jnp.array([70, 68])
KERNELS = [pytest.param(name, marks=pytest.mark.slow) for name in INTERPRETED]
each = pytest.mark.parametrize("implementation", [None, "scan", "chunked", *KERNELS])
# Of the same arithmetic in another order.
SAME = 1e-6
EXACT = 1e-13


def ids_of(sizes, tokens):
    """Returns the ids of rows whose sequences have these sizes; tokens after them join the last."""
    rows = np.full((len(sizes), tokens), len(sizes[0]) - 1)
    for row, numbers in zip(rows, sizes, strict=True):
        ids = np.repeat(np.arange(len(numbers)), numbers)
        row[: len(ids)] = ids
    return jnp.asarray(rows)


IDS = ids_of(SIZES, CASE.tokens)


def pulled(run, inputs, states):
    """Returns y, the end states and the gradients of all seven arrays."""
    (y, end), pull = jax.vjp(run, inputs, states)
    return y, end, *pull((jnp.sin(inputs[3]), jnp.cos(states)))


def separate(inputs, states, *, sizes, implementation, chunk=None):
    """Runs every sequence in a row of its own, and puts the results where the packed ones are."""
    rows = []
    ends = []
    for b, numbers in enumerate(sizes):
        parts = []
        first = 0
        for k, size in enumerate(numbers):
            alone = [x[b : b + 1, first : first + size] for x in inputs]
            start = states[b * len(numbers) + k][None]
            y, end = op(alone, start, implementation=implementation, chunk=chunk)
            parts.append(y[0])
            ends.append(end[0])
            first += size
        row = jnp.concatenate(parts)
        rows.append(jnp.pad(row, ((0, inputs[3].shape[1] - first), (0, 0), (0, 0))))
    return jnp.stack(rows), jnp.stack(ends)


def compare(found, expected, bar):
    names = ("y", "end", "gradient of r", *"wkvabS")
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    for name, (left, right) in zip(names, pairs, strict=True):
        assert_close(left, right, bar, name)


@each
def test_packed_sequences_equal_separate_rows_with_all_gradients(implementation):
    packed = functools.partial(
        op, segment_ids=IDS, lengths=LENGTHS, implementation=implementation
    )
    alone = functools.partial(separate, sizes=SIZES, implementation=implementation)
    found = jax.jit(functools.partial(pulled, packed))(INPUTS, STATES)
    expected = jax.jit(functools.partial(pulled, alone))(INPUTS, STATES)
    compare(found, expected, SAME)


def test_packed_sequences_equal_separate_rows_in_float64():
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x.astype("float64"), (INPUTS, STATES))
        alone = functools.partial(separate, sizes=SIZES, implementation="scan")
        expected = jax.jit(functools.partial(pulled, alone))(*wide)
        for implementation in ("scan", "chunked"):
            packed = functools.partial(
                op, segment_ids=IDS, lengths=LENGTHS, implementation=implementation
            )
            found = jax.jit(functools.partial(pulled, packed))(*wide)
            compare(found, expected, EXACT)


@functools.partial(jax.jit, static_argnames="implementation")
def _gradients(inputs, states, ids, *, implementation):
    run = functools.partial(op, segment_ids=ids, implementation=implementation)
    return pulled(run, inputs, states)


@hypothesis.settings(max_examples=15)
@hypothesis.given(cuts=st.lists(st.integers(0, 40), min_size=K - 1, max_size=K - 1))
@pytest.mark.parametrize("implementation", ["scan", "chunked"])
def test_any_borders_match_the_definition(implementation, cuts):
    """In float64, against one row for each sequence whose other tokens are left out by lengths."""
    borders = [0, *sorted(cuts), 40]
    sizes = [tuple(np.diff(borders).tolist())]
    with jax.enable_x64(True):
        inputs = tuple(x[:1, :40].astype("float64") for x in INPUTS)
        states = STATES[:K].astype("float64")
        found = _gradients(
            inputs, states, ids_of(sizes, 40), implementation=implementation
        )
        # All sequences begin at token 0 of their row, as many rows as sequences.
        gather = np.minimum(np.array(borders[:-1])[:, None] + np.arange(40), 39)
        expected = _padded(inputs, states, gather, np.diff(borders))
    for left, right in zip(
        jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
    ):
        assert_close(left, right, EXACT)


@jax.jit
def _padded(inputs, states, gather, sizes):
    """Computes what `pulled` does with a row for each sequence."""

    def run(inputs, states):
        rows = tuple(x[0][gather] for x in inputs)
        y, end = op(rows, states, lengths=sizes, implementation="scan")
        # Back into one row; what is padding has zeros.
        filled = jnp.arange(40)[None] < sizes[:, None]
        y = jnp.where(filled[..., None, None], y, 0)
        return jnp.zeros_like(inputs[3]).at[0, gather].add(y), end

    return pulled(run, inputs, states)


@pytest.mark.parametrize("implementation", INTERPRETED)
def test_short_rows_of_interpreted_kernels_match_the_definition(implementation):
    # Several chunks of one sequence, parts of chunks, and sequences without a token.
    sizes = ((30, 3, 0), (0, 1, 32))
    inputs = tuple(x[:, :33] for x in INPUTS)
    states = STATES[:6]
    packed = functools.partial(
        op, segment_ids=ids_of(sizes, 33), implementation=implementation, chunk=16
    )
    y, end, grads, dstates = jax.jit(functools.partial(pulled, packed))(inputs, states)
    for row, numbers in enumerate(sizes):
        borders = np.cumsum([0, *numbers])
        for k, (first, last) in enumerate(itertools.pairwise(borders)):
            at = 3 * row + k
            # [1 T ...] of the sequence alone.
            part = (slice(row, row + 1), slice(first, last))
            alone = tuple(x[part] for x in inputs)
            start = states[at][None]
            expected = wkv_reference.both(
                alone, start, jnp.sin(alone[3]), jnp.cos(start)
            )
            found = (
                y[part],
                end[at][None],
                [*(grad[part] for grad in grads), dstates[at][None]],
            )
            compare(found, expected, WKV["float32"]["gradient"])


def test_one_sequence_per_row_equals_the_plain_call():
    ids = jnp.zeros((2, CASE.tokens), int)

    def call(**choices):
        run = functools.partial(op, implementation="chunked", **choices)
        return jax.jit(functools.partial(pulled, run))(INPUTS, STATES[:2])

    compare(call(segment_ids=ids), call(), 1e-7)


@pytest.mark.slow
def test_second_derivatives_match_separate_rows():
    inputs = tuple(x[:1, :20, :1] for x in INPUTS)
    sizes = ((3, 17),)
    states = STATES[:2, :1]

    def second(run):
        def total(inputs, states):
            y, end = run(inputs, states)
            return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(end))

        def of_gradients(inputs, states):
            grads = jax.grad(total, argnums=(0, 1))(inputs, states)
            return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(grads))

        return jax.jit(jax.grad(of_gradients, argnums=(0, 1)))

    with jax.enable_x64(True):
        inputs, states = jax.tree.map(lambda x: x.astype("float64"), (inputs, states))
        found = second(functools.partial(op, segment_ids=ids_of(sizes, 20)))
        alone = second(functools.partial(separate, sizes=sizes, implementation="scan"))
        found = found(inputs, states)
        expected = alone(inputs, states)
    for left, right in zip(
        jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
    ):
        assert_close(left, right, 1e-10)


def test_nan_in_padding_reaches_nothing():
    padding = (jnp.arange(CASE.tokens)[None] >= LENGTHS[:, None])[..., None, None]
    poisoned = tuple(jnp.where(padding, jnp.nan, x) for x in INPUTS)

    def run(inputs, states):
        return op(inputs, states, segment_ids=IDS, lengths=LENGTHS)

    @jax.jit
    def pull(inputs, dy):
        (y, end), pull = jax.vjp(run, inputs, STATES)
        return y, end, pull((dy, jnp.cos(end)))

    dy = jnp.cos(INPUTS[3])
    clean = pull(INPUTS, dy)
    dirty = pull(poisoned, jnp.where(padding, jnp.nan, dy))
    for left, right in zip(jax.tree.leaves(dirty), jax.tree.leaves(clean), strict=True):
        np.testing.assert_array_equal(left, right)


def test_under_vmap_each_call_has_its_own_borders():
    ids = jnp.stack([IDS, jnp.flip(IDS.max() - IDS, axis=1)])
    states = jnp.stack([STATES, -STATES])

    def run(ids, states):
        return op(INPUTS, states, segment_ids=ids, implementation="chunked")

    alone = jax.jit(run)
    y, end = jax.jit(jax.vmap(run))(ids, states)
    for i in range(2):
        y1, end1 = alone(ids[i], states[i])
        assert_close(y[i], y1, SAME)
        assert_close(end[i], end1, SAME)


def test_traced_ids_out_of_range_count_as_the_nearest():
    run = jax.jit(functools.partial(op, implementation="chunked"))
    wild = jnp.where(IDS == K - 1, K + 7, jnp.where(IDS == 0, -3, IDS))
    # A fall counts as the largest id before it.
    wild = wild.at[0, 40].set(0)
    left = run(INPUTS, STATES, segment_ids=wild)
    right = run(INPUTS, STATES, segment_ids=IDS)
    for one, other in zip(left, right, strict=True):
        np.testing.assert_array_equal(one, other)


def test_without_tokens_the_states_are_returned():
    inputs = tuple(x[:, :0] for x in INPUTS)
    y, end = op(inputs, STATES, segment_ids=jnp.zeros((2, 0), int))
    assert y.shape == (2, 0, 2, 64)
    np.testing.assert_array_equal(end, STATES)


@pytest.mark.parametrize("implementation", [None, "scan", "chunked"])
def test_sharding_over_rows_and_heads_changes_nothing(implementation):
    axes = ("batch", "heads")
    mesh = jax.make_mesh((2, 1), axes, axis_types=(AxisType.Auto,) * 2)
    tokens = PartitionSpec("batch", None, "heads")
    states = PartitionSpec(*axes)

    def run(inputs, state, ids):
        return op(inputs, state, segment_ids=ids, implementation=implementation)

    over = jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(tokens, states, PartitionSpec("batch")),
        out_specs=(tokens, states),
    )

    def gradients(run):
        bound = functools.partial(lambda i, s, ids: run(i, s, ids), ids=IDS)
        return jax.jit(lambda i, s: pulled(bound, i, s))(INPUTS, STATES)

    compare(gradients(over), gradients(run), SAME)


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_packed_rows_are_lowered_to_kernels(platform):
    lowered = "cuda" if platform == "gpu" else platform

    def run(inputs, states):
        return pulled(functools.partial(op, segment_ids=IDS), inputs, states)

    with jax.sharding.use_abstract_mesh(abstract_devices.mesh(platform)):
        traced = jax.jit(run).trace(INPUTS, STATES)
        text = traced.lower(lowering_platforms=(lowered,)).as_text()
    assert text.count(abstract_devices.MARKS[lowered]) >= 2


SENTENCES = [
    ({"segment_ids": IDS[:, :5]}, r"`segment_ids` must be integers of shape \(2, 70\)"),
    ({"segment_ids": IDS.astype(float)}, "`segment_ids` must be integers of shape"),
    ({"segment_ids": IDS - 1}, "`segment_ids` must lie between 0 and 3.*got -1"),
    ({"segment_ids": IDS + 1}, "`segment_ids` must lie between 0 and 3.*got 4"),
    (
        {"segment_ids": IDS.at[1, 69].set(0)},
        "`segment_ids` must not decrease from one token to the next; row 1 does",
    ),
    (
        {"state": STATES[:7]},
        r"`state` must have shape \[S H Nv Nk\].*multiple of the 2",
    ),
    (
        {"state": STATES[:0]},
        r"`state` must have shape \[S H Nv Nk\].*multiple of the 2",
    ),
]


@pytest.mark.parametrize(("change", "sentence"), SENTENCES)
def test_bad_ids_and_states_are_named_in_one_sentence(unchecked, change, sentence):
    arguments = {"state": STATES, "segment_ids": IDS} | change
    with pytest.raises(ValueError, match=f"^wkv7: {sentence}"):
        pallas_kernels.wkv7(*INPUTS, **arguments)


def test_triton_rejects_packed_rows(unchecked):
    with (
        jax.sharding.use_abstract_mesh(abstract_devices.mesh("gpu")),
        pytest.raises(NotImplementedError, match="'triton' takes no `segment_ids`"),
    ):
        pallas_kernels.wkv7(*INPUTS, STATES, segment_ids=IDS, implementation="triton")
