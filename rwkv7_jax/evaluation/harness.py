"""RWKV-7 as a model of lm-evaluation-harness, from any start state.

Only this module needs the package lm-eval, which is large and takes seconds to import.
"""

import functools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from rwkv7_jax.array_types import Lengths, Params, Tokens
from rwkv7_jax.checks import (
    check_count,
    check_ids,
    check_not_intercepted,
    check_runnable,
    check_tokenizer,
    prefix_errors,
)
from rwkv7_jax.generation.generate import commit_like, generate
from rwkv7_jax.generation.prefill import chunk_widths, cut_chunk, prefill_rows
from rwkv7_jax.generation.sampling import fold_keys
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import RWKV7State, check_state, init_state, repeat, select
from rwkv7_jax.text.tokenizer import END_OF_TEXT, Tokenizer
from rwkv7_jax.training.head_loss import token_statistics

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
except ImportError:
    raise ImportError(
        "Tasks of lm-evaluation-harness need the package lm-eval: "
        "pip install 'rwkv7_jax[harness]'."
    ) from None

# Tokens per row and prefill chunk.
_CHUNK = 256

# The generation options of tasks; `normalize_gen_kwargs` maps other spellings to these.
_OPTIONS = ("until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k")


class _Sampling(NamedTuple):
    """The generation options of a request."""

    until: tuple[str, ...]
    tokens: int
    temperature: float
    top_p: float
    top_k: int


def split_pair(context: str, continuation: str) -> tuple[str, str]:
    """Moves whitespace from the end of a context to the beginning of its continuation."""
    stripped = context.rstrip()
    return stripped, context[len(stripped) :] + continuation


class StateLM(TemplateLM):
    """A model of lm-evaluation-harness that starts every context from the same state.

    The ids `bos` precede every context. By default there are none: a tuned state stands where the
    rows of its training began, and the zero state is the start of a text. If nothing precedes the
    first scored token (an empty context, or a text that is scored from its start), the model first
    reads the end-of-text id, because that token's probability needs a token before it.

    A context that several continuations or requests share is read once. The common prefix of a
    task's contexts, such as few-shot examples, is read once too.

    Attributes:
        tokens_read: context tokens read so far.
        split_pairs: continuations whose first token would have spanned the border to the context.
            They are encoded separately. A byte vocabulary has none.
        on_progress: called with the number of finished requests and the number of all requests of
            one call of the harness; None by default.
    """

    def __init__(
        self,
        model: RWKV7,
        params: Params,
        tokenizer: Tokenizer,
        state: RWKV7State | None = None,
        *,
        rows: int = 8,
        bos: Sequence[int] = (),
        max_tokens: int = 256,
    ):
        """Binds the model and its start state.

        Args:
            model: the network.
            params: its weights.
            tokenizer: its tokenizer.
            state: batch 1; None means the zero state.
            rows: batch size for contexts, continuations and answers.
            bos: ids before every context.
            max_tokens: most tokens of an answer if its task sets no limit.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: the weights or the state do not fit the model, an id is out of range, a
                count is below 1, or it is called inside `flax.linen.intercept_methods`.
        """
        super().__init__()
        with prefix_errors("StateLM"):
            check_runnable(model, params)
            check_tokenizer(tokenizer, "encode", "token_bytes")
            if state is None:
                state = init_state(model.config)
            check_state(state, 1, model.config)
            check_count(rows, 1, "`rows`")
            check_count(max_tokens, 1, "`max_tokens`")
            self.bos = tuple(check_ids(bos, model.config.vocab_size, "`bos`").tolist())
        self._model = model
        self._params = params
        self._tokenizer = tokenizer
        self._start = commit_like(params, state)
        self._rows = rows
        self._max_tokens = max_tokens
        self.tokens_read = 0
        self.split_pairs = 0
        self.on_progress: Callable[[int, int], Any] | None = None
        self._asked = 0
        self._finished = 0

    def _begin_call(self, requests: int) -> None:
        """Counts from 0 to the number of requests of a call of the harness."""
        self._asked = requests
        self._finished = 0

    def _finish(self, requests: int) -> None:
        """Reports that some more requests are finished."""
        self._finished += requests
        if self.on_progress is not None:
            self.on_progress(self._finished, self._asked)

    @property
    def eot_token_id(self) -> int:
        """The end-of-text id, read before an empty context."""
        end = self._tokenizer.end_of_text
        return END_OF_TEXT if end is None else end

    @property
    def tokenizer_name(self) -> str:
        """The vocabulary's name, under which the harness may cache requests."""
        return self._tokenizer.name

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Encodes a text and adds no special token."""
        del add_special_tokens
        return [int(number) for number in self._tokenizer.encode(string)]

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Scores continuations after their contexts.

        Args:
            requests: instances with (context, continuation). Whitespace at the end of a context
                counts as part of the continuation, as everywhere in the harness.
            disable_tqdm: ignored; there is no progress bar.

        Returns:
            For each request the log-probability of the continuation, and whether greedy decoding
            produces it.
        """
        del disable_tqdm
        self._begin_call(len(requests))
        # Contexts share a prefix within a task, not across tasks.
        by_task = defaultdict(list)
        for index, request in enumerate(requests):
            by_task[request.task_name].append(index)
        results: list[Any] = [None] * len(requests)
        for indices in by_task.values():
            scores = self._score_pairs([requests[index].args for index in indices])
            for index, result in zip(indices, scores, strict=True):
                results[index] = result
        return results

    def score_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Scores pairs of a context and a continuation; see `loglikelihood`."""
        self._begin_call(len(pairs))
        return self._score_pairs(pairs)

    def _score_pairs(
        self, pairs: Sequence[tuple[str, str]]
    ) -> list[tuple[float, bool]]:
        encoded = [(pair, *self._encode_pair(*pair)) for pair in pairs]
        return self._loglikelihood_tokens(encoded)

    def _encode_pair(
        self, context: str, continuation: str
    ) -> tuple[list[int], list[int]]:
        """Encodes both parts.

        If a token would span the border, each part is encoded by itself. The harness's method would
        lose the bytes of the continuation in that token.
        """
        context, continuation = split_pair(context, continuation)
        before = self.tok_encode(context)
        both = self.tok_encode(context + continuation)
        if both[: len(before)] == before:
            return before, both[len(before) :]
        self.split_pairs += 1
        return before, self.tok_encode(continuation)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        **_: Any,
    ) -> list[tuple[float, bool]]:
        asked = defaultdict(list)
        for index, (_pair, context, _continuation) in enumerate(requests):
            asked[self._begin(context)].append(index)
        contexts = sorted(asked)
        results: list[Any] = [None] * len(requests)
        shared, start = self._read_shared(contexts)
        for first in range(0, len(contexts), self._rows):
            part = contexts[first : first + self._rows]
            # `_score` reads the last token, which predicts the first token of the continuation.
            states = self._read(
                self._filled([context[shared:-1] for context in part]), start
            )
            self.tokens_read += len(part)
            questions = []
            for row, context in enumerate(part):
                questions += [(row, index) for index in asked[context]]
            for begin in range(0, len(questions), self._rows):
                batch = questions[begin : begin + self._rows]
                rows = [row for row, _ in batch]
                continuations = [requests[index][2] for _, index in batch]
                last = [part[row][-1] for row in rows]
                scores = self._score(rows, states, last, continuations)
                for (_row, index), result in zip(batch, scores, strict=True):
                    results[index] = result
                self._finish(len(batch))
        for (pair, _context, _continuation), result in zip(
            requests, results, strict=True
        ):
            self.cache_hook.add_partial("loglikelihood", pair, result)
        return results

    def loglikelihood_rolling(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Scores whole texts in one pass: the state needs no overlapping windows.

        Args:
            requests: instances with (text,).
            disable_tqdm: ignored; there is no progress bar.
        """
        del disable_tqdm
        self._begin_call(len(requests))
        encoded = []
        for request in requests:
            (text,) = request.args
            encoded.append((("", text), [], self.tok_encode(text)))
        return [value for value, _ in self._loglikelihood_tokens(encoded)]

    def generate_until(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[str]:
        """Generates answers in batches, until a stop sequence, end of text or the token limit.

        Args:
            requests: instances with (context, options).
            disable_tqdm: ignored; there is no progress bar.

        Raises:
            ValueError: a task sets an option that the sampler does not have.
        """
        del disable_tqdm
        self._begin_call(len(requests))
        groups: dict[Any, dict[Any, list[int]]] = defaultdict(lambda: defaultdict(list))
        for index, request in enumerate(requests):
            context, options = request.args
            sampling = _read_sampling(options, self._max_tokens)
            # Greedy answers to the same context are equal; each request samples its own.
            draw = index if sampling.temperature > 0 else 0
            answer = (self._begin(self.tok_encode(context)), draw)
            groups[request.task_name, sampling][answer].append(index)
        results = [""] * len(requests)
        for (_, sampling), asked in groups.items():
            texts = self._generate(asked, sampling)
            for answer, text in zip(sorted(asked), texts, strict=True):
                for index in asked[answer]:
                    results[index] = text
        for request, text in zip(requests, results, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return results

    def _generate(
        self,
        asked: Mapping[tuple[tuple[int, ...], int], list[int]],
        sampling: _Sampling,
    ) -> list[str]:
        """Generates one text for each pair of a context and the number of its draw, in order.

        Args:
            asked: the requests of each pair.
            sampling: their options.
        """
        answers = sorted(asked)
        shared, start = self._read_shared([context for context, _ in answers])
        texts: list[str] = []
        for first in range(0, len(answers), self._rows):
            part = answers[first : first + self._rows]
            self.tokens_read += sum(len(context) - shared for context, _ in part)
            # Repeat the last row so that all batches have one shape and one program.
            filled = part + part[-1:] * (self._rows - len(part))
            draws = jnp.array([draw for _, draw in filled])
            generated = generate(
                self._model,
                self._params,
                [context[shared:] for context, _ in filled],
                start,
                tokens=sampling.tokens,
                key=fold_keys(jax.random.key(0), draws),
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                stop_ids=self._tokenizer.stop_ids,
                stop_strings=sampling.until,
                tokenizer=self._tokenizer,
            )
            assert generated.texts is not None
            texts += generated.texts[: len(part)]
            self._finish(sum(len(asked[answer]) for answer in part))
        return texts

    def _begin(self, context: Sequence[int]) -> tuple[int, ...]:
        """Prepends the ids that precede every context."""
        return (*self.bos, *context) or (self.eot_token_id,)

    def _filled(self, rows: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """Pads with empty rows, so that all batches have one shape and one program."""
        return rows + [()] * (self._rows - len(rows))

    def _read_shared(self, contexts: list[tuple[int, ...]]) -> tuple[int, RWKV7State]:
        """Reads the common prefix of the sorted contexts; returns its length and the state."""
        # The model runs only after this, in `loglikelihood` as in `generate_until`.
        with prefix_errors("StateLM"):
            check_not_intercepted()
        if len(contexts) < 2:
            return 0, self._start
        # In sorted order, the common prefix of the first and the last is that of all.
        first = contexts[0]
        last = contexts[-1]
        # `_score` needs one unread token of each context.
        most = min(len(first), len(last)) - 1
        count = 0
        while count < most and first[count] == last[count]:
            count += 1
        return count, self._read([first[:count]], self._start)

    def _read(self, rows: Sequence[Sequence[int]], start: RWKV7State) -> RWKV7State:
        """Prefills the rows from a state of batch 1 and returns the state of every row."""
        self.tokens_read += sum(map(len, rows))
        states = repeat(start, len(rows))
        return prefill_rows(self._model, self._params, states, rows, chunk=_CHUNK)

    def _score(
        self,
        rows: list[int],
        states: RWKV7State,
        last: list[int],
        continuations: list[list[int]],
    ) -> list[tuple[float, bool]]:
        """Scores one continuation per row.

        Args:
            rows: index into `states` for each continuation.
            states: states before the last token of each context.
            last: that token, for each continuation.
            continuations: ids of each continuation.
        """
        missing = self._rows - len(rows)
        states = select(states, np.array(rows + [0] * missing))
        inputs = []
        for token, continuation in zip(last, continuations, strict=True):
            inputs.append((token, *continuation[:-1]))
        targets = self._filled([tuple(ids) for ids in continuations])
        inputs = self._filled(inputs)
        nats = np.zeros(self._rows)
        greedy = np.ones(self._rows, bool)
        for first, width in chunk_widths(max(map(len, targets)), _CHUNK):
            tokens, _ = cut_chunk(inputs, first, width)
            wanted, lengths = cut_chunk(targets, first, width)
            states, part, correct = _score_chunk(
                self._model,
                self._params,
                states,
                tokens=tokens,
                targets=wanted,
                lengths=lengths,
            )
            counts = np.arange(width) < lengths[:, None]
            # A text may have a hundred thousand tokens, too many for a float32 sum.
            nats += np.where(counts, part, 0).sum(1, dtype=np.float64)
            greedy &= (np.asarray(correct) | ~counts).all(1)
        return [(-float(nats[row]), bool(greedy[row])) for row in range(len(rows))]


@functools.partial(jax.jit, static_argnums=0)
def _score_chunk(
    model: RWKV7,
    params: Params,
    states: RWKV7State,
    *,
    tokens: Tokens,
    targets: Tokens,
    lengths: Lengths,
) -> tuple[RWKV7State, Array, Array]:
    """Returns the states after the tokens, each target's loss and whether it is most likely."""
    x, states = model.apply(
        {"params": params}, tokens, states, lengths, method="hidden"
    )
    statistics = token_statistics(x, params["head"]["weight"], targets)
    return states, statistics.nats, statistics.correct


def _read_sampling(options: Mapping[str, Any], max_tokens: int) -> _Sampling:
    """Parses a request's options.

    Raises:
        ValueError: an option is unknown; without it the answers would not be the task's.
    """
    known: Any = normalize_gen_kwargs(dict(options), default_max_gen_toks=max_tokens)
    for name in known:
        if name not in _OPTIONS:
            raise ValueError(
                f"StateLM.generate_until: a task's options must be {', '.join(_OPTIONS)}; "
                f"got `{name}`."
            )
    return _Sampling(
        until=tuple(known["until"]),
        tokens=known["max_gen_toks"],
        temperature=known.get("temperature", 0.0) if known["do_sample"] else 0.0,
        top_p=known.get("top_p", 1.0),
        top_k=known.get("top_k", 0),
    )
