"""A larger model's completions of prompts that nobody has answered, as traces."""

import collections
import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from rwkv7_jax.array_types import Params
from rwkv7_jax.checkpoints.model_files import model_hash
from rwkv7_jax.checks import check_count, check_function, check_prompts, typed_key
from rwkv7_jax.generation.sampling import Ids as StopIds
from rwkv7_jax.generation.sampling import Number
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import RWKV7State
from rwkv7_jax.test_time.completion_cache import CompletionCache
from rwkv7_jax.test_time.rewards import RewardFunction, evaluate_rewards
from rwkv7_jax.test_time.rollouts import rollouts
from rwkv7_jax.test_time.traces import Ids, TokenBudget, Trace

Extract = Callable[[Ids], Hashable]


def collect_traces(
    guide: RWKV7,
    guide_params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    tokens: int,
    key: Array,
    samples: int = 1,
    state: RWKV7State | None = None,
    template: Callable[[Ids], Sequence[int]] | None = None,
    verify: RewardFunction | None = None,
    vote: tuple[Extract, float] | None = None,
    temperature: Number = 1.0,
    stop_ids: StopIds = (0,),
    source: str = "guide",
    cache: str | Path | None = None,
    at_once: int = 8,
    on_progress: Callable[[int, int], Any] | None = None,
) -> tuple[list[Trace], TokenBudget]:
    """Traces of what the guide wrote and a judge kept, in the prompts' order, and what they cost.

    The guide reads each prompt once. A prompt's completions depend on the key, on its own ids and
    on how often it came before, not on its neighbours; so with `cache` a run that was killed goes
    on where it stopped and ends with the same traces and the same budget.

    Args:
        guide: the larger model, or the student itself.
        guide_params: its weights.
        prompts: lists of ids as the student shall see them.
        tokens: ids drawn a completion at most.
        key: one random key.
        samples: completions a prompt.
        state: what the guide starts from (batch 1).
        template: from a prompt to what the guide reads in its place: an instruction, a hint, a
            demand to think aloud. The traces keep the student's prompt.
        verify: `(prompt, completion) -> number` of the student's prompt; above 0 keeps the
            completion, and is its weight (a bool counts as 0 or 1).
        vote: `(extract, margin)`, instead of `verify`: of each prompt's completions those are kept
            whose `extract(completion)` is the most frequent answer, if it leads the second by at
            least `margin`, a share of `samples`, and by one. An answer of None does not vote.
        temperature: of the sampling.
        stop_ids: ids that end a completion; they are part of it.
        source: who wrote the traces.
        cache: a file to which completions are appended before they are judged, and from which
            those of the same guide, state, prompt, key and choices are taken.
        at_once: prompts in one batch.
        on_progress: called with the number of prompts done and of all.

    Raises:
        ValueError: an argument out of its range, or a judge that raised or gave no number; what is
            in the cache stays there.
    """
    for name, value in (("tokens", tokens), ("samples", samples), ("at_once", at_once)):
        check_count(value, 1, f"collect_traces: `{name}`")
    keep = _keeper(verify, vote, source)
    key = typed_key(key, caller="collect_traces")
    if key.ndim:
        raise ValueError(f"collect_traces: `key` must be one key; got shape {key.shape}.")
    questions = _questions(guide, prompts, template)
    choices = {"tokens": tokens, "temperature": temperature, "stop_ids": stop_ids}
    draw = functools.partial(
        _draw, guide, guide_params, state, key=key, samples=samples, choices=choices
    )
    store, stamp = None, ""
    if cache is not None:
        store = CompletionCache(cache)
        stamp = _stamp(guide, guide_params, state, key, {"samples": samples, **choices})
    traces, spent, width = [], 0, min(at_once, len(questions))
    for first in range(0, len(questions), at_once):
        part = questions[first : first + at_once]
        for question, completions in zip(
            part, _answered(part, draw, width, store, stamp), strict=True
        ):
            traces += keep(question, completions)
            spent += len(question.asked) + sum(map(len, completions))
        if on_progress:
            on_progress(first + len(part), len(questions))
    return traces, TokenBudget(guide_tokens=spent)


@dataclasses.dataclass(frozen=True)
class _Question:
    """A prompt among others.

    Attributes:
        index: its place.
        prompt: as the student sees it.
        asked: what the guide reads.
        identity: a digest of both and of how often they came before.
    """

    index: int
    prompt: Ids
    asked: list[int]
    identity: str


def _questions(guide: RWKV7, prompts: Any, template) -> list[_Question]:
    """The prompts with what the guide reads for them."""
    check = functools.partial(
        check_prompts, vocab_size=guide.config.vocab_size, caller="collect_traces"
    )
    rows = asked = check(prompts)
    if template is not None:
        check_function(template, "collect_traces: `template`")
        asked = []
        for index, row in enumerate(rows):
            try:
                asked.append(template(tuple(row)))
            except Exception as error:
                kind = type(error).__name__
                raise ValueError(
                    f"collect_traces: `template` of prompt {index} raised {kind}: {error}"
                ) from error
        asked = check(asked, name="template")
    questions, before = [], collections.Counter()
    for index, pair in enumerate(zip(rows, asked, strict=True)):
        text = json.dumps(pair)
        identity = _digest(text, str(before[text]))
        before[text] += 1
        questions.append(_Question(index, tuple(pair[0]), pair[1], identity))
    return questions


def _digest(*parts: str | bytes) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        part = part.encode() if isinstance(part, str) else part
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()


def _stamp(guide, guide_params, state: RWKV7State | None, key: Array, choices: dict) -> str:
    """A digest of all that completions depend on beside their question."""
    leaves = [] if state is None else jax.tree.leaves(state)
    choices = {name: np.asarray(value).tolist() for name, value in choices.items()}
    return _digest(
        model_hash(guide_params, guide.config),
        str(jax.tree.structure(state)),
        *(np.asarray(leaf, np.float32).tobytes() for leaf in leaves),
        np.asarray(jax.random.key_data(key)).tobytes(),
        json.dumps(choices, sort_keys=True),
    )


def _draw(guide, guide_params, state, part, *, width: int, key, samples: int, choices: dict):
    """Each question's completions; `width` questions are drawn, so that one program serves all."""
    filled = [*part, *[part[-1]] * (width - len(part))]
    folds = jnp.asarray([int(question.identity[:8], 16) for question in filled], jnp.uint32)
    fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    keys = jax.vmap(fold, in_axes=(0, None))(fold(key, folds), jnp.arange(samples))
    asked = [question.asked for question in filled]
    drawn = rollouts(
        guide, guide_params, state, asked, group=samples, key=keys.reshape(-1), **choices
    )
    return [drawn.completions[i * samples : (i + 1) * samples] for i in range(len(part))]


def _answered(part, draw, width: int, store: CompletionCache | None, stamp: str) -> list[list[Ids]]:
    """Each question's completions, from the store where it has them; new ones are stored."""
    if store is None:
        return draw(part, width=width)
    keys = {question.index: _digest(stamp, question.identity) for question in part}
    new = [question for question in part if store.get(keys[question.index]) is None]
    if new:
        for question, completions in zip(new, draw(new, width=width), strict=True):
            store.put(keys[question.index], question.prompt, completions)
    return [store.get(keys[question.index]) for question in part]


def _keeper(verify, vote, source: str) -> Callable[[_Question, list[Ids]], list[Trace]]:
    """What makes traces of a question's completions."""
    if verify is not None and vote is not None:
        raise ValueError("collect_traces: `verify` and `vote` exclude each other; got both.")
    weigh = functools.partial(_verified, verify)
    if vote is not None:
        extract, margin = _checked_vote(vote)
        weigh = functools.partial(_majority, extract, margin)
    elif verify is None:
        weigh = _everything
    else:
        check_function(verify, "collect_traces: `verify`")

    def keep(question, completions):
        weights = weigh(question, completions)
        pairs = zip(completions, weights, strict=True)
        return [Trace(question.prompt, ids, weight, source) for ids, weight in pairs if weight > 0]

    return keep


def _everything(question: _Question, completions: list[Ids]) -> list[float]:
    return [1.0] * len(completions)


def _checked_vote(vote: Any) -> tuple[Extract, float]:
    if not (isinstance(vote, tuple) and len(vote) == 2 and callable(vote[0])):
        raise TypeError(f"collect_traces: `vote` must be a function and a margin; got {vote!r}.")
    if not 0 <= vote[1] <= 1:
        raise ValueError(f"collect_traces: `vote` must have a margin from 0 to 1; got {vote[1]}.")
    return vote


def _verified(verify: RewardFunction, question: _Question, completions: list[Ids]) -> list[float]:
    """What the verifier says of each."""
    prompts = [question.prompt] * len(completions)
    many = {"group": len(completions), "first": question.index}
    weights = evaluate_rewards(
        verify, prompts, completions, name="collect_traces: `verify`", **many
    )
    if (weights < 0).any():
        raise ValueError(
            f"collect_traces: `verify` of prompt {question.index} must be at least 0; "
            f"got {weights.min()}."
        )
    return weights.tolist()


def _majority(
    extract: Extract, margin: float, question: _Question, completions: list[Ids]
) -> list[float]:
    """1 for those that give the most frequent answer, if it leads by enough; else 0."""
    answers, votes = [], collections.Counter()
    for completion in completions:
        try:
            answers.append(extract(completion))
            votes[answers[-1]] += 1
        except Exception as error:
            raise ValueError(
                f"collect_traces: `vote` of prompt {question.index} raised "
                f"{type(error).__name__}: {error}"
            ) from error
    del votes[None]
    (best, most), (_, second) = [*votes.most_common(2), (None, 0), (None, 0)][:2]
    lead = most - second
    enough = lead > 0 and lead / len(completions) >= margin
    return [float(enough and answer == best) for answer in answers]
