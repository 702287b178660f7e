"""The experiments of the table: targets for upscaling, decorrelation and teachers.

Each function returns its numbers and `passed`: whether they meet the target in its docstring (None
for a run that only serves as a comparison).
"""

import dataclasses
from typing import Any

import jax
import numpy as np
import optax

import rwkv7_jax as rwkv
from benchmarks.lab import (
    DBP,
    RAW,
    RULES,
    STANDARD,
    WHITENED,
    Method,
    base,
    batch,
    measure,
    tune,
)
from rwkv7_jax.data.tasks.synthetic_tasks import question_batch
from rwkv7_jax.observer.evaluation import evaluate_handover
from rwkv7_jax.observer.loss import observer_loss
from rwkv7_jax.observer.observer import init_observer, propose, state_moments
from rwkv7_jax.test_time.distillation import distill
from rwkv7_jax.test_time.grpo import grpo
from rwkv7_jax.test_time.rollouts import RolloutSampler
from rwkv7_jax.test_time.teacher import collect_traces
from rwkv7_jax.training.costs import tree_size
from rwkv7_jax.tuning.state_arithmetic import scaled

Numbers = dict[str, Any]
SKILLS = ("dictionary", "mapping", "modular", "sequence")


def steering(seed: int = 0) -> Numbers:
    """Tunes for a hidden instruction: the small model reaches .97 and beats the large one."""
    tuned = measure("steer", tune("steer", STANDARD, seed=seed).state).accuracy
    small = measure("steer", name="small").accuracy
    large = measure("steer", name="large").accuracy
    passed = tuned >= 0.97 and tuned > large
    return {"small": small, "large": large, "tuned": tuned, "passed": passed}


def _mean_accuracy(task: str, method: Method, seeds: int) -> float:
    """Averages the accuracy of states tuned from several seeds."""
    accuracies = []
    for seed in range(seeds):
        state = tune(task, method, seed=seed).state
        accuracies.append(measure(task, state, seed=seed).accuracy)
    return float(np.mean(accuracies))


def novel_functions(seeds: int = 3) -> Numbers:
    """Tunes for untaught functions: both states pass; DBP's error is .75 of standard's at most."""
    bars = {"novel": (0.80, 0.86), "modulus-9": (0.95, 0.97), "product-7": (0.85, 0.97)}
    found = {}
    passed = True
    for task, (low, high) in bars.items():
        standard = _mean_accuracy(task, STANDARD, seeds)
        wide = _mean_accuracy(task, DBP, seeds)
        found[task] = {"standard": standard, "upscaled_dbp": wide}
        # Where both are perfect up to a thousandth there is no error left to compare.
        better = 1 - wide <= max(0.75 * (1 - standard), 1e-3)
        passed &= standard >= low and wide >= high and better
    return found | {"passed": bool(passed)}


def conditioning(seed: int = 0, *, all_rules: bool = True) -> Numbers:
    """Tunes 128 facts through raw features: Adam at most .30, DBP at least .95 and fast.

    Of a row with several runs the one that ends lowest counts.

    Args:
        seed: of the facts and of the features.
        all_rules: also the rows without a target, for comparison: the published rule,
            and ours with one iteration.
    """
    rates = (0.1, 0.3, 1.0)
    rows = {
        "adam": [dataclasses.replace(RAW, rate=rate) for rate in rates],
        "dbp": [DBP],
        "whitened": [WHITENED],
    }
    if all_rules:
        published = [rule for rule in RULES if rule.startswith("as published")]
        rows["dbp, one iteration"] = [dataclasses.replace(DBP, rule="one iteration")]
        rows["dbp, as published"] = [
            dataclasses.replace(DBP, rule=rule, rate=rate)
            for rule in published
            for rate in rates
        ]
    found = {}
    curves = {}
    chosen = {}
    for label, methods in rows.items():
        runs = [tune("facts-128", method, seed=seed) for method in methods]
        ends = [np.nan_to_num(np.mean(run.losses[-10:]), nan=np.inf) for run in runs]
        best = int(np.argmin(ends))
        found[label] = measure("facts-128", runs[best].state, seed=seed).accuracy
        curves[label] = runs[best].losses
        chosen[label] = {"rate": methods[best].rate, "rule": methods[best].rule}
    below = {label: _first_below(losses, 0.5) for label, losses in curves.items()}
    passed = found["adam"] <= 0.30 and found["dbp"] >= 0.95
    passed &= below["adam"] is None and (below["dbp"] or 999) <= 100
    return {
        "accuracy": found,
        "steps_to_half_a_nat": below,
        "chosen": chosen,
        "losses": curves,
        "passed": passed,
    }


def conditioning_again(seeds: tuple[int, ...] = (1, 2)) -> Numbers:
    """Repeats `conditioning` with other seeds, for the spread; lists a number for each."""
    runs = [conditioning(seed=seed) for seed in seeds]
    return {
        "seeds": seeds,
        "accuracy": _by_label(runs, "accuracy"),
        "steps_to_half_a_nat": _by_label(runs, "steps_to_half_a_nat"),
        "chosen": _by_label(runs, "chosen"),
        "passed": None,
    }


def _by_label(runs: list[Numbers], name: str) -> dict[str, list]:
    """Lists the runs' values of one entry by the label of the row."""
    return {label: [run[name][label] for run in runs] for label in runs[0][name]}


def _first_below(losses: list[float], level: float) -> int | None:
    """Finds the first step at which the mean of five losses is below a level."""
    means = np.convolve(losses, np.ones(5) / 5, "valid")
    below = means < level
    return int(np.argmax(below)) + 5 if below.any() else None


def capacity(seeds: int = 1) -> Numbers:
    """Tunes 256 facts: whitened and DBP states reach .90 and twice the standard state."""
    methods = {"standard": STANDARD, "whitened": WHITENED, "dbp": DBP}
    found = {
        name: _mean_accuracy("facts-256", method, seeds)
        for name, method in methods.items()
    }
    passed = all(
        found[x] >= max(0.90, 2 * found["standard"]) for x in ("whitened", "dbp")
    )
    return found | {"passed": passed}


def capacity_curve(steps: int = 300) -> Numbers:
    """Counts facts by size of the state: four times the columns store at least three times."""
    wide = {size: dataclasses.replace(DBP, size=size) for size in (64, 128, 256)}
    runs = {
        "N=16": ("small16", STANDARD, (64, 128)),
        "N=32": ("small", STANDARD, (64, 128, 256, 320)),
        "M=64": ("small", wide[64], (256, 512)),
        "M=128": ("small", wide[128], (512, 768, 1024)),
        "M=256": ("small", wide[256], (1024,)),
    }
    points = {}
    for label, (name, method, counts) in runs.items():
        points[label] = {"numbers": 0, "facts": {}}
        for count in counts:
            run = tune(
                f"facts-{count}",
                method,
                name=name,
                steps=steps,
            )
            upscaled = run.state.upscaled
            leaf = run.state.wkv if upscaled is None else upscaled.memory
            share = measure(f"facts-{count}", run.state, name=name).accuracy
            points[label]["numbers"] = int(leaf.size)
            points[label]["facts"][count] = round(share * count)
    most = {label: max(point["facts"].values()) for label, point in points.items()}
    ratio = most["M=128"] / most["N=32"]
    ordered = [most[label] for label in runs]
    passed = ratio >= 3 and ordered == sorted(ordered)
    return {"points": points, "stored": most, "ratio": ratio, "passed": passed}


def _questions(
    task: str,
    step: int,
    count: int,
    **more,
):
    questions, replies = question_batch(
        task,
        step,
        batch_size=count,
        **more,
    )
    return questions, {tuple(q): r for q, r in zip(questions, replies, strict=True)}


class Exact:
    """A reward of 1 for the right answer; it remembers the answers of all prompts it has made."""

    def __init__(self, task: str, seed: int = 0):
        self.task = task
        self.seed = seed
        self.answers = {}

    def prompts(
        self, step: int, count: int = 8, held_out: bool = False
    ) -> list[list[int]]:
        """Makes the prompts of a step."""
        questions, replies = _questions(
            self.task,
            step,
            count,
            seed=self.seed,
            held_out=held_out,
        )
        self.answers |= replies
        return questions

    def __call__(self, prompt, completion) -> float:
        """Compares the beginning of a completion with the answer."""
        wanted = self.answers[tuple(prompt)]
        return float(list(completion[: len(wanted)]) == wanted)


def sampler_of(name: str, group: int = 8, temperature: float = 1.0) -> RolloutSampler:
    """Makes what draws the answers of a base model."""
    return RolloutSampler(*base(name), group=group, tokens=6, temperature=temperature)


def policy(seed: int = 0, steps: int = 60) -> Numbers:
    """Tunes by rewards: .90 of instructions are followed, .3 more than by the large model."""
    reward = Exact("steer", seed)
    held_out = reward.prompts(0, 128, held_out=True)
    exact = {
        name: sampler_of(name).mean_reward(None, held_out, reward)[0]
        for name in ("small", "large")
    }
    small = sampler_of("small")
    made = grpo(
        small,
        reward.prompts,
        reward,
        key=jax.random.key(seed),
        steps=steps,
        stop_reward=2.0,
    )
    tuned, _ = small.mean_reward(made.state, held_out, reward)
    passed = tuned >= max(0.90, exact["large"] + 0.3)
    return exact | {
        "tuned": tuned,
        "tokens": dataclasses.asdict(made.budget),
        "passed": passed,
    }


def guidance(seed: int = 0, steps: int = 60) -> Numbers:
    """Distils traces of the instructed large model: the small one answers .95 uninstructed."""
    reward = Exact("steer", seed)
    held_out = reward.prompts(0, 128, held_out=True)
    prompts = reward.prompts(1, 512)
    # The id of R, which tells the teacher what "?" hides.
    instruction = ord("R") + 1
    traces, cost = collect_traces(
        sampler_of("large", group=1, temperature=0.0),
        prompts,
        key=jax.random.key(seed),
        template=lambda prompt: (instruction, *prompt[1:]),
        verify=reward,
        at_once=128,
    )
    made = distill(
        *base("small"),
        traces,
        steps=steps,
        batch_size=64,
        seed=seed,
    )
    tuned, _ = sampler_of("small").mean_reward(made.state, held_out, reward)
    budget = dataclasses.asdict(cost + made.budget)
    kept = len(traces) / len(prompts)
    return {"kept": kept, "tuned": tuned, "tokens": budget, "passed": tuned >= 0.95}


# The prompt is a letter and 12 pairs; four more pairs follow as questions.
_OBSERVED_PROMPT = 25
_OBSERVED_LENGTH = 32
_OBSERVER = rwkv.RWKV7Config(
    vocab_size=257,
    num_layers=1,
    width=32,
    head_size=32,
    ffn_width=96,
    decay_rank=16,
    icl_rank=16,
    value_rank=16,
    gate_rank=16,
)


def _observed_rows(step: int, seed: int, **more):
    """Makes rows of pairs with the place where the prompt ends."""
    pairs = batch("mapping", step, seed=seed, length=_OBSERVED_LENGTH, **more)
    splits = np.full(len(pairs.tokens), _OBSERVED_PROMPT, np.int32)
    return pairs.replace(split=splits)


def observing(steps: int = 1000, seed: int = 0, answers: float = 1.0) -> Numbers:
    """Trains an observer, a third of the teacher's size: its states reach .85 of the teacher's."""
    teacher, weights = base("small")
    prompts = _observed_rows(0, seed, rows=256)
    bias = state_moments(teacher, weights, prompts.inputs, prompts.split).mean
    key = jax.random.key(seed)
    observer, params = init_observer(_OBSERVER, teacher.config, key, bias=bias)
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adam(optax.cosine_decay_schedule(3e-3, steps, 0.05)),
    )
    loss = observer_loss(observer, teacher, weights, answers=answers)
    step = rwkv.make_train_step(loss, tx)
    train = rwkv.TrainState.create(params, tx)
    for number in range(steps):
        train, _ = step(train, _observed_rows(number, seed))
    held_out = _observed_rows(0, seed, rows=256, held_out=True)
    proposed = propose(observer, train.params, held_out.inputs, held_out.split)
    answers_by_start = evaluate_handover(teacher, weights, proposed, held_out)
    table = {name: found.accuracy for name, found in answers_by_start.items()}
    ratio = table["proposed"] / table["wkv"]
    return {
        "accuracy": table,
        "ratio": ratio,
        "unexplained": float(loss(train.params, held_out)[1]["fvu"]),
        "numbers": tree_size(train.params),
        "passed": ratio >= 0.85,
    }


def _skills(state) -> dict[str, float]:
    """Measures what the base was trained for."""
    return {task: measure(task, state).accuracy for task in SKILLS}


def retention(seed: int = 0) -> Numbers:
    """Anchors a state to the base: it costs the target at most .05 and doubles retention."""
    plain = tune("facts-64", STANDARD, seed=seed).state
    held = tune("facts-64", dataclasses.replace(STANDARD, anchor=1.0), seed=seed).state
    states = {"plain": plain, "anchored": held, "plain x 0.25": scaled(plain, 0.25)}
    found = {
        name: {
            "target": measure("facts-64", state, seed=seed).accuracy,
            "skills": _skills(state),
        }
        for name, state in states.items()
    }
    mean = {
        name: float(np.mean(list(one["skills"].values())))
        for name, one in found.items()
    }
    drop = found["plain"]["target"] - found["anchored"]["target"]
    passed = drop <= 0.05 and mean["anchored"] >= 2 * mean["plain"]
    return {
        "states": found,
        "mean_skill": mean,
        "target_drop": drop,
        "passed": bool(passed),
    }


def forgetting(seed: int = 0, steps: int = 250) -> Numbers:
    """Compares late facts of a row: a static memory is right .15 more often than a start state."""
    static = Method(
        rate=0.3,
        size=64,
        prepare="whiten",
    )
    found = {}
    for label, method in {"standard": STANDARD, "static": static}.items():
        state = tune(
            "facts-64",
            method,
            steps=steps,
            seed=seed,
        ).state
        by_position = measure(
            "facts-64",
            state,
            seed=seed,
            length=120,
        ).by_position
        # 40 facts in a row, in five blocks of eight; other positions are not scored.
        facts = by_position[~np.isnan(by_position)]
        shares = facts.reshape(5, 8).mean(1)
        found[label] = [float(share) for share in shares]
    gain = found["static"][-1] - found["standard"][-1]
    return {"by_eight_facts": found, "gain": gain, "passed": gain >= 0.15}
