"""The model against its equations in numpy, and against itself."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from tiny_models import CONFIG as AS_SHIPPED
from tiny_models import SCANNED as CONFIG
from tiny_models import lively, random_state, restated, tokens
from tolerances import MODEL_BFLOAT16, SAME, assert_close, assert_trees_close

from rwkv7_jax import sharding
from rwkv7_jax.checkpoints.model_files import load_model, save_model
from rwkv7_jax.model.block import TRACE
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.model.inputs import safe_lengths
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import init_state, select

LENGTH = 6
IDS = tokens(3, LENGTH)
STATE = random_state(batch=3)


@functools.partial(jax.jit, static_argnames=("config", "method"))
def run(params, ids, state, lengths=None, *, config=CONFIG, method=None):
    """The model's call, or another of its methods, compiled."""
    return RWKV7(config).apply({"params": params}, ids, state, lengths, method=method)


@pytest.fixture(scope="module")
def whole():
    """Logits and state of one pass."""
    return run(lively(), IDS, STATE)


def check_restated(params, ids, state, config=CONFIG):
    """Compare row 0's logits, state and trace with numpy's."""
    logits, end, trace = run(params, ids, state, config=config, method="trace")
    true_logits, true_end, true_trace = restated(
        params, ids[0], select(state, 0), config
    )
    assert_close(logits[0], true_logits, SAME["model"], "logits")
    for name in ("att_shift", "wkv", "ffn_shift"):
        assert_close(
            getattr(end, name)[:, 0], getattr(true_end, name), SAME["model"], name
        )
    for name in TRACE:
        assert_close(trace[name][:, 0], true_trace[name], SAME["model"], name)


def test_logits_state_and_trace_match_the_equations():
    check_restated(lively(), IDS, STATE)


@pytest.mark.parametrize("head_size", [64, 128])  # 32 is what all others have
def test_a_single_layer_of_any_head_size_matches_the_equations(head_size):
    sizes = {"vocab_size": 11, "num_layers": 1, "width": 128, "ffn_width": 32}
    config = RWKV7Config(**sizes, head_size=head_size, implementation="scan")
    state = random_state(config)
    check_restated(lively(config), tokens(1, LENGTH, config), state, config)


def test_every_product_of_float32_activations_has_full_precision():
    # Which says nothing on a CPU; GPUs and TPUs would round the operands.
    config = dataclasses.replace(CONFIG, num_layers=1)

    def loss(params):
        state = random_state(config)
        logits, _ = RWKV7(config).apply({"params": params}, IDS[:1], state)
        return logits.sum()

    program = str(jax.make_jaxpr(jax.grad(loss))(lively(config)))
    products = program.count("dot_general[")
    assert products > 30
    assert program.count("Precision.HIGHEST, Precision.HIGHEST") == products


def test_a_transposed_state_is_detected():
    turned = STATE.replace(wkv=STATE.wkv.mT)
    logits, _ = run(lively(), IDS, turned)
    true_logits, _, _ = restated(lively(), IDS[0], select(STATE, 0))
    with pytest.raises(AssertionError, match="relative L2 error"):
        assert_close(logits[0], true_logits, SAME["model"], "logits")


def test_trace_stacks_every_name_over_layers_and_changes_no_logit(whole):
    logits, _, trace = run(lively(), IDS, STATE, method="trace")
    assert set(trace) == set(TRACE)
    assert_close(logits, whole[0], SAME["op"], "logits")
    heads = (3, 3, LENGTH, 2, 32)
    wide = (3, 3, LENGTH, CONFIG.width)
    for name in ("r", "log_w", "k", "v", "a", "b", "y"):
        assert trace[name].shape == heads
    for name in ("residual", "gate", "ffn_input"):
        assert trace[name].shape == wide
    assert trace["ffn_hidden"].shape == (3, 3, LENGTH, CONFIG.ffn_width)
    assert trace["log_w"].dtype == jnp.float32


def test_hidden_returns_the_input_of_the_head(whole):
    x, _ = run(lively(), IDS, STATE, method="hidden")
    assert_close(x @ lively()["head"]["weight"].T, whole[0], SAME["model"], "logits")


@pytest.mark.parametrize("cut", range(1, LENGTH))
def test_cutting_anywhere_changes_nothing(whole, cut):
    left, middle = run(lively(), IDS[:, :cut], STATE)
    right, end = run(lively(), IDS[:, cut:], middle)
    assert_close(
        jnp.concatenate([left, right], axis=1), whole[0], SAME["model"], "logits"
    )
    assert_trees_close(end, whole[1], SAME["model"])


def test_prefill_and_token_by_token_match_one_pass(whole):
    logits, state = run(lively(), IDS[:, :3], STATE)
    for t in range(3, LENGTH):
        step, state = run(lively(), IDS[:, t : t + 1], state)
        logits = jnp.concatenate([logits, step], axis=1)
    assert_close(logits, whole[0], SAME["model"], "logits")
    assert_trees_close(state, whole[1], SAME["model"])


def test_without_tokens_there_are_no_logits_and_the_state_is_returned():
    logits, end = run(lively(), IDS[:, :0], STATE)
    assert logits.shape == (3, 0, CONFIG.vocab_size)
    jax.tree.map(np.testing.assert_array_equal, end, STATE)


def test_rows_of_a_batch_are_independent(whole):
    other = IDS.at[1:].set((IDS[1:] + 1) % CONFIG.vocab_size)
    logits, end = run(lively(), other, STATE)
    np.testing.assert_array_equal(logits[0], whole[0][0])
    jax.tree.map(np.testing.assert_array_equal, select(end, 0), select(whole[1], 0))


@pytest.mark.parametrize(("row", "length"), [(1, 2), (2, 0)])
def test_a_row_in_a_ragged_batch_equals_the_row_alone(row, length):
    logits, end = run(lively(), IDS, STATE, jnp.array([LENGTH, 2, 0]))
    alone, last = run(lively(), IDS[row : row + 1, :length], select(STATE, row))
    assert_close(logits[row, :length], alone[0], SAME["model"], "logits")
    assert_trees_close(select(end, row), last, SAME["model"])


@functools.partial(jax.jit, static_argnames="config")
@functools.partial(jax.grad, argnums=(0, 1))
def gradients(params, state, config):
    """Of a loss on logits and end state."""
    logits, end = run(params, IDS, state, config=config)
    return jnp.mean(jnp.square(logits)) + jnp.mean(jnp.square(end.wkv))


def test_the_default_implementation_matches_the_definition():
    lengths = jnp.array([LENGTH, 2, 0])
    found, wanted = (
        run(lively(), IDS, STATE, lengths, config=x) for x in (AS_SHIPPED, CONFIG)
    )
    assert_trees_close(found, wanted, SAME["model"])


@pytest.mark.slow
def test_the_default_implementation_has_the_gradients_of_the_definition():
    found, wanted = (gradients(lively(), STATE, x) for x in (AS_SHIPPED, CONFIG))
    assert_trees_close(found, wanted, SAME["gradient"])


@pytest.mark.slow
def test_rematerialisation_changes_no_gradient():
    again = gradients(lively(), STATE, dataclasses.replace(CONFIG, remat="block"))
    assert_trees_close(again, gradients(lively(), STATE, CONFIG), SAME["model"])


def test_every_weight_and_the_state_have_a_gradient():
    for path, grad in jax.tree_util.tree_leaves_with_path(
        gradients(lively(), STATE, CONFIG)
    ):
        assert float(jnp.abs(grad).max()) > 0, jax.tree_util.keystr(path)


def test_an_eager_call_compiles_once(whole):
    """And not at every call: all of these programs were kept, some megabytes each."""
    params = lively()

    def call():
        return RWKV7(CONFIG).apply({"params": params}, IDS, STATE)

    assert_trees_close(call(), whole, SAME["model"])
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event)
    )
    try:
        call()
    finally:
        jax.monitoring.clear_event_listeners()
    assert not [event for event in compiled if "compile" in event]


def test_modules_around_the_model_can_be_called_eagerly():
    class Features(nn.Module):
        def setup(self):
            self.model = RWKV7(CONFIG)

        def __call__(self, ids, state):
            return self.model.hidden(ids, state)[0]

    # The head is never called, so there are no weights of it.
    weights = {name: leaf for name, leaf in lively().items() if name != "head"}
    hidden = Features().apply({"params": {"model": weights}}, IDS, STATE)
    assert_close(hidden, run(lively(), IDS, STATE, method="hidden")[0], SAME["model"])


@pytest.mark.parametrize("method", ["__call__", "hidden", "trace"])
def test_a_call_without_weights_names_apply(method):
    message = r"^RWKV7: it must be called by `apply\(\{\"params\": params\}"
    with pytest.raises(ValueError, match=message):
        getattr(RWKV7(CONFIG), method)(IDS, STATE)


def test_forward_mode_through_the_model_raises_one_sentence():
    def logits(state):
        return RWKV7(CONFIG).apply({"params": lively()}, IDS, state)[0]

    with pytest.raises(TypeError, match=r"^wkv7: forward-mode differentiation"):
        jax.jvp(logits, (STATE,), (STATE,))
    # Of a gradient it is defined.
    push_gradient = functools.partial(jax.jvp, jax.grad(lambda s: jnp.sum(logits(s))))
    assert jax.tree.leaves(jax.eval_shape(push_gradient, (STATE,), (STATE,)))


def test_captured_intermediates_cover_all_modules():
    _, kept = RWKV7(CONFIG).apply(
        {"params": lively()},
        IDS,
        STATE,
        capture_intermediates=True,
        mutable=["intermediates"],
    )
    kept = kept["intermediates"]
    assert {"emb", "ln0", "layer_0", "layers", "head"} <= kept.keys()
    # Stacked over the layers that are scanned.
    ((memories, *_),) = kept["layers"]["__call__"]
    assert jax.tree.leaves(memories)[0].shape[0] == CONFIG.num_layers - 1


def test_debug_nans_finds_where_a_nan_arises():
    params = jax.tree.map(lambda leaf: leaf * np.nan, lively())
    with jax.debug_nans(True), pytest.raises(FloatingPointError, match="nan"):
        RWKV7(CONFIG).apply({"params": params}, IDS, STATE)


def test_a_checked_shard_map_raises_a_sentence_with_the_remedy():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("x",))
    axes = jax.sharding.PartitionSpec("x")
    # Outside of the function: weights that are made inside of it would be traced.
    params = lively()

    def logits(ids):
        return RWKV7(CONFIG).apply({"params": params}, ids, STATE)[0]

    over = functools.partial(
        jax.shard_map, logits, mesh=mesh, in_specs=axes, out_specs=axes
    )
    with pytest.raises(TypeError, match=r"check_vma=False.*vary over x"):
        jax.eval_shape(over(), IDS)
    assert jax.eval_shape(over(check_vma=False), IDS).shape[:2] == IDS.shape


@pytest.mark.parametrize("axis", ["tensor", "fsdp", "sequence", "data"])
def test_a_callers_shard_map_may_reuse_our_axis_names(whole, axis):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), (axis,))
    rows = jax.sharding.PartitionSpec(axis)
    params = lively()
    # Each device has rows of its own, which are the same ones here.
    twice = jnp.concatenate([IDS, IDS])

    def logits(ids):
        return RWKV7(CONFIG).apply({"params": params}, ids, STATE)[0]

    over = jax.shard_map(
        logits, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False
    )
    found = jax.jit(over)(twice)
    assert_close(found, jnp.concatenate([whole[0], whole[0]]), SAME["model"])


def on_an_explicit_mesh(array):
    """Puts an array on two devices of a mesh as `jax.make_mesh` makes it."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return mesh, jax.device_put(array, replicated)


def test_a_mesh_with_explicit_axes_is_rejected_everywhere(tmp_path):
    params = lively()
    mesh, ids = on_an_explicit_mesh(IDS)
    call = RWKV7(CONFIG).apply
    sentence = r"must have axes of type AxisType.Auto.* got Explicit for data"
    for run_model in (call, jax.jit(call)):
        with pytest.raises(
            ValueError, match=f"RWKV7: the mesh of the arrays {sentence}"
        ):
            run_model({"params": params}, ids, STATE)
    with (
        jax.set_mesh(mesh),
        pytest.raises(ValueError, match=f"RWKV7: the mesh of the program {sentence}"),
    ):
        jax.jit(call)({"params": params}, IDS, STATE)
    with pytest.raises(ValueError, match=f"use_mesh: `mesh` {sentence}"):
        sharding.use_mesh(mesh)
    save_model(tmp_path / "m.safetensors", params, CONFIG)
    with pytest.raises(ValueError, match=f"load_model: `mesh` {sentence}"):
        load_model(tmp_path / "m.safetensors", mesh=mesh)


@pytest.mark.parametrize("axis", ["tensor", "fsdp", "data"])
def test_a_callers_mesh_with_one_of_our_axis_names_gives_the_same(whole, axis):
    mesh = jax.make_mesh((2,), (axis,), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        found = jax.jit(RWKV7(CONFIG).apply)({"params": lively()}, IDS, STATE)
    assert_trees_close(found, whole, SAME["model"])


def test_models_under_a_lifted_transform_are_called_together(whole):
    pair = nn.vmap(
        RWKV7,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(None, None),
        axis_size=2,
    )(CONFIG)
    both = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf * 0.5]), lively())
    logits, _ = jax.jit(pair.apply)({"params": both}, IDS, STATE)
    assert_close(logits[0], whole[0], SAME["model"])
    assert not np.allclose(logits[1], whole[0])


@pytest.mark.parametrize("method", ["trace", "hidden_with_trace"])
def test_trace_returns_the_requested_names(method):
    call = functools.partial(RWKV7(CONFIG).apply, {"params": lively()}, IDS, STATE)
    *_, traced = call(names=["residual"], method=method)
    assert set(traced) == {"residual"}
    with pytest.raises(
        ValueError, match=r"RWKV7: `names` must be one of .* got 'resid'"
    ):
        call(names=["resid"], method=method)
    # A string is a sequence of letters, and some letters are names.
    message = r"`names` must be a tuple of names, such as \(\"r\",\); got 'residual'"
    with pytest.raises(TypeError, match=message):
        call(names="residual", method=method)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_state_is_the_carry_of_a_loop_whatever_its_dtype(dtype):
    model = RWKV7(dataclasses.replace(CONFIG, dtype=dtype))
    wide = init_state(CONFIG, 3)

    def step(state, ids):
        logits, state = model.apply({"params": lively()}, ids[:, None], state)
        return state, logits

    end, _ = jax.lax.scan(step, wide, IDS.T)
    kinds = jax.tree.map(lambda leaf: leaf.dtype, (end, wide))
    assert kinds[0] == kinds[1]


def test_bfloat16_activations_stay_close_to_float32(whole):
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    state = random_state(config, batch=3)
    logits, end = run(lively(), IDS, state, config=config)
    assert (logits.dtype, end.wkv.dtype) == (jnp.float32, jnp.float32)
    assert (end.att_shift.dtype, end.ffn_shift.dtype) == (jnp.bfloat16, jnp.bfloat16)
    assert_close(logits, whole[0], MODEL_BFLOAT16, "logits")


def test_strict_promotion_allows_small_weights_and_small_lengths():
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    weights = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), lively())
    lengths = jnp.array([0, 2, LENGTH], jnp.int8)
    with jax.numpy_dtype_promotion("strict"):
        # Traced only: promotion is decided there.
        logits, _ = jax.eval_shape(
            RWKV7(config).apply,
            {"params": weights},
            IDS,
            random_state(config, batch=3),
            lengths,
        )
    assert logits.dtype == jnp.float32


@pytest.mark.parametrize(
    ("bad", "position"), [(CONFIG.vocab_size, (1, 4)), (-1, (0, 0))]
)
def test_an_id_outside_the_vocabulary_is_named_with_its_position(bad, position):
    with pytest.raises(ValueError) as caught:
        RWKV7(CONFIG).apply({"params": lively()}, IDS.at[position].set(bad), STATE)
    assert str(caught.value) == (
        f"RWKV7: `tokens` must be at least 0 and below 29; got {bad} at position {position}."
    )


def test_ids_must_be_integers(unchecked):
    with pytest.raises(
        TypeError, match="RWKV7: `tokens` must be integers; got float32"
    ):
        RWKV7(CONFIG).apply({"params": lively()}, IDS.astype(float), STATE)


def refuse(state, error):
    """The message with which a state is refused."""
    with pytest.raises(error) as caught:
        RWKV7(CONFIG).apply({"params": lively()}, IDS, state)
    return str(caught.value)


def test_a_state_of_another_model_is_rejected_in_one_sentence(unchecked):
    assert refuse(init_state(CONFIG, 2), ValueError) == (
        "RWKV7: `state.att_shift` must have shape (3, 3, 64) (layers 3, batch 3, ...); "
        "got (3, 2, 64)."
    )
    half = STATE.replace(wkv=STATE.wkv.astype("bfloat16"))
    assert (
        refuse(half, TypeError) == "RWKV7: `state.wkv` must be float32; got bfloat16."
    )
    assert refuse(STATE.wkv, TypeError).startswith(
        "RWKV7: `state` must be an RWKV7State; got "
    )


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
def test_lengths_may_have_a_dtype_too_small_for_the_row(unchecked, dtype):
    lengths = np.array([100, 3, 0], dtype)
    found = jax.jit(lambda lengths: safe_lengths(lengths, (3, 300)))(lengths)
    np.testing.assert_array_equal(found, lengths)
