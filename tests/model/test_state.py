"""Laws of states as batches of sequences, and the check that a state fits a model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization
from tiny_models import CONFIG, random_state
from upscaled_states import ADDITIVE, SIZE, empty_state, filled

from rwkv7_jax.model.kernel_features import KINDS
from rwkv7_jax.model.state import (
    RWKV7State,
    check_state,
    init_state,
    map_linear_leaves,
    repeat,
    restore_rows,
    select,
    stack,
    where_rows,
)
from rwkv7_jax.model.upscaled_memory import DYNAMICS, MEMORY_FORMS
from rwkv7_jax.training.train_step import TrainState
from rwkv7_jax.tuning.state_arithmetic import capacity, scaled

ROWS = 4
REPLACING = ("replace", "replace_raw")
LEADING = (CONFIG.num_layers, 1, CONFIG.num_heads)


def assert_same(actual, expected):
    """Equal bit for bit, in structure as well."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def one_state(kind, seed):
    """A state of one sequence; `kind` is None or the dynamics of its upscaled memory."""
    state = random_state(seed=seed)
    if kind is None:
        return state
    upscaled = filled(empty_state(dynamics=kind), seed=seed, write=0.1 * seed).upscaled
    return state.replace(upscaled=upscaled)


def batch_of(kind):
    """Several different sequences, each with a memory of its own."""
    return stack([one_state(kind, seed) for seed in range(ROWS)])


kinds = pytest.mark.parametrize("kind", [None, *DYNAMICS])


@kinds
def test_selecting_from_a_stack_gives_back_each_state(kind):
    states = [one_state(kind, seed) for seed in range(ROWS)]
    together = stack(states)
    assert together.batch == ROWS
    for row, state in enumerate(states):
        assert_same(select(together, row), state)


@kinds
def test_stacking_single_rows_gives_back_the_batch(kind):
    batch = batch_of(kind)
    assert_same(stack([select(batch, row) for row in range(ROWS)]), batch)


@kinds
def test_selections_compose(kind):
    batch = batch_of(kind)
    first = np.array([3, 1, 1, 0])
    second = np.array([2, 0])
    assert_same(select(select(batch, first), second), select(batch, first[second]))


@pytest.mark.parametrize("rows", [1, -3, slice(1, 2), np.array([1]), jnp.array([1])])
def test_an_index_a_slice_and_an_array_select_the_same_row(rows):
    batch = batch_of("decay")
    assert_same(select(batch, rows), select(batch, 1))


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_indices_of_few_bits_select_from_batches_beyond_their_range(dtype):
    state = init_state(CONFIG, 300)
    numbers = jnp.arange(300.0)[None, :, None]
    state = state.replace(att_shift=jnp.zeros_like(state.att_shift) + numbers)
    rows = np.array([1, 100], dtype)
    for choose in (select, jax.jit(select)):
        found = choose(state, rows).att_shift[0, :, 0]
        np.testing.assert_array_equal(found, [1, 100])


@kinds
def test_every_row_of_a_repeated_state_is_the_state(kind):
    state = one_state(kind, seed=1)
    together = repeat(state, ROWS)
    assert together.batch == ROWS
    check_state(together, ROWS, CONFIG)
    # A shared memory has one row, so it is compared with the first one of the batch.
    for row in range(ROWS):
        found = select(together, row)
        for name in ("att_shift", "wkv", "ffn_shift"):
            np.testing.assert_array_equal(getattr(found, name), getattr(state, name))
        if kind is not None:
            np.testing.assert_array_equal(found.upscaled.memory, state.upscaled.memory)


def test_repeating_once_changes_nothing():
    for kind in (None, *DYNAMICS):
        state = one_state(kind, seed=1)
        assert_same(repeat(state, 1), state)


def test_only_a_single_sequence_is_repeated():
    with pytest.raises(
        ValueError, match=r"repeat: `state` must hold one sequence; got 4\."
    ):
        repeat(batch_of(None), 2)


@pytest.mark.parametrize("kind", DYNAMICS)
def test_only_a_memory_that_never_changes_is_shared_by_the_rows(kind):
    memory = repeat(one_state(kind, seed=1), ROWS).upscaled.memory
    assert memory.shape[1] == (ROWS if MEMORY_FORMS[kind].has_own_rows else 1)


@kinds
def test_where_rows_takes_each_row_from_one_of_two_states(kind):
    ours = batch_of(kind)
    theirs = select(ours, np.array([1, 2, 3, 0]))
    rows = jnp.array([True, False, False, True])
    mixed = where_rows(rows, ours, theirs)
    for row, from_ours in enumerate(rows):
        assert_same(select(mixed, row), select(ours if from_ours else theirs, row))


@kinds
def test_where_rows_of_all_or_of_none_is_one_of_the_two(kind):
    ours = batch_of(kind)
    theirs = select(ours, np.array([1, 2, 3, 0]))
    every_row = jnp.ones(ROWS, bool)
    assert_same(where_rows(every_row, ours, theirs), ours)
    assert_same(where_rows(~every_row, ours, theirs), theirs)


@pytest.mark.parametrize(("rows", "came"), [([0, 3], "int64[2]"), ([True], "bool[1]")])
def test_where_rows_needs_one_bool_for_each_row(rows, came, unchecked):
    ours = batch_of(None)
    with pytest.raises(ValueError) as caught:
        where_rows(rows, ours, ours)
    assert str(caught.value) == f"where_rows: `rows` must be 4 bools; got {came}."
    theirs = select(ours, np.array([1, 2, 3, 0]))
    mask = [True, False, False, True]
    mixed = where_rows(mask, ours, theirs)
    assert_same(mixed, where_rows(jnp.array(mask), ours, theirs))


def test_where_rows_gives_each_row_its_own_of_two_shared_memories():
    ours = one_state("static", seed=1)
    theirs = one_state("static", seed=2)
    mixed = where_rows(
        jnp.array([False, True, False]), repeat(ours, 3), repeat(theirs, 3)
    )
    for row, one in enumerate((theirs, ours, theirs)):
        assert_same(select(mixed, row), one)


@kinds
def test_rows_are_restored_and_shared_memories_stay_shared(kind):
    start = repeat(one_state(kind, seed=1), ROWS)
    # As two tokens later: only what has a row for each sequence differs.
    now = select(start, [0] * ROWS)
    if kind is not None and MEMORY_FORMS[kind].has_own_rows:
        memory = 2 * now.upscaled.memory
        now = now.replace(upscaled=now.upscaled.replace(memory=memory))
    now = now.replace(wkv=2 * now.wkv)
    rows = jnp.array([True, False, False, True])
    # In a program, as generation calls it: no array there is known to be another one.
    mixed = jax.jit(restore_rows)(rows, start, now)
    assert jax.tree.map(jnp.shape, mixed) == jax.tree.map(jnp.shape, start)
    for row, is_restored in enumerate(rows):
        assert_same(select(mixed, row), select(start if is_restored else now, row))


def test_where_rows_rejects_memories_of_different_shapes():
    plain = random_state(seed=7)
    static = one_state("static", seed=1)
    for pair in (
        (plain, static),
        (static, plain),
        (static, one_state("decay", seed=1)),
    ):
        with pytest.raises(
            ValueError, match="where_rows: `state` and `other` must have"
        ):
            where_rows(jnp.array([True]), *pair)


def test_a_mask_of_unknown_count_is_rejected(unchecked):
    with pytest.raises(TypeError, match="`rows` must be indices in a compiled"):
        jax.jit(lambda rows: select(random_state(seed=7), rows))(jnp.array([True]))


@pytest.mark.parametrize("kind", ADDITIVE)
def test_a_plain_state_is_stacked_with_an_empty_memory(kind):
    plain = random_state(seed=7)
    wide = one_state(kind, seed=1)
    for states, row in (([plain, wide], 0), ([wide, plain], 1)):
        found = select(stack(states), row)
        assert not np.any(found.upscaled.memory)
        assert not np.any(found.upscaled.write)
        assert_same(found.replace(upscaled=None), plain)
        assert_same(found.upscaled.features, wide.upscaled.features)


def test_memories_of_different_forms_are_not_stacked():
    static = one_state("static", seed=1)
    features = jax.tree.map(lambda leaf: leaf[:, :, :, :12], static.upscaled.features)
    features = features.replace(map=features.map[..., :12])
    memory = static.upscaled.memory[..., :12]
    narrow = static.replace(
        upscaled=static.upscaled.replace(memory=memory, features=features)
    )
    with pytest.raises(
        ValueError, match=r"same form; got static gaussian with 24 .* with 12"
    ):
        stack([static, narrow])
    with pytest.raises(ValueError, match=r"same form; got static .* and delta"):
        stack([static, one_state("delta", seed=1)])


@pytest.mark.parametrize("kind", REPLACING)
def test_a_memory_that_replaces_the_wkv_state_is_not_stacked_with_plain_states(kind):
    states = [one_state(None, seed=1), one_state(kind, seed=2)]
    sentence = f"stack: `states` must all have a memory of the paper's form.*{kind}"
    for some in (states, states[::-1]):
        with pytest.raises(ValueError, match=sentence):
            stack(some)


@kinds
def test_linear_leaves_are_added_and_features_stay_those_of_the_first(kind):
    first = one_state(kind, seed=1)
    second = one_state(kind, seed=2)
    if kind is not None:
        features = second.upscaled.features
        other_mean = features.replace(mean=features.mean + 1)
        second = second.replace(upscaled=second.upscaled.replace(features=other_mean))
    total = map_linear_leaves(lambda x, y: x + 2 * y, first, second)
    for name in ("att_shift", "wkv", "ffn_shift"):
        wanted = getattr(first, name) + 2 * getattr(second, name)
        np.testing.assert_array_equal(getattr(total, name), wanted)
    if kind is not None:
        wanted = first.upscaled.memory + 2 * second.upscaled.memory
        np.testing.assert_array_equal(total.upscaled.memory, wanted)
        wanted = first.upscaled.write + 2 * second.upscaled.write
        np.testing.assert_array_equal(total.upscaled.write, wanted)
        assert_same(total.upscaled.features, first.upscaled.features)
        assert_same(total.upscaled.readout, first.upscaled.readout)


@kinds
def test_the_check_accepts_arrays_tracers_and_shapes(kind):
    batch = batch_of(kind)
    check_state(batch, ROWS, CONFIG)
    check_state(jax.eval_shape(lambda: batch), ROWS, CONFIG)

    @jax.jit
    def traced(state):
        check_state(state, ROWS, CONFIG)
        return state.wkv

    traced(batch)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_new_state_is_zeros_in_the_dtypes_of_the_model(dtype):
    config = dataclasses.replace(CONFIG, dtype=dtype)
    state = init_state(config, ROWS)
    check_state(state, ROWS, config)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(state))
    assert (state.att_shift.dtype, state.ffn_shift.dtype) == (dtype, dtype)
    assert state.wkv.dtype == jnp.float32


def message_of(state, error, batch=1):
    """The message with which a state is refused."""
    with pytest.raises(error) as caught:
        check_state(state, batch, CONFIG)
    return str(caught.value)


def test_the_message_begins_with_the_function():
    message = message_of(init_state(CONFIG), ValueError, batch=2)
    assert message.startswith(
        "check_state: `state.att_shift` must have shape (3, 2, 64)"
    )


@pytest.mark.parametrize("name", ["att_shift", "wkv", "ffn_shift"])
def test_a_leaf_of_another_shape_is_named(name, unchecked):
    state = init_state(CONFIG)
    longer = state.replace(**{name: jnp.concatenate([getattr(state, name)] * 2)})
    assert f"`state.{name}` must have shape (3, 1," in message_of(longer, ValueError)


def test_the_wkv_state_must_be_float32(unchecked):
    state = init_state(CONFIG)
    assert "got dict." in message_of({"wkv": state.wkv}, TypeError)
    half = state.replace(wkv=state.wkv.astype("bfloat16"))
    assert "`state.wkv` must be float32; got bfloat16." in message_of(half, TypeError)


def with_upscaled(kind, **changes) -> RWKV7State:
    state = empty_state(dynamics=kind)
    return state.replace(upscaled=state.upscaled.replace(**changes))


def test_a_state_prints_its_shapes():
    """Its numbers would fill screens."""
    state = init_state(CONFIG)
    shown = repr(state)
    assert f"wkv=float32[{','.join(map(str, state.wkv.shape))}]" in shown
    assert len(shown) < 200 and len(repr(one_state("static", 1))) < 700
    train = TrainState.create(state, optax.adam(0.1))
    assert len(repr(train)) < 800 and shown in repr(train)
    # What stands for a leaf while JAX looks at the structure is shown as it is.
    assert "wkv='a'" in repr(jax.tree.map(lambda _: "a", state))


def test_an_array_of_another_library_is_rejected():
    class Tensor:
        """What tells PyTorch's tensors apart: its dtypes are its own."""

        def __init__(self, array):
            self.shape = array.shape
            self.dtype = "torch.float32"

    state = jax.tree.map(Tensor, init_state(CONFIG))
    message = message_of(state, TypeError)
    assert message == "check_state: `state.att_shift` must be an array; got Tensor."


@pytest.mark.parametrize(
    "use", [check_state, repeat, select, scaled, capacity], ids=lambda use: use.__name__
)
def test_a_memory_that_a_reader_left_as_a_dict_is_named(use):
    saved = serialization.to_bytes(one_state("static", 1))
    # The template has no memory, so Flax does not know its type.
    read = serialization.from_bytes(init_state(CONFIG), saved)
    arguments = {check_state: (1, CONFIG), repeat: (2,), select: (0,), scaled: (0.5,)}
    with pytest.raises(TypeError) as caught:
        use(read, *arguments.get(use, ()))
    message = "`state.upscaled` must be an Upscaled or None; got dict."
    assert str(caught.value) == f"{use.__name__}: {message}"
    # With a template of the same form, Flax reads a state.
    read = serialization.from_bytes(one_state("static", 1), saved)
    check_state(read, 1, CONFIG)


def test_an_unknown_form_or_kind_lists_the_known_ones():
    message = message_of(with_upscaled("static", dynamics="still"), ValueError)
    assert f"must be one of {', '.join(DYNAMICS)}; got 'still'." in message
    features = empty_state().upscaled.features.replace(kind="cubic")
    message = message_of(with_upscaled("static", features=features), ValueError)
    assert f"must be one of {', '.join(KINDS)}; got 'cubic'." in message


@pytest.mark.parametrize("kind", REPLACING)
def test_the_papers_form_needs_a_readout(kind):
    message = message_of(with_upscaled(kind, readout=None), ValueError)
    assert f"`state.upscaled.readout` must be given for dynamics {kind!r}" in message


@pytest.mark.parametrize("kind", ADDITIVE)
def test_an_additive_memory_has_no_readout(kind):
    readout = jnp.zeros((*LEADING, CONFIG.head_size, SIZE))
    message = message_of(with_upscaled(kind, readout=readout), ValueError)
    assert f"`state.upscaled.readout` must be None for dynamics {kind!r}" in message


@pytest.mark.parametrize("kind", DYNAMICS)
def test_a_memory_of_another_shape_is_named(kind):
    upscaled = empty_state(dynamics=kind).upscaled
    taller = jnp.concatenate([upscaled.memory] * 2, axis=-2)
    assert "`state.upscaled.memory` must" in message_of(
        with_upscaled(kind, memory=taller), ValueError
    )
    shorter = upscaled.write[..., :-1]
    assert "`state.upscaled.write` must" in message_of(
        with_upscaled(kind, write=shorter), ValueError
    )


@pytest.mark.parametrize("kind", DYNAMICS)
def test_a_memory_with_one_row_serves_a_batch_only_if_it_never_changes(kind):
    state = init_state(CONFIG, ROWS).replace(
        upscaled=empty_state(dynamics=kind).upscaled
    )
    if MEMORY_FORMS[kind].has_own_rows:
        assert "`state.upscaled.memory` must have shape" in message_of(
            state, ValueError, ROWS
        )
    else:
        check_state(state, ROWS, CONFIG)
