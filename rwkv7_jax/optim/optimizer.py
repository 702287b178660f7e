"""RWKV's parameter groups and schedules as one optax chain."""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class Group(NamedTuple):
    """Parameters that move by the same rule.

    Attributes:
        label: the group's name.
        pattern: a regular expression that finds its members' paths in the tree.
        rate: factor on the learning rate.
        decays: whether weight decay pulls them.
    """

    label: str
    pattern: str
    rate: float
    decays: bool


# The first match counts.
# Source: BlinkDL/RWKV-LM@524481d RWKV-v7/train_temp/src/model.py:793-831.
GROUPS = (
    Group("fast", r"att/w0$", 2.0, False),
    Group("table", r"(^|/)(emb|head)/weight$", 1.0, True),
    Group("matrix", r"(receptance|key|value|output)/weight$", 1.0, True),  # Muon's share
    Group("rest", r"", 1.0, False),
)

SCHEDULES = ("cosine", "linear", "wsd", "constant")

KINDS = ("adamw", "muon")

# Muon's updates get the root mean square that Adam's typically have, so one learning rate serves
# both.
# Source: arXiv 2502.16982, section 2.2.
_MUON_RMS = 0.2


def path_name(path) -> str:
    """A parameter's path as one string, such as "layers/att/w0"."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path)


def group(name: str) -> Group:
    """The group of the parameter with this path."""
    return next(one for one in GROUPS if re.search(one.pattern, name))


def group_labels(params) -> Any:
    """The tree of the groups' labels."""
    return jax.tree_util.tree_map_with_path(lambda path, _: group(path_name(path)).label, params)


def group_table(params: Any) -> str:
    """Which group each parameter is in and what that means, as lines to print.

    Args:
        params: the trainables; groups without a member are left out.
    """
    members: dict[str, list] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        members.setdefault(group(path_name(path)).label, []).append(leaf.size)
    lines = [f"{'group':<8}{'rate':>5}{'decay':>7}{'tensors':>9}{'numbers':>16}  pattern"]
    for one in GROUPS:
        if sizes := members.get(one.label):
            decay, pattern = "yes" if one.decays else "no", one.pattern or "(what is left)"
            lines.append(
                f"{one.label:<8}{f'x{one.rate:g}':>5}{decay:>7}{len(sizes):>9}{sum(sizes):>16,}"
                f"  {pattern}"
            )
    return "\n".join(lines)


def learning_rate_schedule(
    kind: str, peak: float, final: float, *, warmup_steps: int, total_steps: int
) -> Callable[[jax.Array], jax.Array]:
    """The learning rate at a step.

    Args:
        kind: "cosine", "linear", "wsd" (constant, then linear over the last fifth) or "constant".
        peak: at the end of the warm-up, which starts at a hundredth of it.
        final: at `total_steps` and behind; "constant" stays at `peak`.
        warmup_steps: steps of the warm-up; 0 for none.
        total_steps: steps of the whole run.

    Raises:
        ValueError: an unknown kind.

    Source: BlinkDL/RWKV-LM@524481d RWKV-v7/train_temp/src/trainer.py:18-56.
    """
    if kind not in SCHEDULES:
        raise ValueError(f"schedule: `kind` must be one of {', '.join(SCHEDULES)}; got {kind!r}.")

    def rate(step):
        done = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
        done = jnp.clip(done, 0.0, 1.0)
        remaining = {
            "cosine": 0.5 + 0.5 * jnp.cos(math.pi * done),
            "linear": 1.0 - done,
            "wsd": jnp.minimum(1.0, 5.0 * (1.0 - done)),
            "constant": 1.0,
        }[kind]
        warm = 0.01 + 0.99 * step / max(warmup_steps, 1)
        warm = jnp.where(step < warmup_steps, warm, 1.0)
        return warm * (final + (peak - final) * remaining)

    return rate


def _scale_to_rms() -> optax.GradientTransformation:
    """Orthogonal matrices scaled to the root mean square `_MUON_RMS`."""
    return optax.stateless(
        lambda updates, _: jax.tree.map(
            lambda u: u * _MUON_RMS * math.sqrt(max(u.shape[-2:])), updates
        )
    )


def _moments(kind: str, b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)
    if kind == "adamw":
        return adam
    last_two = optax.contrib.MuonDimensionNumbers(reduction_axis=-1, output_axis=-2)
    muon = optax.contrib.scale_by_muon(
        weight_dimension_numbers=lambda tree: jax.tree.map(lambda _: last_two, tree)
    )
    by_group = {one.label: adam for one in GROUPS} | {"matrix": optax.chain(muon, _scale_to_rms())}
    return optax.partition(by_group, group_labels)


def build_optimizer(
    learning_rate: float | Callable[[jax.Array], jax.Array],
    *,
    kind: str = "adamw",
    weight_decay: float = 0.0,
    clip: float | None = 1.0,
    b1: float = 0.9,
    b2: float = 0.99,
    eps: float = 1e-18,
) -> optax.GradientTransformation:
    """RWKV's optimizer: Adam, decoupled weight decay on the matrices, a doubled rate for `att.w0`.

    Args:
        learning_rate: a number or a schedule.
        kind: "adamw", or "muon" for orthogonalised momentum on the blocks' matrices and Adam
            elsewhere.
        weight_decay: of the groups that decay.
        clip: largest global norm of the gradient; None switches clipping off.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: Adam's epsilon, far below the usual 1e-8.

    Raises:
        ValueError: an unknown kind.

    Source: BlinkDL/RWKV-LM@524481d RWKV-v7/train_temp/src/model.py:793-831, train.py:39-50.
    """
    if kind not in KINDS:
        raise ValueError(
            f"build_optimizer: `kind` must be one of {', '.join(KINDS)}; got {kind!r}."
        )

    def where(chosen: Callable[[Group], bool]):
        labels = [one.label for one in GROUPS if chosen(one)]
        return lambda params: jax.tree.map(lambda label: label in labels, group_labels(params))

    rates = sorted({one.rate for one in GROUPS} - {1.0})
    faster = [optax.masked(optax.scale(x), where(lambda one, x=x: one.rate == x)) for x in rates]
    return optax.chain(
        optax.clip_by_global_norm(clip) if clip is not None else optax.identity(),
        _moments(kind, b1, b2, eps),
        optax.add_decayed_weights(weight_decay, mask=where(lambda one: one.decays)),
        *faster,
        optax.scale_by_learning_rate(learning_rate),
    )
