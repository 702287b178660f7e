"""RWKV's parameter groups and learning rate schedules as an Optax chain."""

import math
import re
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from rwkv7_jax.checks import check_choice, check_count, check_number, prefix_errors
from rwkv7_jax.sharding.layout import path_name


class Group(NamedTuple):
    """Parameters that share one update rule.

    Attributes:
        label: the group's name.
        pattern: a regular expression that matches the paths of its members.
        rate: factor on the learning rate.
        decays: whether weight decay applies.
    """

    label: str
    pattern: str
    rate: float
    decays: bool


# The first match wins.
# Source: BlinkDL/RWKV-LM@524481d RWKV-v7/train_temp/src/model.py:793-831.
GROUPS = (
    Group("fast", r"att/w0$", 2.0, False),
    Group("table", r"(^|/)(emb|head)/weight$", 1.0, True),
    # The matrices that "muon" orthogonalises.
    Group("matrix", r"(receptance|key|value|output)/weight$", 1.0, True),
    Group("rest", r"", 1.0, False),
)

SCHEDULES = ("cosine", "linear", "wsd", "constant")

KINDS = ("adamw", "muon")

# Muon's updates get the typical root mean square of Adam's, so one learning rate serves both.
# Source: arXiv 2502.16982, section 2.2.
_MUON_RMS = 0.2


def check_optimizer(tx: Any, argument: str) -> None:
    """Raises unless `tx` has the methods of an Optax transformation."""
    if isinstance(tx, type) or not (hasattr(tx, "init") and hasattr(tx, "update")):
        kind = type(tx).__name__
        raise TypeError(
            f"{argument} must be an Optax transformation, such as optax.adam; got {kind}."
        )


def widened(leaf: Array) -> Array:
    """Casts to float32, also where promotion is strict; float64 stays."""
    with jax.numpy_dtype_promotion("standard"):
        return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))


def group(name: str) -> Group:
    """Finds the group of the parameter with this path."""
    return next(rule for rule in GROUPS if re.search(rule.pattern, name))


def group_labels(params) -> Any:
    """Labels every leaf of the tree with its group."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: group(path_name(path)).label, params
    )


def group_table(params: Any) -> str:
    """Formats the parameter groups as a table.

    Args:
        params: the trainable parameters; groups without a member are omitted.
    """
    sizes: dict[str, list[int]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        label = group(path_name(path)).label
        sizes.setdefault(label, []).append(leaf.size)
    lines = [
        f"{'group':<8}{'rate':>5}{'decay':>7}{'tensors':>9}{'numbers':>16}  pattern"
    ]
    for rule in GROUPS:
        if rule.label not in sizes:
            continue
        members = sizes[rule.label]
        rate = f"x{rule.rate:g}"
        decay = "yes" if rule.decays else "no"
        pattern = rule.pattern or "(all others)"
        lines.append(
            f"{rule.label:<8}{rate:>5}{decay:>7}{len(members):>9}{sum(members):>16,}  {pattern}"
        )
    return "\n".join(lines)


def learning_rate_schedule(
    kind: str, peak: float, final: float, *, warmup_steps: int, total_steps: int
) -> optax.Schedule:
    """Makes the function from a step to its learning rate.

    Args:
        kind: "cosine", "linear", "wsd" (constant, then linear over the last fifth) or "constant".
        peak: the rate at the end of the warm-up, which starts at a hundredth of it.
        final: the rate from `total_steps` on, if the warm-up has ended; "constant" stays at `peak`.
        warmup_steps: steps of the warm-up, which may be longer than the run; 0 for none.
        total_steps: steps of the run, including the warm-up.

    Raises:
        TypeError: an argument that is not a number.
        ValueError: an unknown kind, or a number out of its range.

    Source: BlinkDL/RWKV-LM@524481d RWKV-v7/train_temp/src/trainer.py:18-56.
    """
    with prefix_errors("learning_rate_schedule"):
        check_choice(kind, SCHEDULES, "`kind`")
        check_number(peak, 0, math.inf, "`peak`")
        check_number(final, 0, math.inf, "`final`")
        check_count(warmup_steps, 0, "`warmup_steps`")
        check_count(total_steps, 0, "`total_steps`")

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


def scale_by_factors(factors: Any) -> optax.GradientTransformation:
    """Multiplies updates by factors: separate learning rates for leaves and parts of leaves.

    Put it last in a chain, so that the factors affect neither moments nor norms.

    Args:
        factors: a tree like the parameters, of numbers or of arrays that broadcast to the leaves.

    Raises:
        ValueError: from `update`, a tree of another structure, or a factor that does not broadcast
            to the shape of its leaf.
    """

    def scale(path, update, factor):
        factor = jnp.asarray(factor, update.dtype)
        if jnp.broadcast_shapes(update.shape, factor.shape) != update.shape:
            raise ValueError(
                f"`factors` must broadcast to {path_name(path)} of shape {update.shape}; "
                f"got shape {factor.shape}."
            )
        return update * factor

    def update(updates, params=None):
        del params
        with prefix_errors("scale_by_factors"):
            if jax.tree.structure(updates) != jax.tree.structure(factors):
                raise ValueError(
                    "`factors` must have the structure of the parameters, "
                    f"{jax.tree.structure(updates)}; got {jax.tree.structure(factors)}."
                )
            return jax.tree_util.tree_map_with_path(scale, updates, factors)

    return optax.stateless(update)


def _mask_of(labels: list[str]) -> Callable[[Any], Any]:
    """Makes the function that marks the parameters of some groups."""

    def mask(params):
        return jax.tree.map(lambda label: label in labels, group_labels(params))

    return mask


def _clip_by_global_norm(limit: float) -> optax.GradientTransformation:
    """Clips as Optax does, but with a norm that is at least float32."""
    clip = optax.clip_by_global_norm(limit)

    def update(updates, state, params=None):
        # In float16, a norm above 255 would be infinite, and the clipped gradient 0.
        clipped, state = clip.update(jax.tree.map(widened, updates), state, params)
        narrow = jax.tree.map(lambda new, old: new.astype(old.dtype), clipped, updates)
        return narrow, state

    return optax.GradientTransformation(clip.init, update)


def _scale_to_rms() -> optax.GradientTransformation:
    """Scales orthogonal matrices to the root mean square `_MUON_RMS`."""

    def scale(update):
        return update * _MUON_RMS * math.sqrt(max(update.shape[-2:]))

    return optax.stateless(lambda updates, _: jax.tree.map(scale, updates))


def _scale_by_moments(
    kind: str, b1: float, b2: float, eps: float
) -> optax.GradientTransformation:
    """Chooses Adam for all groups, or Muon for the matrices and Adam for the rest."""
    adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)
    if kind == "adamw":
        return adam
    # Layers are stacked along the leading axis, so a weight's own axes are its last two.
    last_two = optax.contrib.MuonDimensionNumbers(reduction_axis=-1, output_axis=-2)

    def dimension_numbers(params):
        return jax.tree.map(lambda _: last_two, params)

    muon = optax.contrib.scale_by_muon(weight_dimension_numbers=dimension_numbers)
    by_group: dict[Hashable, optax.GradientTransformation] = {
        rule.label: adam for rule in GROUPS
    }
    by_group["matrix"] = optax.chain(muon, _scale_to_rms())
    return optax.partition(by_group, group_labels)


def build_optimizer(
    learning_rate: float | optax.Schedule,
    *,
    kind: str = "adamw",
    weight_decay: float = 0.0,
    clip: float | None = 1.0,
    b1: float = 0.9,
    b2: float = 0.99,
    eps: float = 1e-18,
) -> optax.GradientTransformation:
    """Builds RWKV's optimizer: Adam, weight decay on the matrices, a doubled rate for `att.w0`.

    Weight decay is decoupled from the moments.

    Args:
        learning_rate: a number or a schedule.
        kind: "adamw", or "muon" for orthogonalised momentum on the blocks' matrices and Adam
            elsewhere.
        weight_decay: of the groups that decay.
        clip: maximum global norm of the gradient; None disables clipping.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: Adam's epsilon, far below the usual 1e-8.

    Raises:
        TypeError: an argument that is not a number.
        ValueError: an unknown kind, or a number out of its range.

    Source: BlinkDL/RWKV-LM@524481d RWKV-v7/train_temp/src/model.py:793-831, train.py:39-50.
    """
    with prefix_errors("build_optimizer"):
        check_choice(kind, KINDS, "`kind`")
        if not callable(learning_rate):
            check_number(learning_rate, 0, math.inf, "`learning_rate`")
        check_number(weight_decay, 0, math.inf, "`weight_decay`")
        if clip is not None:
            check_number(
                clip, 0, math.inf, "`clip`", above=True, bounds="above 0, or None"
            )
        # At 1 a moment would stay 0, and its bias correction would divide by 0.
        for name, value in (("b1", b1), ("b2", b2)):
            check_number(
                value,
                0,
                math.nextafter(1, 0),
                f"`{name}`",
                bounds="at least 0, below 1",
            )
        check_number(eps, 0, math.inf, "`eps`")

    decaying = [rule.label for rule in GROUPS if rule.decays]
    clipping = optax.identity() if clip is None else _clip_by_global_norm(clip)
    transforms = [
        clipping,
        _scale_by_moments(kind, b1, b2, eps),
        optax.add_decayed_weights(weight_decay, mask=_mask_of(decaying)),
    ]
    # One scaling per factor in ascending order, which is part of the state's structure in
    # checkpoints.
    for rate in sorted({rule.rate for rule in GROUPS} - {1.0}):
        members = [rule.label for rule in GROUPS if rule.rate == rate]
        transforms.append(optax.masked(optax.scale(rate), _mask_of(members)))
    transforms.append(optax.scale_by_learning_rate(learning_rate))
    return optax.chain(*transforms)
