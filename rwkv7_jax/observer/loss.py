"""The loss of an observer, with terms for the teacher's states, logits and answers."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float

from rwkv7_jax.array_types import Params
from rwkv7_jax.checks import (
    check_instance,
    check_model,
    check_number,
    check_params,
    prefix_errors,
)
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
from rwkv7_jax.observer.prompt_splits import (
    after_split,
    check_answers,
    check_split,
    continuations,
)
from rwkv7_jax.training.head_loss import PerToken, TermWeights, weighted_loss
from rwkv7_jax.training.losses import (
    Loss,
    Metrics,
    loss_weights,
    shares_of_known_ids,
)

Scalar = Float[Array, ""]


class BatchTotals(NamedTuple):
    """Totals over a batch, which its microbatches need under gradient accumulation.

    Attributes:
        variance: [L H] of the teacher's states over all rows; None if states are not compared.
        prompt_tokens: mean number of prompt tokens of a microbatch.
        answer_weight: mean over microbatches of the summed loss weights of the targets after the
            splits.
    """

    variance: Any
    prompt_tokens: Scalar
    answer_weight: Scalar


@dataclasses.dataclass(frozen=True)
class ObserverLoss:
    """The loss of an observer's parameters; the first argument of a call is the teacher's weights.

    Attributes:
        observer: the shells of both models.
        teacher: the shell of the teacher.
        variance: weight of the term for states.
        divergence: weight of the term for logits.
        answers: weight of the term for answers.
    """

    observer: Observer
    teacher: RWKV7
    variance: float
    divergence: float
    answers: float

    def __call__(
        self,
        teacher_params: Params,
        params: Params,
        batch: BatchLike,
        totals: BatchTotals | None = None,
    ) -> tuple[Scalar, Metrics]:
        """Computes the weighted sum of the terms, and each term as a metric.

        Args:
            teacher_params: all weights of the teacher.
            params: the observer's.
            batch: tokens, mask and split.
            totals: of the full batch if `batch` is a microbatch; else None.
        """
        with prefix_errors("observer_loss"):
            batch = self.check_batch(batch)
            check_maps(self.observer, params)
            if totals is None:
                self._check_rows(batch.tokens.shape[0])
                if self.answers:
                    check_answers(batch)
        # Gradients pass through the teacher, but not into its weights.
        teacher_params = jax.lax.stop_gradient(teacher_params)
        inputs = jnp.asarray(batch.inputs)
        split = jnp.asarray(batch.split)
        # x [B T D] of the small model, and the proposals [L B H Nv Nk].
        x, proposed = propose_wkv(self.observer, params, inputs, split)
        # A term of weight 0 is not computed, and has no metric.
        total = jnp.zeros((), jnp.float32)
        metrics: Metrics = {}
        if self.variance or self.divergence:
            teacher_x, own = read_prompts(self.teacher, teacher_params, inputs, split)
            # Targets, which do not depend on the parameters.
            teacher_x = jax.lax.stop_gradient(teacher_x)
            own_wkv = jax.lax.stop_gradient(own.wkv)
        if self.variance:
            variance = moments(own_wkv).variance if totals is None else totals.variance
            rows = fraction_of_variance_unexplained(proposed, own_wkv, variance)
            metrics["fvu"] = jnp.mean(rows)
            total = total + self.variance * metrics["fvu"]
        if self.divergence:
            shares = _prompt_shares(batch, totals, self.teacher.config.vocab_size)
            divergence, _ = weighted_loss(
                x,
                params["model"]["head"]["weight"],
                None,
                TermWeights(kl=shares),
                reference=teacher_x,
                reference_head=teacher_params["head"]["weight"],
            )
            metrics["divergence_nats"] = divergence
            total = total + self.divergence * divergence
        if self.answers:
            nats = _answer_loss(self.teacher, teacher_params, proposed, batch, totals)
            metrics["answer_nats"] = nats
            metrics["loss_nats"] = nats
            total = total + self.answers * nats
        return total, metrics

    def check_batch(self, batch: BatchLike) -> Batch:
        """Checks a batch; a step calls it on the host, where ids and splits are concrete."""
        return check_split(batch, self.teacher.config.vocab_size)

    def batch_totals(self, teacher_params: Params, pieces: BatchLike) -> BatchTotals:
        """Computes the totals of a batch whose arrays have a leading axis of microbatches.

        The variance of the states takes an additional pass of the teacher over the prompts.
        """
        with prefix_errors("observer_loss"):
            pieces = Batch.of(pieces, "weights", "split")
            count, rows, _ = pieces.tokens.shape
            self._check_rows(count * rows)
        inputs = jnp.asarray(pieces.tokens)[:, :, :-1]
        split = jnp.asarray(pieces.split)
        length = inputs.shape[2]
        after = jax.vmap(lambda split: after_split(split, length))(split)
        # Means, because each microbatch divides by these counts and the losses are averaged.
        prompt_tokens = jnp.sum(1 - after) / count
        answer_weight = jnp.sum(pieces["weights"] * after) / count
        if not self.variance:
            return BatchTotals(None, prompt_tokens, answer_weight)

        def of_piece(piece):
            _, own = read_prompts(self.teacher, teacher_params, *piece)
            return moments(own.wkv)

        # All microbatches have the same number of rows, so the variance over all rows is the mean
        # variance inside microbatches plus the variance of their means. Only one microbatch's
        # states exist at a time. For K microbatches, means [K L H Nv Nk] and variances [K L H].
        means, variances = jax.lax.map(of_piece, (inputs, split))
        between = jnp.mean(
            jnp.square(means - jnp.mean(means, axis=0)[None]), axis=(0, 3, 4)
        )
        return BatchTotals(
            jnp.mean(variances, axis=0) + between, prompt_tokens, answer_weight
        )

    def _check_rows(self, rows: int) -> None:
        if self.variance and rows < 2:
            raise ValueError(
                f"`batch` must have at least 2 rows to compute their variance; got {rows}."
            )


def _prompt_shares(
    batch: Batch, totals: BatchTotals | None, vocab_size: int
) -> PerToken:
    """Returns each prediction's share of a mean over the prompts; NaN if all prompts are empty."""
    inside = 1 - after_split(batch["split"], batch.tokens.shape[1] - 1)
    count = jnp.sum(inside) if totals is None else totals.prompt_tokens
    # NaN, because a divergence of 0 would look perfect.
    mean = inside / jnp.where(count > 0, count, 1.0)
    shares = jnp.where(count > 0, mean, jnp.nan)
    return shares_of_known_ids(shares, batch.tokens, vocab_size)


def _answer_loss(
    teacher: RWKV7,
    params: Params,
    wkv: WKV,
    batch: Batch,
    totals: BatchTotals | None,
) -> Scalar:
    """Averages the teacher's loss after the splits, from `wkv` and zero token shifts."""
    weights = shares_of_known_ids(
        loss_weights(batch), batch.tokens, teacher.config.vocab_size
    )
    inputs, targets, shares = continuations(
        batch.tokens,
        batch["split"],
        weights,
        total=None if totals is None else totals.answer_weight,
    )
    start = init_state(teacher.config, inputs.shape[0]).replace(wkv=wkv)
    x, _ = teacher.apply({"params": params}, inputs, start, method="hidden")
    loss, _ = weighted_loss(
        x, params["head"]["weight"], targets, TermWeights(nats=shares)
    )
    return loss


def observer_loss(
    observer: Observer,
    teacher: RWKV7,
    teacher_params: Params,
    *,
    variance: float = 1.0,
    divergence: float = 0.5,
    answers: float = 1.0,
) -> Loss:
    """Makes the loss of an observer's parameters, with the teacher's weights as frozen arguments.

    A batch has tokens [B T+1], mask [B T] and `split` [B], the number of prompt tokens of each row,
    as drawn by `add_prompt_splits`. States are compared, and answers begin, at the splits. Answers
    are the targets after the split whose mask is 1. A term of weight 0 is not computed and has no
    metric. A term without a position to average over is NaN, so a step skips the batch. Gradient
    accumulation gives the terms of the full batch.

    The metrics are `fvu`, `divergence_nats` and `answer_nats`. `loss_nats` repeats the loss of the
    answers under the name that all language model losses share; without answers there is none. FVU
    alone is a weak measure: of two observers that explain half the variance, one may have kept what
    the teacher reads and the other lost it.

    Args:
        observer: the shells of both models.
        teacher: the shell around `teacher_params`.
        teacher_params: all weights.
        variance: weight of the fraction of variance unexplained (FVU) of the teacher's own states.
            Each layer and head is normalised by its variance over the batch's rows, at least two.
        divergence: weight of KL(teacher || observer) of the logits inside the prompts.
        answers: weight of the teacher's cross entropy after the prompts, started from the
            proposals; its gradient passes through the frozen teacher.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a teacher of other sizes than the observer's, or weights below 0 or all 0; from
            the loss, a batch or parameters that do not match.
    """
    weights = {"variance": variance, "divergence": divergence, "answers": answers}
    with prefix_errors("observer_loss"):
        check_instance(observer, Observer, "`observer`")
        check_model(teacher, "`teacher`")
        check_teacher(observer, teacher.config)
        check_params(teacher_params, teacher.config, "`teacher_params`")
        for name, weight in weights.items():
            check_number(weight, 0, math.inf, f"`{name}`")
        if not any(weights.values()):
            names = ", ".join(f"`{name}`" for name in weights)
            raise ValueError(f"one of {names} must be above 0; all are 0.")
    loss = ObserverLoss(observer, teacher, variance, divergence, answers)
    return Partial(loss, teacher_params)
