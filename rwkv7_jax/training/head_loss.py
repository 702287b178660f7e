"""The head and its losses, without materialising the logits of all tokens.

Positions (rows x tokens) are processed in chunks. A loss whose weights are known in advance
computes its gradients in the same pass: while a chunk's logits exist, their gradient is turned into
that of the activations and of the head. No logits are saved or recomputed.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.eager import compiled_when_eager
from rwkv7_jax.array_types import Activations, Tokens
from rwkv7_jax.checks import check_count
from rwkv7_jax.model.casts import at_least_int32, wide_dtype
from rwkv7_jax.model.int8_weights import Int8Matrix, Weight
from rwkv7_jax.model.products import head_logits, linear
from rwkv7_jax.sharding import (
    as_shards,
    gather_shards,
    mesh_sizes,
    on_each,
    row_axes,
    specs,
    token_axes,
)
from rwkv7_jax.training.token_chunks import CHUNK, Cut, map_token_chunks

PerToken = Float[Array, "B T"]


class TokenStatistics(NamedTuple):
    """Statistics of the predictions at every position.

    Attributes:
        nats: cross entropy of the target, NaN for one out of range; None without targets.
        correct: whether the target has the largest logit; None without targets.
        largest: the largest logit.
        kl: divergence between the model and the reference in nats; None without a reference.
        entropy: of the prediction in nats, at the temperature of `nats`; None unless requested.
    """

    # `Any` stands for an array or None; the caller's arguments determine which.
    nats: Any
    correct: Any
    largest: Float[Array, "..."]
    kl: Any
    entropy: Any


class TermWeights(NamedTuple):
    """The weights of a loss's terms at every position; None leaves a term out.

    Attributes:
        nats: of the targets' cross entropy.
        square: of half the largest logit's square, for L2Wrap.
        kl: of the divergence.
    """

    nats: Float[Array, "..."] | None = None
    square: Float[Array, "..."] | None = None
    kl: Float[Array, "..."] | None = None


class _Form(NamedTuple):
    """The static arguments.

    Attributes:
        reverse_kl: whether the divergence is KL(model || reference) instead of
            KL(reference || model).
        entropy: whether to compute the entropy.
        chunk: positions (rows x tokens) whose logits exist at the same time.
    """

    reverse_kl: bool
    entropy: bool
    chunk: int


class _Positions(NamedTuple):
    """The arrays that are split into chunks, [B T ...] each; None if absent."""

    hidden: Any
    targets: Any
    reference: Any
    weights: TermWeights


class _Shared(NamedTuple):
    """The arrays that every chunk reads; None if absent."""

    head: Any
    reference_head: Any
    temperature: Any


def is_id(ids: Int[Array, "..."], vocab_size: int) -> Bool[Array, "..."]:
    """Tells which numbers are ids of the vocabulary; negative ones are not."""
    ids = at_least_int32(ids)
    return (ids >= 0) & (ids < vocab_size)


def weighted_sum(weights: Float[Array, "..."], values: Any) -> Float[Array, ""]:
    """Sums weights x values; ignores non-finite values whose weight is 0."""
    ignored = (weights == 0) & ~jnp.isfinite(values)
    return jnp.sum(weights.astype(values.dtype) * jnp.where(ignored, 0.0, values))


def _is_predicted(
    logits: Float[Array, "... V"], targets: Int[Array, "..."]
) -> Bool[Array, "..."]:
    """Tells whether a target is the first id with the largest logit."""
    # On CPUs `argmax`, a reduction of pairs, is not vectorised: for 65,536 ids it takes a third of
    # the time of the product that computes the logits from a width of 384.
    ids = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
    target = targets[..., None]
    chosen = jnp.take_along_axis(logits, target, axis=-1)
    is_smaller = jnp.where(ids < target, logits < chosen, logits <= chosen)
    return jnp.all(is_smaller, axis=-1) & is_id(targets, logits.shape[-1])


@jax.custom_jvp
def _cross_entropy(
    logits: Float[Array, "... V"], targets: Int[Array, "..."]
) -> Float[Array, "..."]:
    """Computes -log softmax(logits) of the targets."""
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


# JAX's own rules would make three additional arrays of the logits' size: the exponentials, zeros,
# and the zeros into which the gather's transpose scatters. This rule needs only the gradient.
@_cross_entropy.defjvp
def _cross_entropy_jvp(primals, tangents):
    logits, targets = primals
    # Subtracts the largest logit before the logarithm of the sum, which is small if a prediction is
    # nearly right; the gradient is then a small difference between the softmax and 1.
    largest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    log_sum = jnp.log(jnp.sum(jnp.exp(logits - largest), axis=-1, keepdims=True))
    # Without the barrier, XLA would save the summands to reuse them here.
    softmax = jnp.exp(logits - jax.lax.optimization_barrier(largest) - log_sum)
    ids = jnp.arange(logits.shape[-1], dtype=targets.dtype)
    is_target = jax.lax.broadcast_to_rank(ids, logits.ndim) == targets[..., None]
    slope = softmax - is_target.astype(logits.dtype)
    return _cross_entropy(logits, targets), jnp.sum(slope * tangents[0], axis=-1)


def _kl_divergence(
    logp: Float[Array, "... V"], logq: Float[Array, "... V"]
) -> Float[Array, "..."]:
    """Computes KL(p || q) over the vocabulary."""
    return jnp.sum(jnp.exp(logp) * (logp - logq), axis=-1)


def _entropy(logits: Float[Array, "... V"]) -> Float[Array, "..."]:
    """Computes the entropy of the softmax, in nats."""
    logp = jax.nn.log_softmax(logits)
    return -jnp.sum(jnp.exp(logp) * logp, axis=-1)


def _chunk_statistics(
    form: _Form, x: _Positions, shared: _Shared, make_logits=head_logits
) -> TokenStatistics:
    """Computes the statistics of one chunk, whose logits exist at the same time."""
    logits = make_logits(x.hidden, shared.head)
    scaled = logits
    if shared.temperature is not None:
        scaled = logits / shared.temperature.astype(logits.dtype)
    nats = None
    correct = None
    kl = None
    if x.reference is not None:
        logp = jax.nn.log_softmax(logits)
        reference = make_logits(x.reference, shared.reference_head)
        reference_logp = jax.nn.log_softmax(reference)
        if form.reverse_kl:
            kl = _kl_divergence(logp, reference_logp)
        else:
            kl = _kl_divergence(reference_logp, logp)
    if x.targets is not None:
        correct = _is_predicted(logits, x.targets)
        nats = _cross_entropy(scaled, x.targets)
        # NaN for targets that are not ids: 0 would look like a perfect prediction.
        nats = jnp.where(is_id(x.targets, logits.shape[-1]), nats, jnp.nan)
    entropy = _entropy(scaled) if form.entropy else None
    return TokenStatistics(nats, correct, jnp.max(logits, axis=-1), kl, entropy)


@functools.partial(compiled_when_eager, static_argnums=0)
def _statistics(form: _Form, x: _Positions, shared: _Shared) -> TokenStatistics:
    """Computes the statistics of all positions, chunk by chunk."""
    leaves, tree = jax.tree.flatten(x._replace(weights=TermWeights()))

    def per_token(*chunk):
        return _chunk_statistics(form, tree.unflatten(chunk), shared)

    return map_token_chunks(per_token, *leaves, chunk=form.chunk)


def _positions(
    hidden: Activations, targets: Any, reference: Any, weights: TermWeights
) -> _Positions:
    """Collects the arrays that are split into chunks; ids may be on the host."""
    if targets is not None:
        targets = at_least_int32(targets)
    return _Positions(hidden, targets, reference, weights)


def _shared(head: Any, reference_head: Any, temperature: Any) -> _Shared:
    """Collects the arrays that every chunk reads; the temperature may be a Python number."""
    if temperature is not None:
        temperature = jnp.asarray(temperature)
    return _Shared(head, reference_head, temperature)


def token_statistics(
    hidden: Activations,
    head: Weight,
    targets: Tokens | None,
    *,
    reference: Float[Array, "B T E"] | None = None,
    reference_head: Float[Array, "V E"] | Int8Matrix | None = None,
    reverse_kl: bool = False,
    temperature: ArrayLike | None = None,
    entropy: bool = False,
    chunk: int = CHUNK,
) -> TokenStatistics:
    """Computes loss, accuracy and divergence per token, without materialising all logits.

    Unused fields cost nothing: XLA removes them. Gradients recompute the logits; `weighted_loss`
    computes the gradient of a weighted sum in the forward pass.

    Args:
        hidden: normed activations, from the model's `hidden`.
        head: its output projection.
        targets: ids; None for the divergence alone. One that is out of range has NaN nats and is
            never correct.
        reference: normed activations of another model, or of this one from another state.
        reference_head: the reference's output projection, if it is not `head`.
        reverse_kl: whether the divergence is KL(model || reference) instead of
            KL(reference || model).
        temperature: of the distribution of `nats` and `entropy`; None for 1. The divergence is
            always computed at temperature 1.
        entropy: whether to compute the entropy.
        chunk: positions (rows x tokens) whose logits exist at the same time.
    """
    check_count(chunk, 1, "token_statistics: `chunk`")
    form = _Form(reverse_kl, entropy, chunk)
    positions = _positions(hidden, targets, reference, TermWeights())
    shared = _shared(head, reference_head, temperature)
    return _on_each_device(functools.partial(_statistics, form), positions, shared)


@jax.named_scope("head_loss")
def weighted_loss(
    hidden: Activations,
    head: Weight,
    targets: Tokens | None,
    weights: TermWeights,
    *,
    reference: Float[Array, "B T E"] | None = None,
    reference_head: Float[Array, "V E"] | Int8Matrix | None = None,
    reverse_kl: bool = False,
    temperature: ArrayLike | None = None,
    entropy: bool = False,
    chunk: int = CHUNK,
) -> tuple[Float[Array, ""], TokenStatistics]:
    """Sums the weighted terms of all positions, and computes the sum's gradients in the same pass.

    A gradient costs one additional product with the head for the activations, and another one for
    the head if it is trained: two passes over the head, where recomputed logits would take three.
    Derivatives of all orders are correct in forward and reverse mode. Derivatives of the statistics
    recompute the logits; second derivatives in reverse mode save all logits.

    Args:
        hidden: as in `token_statistics`, which describes the other arguments in detail.
        head: the output projection.
        targets: ids; None for the divergence alone. One that is out of range and has a nonzero
            weight makes the loss NaN.
        weights: of the terms.
        reference: normed activations of another model.
        reference_head: the reference's output projection, if it is not `head`.
        reverse_kl: the direction of the divergence.
        temperature: of the distribution of the targets' cross entropy.
        entropy: whether the statistics include the entropy.
        chunk: positions whose logits exist at the same time.
    """
    form = _Form(reverse_kl, entropy, chunk)
    positions = _positions(hidden, targets, reference, weights)
    shared = _shared(head, reference_head, temperature)

    def loss_of_device(x, shared):
        loss, statistics = _call_loss(form, x, shared)
        return loss[None, None], statistics

    losses, statistics = _on_each_device(loss_of_device, positions, shared)
    return jnp.sum(losses), statistics


def _on_each_device(
    function: Callable[[_Positions, _Shared], Any], x: _Positions, shared: _Shared
) -> Any:
    """Calls a function on each device, with its own rows or tokens and unsharded output heads.

    Args:
        function: its results have leading axes of rows and tokens, which may have size 1.
        x: arrays of all rows.
        shared: `reference_head` is None if the reference has the same head.
    """
    sizes = mesh_sizes()
    batch, tokens = x.hidden.shape[:2]
    rows = PartitionSpec(row_axes(batch, sizes) or None, token_axes(tokens, sizes))
    heads = _Shared(
        head=_head_specs(sizes, shared.head),
        reference_head=_head_specs(sizes, shared.reference_head),
        temperature=jax.tree.map(lambda _: PartitionSpec(), shared.temperature),
    )

    def on_device(x: _Positions, shared: _Shared) -> Any:
        shared = gather_shards(as_shards(shared, heads), x.hidden.dtype)
        if shared.reference_head is None:
            shared = shared._replace(reference_head=shared.head)
        return function(x, shared)

    return on_each(on_device, x, shared, takes=(rows, heads), gives=rows)


def _head_specs(sizes: dict[str, int], head: Any) -> Any:
    """Returns the specs of an output head."""
    return specs(sizes, {"head": {"weight": head}})["head"]["weight"]


def _sum_terms(weights: TermWeights, statistics: TokenStatistics) -> Float[Array, ""]:
    """Adds up the weighted terms of a loss."""
    terms = []
    if weights.nats is not None:
        terms.append(weighted_sum(weights.nats, statistics.nats))
    if weights.square is not None:
        terms.append(weighted_sum(weights.square, 0.5 * jnp.square(statistics.largest)))
    if weights.kl is not None:
        terms.append(weighted_sum(weights.kl, statistics.kl))
    return sum(terms, jnp.zeros((), statistics.largest.dtype))


# A forward-mode rule, from which JAX derives the backward pass: the tangent of the sum is an inner
# product with its gradient, which depends only on primal values. A `custom_vjp` would not support
# forward mode.
@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _loss(form: _Form, x: _Positions, shared: _Shared):
    statistics = _statistics(form, x, shared)
    return _sum_terms(x.weights, statistics), statistics


@functools.partial(_loss.defjvp, symbolic_zeros=True)
def _loss_jvp(form: _Form, primals, tangents):
    # A frozen array has a symbolic zero as its tangent, and gets no gradient.
    moving = jax.tree.map(lambda x, t: None if _is_zero(t) else x, primals, tangents)
    tangents = jax.tree.map(lambda t: None if _is_zero(t) else t, tangents)
    statistics, gradients = _statistics_and_gradients(form, primals, moving)
    loss = _sum_terms(primals[0].weights, statistics)
    loss_tangent = jnp.zeros_like(loss)
    for gradient, tangent in zip(
        jax.tree.leaves(gradients), jax.tree.leaves(tangents), strict=True
    ):
        product = gradient.astype(loss.dtype) * tangent.astype(loss.dtype)
        loss_tangent = loss_tangent + jnp.sum(product)
    # XLA removes this if only the loss is differentiated, as in training.
    _, statistics_tangents = jax.jvp(
        lambda moving: _statistics(form, *_merge(moving, primals)),
        (moving,),
        (tangents,),
    )
    return (loss, statistics), (loss_tangent, statistics_tangents)


_call_loss = compiled_when_eager(_loss, static_argnums=0)


def _is_zero(tangent: Any) -> bool:
    return isinstance(tangent, SymbolicZero)


def _merge(moving: Any, given: Any) -> Any:
    """Replaces None leaves of a tree by those of another one."""
    return jax.tree.map(
        lambda leaf, other: other if leaf is None else leaf,
        moving,
        given,
        is_leaf=lambda leaf: leaf is None,
    )


def _statistics_and_gradients(form: _Form, primals: Any, moving: Any):
    """Computes the statistics, and the loss's gradients with respect to the moving arrays.

    Args:
        form: the static arguments.
        primals: `_Positions` and `_Shared`.
        moving: the same trees, with None for arrays that need no gradient.
    """
    positions, shared = primals
    moving_positions, moving_shared = moving
    rows, tokens = positions.hidden.shape[:2]
    cut = Cut.of(rows, tokens, form.chunk)

    def loss(moving, given):
        x, heads = _merge(moving, given)
        statistics = _chunk_statistics(form, x, heads, _logits)
        return _sum_terms(x.weights, statistics), statistics

    def step(total, chunk):
        moving_chunk, given_chunk = chunk
        (_, statistics), (own, part) = jax.value_and_grad(loss, has_aux=True)(
            (moving_chunk, moving_shared), (given_chunk, shared)
        )
        return jax.tree.map(add_term, total, part), (statistics, own)

    zeros = jax.tree.map(zero_sum, moving_shared)
    chunks = jax.tree.map(cut.chunks, (moving_positions, positions))
    total, parts = jax.lax.scan(step, zeros, chunks)
    statistics, own = jax.tree.map(lambda x: cut.join(x, rows, tokens), parts)
    return statistics, (own, total)


def zero_sum(leaf: Array | jax.ShapeDtypeStruct) -> Array:
    """Makes the initial value of a sum of many terms, which would lose small ones in 16 bits."""
    return jnp.zeros(leaf.shape, wide_dtype(leaf.dtype))


def add_term(total: Array, term: Array) -> Array:
    """Adds a term to a sum, in the dtype of the sum."""
    return total + term.astype(total.dtype)


@jax.custom_vjp
def _logits(x: Float[Array, "... D"], head: Weight) -> Float[Array, "... V"]:
    """Computes float32 logits, whose gradient is multiplied in the activations' dtype."""
    return head_logits(x, head)


def _logits_forward(x, head):
    return head_logits(x, head), (x, head)


def _logits_backward(operands, gradient):
    x, _ = operands
    # Without the cast, a product of 16-bit weights and a float32 gradient would run in float32.
    _, transposed = jax.vjp(linear, *operands)
    return transposed(gradient.astype(x.dtype))


_logits.defvjp(_logits_forward, _logits_backward)
