"""A start state that learns completions: a guide's, or its own that a reward approved."""

import functools
from collections.abc import Sequence

import jax
import numpy as np
import optax
from jaxtyping import Array

from rwkv7_jax.array_types import Params
from rwkv7_jax.checks import check_count, check_function, typed_key
from rwkv7_jax.generation.sampling import Ids as StopIds
from rwkv7_jax.generation.sampling import Number
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import RWKV7State
from rwkv7_jax.test_time.distillation import PromptsAt
from rwkv7_jax.test_time.losses import distillation_loss
from rwkv7_jax.test_time.rewards import RewardFunction, evaluate_rewards
from rwkv7_jax.test_time.rollouts import Rollouts, held_out_reward, rollouts
from rwkv7_jax.test_time.traces import Ids, Trace, trace_batch
from rwkv7_jax.test_time.tuning_loop import OnStep, Result, RewardTarget, start_tuning


def expert_iteration(
    model: RWKV7,
    params: Params,
    prompts_at: PromptsAt,
    reward: RewardFunction,
    *,
    tokens: int,
    key: Array,
    state: RWKV7State | None = None,
    rounds: int = 6,
    group: int = 8,
    keep_reward: float = 1.0,
    updates: int = 10,
    batch_size: int = 32,
    length: int | None = None,
    temperature: Number = 1.0,
    stop_ids: StopIds = (0,),
    leaves: tuple[str, ...] = ("wkv",),
    learning_rate: float = 0.3,
    tx: optax.GradientTransformation | None = None,
    held_out: Sequence[Sequence[int]] = (),
    stop_reward: float = 0.97,
    on_step: OnStep | None = None,
) -> Result:
    """A start state that has learned what it wrote itself and the reward approved.

    Round n draws from the current state, keeps the completions whose reward is at least
    `keep_reward`, each text once, and makes `updates` updates on all that were kept so far. It ends
    early when the held-out prompts' greedy completions, or else a round's own, earn `stop_reward`.

    Args:
        model: the student.
        params: its weights.
        prompts_at: the prompts of a round.
        reward: `(prompt, completion) -> number`; the completion holds its stop id.
        tokens: ids drawn a completion at most.
        key: one random key.
        state: where to start (batch 1); None is zeros.
        rounds: at most.
        group: completions a prompt.
        keep_reward: what a completion must earn to be kept.
        updates: a round.
        batch_size: rows of an update.
        length: inputs of a row, as in `rollouts`.
        temperature: of the rollouts.
        stop_ids: ids that end a completion.
        leaves: what is tuned, of `state_tuning.LEAVES`.
        learning_rate: of Adam with b2 = 0.99.
        tx: another optimizer.
        held_out: prompts that no update sees.
        stop_reward: mean reward that is enough.
        on_step: called with a round's numbers and the state, which the next update consumes.

    Returns:
        A history of `step` (the round), `reward`, `kept` (so far), the last update's metrics, and
        `held_out`; a last entry may hold nothing else. The result's traces are those kept.

    Raises:
        ValueError: an argument out of its range, or a reward that is no finite number.
    """
    caller = "expert_iteration"
    counts = {"rounds": (rounds, 0), "updates": (updates, 1), "tokens": (tokens, 1)}
    for name, (value, least) in counts.items():
        check_count(value, least, f"{caller}: `{name}`")
    for name, function in (("prompts_at", prompts_at), ("reward", reward)):
        check_function(function, f"{caller}: `{name}`")
    key = typed_key(key, caller=caller)
    loss = distillation_loss(model, params, leaves=leaves)
    running = {"tx": tx, "learning_rate": learning_rate, "on_step": on_step}
    run = start_tuning(model, loss, state, **running, caller=caller)
    drawn = {"tokens": tokens, "stop_ids": stop_ids}
    choices = {"group": group, "length": length, "temperature": temperature, **drawn}
    asked = {"prompts": held_out, "reward": reward, **drawn}
    look = functools.partial(held_out_reward, model, params, **asked)
    goal = RewardTarget(look if len(held_out) else None, 1, stop_reward)
    kept, width = {}, 0
    for entry in goal.steps(run, rounds):
        step = entry["step"]
        now = jax.random.fold_in(key, step)
        out = rollouts(model, params, run.state, prompts_at(step), key=now, **choices)
        run.budget += out.budget
        name = f"{caller}: `reward`"
        rewards = evaluate_rewards(reward, out.prompts, out.completions, name=name, group=group)
        width = max(width, out.mask.shape[1])
        kept |= _approved(out, rewards >= keep_reward)
        entry |= {"reward": float(rewards.mean()), "kept": len(kept)}
        sizes = {"batch_size": batch_size, "length": width, "seed": step}
        for index in range(updates if kept else 0):
            entry |= run.update(trace_batch(list(kept.values()), index, **sizes))
    return Result(run.state, run.history, run.budget, list(kept.values()))


def _approved(out: Rollouts, good: np.ndarray) -> dict[tuple[Ids, Ids], Trace]:
    """Traces of the good rows, by prompt and completion: each text once."""
    pairs = [(out.prompts[row], out.completions[row]) for row in np.flatnonzero(good)]
    return {pair: Trace(*pair, source="student") for pair in pairs}
