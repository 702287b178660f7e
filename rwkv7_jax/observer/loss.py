"""What an observer learns from: the teacher's states, its logits, and its answers."""

import math

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float

from rwkv7_jax.array_types import Activations, Params
from rwkv7_jax.data.batch import Batch, BatchLike
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import init_state
from rwkv7_jax.observer.observer import (
    WKV,
    Observer,
    check_maps,
    check_teacher,
    fraction_of_variance_unexplained,
    moments,
    propose_wkv,
    read_prompts,
)
from rwkv7_jax.observer.prompt_splits import check_split, continuations
from rwkv7_jax.training import losses
from rwkv7_jax.training.losses import Loss

Scalar = Float[Array, ""]


def _divergence(x: Activations, heads: tuple, base: Array, split: Array) -> Scalar:
    """Mean KL(teacher || observer) of the predictions inside the prompts."""
    nats = losses.kl_divergence(x, base, heads[0], base_head=heads[1])
    inside = (jnp.arange(x.shape[1])[None] < split[:, None]).astype(nats.dtype)
    return jnp.sum(nats * inside) / jnp.maximum(jnp.sum(inside), 1.0)


def _answers(teacher: RWKV7, params: Params, wkv: WKV, batch: Batch) -> Scalar:
    """The teacher's mean loss behind the splits, started from `wkv` and zero token shifts."""
    inputs, targets, shares = continuations(batch.tokens, batch.split, losses.loss_weights(batch))
    start = init_state(teacher.config, inputs.shape[0]).replace(wkv=wkv)
    x, _ = teacher.apply({"params": params}, inputs, start, method="hidden")
    nats, _ = losses.cross_entropy(x, params["head"]["weight"], targets)
    return jnp.sum(shares * nats)


def _check(weights: dict[str, float]) -> None:
    for name, weight in weights.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"observer_loss: `{name}` must be at least 0; got {weight}.")
    if not any(weights.values()):
        raise ValueError(f"observer_loss: one of {', '.join(weights)} must be above 0.")


def _check_batch(batch: BatchLike, vocab_size: int, *, compared: bool) -> Batch:
    batch = check_split(batch, vocab_size, caller="observer_loss")
    if compared and batch.tokens.shape[0] < 2:
        raise ValueError("observer_loss: `batch` must have at least two rows, for their variance.")
    return batch


def observer_loss(
    observer: Observer,
    teacher: RWKV7,
    teacher_params: Params,
    *,
    variance: float = 1.0,
    divergence: float = 0.5,
    answers: float = 1.0,
) -> Loss:
    """The loss as a function of an observer's parameters; the teacher's are frozen arguments.

    A batch has tokens [B T+1], mask [B T] and `split` [B], each row's prompt in tokens, such as
    `split_batch` draws them: states are compared, and answers begin, at the splits. Only targets
    behind the split whose mask is 1 are answers. A term of weight 0 is not computed and has no
    metric. Micro-batches count alike, each with a variance of its own.

    The metrics are `fvu`, `divergence_nats`, `answer_nats` and, for the loop, `loss_nats`: the
    answers' where they are trained, else the whole loss. The first alone says little: an observer
    that explains half the variance may have lost all that the teacher reads.

    Args:
        observer: which models.
        teacher: the shell around `teacher_params`.
        teacher_params: all weights.
        variance: weight of the fraction of variance unexplained (FVU) of the teacher's own states,
            for each layer and head by its variance over the batch's rows: at least two.
        divergence: weight of KL(teacher || observer) of the logits inside the prompts.
        answers: weight of the teacher's cross entropy behind the prompts, started from the
            proposals; its gradient passes through the frozen teacher.

    Raises:
        ValueError: another teacher than the observer's, or weights below 0 or all 0; from the loss,
            a batch or parameters that do not fit.
    """
    check_teacher(observer, teacher.config, caller="observer_loss")
    weights = {"variance": variance, "divergence": divergence, "answers": answers}
    _check(weights)

    def loss(teacher_params: Params, params: Params, batch: BatchLike):
        check_maps(observer, params, caller="observer_loss")
        batch = _check_batch(batch, teacher.config.vocab_size, compared=bool(variance))
        teacher_params = jax.lax.stop_gradient(teacher_params)
        inputs, split = jnp.asarray(batch.tokens)[:, :-1], jnp.asarray(batch.split)
        x, proposed = propose_wkv(observer, params, inputs, split)
        terms = {}
        if variance or divergence:
            base, own = jax.lax.stop_gradient(read_prompts(teacher, teacher_params, inputs, split))
        if variance:
            rows = fraction_of_variance_unexplained(proposed, own.wkv, moments(own.wkv).variance)
            terms["fvu"] = variance, jnp.mean(rows)
        if divergence:
            heads = params["model"]["head"]["weight"], teacher_params["head"]["weight"]
            terms["divergence_nats"] = divergence, _divergence(x, heads, base, split)
        if answers:
            terms["answer_nats"] = answers, _answers(teacher, teacher_params, proposed, batch)
        total = sum(weight * value for weight, value in terms.values())
        metrics = {name: value for name, (_, value) in terms.items()}
        return total, metrics | {"loss_nats": metrics.get("answer_nats", total)}

    return Partial(loss, teacher_params)
