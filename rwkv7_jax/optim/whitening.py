"""Covariances, and the matrices that whiten what they describe."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

Covariance = Float[Array | np.ndarray, "*heads M M"]

Square = Float[Array, "*heads M M"]

Flags = Bool[Array, "*heads"]

# A GPU or a TPU would shorten float32 operands; R's small directions would not survive that.
_matmul = functools.partial(jnp.matmul, precision="highest")

# Newton-Schulz multiplies the smallest eigenvalue by up to 2.25 a step: 40 steps reach 1 from
# 1e-14, far below what float32 resolves. The last steps, all errors below a tenth, are quadratic.
_MOST_STEPS, _LAST_STEPS, _NEAR = 40, 3, 0.1


def effective_rank(covariance: Covariance) -> Float[Array, "*heads"]:
    """How many directions carry the inputs: (tr C)^2 / tr C^2, from 1 to M; 0 where C is zero."""
    trace = jnp.trace(covariance, axis1=-2, axis2=-1)[..., None, None]
    squares = jnp.sum(jnp.square(covariance / jnp.where(trace == 0, 1.0, trace)), axis=(-2, -1))
    return jnp.where(squares == 0, 0.0, 1.0 / jnp.where(squares == 0, 1.0, squares))


@functools.partial(jax.jit, static_argnames="normalise")
def whitening(
    covariance: Covariance, damping: ArrayLike = 1e-3, *, normalise: bool = True
) -> Square:
    """R = (C M / tr C + damping I)^(-1/2), symmetric, float32: z = R x has a covariance near I.

    Matrix products alone, in float32: R C R^T is I to 1e-2 at condition numbers of 1e5 (M up to
    256), to 1e-4 at 1e3.

    Args:
        covariance: C = E[x x^T], symmetric, any floating dtype; used as float32.
        damping: how far directions without inputs are held back, in units of the mean eigenvalue
            (of C's own units where `normalise` is off). Directions far below it are not amplified
            beyond damping^(-1/2). With 0, C has to be of full rank.
        normalise: scale C to a mean eigenvalue of 1, so that an isotropic C gives R near I.

    Returns:
        R; NaN for matrices that are not positive definite to float32, the identity for a C of
        zeros where `normalise` is on.

    Source: the coupled Newton-Schulz iteration in Higham, Functions of Matrices (2008), eq. 6.35.
    """
    covariance = jnp.asarray(covariance, jnp.float32)
    root = inverse_root(damped_covariance(covariance, damping, normalise))
    empty = jnp.trace(covariance, axis1=-2, axis2=-1) == 0
    return jnp.where((empty & normalise)[..., None, None], _eye(root), root)


def damped_covariance(covariance: Square, damping: ArrayLike, normalise: bool) -> Square:
    """The positive definite matrix that R is to whiten."""
    scale = jnp.ones((*covariance.shape[:-2], 1, 1), jnp.float32)
    if normalise:
        trace = jnp.trace(covariance, axis1=-2, axis2=-1)[..., None, None]
        scale = covariance.shape[-1] / jnp.where(trace > 0, trace, 1.0)
    return covariance * scale + jnp.asarray(damping, jnp.float32) * _eye(covariance)


def inverse_root(matrix: Square) -> Square:
    """The symmetric A^(-1/2); NaN for matrices that are not positive definite.

    Matrix products alone: `eigh` inside a compiled program is slow on every device.
    """
    size, eye = _norm(matrix), _eye(matrix)

    def step(carry):
        root, inverse, error, steps = carry
        factor = eye + 0.5 * error
        # The product is taken in this order: with the matrix itself in place of `root`, rounding
        # errors grow once the condition number exceeds about ten.
        root, inverse = _matmul(root, factor), _matmul(factor, inverse)
        return root, inverse, eye - _matmul(inverse, root), steps + 1

    def unfinished(carry):
        return jnp.any(_norm(carry[2]) > _NEAR) & (carry[3] < _MOST_STEPS)

    start = matrix / size
    carry = jax.lax.while_loop(unfinished, step, (start, eye, eye - start, 0))
    _, inverse, error, _ = jax.lax.fori_loop(0, _LAST_STEPS, lambda _, carry: step(carry), carry)
    inverse = 0.5 * (inverse + inverse.mT) / jnp.sqrt(size)
    return jnp.where(_norm(error) <= _NEAR, inverse, jnp.nan)


def recompute(whitener: Square, target: Square, due: Flags) -> Square:
    """R with the matrices that are due computed anew; where none is, nothing is computed."""
    due = per_matrix(due)
    # What is not due might never converge, and would keep the others waiting.
    target = jnp.where(due, target, _eye(target))
    return jax.lax.cond(
        jnp.any(due), lambda: jnp.where(due, inverse_root(target), whitener), lambda: whitener
    )


def online_update(
    whitener: Square,
    target: Square,
    *,
    rate: ArrayLike,
    balance: ArrayLike,
    iterations: ArrayLike,
    clip: ArrayLike | None,
) -> Square:
    """R <- R - rate ((1 - kappa) off + kappa diag(d - 1)) R, where d + off = R C R^T, repeated."""
    eye = _eye(whitener) > 0
    rate, balance = jnp.asarray(rate, jnp.float32), jnp.asarray(balance, jnp.float32)

    def step(_, whitener):
        moment = _matmul(_matmul(whitener, target), whitener.mT)
        # The variances' part is a diagonal matrix on R's left, which scales R's rows. The published
        # program multiplies R's columns by it; that only agrees while R is diagonal.
        move = rate * jnp.where(eye, balance * (moment - 1), (1 - balance) * moment)
        if clip is not None:
            limit = jnp.asarray(clip, jnp.float32)
            move = move * (limit / jnp.maximum(limit, _norm(move)))
        return whitener - _matmul(move, whitener)

    return jax.lax.fori_loop(0, iterations, step, whitener)


def per_matrix(flags: Flags) -> Bool[Array, "*heads 1 1"]:
    """One flag per matrix, in a shape that selects whole matrices."""
    return flags[..., None, None]


def finite(x: Square) -> Flags:
    """Which matrices have finite entries only."""
    return jnp.all(jnp.isfinite(x), axis=(-2, -1))


def _eye(like: Square) -> Square:
    return jnp.broadcast_to(jnp.eye(like.shape[-1], dtype=like.dtype), like.shape)


def _norm(x: Square) -> Float[Array, "*heads 1 1"]:
    """Frobenius norms; scaled by the largest entry, whose square might overflow."""
    peak = jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True)
    unit = x / jnp.where(peak > 0, peak, 1.0)
    return peak * jnp.sqrt(jnp.sum(jnp.square(unit), axis=(-2, -1), keepdims=True))
