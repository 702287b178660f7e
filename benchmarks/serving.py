"""Batched decoding of concurrent requests next to the same requests one after another.

Run from the repository's root: `python -m benchmarks.serving [--json FILE]`. The model is random,
of the 0.1B size by default. Prompts have 16 to 256 tokens, all answers have the same length, and
there are four start states. Every answer is compared with that of `generate`. Time to first text
counts from the arrival of the first request, so most of it is queueing.
"""

import argparse
import statistics
import time
from collections.abc import Sequence

import jax
import numpy as np

from benchmarks import record
from benchmarks.decode import random_model
from benchmarks.timing import take_turns
from rwkv7_jax.generation.generate import generate
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.model.state import init_state
from rwkv7_jax.serving import Answer, Engine, Request
from rwkv7_jax.text.tokenizer import Tokenizer

SLOTS = (1, 8, 32)
# The slots that are also measured with one request at a time: the cost of free ones.
IN_TURNS = 8
STATES = 4


def draw_states(config: RWKV7Config) -> dict:
    """Draws start states that differ."""
    random = np.random.default_rng(1)
    states = {}
    for index in range(STATES):
        state = init_state(config)
        wkv = 0.1 * random.standard_normal(state.wkv.shape, np.float32)
        states[f"state-{index}"] = state.replace(wkv=jax.numpy.asarray(wkv))
    return states


def draw_requests(vocab_size: int, count: int, tokens: int) -> list[Request]:
    """Draws prompts of 16 to 256 tokens, each for one of the states in turn."""
    random = np.random.default_rng(2)
    requests = []
    for index in range(count):
        prompt = random.integers(1, vocab_size, random.integers(16, 257))
        request = Request(
            prompt=tuple(prompt.tolist()),
            state=f"state-{index % STATES}",
            tokens=tokens,
            seed=index,
            temperature=0.8,
            top_p=0.9,
        )
        requests.append(request)
    return requests


class Together:
    """Requests that an engine answers."""

    def __init__(
        self, engine: Engine, requests: Sequence[Request], *, in_turns: bool = False
    ):
        """Compiles what they need.

        Args:
            engine: the engine.
            requests: all come at once.
            in_turns: each comes when the one before is answered.
        """
        self.answers: dict[int, Answer] = {}
        self.first_text: dict[int, float] = {}
        self._engine = engine
        self._requests = requests
        self._in_turns = in_turns
        engine.warm_up()

    def __call__(self) -> None:
        """Answers all requests."""
        self.first_text.clear()
        began = time.perf_counter()
        for index, request in enumerate(self._requests):
            self._engine.submit(
                request,
                on_piece=lambda _, index=index: self.first_text.setdefault(
                    index, time.perf_counter() - began
                ),
                on_end=lambda answer, index=index: self.answers.update({index: answer}),
            )
            if self._in_turns:
                self._answer_all()
        self._answer_all()

    def _answer_all(self) -> None:
        while self._engine.tick():
            pass


class OneByOne:
    """The same requests by `generate`."""

    def __init__(self, model, params, states: dict, requests: Sequence[Request]):
        """Takes what to run."""
        self.tokens: list[tuple[int, ...]] = []
        self._call = (model, params)
        self._states = states
        self._requests = requests

    def __call__(self) -> None:
        """Answers each request after the other."""
        self.tokens = []
        for request in self._requests:
            out = generate(
                *self._call,
                list(request.prompt),
                self._states[request.state],
                tokens=request.tokens,
                key=jax.random.key(request.seed)[None],
                temperature=request.temperature,
                top_p=request.top_p,
            )
            self.tokens.append(tuple(out.tokens[0]))


def measure(model, params, requests: Sequence[Request], rounds: int) -> dict:
    """Measures all ways in turn; of several rounds the medians."""
    states = draw_states(model.config)
    tokenizer = Tokenizer.for_vocabulary(model.config.vocab_size)
    alone = OneByOne(model, params, states, requests)
    together: dict[int | str, Together] = {}
    for slots in SLOTS:
        engine = Engine(
            model,
            params,
            tokenizer,
            states,
            slots=slots,
            queue=len(requests),
            cache_bytes=0,
        )
        together[slots] = Together(engine, requests)
        if slots == IN_TURNS:
            name = f"{slots}, one request at a time"
            together[name] = Together(engine, requests, in_turns=True)
    alone()
    seconds = take_turns({"generate": alone} | together, rounds)
    drawn = sum(map(len, alone.tokens))
    rows = {}
    for name, found in seconds.items():
        wall = statistics.median(one.wall for one in found)
        rows[str(name)] = {"tokens_per_second": drawn / wall}
    one_by_one = rows["generate"]["tokens_per_second"]
    for name, run in together.items():
        row = rows[str(name)]
        row["rate_over_generate"] = row["tokens_per_second"] / one_by_one
        firsts = sorted(run.first_text.values())
        row["median_seconds_to_first_text"] = statistics.median(firsts)
        same = [
            run.answers[index].tokens == tokens
            for index, tokens in enumerate(alone.tokens)
        ]
        row["answers_equal_to_generate"] = f"{sum(same)} of {len(same)}"
    return rows


def main() -> None:
    """Measures, prints a line for each way, and writes the file that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--vocab-size", type=int, default=65536)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json")
    options = parser.parse_args()
    model, params = random_model(options.layers, options.width, options.vocab_size)
    requests = draw_requests(options.vocab_size, options.requests, options.tokens)
    rows = measure(model, params, requests, options.rounds)
    for name, row in rows.items():
        print(name, row)
    if options.json:
        sizes = vars(options) | {"json": None}
        record.write(options.json, "benchmarks.serving", sizes=sizes, rows=rows)


if __name__ == "__main__":
    main()
