"""Whitening matrices: inverse square roots of covariances, exact or learnt step by step.

A covariance here is E[x x^T] of the inputs x; it is not centred.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from pallas_kernels.eager import compiled_when_eager

Covariance = Float[Array | np.ndarray, "*heads M M"]

Square = Float[Array, "*heads M M"]

Flags = Bool[Array, "*heads"]

# A GPU or a TPU would shorten float32 operands; R's small directions would not survive that.
_matmul = functools.partial(jnp.matmul, precision="highest")

# Newton-Schulz multiplies the smallest eigenvalue by up to 2.25 a step: 40 steps reach 1 from
# 1e-14, far below what float32 resolves.
_MAX_STEPS = 40

# The residual below which the iteration converges quadratically, and the steps taken from there.
_NEAR = 0.1
_LAST_STEPS = 3


def effective_rank(covariance: Covariance) -> Float[Array, "*heads"]:
    """Counts the directions that carry the inputs, by the participation ratio of the eigenvalues.

    Returns:
        (tr C)^2 / tr C^2, from 1 to M; 0 where C is zero.
    """
    covariance = _largest_near_1(covariance)
    trace = jnp.trace(covariance, axis1=-2, axis2=-1)[..., None, None]
    # C is divided by its trace first: the squares of small entries would underflow.
    scaled = covariance / jnp.where(trace == 0, 1.0, trace)
    squares = jnp.sum(jnp.square(scaled), axis=(-2, -1))
    return jnp.where(squares == 0, 0.0, 1.0 / jnp.where(squares == 0, 1.0, squares))


def _largest_near_1(covariance: Covariance) -> Square:
    """Scales C so that sums of its entries cannot overflow, by a power of 2: no digit changes."""
    largest = jnp.max(jnp.abs(covariance), axis=(-2, -1), keepdims=True)
    _, exponent = jnp.frexp(largest)
    return jnp.ldexp(covariance, -exponent)


@functools.partial(jax.jit, static_argnames="normalise")
def whitening(
    covariance: Covariance, damping: ArrayLike = 1e-3, *, normalise: bool = True
) -> Square:
    """Computes R = (C M / tr C + damping I)^(-1/2), so that z = R x has a covariance near I.

    R is symmetric and float32. The iteration uses matrix products alone, in float32: R C R^T is I
    to 1e-2 at condition numbers of 1e5 (M up to 256), to 1e-4 at 1e3.

    Args:
        covariance: C = E[x x^T], symmetric, any floating dtype; used as float32.
        damping: how strongly directions without inputs are held back, in units of the mean
            eigenvalue (of C's own units if `normalise` is off). Directions far below it are not
            amplified beyond damping^(-1/2). With 0, C has to be of full rank.
        normalise: scale C to a mean eigenvalue of 1, so that an isotropic C gives R near I.

    Returns:
        R; NaN for matrices that are not positive definite to float32; the identity for a C of
        zeros if `normalise` is on.

    Source: the coupled Newton-Schulz iteration in Higham, Functions of Matrices (2008), eq. 6.35.
    """
    covariance = jnp.asarray(covariance, jnp.float32)
    root = inverse_root(damped_covariance(covariance, damping, normalise))
    empty = jnp.max(jnp.abs(covariance), axis=(-2, -1)) == 0
    return jnp.where((empty & normalise)[..., None, None], _eye(root), root)


def damped_covariance(
    covariance: Square, damping: ArrayLike, normalise: bool
) -> Square:
    """Scales C if `normalise` is on and adds the damping, which makes it positive definite."""
    scale = jnp.ones((*covariance.shape[:-2], 1, 1), jnp.float32)
    if normalise:
        covariance = _largest_near_1(covariance)
        trace = jnp.trace(covariance, axis1=-2, axis2=-1)[..., None, None]
        scale = covariance.shape[-1] / jnp.where(trace > 0, trace, 1.0)
    return covariance * scale + jnp.asarray(damping, jnp.float32) * _eye(covariance)


def inverse_root(matrix: Square) -> Square:
    """Computes the symmetric A^(-1/2); NaN for matrices that are not positive definite.

    The iteration uses matrix products alone: `eigh` inside a compiled program is slow on every
    device.
    """
    size = _norm(matrix)
    eye = _eye(matrix)

    def step(carry):
        root, inverse, residual, count = carry
        factor = eye + 0.5 * residual
        # The product is taken in this order: with the matrix itself in place of `root`, rounding
        # errors grow once the condition number exceeds about ten.
        root = _matmul(root, factor)
        inverse = _matmul(factor, inverse)
        return root, inverse, eye - _matmul(inverse, root), count + 1

    def unfinished(carry):
        _, _, residual, count = carry
        return jnp.any(_norm(residual) > _NEAR) & (count < _MAX_STEPS)

    start = matrix / size
    carry = jax.lax.while_loop(unfinished, step, (start, eye, eye - start, 0))
    _, inverse, residual, _ = jax.lax.fori_loop(
        0,
        _LAST_STEPS,
        lambda _, carry: step(carry),
        carry,
    )
    inverse = 0.5 * (inverse + inverse.mT) / jnp.sqrt(size)
    return jnp.where(_norm(residual) <= _NEAR, inverse, jnp.nan)


@compiled_when_eager
def recompute(whitener: Square, target: Square, due: Flags) -> Square:
    """Recomputes R for the matrices that are due; if none is, nothing is computed."""
    due = per_matrix(due)
    # A matrix that is not due might never converge, and the others would iterate with it.
    target = jnp.where(due, target, _eye(target))
    return jax.lax.cond(
        jnp.any(due),
        lambda: jnp.where(due, inverse_root(target), whitener),
        lambda: whitener,
    )


@compiled_when_eager
def online_update(
    whitener: Square,
    target: Square,
    rate: ArrayLike,
    balance: ArrayLike,
    iterations: ArrayLike,
    clip: ArrayLike | None,
) -> Square:
    """Moves R by R <- R - rate ((1 - kappa) off + kappa diag(d - 1)) R, repeatedly.

    Here d + off = R C R^T, split into its diagonal and the rest.
    """
    diagonal = _eye(whitener) > 0
    rate = jnp.asarray(rate, jnp.float32)
    balance = jnp.asarray(balance, jnp.float32)
    # `fori_loop` refuses a float as its bound, also a whole one such as 3.0.
    iterations = jnp.asarray(iterations).astype(jnp.int32)

    def step(_, whitener):
        moment = _matmul(_matmul(whitener, target), whitener.mT)
        # The variances' part is a diagonal matrix on R's left, which scales R's rows. The published
        # program multiplies R's columns by it; that only agrees while R is diagonal.
        move = rate * jnp.where(
            diagonal, balance * (moment - 1), (1 - balance) * moment
        )
        if clip is not None:
            limit = jnp.asarray(clip, jnp.float32)
            move = move * (limit / jnp.maximum(limit, _norm(move)))
        return whitener - _matmul(move, whitener)

    return jax.lax.fori_loop(0, iterations, step, whitener)


def per_matrix(flags: Flags) -> Bool[Array, "*heads 1 1"]:
    """Adds two axes to the flags, so that each selects a matrix as a whole in `jnp.where`."""
    return flags[..., None, None]


def finite(x: Square) -> Flags:
    """Tells which matrices have finite entries only."""
    return jnp.all(jnp.isfinite(x), axis=(-2, -1))


def _eye(like: Square) -> Square:
    """Broadcasts the identity to the shape of `like`."""
    return jnp.broadcast_to(jnp.eye(like.shape[-1], dtype=like.dtype), like.shape)


def _norm(x: Square) -> Float[Array, "*heads 1 1"]:
    """Computes Frobenius norms."""
    # The entries are divided by the largest one first: its square might overflow.
    peak = jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True)
    unit = x / jnp.where(peak > 0, peak, 1.0)
    return peak * jnp.sqrt(jnp.sum(jnp.square(unit), axis=(-2, -1), keepdims=True))
