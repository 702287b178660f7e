"""A start state that earns a reward, by policy gradients: the weights never move.

Its parts are public for other loops: `rollouts.policy_batch` makes the batch of one step, and
`test_time_losses.policy_loss` is a loss for `training.make_train_step`. The other ways to scale a
small model at test time are `guide.collect` with `imitation.distil`, and
`imitation.expert_iteration`.
"""

import functools
from collections.abc import Callable, Sequence

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
from rwkv7_jax.test_time.losses import policy_loss
from rwkv7_jax.test_time.rewards import RewardFunction
from rwkv7_jax.test_time.rollouts import held_out_reward, policy_batch
from rwkv7_jax.test_time.tuning_loop import OnStep, Result, RewardTarget, start_tuning

PromptsAt = Callable[[int], Sequence[Sequence[int]]]


def grpo(
    model: RWKV7,
    params: Params,
    prompts_at: PromptsAt,
    reward: RewardFunction,
    *,
    tokens: int,
    key: Array,
    state: RWKV7State | None = None,
    steps: int = 60,
    group: int = 8,
    length: int | None = None,
    temperature: Number = 1.0,
    stop_ids: StopIds = (0,),
    leaves: tuple[str, ...] = ("wkv",),
    learning_rate: float = 0.1,
    tx: optax.GradientTransformation | None = None,
    kl: float = 0.0,
    reference: RWKV7State | None = None,
    anchor: float = 0.0,
    anchor_at: Callable[[int], np.ndarray] | None = None,
    held_out: Sequence[Sequence[int]] = (),
    evaluate_every: int = 10,
    stop_reward: float = 0.97,
    on_step: OnStep | None = None,
) -> Result:
    """A start state whose completions earn more, by group-relative policy gradients.

    Step n draws `group` completions of every prompt of `prompts_at(n)` with the key folded with n,
    from the current state, and makes one update; it depends on the key, n and that state alone. A
    step whose groups are all uniform makes none. It ends early when `stop_reward` is reached: by
    the held-out prompts' greedy completions, looked at every `evaluate_every` steps, the first time
    before any update; without such prompts by the mean reward of the last `evaluate_every` steps.

    Args:
        model: the student.
        params: its weights.
        prompts_at: the prompts of a step; as many each time, lest programs are compiled again.
        reward: `(prompt, completion) -> number`; the completion holds its stop id.
        tokens: ids drawn a completion at most.
        key: one random key.
        state: where to start (batch 1); None is zeros.
        steps: at most.
        group: completions a prompt, at least 2.
        length: inputs of a row, as in `rollouts`.
        temperature: of the rollouts, above 0.
        stop_ids: ids that end a completion.
        leaves: what is tuned, of `state_tuning.LEAVES`.
        learning_rate: of Adam with b2 = 0.99.
        tx: another optimizer.
        kl: weight of KL(tuned || reference) on what is drawn.
        reference: its state; None is zeros.
        anchor: weight of KL(base || tuned) on unlabelled text.
        anchor_at: that text of a step, ids [B T+1].
        held_out: prompts that no update sees.
        evaluate_every: steps.
        stop_reward: mean reward that is enough.
        on_step: called with a step's numbers and the state, which the next update consumes.

    Returns:
        A history of `step`, `reward` and `updated` (0 or 1), with the update's metrics, and
        `held_out` where it was looked at; a last entry may hold nothing else.

    Raises:
        ValueError: an argument out of its range, or a reward that is no finite number.
    """
    counts = {"steps": (steps, 0), "evaluate_every": (evaluate_every, 1)}
    for name, (value, least) in (counts | {"group": (group, 2), "tokens": (tokens, 1)}).items():
        check_count(value, least, f"grpo: `{name}`")
    for name, function in (("prompts_at", prompts_at), ("reward", reward)):
        check_function(function, f"grpo: `{name}`")
    if bool(anchor) != (anchor_at is not None):
        raise ValueError("grpo: `anchor` and `anchor_at` go together; got one of them.")
    key = typed_key(key, caller="grpo")
    terms = {"kl": kl, "reference": reference, "anchor": anchor, "leaves": leaves}
    loss = policy_loss(model, params, temperature=temperature, **terms)
    running = {"tx": tx, "learning_rate": learning_rate, "on_step": on_step}
    run = start_tuning(model, loss, state, **running, caller="grpo")
    drawn = {"tokens": tokens, "stop_ids": stop_ids}
    choices = {"group": group, "length": length, "temperature": temperature, **drawn}
    asked = {"prompts": held_out, "reward": reward, **drawn}
    look = functools.partial(held_out_reward, model, params, **asked)
    goal = RewardTarget(look if len(held_out) else None, evaluate_every, stop_reward)
    for entry in goal.steps(run, steps):
        step = entry["step"]
        now = jax.random.fold_in(key, step)
        made = policy_batch(model, params, run.state, prompts_at(step), reward, key=now, **choices)
        run.budget += made.budget
        entry |= {"reward": float(made.rewards.mean()), "updated": int(not made.uniform)}
        if not made.uniform:
            batch = made.batch
            if anchor:
                batch = batch.replace(anchor=anchor_at(step))
            entry |= run.update(batch)
    return Result(run.state, run.history, run.budget)
