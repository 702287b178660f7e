"""Whitening matrices: inverse square roots of covariances, exact or learned online.

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

# GPUs and TPUs round float32 operands by default, which would destroy R's small directions.
_matmul = functools.partial(jnp.matmul, precision="highest")

# Newton-Schulz multiplies the smallest eigenvalue by up to 2.25 per step: 40 steps reach 1 from
# 1e-14, far below the resolution of float32.
_MAX_STEPS = 40

# The iteration converges quadratically below this residual, and takes this many steps from there.
_NEAR = 0.1
_LAST_STEPS = 3


def effective_rank(covariance: Covariance) -> Float[Array, "*heads"]:
    """Counts the directions that carry the inputs, by the participation ratio of the eigenvalues.

    Returns:
        (tr C)^2 / tr C^2, from 1 to M; 0 where C is zero.
    """
    covariance = _largest_near_1(covariance)
    trace = jnp.trace(covariance, axis1=-2, axis2=-1)[..., None, None]
    # C is divided by its trace first, because squares of small entries would underflow.
    scaled = covariance / jnp.where(trace == 0, 1.0, trace)
    squares = jnp.sum(jnp.square(scaled), axis=(-2, -1))
    return jnp.where(squares == 0, 0.0, 1.0 / jnp.where(squares == 0, 1.0, squares))


def _largest_near_1(covariance: Covariance) -> Square:
    """Scales C exactly, by a power of 2, so that sums of its entries cannot overflow."""
    largest = jnp.max(jnp.abs(covariance), axis=(-2, -1), keepdims=True)
    _, exponent = jnp.frexp(largest)
    return jnp.ldexp(covariance, -exponent)


@functools.partial(jax.jit, static_argnames="normalise")
def whitening(
    covariance: Covariance, damping: ArrayLike = 1e-3, *, normalise: bool = True
) -> Square:
    """Computes R = (C M / tr C + damping I)^(-1/2), so that z = R x has a covariance near I.

    R is symmetric and float32. The iteration uses only float32 matrix products: R C R^T is I to
    within 1e-2 at condition numbers of 1e5 (M up to 256), and 1e-4 at 1e3.

    Args:
        covariance: C = E[x x^T], symmetric, any floating dtype; used as float32.
        damping: limits the amplification of directions without inputs to damping^(-1/2). Its unit
            is the mean eigenvalue of C, or 1 if `normalise` is off. With 0, C must have full rank.
        normalise: scale C to a mean eigenvalue of 1, so that an isotropic C gives R near I.

    Returns:
        R; NaN for matrices that are not positive definite in float32; the identity for a C of
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

    The iteration uses only matrix products: `eigh` in a compiled program is slow on every device.
    """
    size = _norm(matrix)
    eye = _eye(matrix)

    def step(carry):
        root, inverse, residual, count = carry
        factor = eye + 0.5 * residual
        # With the matrix itself instead of `root`, rounding errors would grow once the condition
        # number exceeds about ten.
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
    """Recomputes R for the matrices that are due; computes nothing if none is."""
    due = per_matrix(due)
    # A matrix that is not due might not converge, and would prolong the loop for the others.
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
    # `fori_loop` takes no float as its bound, not even 3.0.
    iterations = jnp.asarray(iterations).astype(jnp.int32)

    def step(_, whitener):
        moment = _matmul(_matmul(whitener, target), whitener.mT)
        # The term for the variances is a diagonal matrix on the left of R, which scales R's rows.
        # The published program scales R's columns, which is the same only while R is diagonal.
        move = rate * jnp.where(
            diagonal, balance * (moment - 1), (1 - balance) * moment
        )
        if clip is not None:
            limit = jnp.asarray(clip, jnp.float32)
            move = move * (limit / jnp.maximum(limit, _norm(move)))
        return whitener - _matmul(move, whitener)

    return jax.lax.fori_loop(0, iterations, step, whitener)


def per_matrix(flags: Flags) -> Bool[Array, "*heads 1 1"]:
    """Adds two axes to the flags, so that each selects a whole matrix in `jnp.where`."""
    return flags[..., None, None]


def finite(x: Square) -> Flags:
    """Tells which matrices have only finite entries."""
    return jnp.all(jnp.isfinite(x), axis=(-2, -1))


def _eye(like: Square) -> Square:
    """Broadcasts the identity to the shape of `like`."""
    return jnp.broadcast_to(jnp.eye(like.shape[-1], dtype=like.dtype), like.shape)


def _norm(x: Square) -> Float[Array, "*heads 1 1"]:
    """Computes Frobenius norms."""
    # Divides by the largest entry first, because its square might overflow.
    peak = jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True)
    unit = x / jnp.where(peak > 0, peak, 1.0)
    return peak * jnp.sqrt(jnp.sum(jnp.square(unit), axis=(-2, -1), keepdims=True))
