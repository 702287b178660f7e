"""RWKV's parameter groups and schedules as one optax chain. Level 5."""

import math
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

# Which group a parameter belongs to, by its path in the tree; the first match counts.
# Source: BlinkDL/RWKV-LM@524481d RWKV-v7/train_temp/src/model.py:793-831.
GROUPS = (
    ("fast", r"att/w0$"),  # learning rate doubled, no weight decay
    ("table", r"^(emb|head)/weight$"),  # weight decay
    ("matrix", r"(receptance|key|value|output)/weight$"),  # weight decay; Muon's share
    ("rest", r""),
)
DECAYED = ("table", "matrix")
SCHEDULES = ("cosine", "linear", "wsd", "constant")
KINDS = ("adamw", "muon")
# Muon's updates get the root mean square that Adam's typically have, so one learning rate serves
# both.
# Source: arXiv 2502.16982, section 2.2.
_MUON_RMS = 0.2


def path_name(path) -> str:
    """A parameter's path as one string, such as "layers/att/w0"."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path)


def group(name: str) -> str:
    """The group of the parameter with this path."""
    return next(label for label, pattern in GROUPS if re.search(pattern, name))


def groups(params) -> dict:
    """The tree of group names."""
    return jax.tree_util.tree_map_with_path(lambda path, _: group(path_name(path)), params)


def schedule(
    kind: str, peak: float, final: float, *, warmup_steps: int, total_steps: int
) -> Callable[[jax.Array], jax.Array]:
    """The learning rate at a step.

    Args:
        kind: "cosine", "linear", "wsd" (constant, then linear over the last fifth) or "constant".
        peak: at the end of the warm-up, which starts at a hundredth of it.
        final: at `total_steps` and behind.
        warmup_steps: steps of the warm-up.
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
        warm = jnp.minimum(1.0, 0.01 + 0.99 * step / max(warmup_steps, 1))
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
    by_group = {label: adam for label, _ in GROUPS} | {"matrix": optax.chain(muon, _scale_to_rms())}
    return optax.partition(by_group, groups)


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
        weight_decay: of the groups `DECAYED`.
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

    def in_groups(*labels):
        return lambda params: jax.tree.map(lambda label: label in labels, groups(params))

    return optax.chain(
        optax.clip_by_global_norm(clip) if clip is not None else optax.identity(),
        _moments(kind, b1, b2, eps),
        optax.add_decayed_weights(weight_decay, mask=in_groups(*DECAYED)),
        optax.masked(optax.scale(2.0), in_groups("fast")),
        optax.scale_by_learning_rate(learning_rate),
    )
