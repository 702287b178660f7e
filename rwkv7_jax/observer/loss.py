"""The loss of an observer: the teacher's states, its logits, and its answers."""

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
    """Totals over a batch, which its pieces need under gradient accumulation.

    Attributes:
        variance: [L H] of the teacher's states over all rows; None if states are not compared.
        prompt_tokens: positions inside the prompts, averaged over the pieces.
        answer_weight: summed loss weights of the targets after the splits, averaged over the
            pieces.
    """

    variance: Any
    prompt_tokens: Scalar
    answer_weight: Scalar


@dataclasses.dataclass(frozen=True)
class ObserverLoss:
    """The loss of an observer's parameters, called with the teacher's weights in front.

    Attributes:
        observer: the shells of both models.
        teacher: the shell of the teacher.
        variance: weight of the states' term.
        divergence: weight of the logits' term.
        answers: weight of the answers' term.
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
        """Computes the weighted sum of the terms, and each of them as a metric.

        Args:
            teacher_params: all weights of the teacher.
            params: the observer's.
            batch: tokens, mask and split.
            totals: of the batch that this is a piece of; None for a batch in one piece.
        """
        with prefix_errors("observer_loss"):
            batch = self.check_batch(batch)
            check_maps(self.observer, params)
            if totals is None:
                self._check_rows(batch.tokens.shape[0])
                if self.answers:
                    check_answers(batch)
        # Gradients pass through the teacher's computation, never into its weights.
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
            # Both are targets here, and the same for every value of the parameters.
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
        """Checks a batch; a step calls it on the host, where ids and splits can still be read."""
        return check_split(batch, self.teacher.config.vocab_size)

    def batch_totals(self, teacher_params: Params, pieces: BatchLike) -> BatchTotals:
        """Computes the totals of a batch that is cut into pieces along a further leading axis.

        The states' variance takes one more pass of the teacher over the prompts.
        """
        with prefix_errors("observer_loss"):
            pieces = Batch.of(pieces, "weights", "split")
            count, rows, _ = pieces.tokens.shape
            self._check_rows(count * rows)
        inputs = jnp.asarray(pieces.tokens)[:, :, :-1]
        split = jnp.asarray(pieces.split)
        length = inputs.shape[2]
        # For a mean piece: the pieces' losses are averaged, so that each divides by the mean count.
        prompt_tokens = jnp.sum(jnp.minimum(split, length)) / count
        counts = jax.vmap(lambda split: after_split(split, length))(split)
        answer_weight = jnp.sum(pieces["weights"] * counts) / count
        if not self.variance:
            return BatchTotals(None, prompt_tokens, answer_weight)

        def of_piece(piece):
            _, own = read_prompts(self.teacher, teacher_params, *piece)
            return moments(own.wkv)

        # Pieces have equally many rows, so the variance over all rows is the mean variance inside
        # the pieces plus the variance of their means. No more than one piece's states are held.
        # means [K L H Nv Nk] and variances [K L H] of K pieces.
        means, variances = jax.lax.map(of_piece, (inputs, split))
        between = jnp.mean(
            jnp.square(means - jnp.mean(means, axis=0)[None]), axis=(0, 3, 4)
        )
        return BatchTotals(
            jnp.mean(variances, axis=0) + between, prompt_tokens, answer_weight
        )

    def _check_rows(self, rows: int) -> None:
        if self.variance and rows < 2:
            raise ValueError("`batch` must have at least two rows, for their variance.")


def _prompt_shares(
    batch: Batch, totals: BatchTotals | None, vocab_size: int
) -> PerToken:
    """Returns each prediction's share of a mean over the prompts; NaN if all of them are empty."""
    inside = 1 - after_split(batch["split"], batch.tokens.shape[1] - 1)
    count = jnp.sum(inside) if totals is None else totals.prompt_tokens
    # A divergence of 0 would look perfect.
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
    """Averages the teacher's loss after the splits, started from `wkv` and zero token shifts."""
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


def _check_weights(weights: dict[str, float]) -> None:
    for name, weight in weights.items():
        check_number(weight, 0, math.inf, f"`{name}`")
    if not any(weights.values()):
        raise ValueError(f"one of {', '.join(weights)} must be above 0.")


def observer_loss(
    observer: Observer,
    teacher: RWKV7,
    teacher_params: Params,
    *,
    variance: float = 1.0,
    divergence: float = 0.5,
    answers: float = 1.0,
) -> Loss:
    """Makes the loss of an observer's parameters; the teacher's weights are frozen arguments of it.

    A batch has tokens [B T+1], mask [B T] and `split` [B], each row's prompt in tokens, such as
    `add_prompt_splits` draws them: states are compared, and answers begin, at the splits. Only
    targets after the split whose mask is 1 are answers. A term of weight 0 is not computed and has
    no metric, and one without a position to average over is NaN, so that a step leaves the batch
    out. Under gradient accumulation all terms are those of the batch in one piece.

    The metrics are `fvu`, `divergence_nats` and `answer_nats`. `loss_nats` is the answers' loss
    again, under the name that all language model losses have; without answers there is none. The
    first term alone says little: of observers that explain half the variance one may have kept what
    the teacher reads, and another lost it.

    Args:
        observer: the shells of both models.
        teacher: the shell around `teacher_params`.
        teacher_params: all weights.
        variance: weight of the fraction of variance unexplained (FVU) of the teacher's own states,
            for each layer and head by its variance over the batch's rows: at least two.
        divergence: weight of KL(teacher || observer) of the logits inside the prompts.
        answers: weight of the teacher's cross entropy after the prompts, started from the
            proposals; its gradient passes through the frozen teacher.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: another teacher than the observer's, or weights below 0 or all 0; from the loss,
            a batch or parameters that do not fit.
    """
    weights = {"variance": variance, "divergence": divergence, "answers": answers}
    with prefix_errors("observer_loss"):
        check_instance(observer, Observer, "`observer`")
        check_model(teacher, "`teacher`")
        check_teacher(observer, teacher.config)
        check_params(teacher_params, teacher.config, "`teacher_params`")
        _check_weights(weights)
    loss = ObserverLoss(observer, teacher, variance, divergence, answers)
    return Partial(loss, teacher_params)
