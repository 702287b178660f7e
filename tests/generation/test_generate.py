"""Laws of generation: exact states after the kept tokens, independent rows, complete text."""

import gc
import warnings

import abstract_devices
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_checkpoints import random_params
from tolerances import SAME, assert_trees_close
from upscaled_states import empty_state

from pallas_kernels import platforms
from rwkv7_jax.generation import decode_loop as decoding
from rwkv7_jax.generation import prefill, sampling
from rwkv7_jax.generation.generate import generate
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import init_state, repeat, select
from rwkv7_jax.model.unrolled import split_params
from rwkv7_jax.text.tokenizer import Tokenizer

CONFIG = RWKV7Config(
    vocab_size=257, num_layers=2, width=32, head_size=16, implementation="scan"
)
MODEL = RWKV7(CONFIG)
BYTES = Tokenizer.bytes()
# Up to 17 tokens and runs of up to 8 share a few compiled programs; streaming runs may be longer.
PROMPTS = [[84, 105, 102], list(range(40, 54)), [9]]


class Pairs:
    """Ids from 128 on spell two bytes, so that a stop string can begin inside a token."""

    encode = BYTES.encode

    def token_bytes(self, token):
        if token < 128:
            return BYTES.token_bytes(token)
        return bytes([97 + (token - 128) // 12, 97 + (token - 128) % 12])


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG, dtype=jnp.float32, scale=0.3)


@pytest.fixture(scope="module")
def text(params):
    """Twelve tokens after the first prompt, in blocks of eight and four."""
    watch = {"tokenizer": BYTES, "on_text": lambda piece, row: None}
    return run(params, PROMPTS[0], tokens=12, key=jax.random.key(3), **watch)


def run(params, prompts, state=None, **choices):
    return generate(MODEL, params, prompts, state, **({"tokens": 8} | choices))


@jax.jit
def _apply(params, tokens, state):
    return MODEL.apply({"params": params}, tokens, state)


def state_after(params, ids, state=None):
    """The state and the last logits of a plain loop over the ids."""
    state = init_state(CONFIG) if state is None else state
    for token in ids:
        logits, state = _apply(params, jnp.array([[token]]), state)
    return state, logits[:, 0]


def assert_close(ours, theirs):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4),
        ours,
        theirs,
    )


def test_greedy_generation_equals_a_plain_loop(params):
    out = run(params, PROMPTS[1], temperature=0, stop_ids=())
    state, logits = state_after(params, PROMPTS[1])
    expected = []
    for _ in range(8):
        expected.append(int(logits.argmax()))
        state, logits = state_after(params, expected[-1:], state)
    assert out.tokens == [expected] and out.finished == ["length"] and out.texts is None
    assert_close(out.state, state)
    assert_close(out.logits, logits)


def test_a_ragged_batch_of_prompts_matches_one_by_one(params):
    key = jax.random.key(7)
    together = run(params, PROMPTS, key=key, top_p=0.9, presence_penalty=0.5)
    for row, prompt in enumerate(PROMPTS):
        own = jax.random.fold_in(key, row)[None]
        alone = run(params, prompt, key=own, top_p=0.9, presence_penalty=0.5)
        assert alone.tokens[0] == together.tokens[row]
        assert_close(alone.state, select(together.state, row))


def test_penalties_and_bans_match_the_official_loop(params):
    pytest.importorskip("torch", reason="the oracle extra is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        utils = pytest.importorskip(
            "rwkv.utils", reason="the oracle extra is not installed"
        )
        import torch
    drawn = []

    class Official(utils.PIPELINE):
        """The official loop around this model."""

        def __init__(self):
            self.model = self
            self.tokenizer = BYTES

        def forward(self, tokens, state):
            state, logits = state_after(params, tokens, state)
            return torch.tensor(np.array(logits[0])), state

        def encode(self, text):
            return list(text)

        def decode(self, ids):
            return bytes(i - 1 for i in ids).decode(errors="replace")

        def sample_logits(self, logits, **choices):
            drawn.append(super().sample_logits(logits, **choices))
            return drawn[-1]

    banned = [0, 7, 93]
    spared = sampling.exempt_ids(BYTES)
    official = utils.PIPELINE_ARGS(0.0, 0.85, 0, 4.0, 2.0, 0.9, banned)
    Official().generate(PROMPTS[0], 24, official)
    watch = {"tokenizer": BYTES, "on_text": lambda piece, row: None}
    choices = {"presence_penalty": 2.0, "frequency_penalty": 4.0, "penalty_decay": 0.9}
    choices |= {"penalty_exempt": spared, "banned": banned, "temperature": 0}
    out = run(params, PROMPTS[0], tokens=24, **choices, **watch)
    assert out.tokens[0] == drawn and len(set(drawn)) > 8


def test_ids_of_the_prompt_are_not_penalized(params):
    choices = {"temperature": 0, "tokens": 1}
    plain = run(params, PROMPTS[0], **choices)
    # A negative penalty favours whatever counts as generated.
    favoured = run(params, PROMPTS[0], **choices, presence_penalty=-1e6)
    assert favoured.tokens == plain.tokens
    assert plain.tokens[0][0] not in PROMPTS[0]


def test_the_same_key_gives_the_same_tokens_and_another_gives_others(params):
    first, again, other = (
        run(params, PROMPTS[0], key=jax.random.key(i)) for i in (1, 1, 2)
    )
    assert first.tokens == again.tokens != other.tokens


def test_generate_under_jit_raises_a_sentence_with_the_remedy(params):
    def logits(params):
        return run(params, PROMPTS[0], temperature=0).logits

    for transformed in (jax.jit(logits), jax.jacrev(logits)):
        with pytest.raises(
            TypeError, match=r"^generate: it must be called outside jit"
        ):
            transformed(params)


def test_a_conversation_in_turns_matches_one_pass(params):
    out = run(params, PROMPTS, key=jax.random.key(5))
    turn = [[7, 8], [11], list(range(60, 74))]
    after = run(params, turn, out.state, tokens=0)
    for row in range(3):
        ids = PROMPTS[row] + out.tokens[row] + turn[row]
        state, logits = state_after(params, ids)
        assert_close(select(after.state, row), state)
        assert_close(after.logits[row : row + 1], logits)


@pytest.mark.parametrize("prompts", [PROMPTS[0], PROMPTS])
def test_a_truncated_answer_continues_from_its_state_and_logits(params, prompts):
    whole = run(params, prompts, temperature=0, stop_ids=())
    first = run(params, prompts, temperature=0, stop_ids=(), tokens=5)
    rest = run(
        params,
        [],
        first.state,
        logits=first.logits,
        temperature=0,
        stop_ids=(),
        tokens=3,
    )
    assert len(rest.tokens) == len(whole.tokens)
    for row, tokens in enumerate(whole.tokens):
        assert first.tokens[row] + rest.tokens[row] == tokens


def test_a_prompt_may_be_read_in_chunks_of_any_size(params):
    expected = state_after(params, PROMPTS[1])
    for chunk in (7, 16):
        out = run(params, PROMPTS[1], tokens=0, prefill_chunk=chunk)
        assert_close((out.state, out.logits), expected)
        assert out.tokens == [[]] and out.finished == ["length"]


@pytest.mark.parametrize(
    ("platform", "batch", "chunk"),
    [
        ("cpu", 1, 256),
        ("cpu", 64, 256),
        ("cuda", 1, 4096),
        ("cuda", 3, 1024),
        ("tpu", 8, 512),
        ("tpu", 100, 256),
    ],
)
def test_accelerators_read_more_tokens_at_once(monkeypatch, platform, batch, chunk):
    monkeypatch.setattr(platforms, "target_platform", lambda: platform)
    assert prefill.default_chunk(batch) == chunk


def test_a_stop_id_ends_only_its_row_and_is_not_read(params):
    free = run(params, PROMPTS, key=jax.random.key(5))
    stop = free.tokens[0][4]
    out = run(params, PROMPTS, key=jax.random.key(5), stop_ids=[stop])
    kept = free.tokens[0][: free.tokens[0].index(stop)]
    assert out.tokens[0] == kept and out.finished[0] == "stop"
    assert_close(select(out.state, 0), state_after(params, PROMPTS[0] + kept)[0])
    for row in (1, 2):
        assert out.tokens[row] == free.tokens[row] or stop in free.tokens[row]


@pytest.mark.parametrize("first, last", [(0, 1), (2, 5), (6, 10), (9, 12)])
def test_a_stop_string_may_span_tokens_and_the_state_precedes_it(
    params, text, first, last
):
    ids = text.tokens[0]
    stop = _ascii(ids)[first:last]
    out = _as_text(params, stop_strings=[stop, "never seen"])
    kept = _ascii(ids).index(stop)
    assert out.finished == ["stop"]
    assert out.texts == [_ascii(ids)[:kept]] and out.tokens == [ids[:kept]]
    state, logits = state_after(params, PROMPTS[0] + ids[:kept])
    assert_close(out.state, state)
    assert_close(out.logits, logits)


def _ascii(ids) -> str:
    """Every id as one printable character, most of them different."""
    return "".join(chr(33 + i % 90) for i in ids)


class _Ascii(Pairs):
    def token_bytes(self, token):
        return chr(33 + token % 90).encode()


def _as_text(params, **choices):
    key = jax.random.key(3)
    return run(params, PROMPTS[0], tokens=12, key=key, tokenizer=_Ascii(), **choices)


def test_a_shared_memory_stays_shared_when_a_row_stops():
    state = repeat(empty_state(CONFIG, "static"), 3)
    start = decoding.DecodeState.create(state, jnp.zeros((3, CONFIG.vocab_size)))
    stopped = start.stop_rows(jnp.array([True, False, True]), start)
    # Other shapes would compile the loop once more.
    assert jax.tree.map(jnp.shape, stopped) == jax.tree.map(jnp.shape, start)


def test_a_token_cut_by_a_stop_string_is_replaced_by_its_remaining_bytes(
    params,
):
    banned = range(128)  # only tokens of two bytes
    free = run(
        params, PROMPTS[0], key=jax.random.key(3), banned=banned, tokenizer=Pairs()
    )
    stop = free.texts[0][11:14]
    assert free.texts[0].index(stop) == 11
    out = run(
        params,
        PROMPTS[0],
        key=jax.random.key(3),
        banned=banned,
        tokenizer=Pairs(),
        stop_strings=[stop],
    )
    assert out.texts == [free.texts[0][:11]]
    assert out.tokens == [free.tokens[0][:5] + Pairs().encode(free.texts[0][10])]
    assert_close(out.state, state_after(params, PROMPTS[0] + out.tokens[0])[0])


# In a block before that of the other row's, or in the same one but begun in the block before.
@pytest.mark.parametrize("first, last", [(3, 5), (5, 10)])
def test_each_row_stops_at_its_own_stop_string(params, first, last):
    choices = {
        "tokens": 12,
        "key": jax.random.key(5),
        "tokenizer": _Ascii(),
        "stop_ids": (),
    }
    free = run(params, PROMPTS, stop_strings=["never"], **choices).texts
    pieces = ["", "", ""]
    stops = [free[0][first:last], free[1][9:11]]

    def collect(piece, row):
        pieces[row] += piece

    out = run(params, PROMPTS, stop_strings=stops, on_text=collect, **choices)
    assert pieces == out.texts
    for row, prompt in enumerate(PROMPTS):
        ends = [at for stop in stops if (at := free[row].find(stop)) >= 0]
        assert out.texts[row] == free[row][: min(ends, default=None)]
        assert_close(
            select(out.state, row), state_after(params, prompt + out.tokens[row])[0]
        )


def test_streamed_pieces_make_up_the_text(params, text):
    pieces = []
    out = run(
        params,
        PROMPTS[0],
        tokens=12,
        key=jax.random.key(3),
        tokenizer=BYTES,
        on_text=lambda piece, row: pieces.append(piece),
    )
    assert out.tokens == text.tokens
    assert all(pieces) and "".join(pieces) == out.texts[0]
    spelled = b"".join(BYTES.token_bytes(i) for i in out.tokens[0])
    assert out.texts[0] == spelled.decode(errors="replace")


def test_an_interrupted_row_ends_like_one_at_its_length(params):
    pieces = []
    out = _as_text(
        params,
        on_text=lambda piece, row: pieces.append(piece),
        should_stop=lambda: len(pieces) == 1,
    )
    short = run(params, PROMPTS[0], tokens=8, key=jax.random.key(3))
    assert out.tokens == short.tokens and out.finished == ["length"]
    assert out.texts == pieces
    jax.tree.map(np.testing.assert_array_equal, out.state, short.state)
    np.testing.assert_array_equal(out.logits, short.logits)
    unread = run(params, PROMPTS[0], temperature=0, should_stop=lambda: True)
    assert unread.tokens == [[]]


def test_no_call_of_the_same_shapes_compiles_again(params):
    def call(**choices):
        run(params, PROMPTS, key=jax.random.key(0), **choices)

    call()
    programs = decoding.decode, prefill.prefill
    before = [program._cache_size() for program in programs]
    call(temperature=0, tokens=7, banned=[3], stop_ids=(1, 2), top_k=4)
    call(
        temperature=0.5, top_p=0.2, presence_penalty=1.0, frequency_penalty=2, tokens=5
    )
    assert [program._cache_size() for program in programs] == before


def held_bytes():
    """Bytes of memory in which living arrays lie; two arrays may share some."""
    spans = []
    for array in jax.live_arrays():
        for shard in array.addressable_shards:
            begin = shard.data.unsafe_buffer_pointer()
            spans.append((begin, begin + shard.data.nbytes))
    total = 0
    covered = 0
    for begin, end in sorted(spans):
        total += max(0, end - max(begin, covered))
        covered = max(covered, end)
    return total


def test_a_cpu_keeps_one_copy_of_the_weights(params):
    expected = run(params, PROMPTS[0], temperature=0).tokens
    gc.collect()
    before = held_bytes()
    decoder = decoding.Decoder(
        MODEL,
        params,
        keys=jax.random.split(jax.random.key(0), 1),
        options=sampling.make_options(CONFIG.vocab_size, temperature=0),
        block=8,
    )
    start = decoding.DecodeState.create(init_state(CONFIG), jnp.zeros((1, 257)))
    decoded = decoder.decode(decoder.read(start, [PROMPTS[0]]), limit=8)
    assert decoded.tokens.tolist() == expected
    gc.collect()
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params["layers"]))
    # States, logits, tokens and options are new.
    assert held_bytes() - before < weights / 2


def test_weights_bound_to_a_device_compile_each_program_once(params):
    bound = jax.device_put(params, jax.devices()[1])
    watch = {"tokenizer": BYTES, "on_text": lambda piece, row: None, "temperature": 0}
    programs = (prefill.prefill, decoding.decode)
    before = [program._cache_size() for program in programs]
    run(bound, list(range(1, 40)), tokens=12, prefill_chunk=16, **watch)
    after = [program._cache_size() for program in programs]
    assert [new - old for new, old in zip(after, before, strict=True)] == [1, 1]


def test_a_given_state_is_repeated_for_every_row_and_not_modified(params):
    start, _ = state_after(params, [3, 4, 5])
    copy = jax.tree.map(np.array, start)
    out = run(params, PROMPTS, start, temperature=0)
    jax.tree.map(np.testing.assert_array_equal, start, copy)
    alone = run(params, PROMPTS[2], start, temperature=0)
    assert alone.tokens[0] == out.tokens[2]


@pytest.mark.parametrize("size", [-3e38, 3e38])
def test_huge_penalties_still_give_tokens(params, size):
    out = run(
        params,
        PROMPTS[0],
        key=jax.random.key(0),
        presence_penalty=size,
        frequency_penalty=size,
    )
    assert np.isfinite(np.asarray(out.logits)).all() and len(out.tokens[0]) <= 8


def test_weights_that_give_nan_are_reported(params):
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, params)
    with pytest.raises(
        ValueError, match=r"generate: .* finite logits; row 0 got non-finite ones after"
    ):
        run(broken, PROMPTS[0], key=jax.random.key(0))


@pytest.mark.parametrize(("implementation", "calls"), [(None, 1), ("scan", 0)])
def test_decoding_on_a_tpu_runs_the_kernel_unless_another_is_named(
    implementation, calls
):
    config = RWKV7Config(
        vocab_size=257,
        num_layers=1,
        width=32,
        head_size=32,
        implementation=implementation,
    )
    run = decoding.DecodeState.create(init_state(config), jnp.zeros((1, 257)))
    with jax.sharding.use_abstract_mesh(abstract_devices.mesh("tpu")):
        traced = decoding.decode.trace(
            RWKV7(config),
            random_params(config),
            run,
            known=decoding.KnownTokens(np.zeros(1, np.int32), np.zeros(1, bool)),
            keys=jax.random.split(jax.random.key(0), 1),
            options=sampling.make_options(257),
            limits=np.full(1, 8),
            capacity=8,
        )
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    # The loop has one body for known and sampled tokens.
    assert text.count("wkv7_token_kernel") == calls


@pytest.mark.parametrize("batch", [1, 3])
def test_a_tpu_decodes_few_rows_next_to_idle_ones(params, monkeypatch, batch):
    tokens = jax.random.normal(jax.random.key(1), (batch, CONFIG.vocab_size))
    start = repeat(init_state(CONFIG), batch)
    options = [sampling.make_options(257, temperature=t) for t in (0.7, 0.0, 1.0)]
    arguments = {
        "known": decoding.KnownTokens(
            np.array([3, 4, 5], np.int32)[:batch], np.array([True, False, True])[:batch]
        ),
        "keys": jax.random.split(jax.random.key(0), batch),
        "options": sampling.options_by_row(options[:batch]),
        "limits": jnp.array([6, 3, 8])[:batch],
        "capacity": 8,
        "alternatives": 2,
        "scored": jnp.array(True),
    }
    layers = split_params(params)
    run = decoding.DecodeState.create(start, tokens)
    expected = decoding.decode(MODEL, layers, run, **arguments)
    monkeypatch.setattr(platforms, "target_platform", lambda: "tpu")
    # Without the program that is kept for the other platform.
    found = decoding.decode.__wrapped__(MODEL, layers, run, **arguments)
    assert_trees_close(found, expected, SAME["model"])
