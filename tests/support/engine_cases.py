"""A small model, its start states, and requests, for tests of the engine."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from upscaled_states import empty_state, filled

from rwkv7_jax.generation.generate import generate
from rwkv7_jax.generation.sampling import exempt_ids
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import init_state
from rwkv7_jax.serving.requests import Request
from rwkv7_jax.text.tokenizer import Tokenizer
from rwkv7_jax.tuning.state_arithmetic import weighted_sum

CONFIG = RWKV7Config(
    vocab_size=257, num_layers=2, width=32, head_size=16, implementation="scan"
)
MODEL = RWKV7(CONFIG)
BYTES = Tokenizer.bytes()


def drawn_state(seed, scale=1.0):
    """A start state that changes what the model says."""
    state = init_state(CONFIG)
    draws = np.random.default_rng(seed).normal(size=state.wkv.shape)
    return state.replace(wkv=jnp.asarray(scale * draws, jnp.float32))


STATES = {"poet": drawn_state(1), "judge": drawn_state(2)}


def ask(engine, request):
    """Queues a request; returns its pieces and its answers, which the engine fills."""
    pieces, answers = [], []
    engine.submit(request, on_piece=pieces.append, on_end=answers.append)
    return pieces, answers


def work(engine):
    ticks = 0
    while engine.tick():
        ticks += 1
        assert ticks < 1000
    return ticks


def answer(engine, request):
    _, answers = ask(engine, request)
    work(engine)
    (only,) = answers
    return only


def compiled_by(engine, requests):
    """Answers requests with long prompts; returns the events of programs that it compiled."""
    events = []

    def note(name, seconds, **_):
        if name == "/jax/core/compile/backend_compile_duration":
            events.append(name)

    jax.monitoring.register_event_duration_secs_listener(note)
    for request in requests:
        ask(engine, dataclasses.replace(request, prompt=request.prompt * 9))
    work(engine)
    jax.monitoring.clear_event_listeners()
    return events


def alone(params, request, states=STATES):
    """The same request by `generate`."""
    return generate(
        MODEL,
        params,
        [list(request.prompt)],
        states[request.state] if request.state else None,
        tokens=request.tokens,
        key=jax.random.key(request.seed)[None],
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        penalty_decay=request.penalty_decay,
        penalty_exempt=exempt_ids(BYTES),
        stop_ids=(*BYTES.stop_ids, *request.stop_ids),
        stop_strings=request.stop_strings,
        tokenizer=BYTES,
    )


def assert_same(answer, expected):
    assert answer.tokens == tuple(expected.tokens[0])
    assert answer.text == expected.texts[0]
    assert answer.ended == expected.ended[0]


def drawn_requests(count, seed=0):
    """Requests of all kinds."""
    random = np.random.default_rng(seed)
    requests = []
    for index in range(count):
        request = Request(
            prompt=tuple(random.integers(1, 256, random.integers(1, 40)).tolist()),
            state=(None, "poet", "judge")[index % 3],
            tokens=int(random.integers(1, 30)),
            seed=int(random.integers(0, 2**40)),
            temperature=float(random.choice([0.0, 0.7, 1.3])),
            top_p=float(random.choice([1.0, 0.8, 0.0])),
            top_k=int(random.choice([0, 5])),
            presence_penalty=float(random.choice([0.0, 0.6])),
            frequency_penalty=float(random.choice([0.0, 0.3])),
            stop_ids=tuple(random.integers(1, 256, index % 4).tolist()),
            stop_strings=(*"aeiou tnr", "z\u00e4")[: 5 * (index % 3)],
        )
        requests.append(request)
    return requests


def wide_states(dynamics):
    """A plain state, two upscaled ones, and a mixture of these."""
    write = 0.0 if dynamics == "static" else 0.4
    empty = empty_state(CONFIG, dynamics)
    first = filled(empty, seed=1, size=20.0, write=write)
    second = filled(empty, seed=2, size=20.0, write=write)
    first = first.replace(wkv=STATES["poet"].wkv)
    mixed = weighted_sum([first, second], [0.6, 0.4])
    return {"poet": STATES["poet"], "one": first, "two": second, "mixed": mixed}


def requests_of(states):
    """A request for each state, and one without a state."""
    plain = Request((40, 41), tokens=6, temperature=0.0)
    return [dataclasses.replace(plain, state=name) for name in (None, *states)]
