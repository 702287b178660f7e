"""Trains matrices in coordinates in which their inputs are decorrelated.

A leaf S of shape [..., N, M] acts as y = S x. If the entries of x are correlated, gradient steps
are long along few directions and short along the others. With z = R x and y = S' z, S' = S R^-1 is
trained instead of S: its gradient is G R^T, where G is that of S, and its update u' moves S by
u' R. R is part of the optimizer's state and never of the model: a new R changes no output, saved
weights are complete without it, and code that reads S does not depend on it.

Source: arXiv 2405.02385 (R learned online); arXiv 2504.05097 (used for RWKV-7's state).
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from rwkv7_jax.checks import check_choice, check_number, prefix_errors
from rwkv7_jax.optim.optimizer import check_optimizer, widened
from rwkv7_jax.optim.whitening import (
    damped_covariance,
    finite,
    online_update,
    per_matrix,
    recompute,
)

MODES = ("online", "exact", "whiten")

# The modes by their names in settings; None trains without decorrelation.
Method = Literal["none", "dbp", "whiten"]
METHODS: dict[Method, str | None] = {"none": None, "dbp": "online", "whiten": "whiten"}


class DecorrelationState(NamedTuple):
    """The state that `decorrelate` carries from update to update.

    The trees have the structure of the parameters, with `optax.MaskedNode` for leaves that are not
    decorrelated. For a decorrelated leaf [..., N, M]:

    Attributes:
        count: the number of statistics that each matrix has learned from, int32 [...].
        covariance: their running average C, in the scale of the inputs, float32 [..., M, M].
        whitener: R, float32 [..., M, M]; not symmetric in mode "online".
        inner: the state of the inner optimizer, whose moments belong to S'.
    """

    count: Any
    covariance: Any
    whitener: Any
    inner: Any


class Decorrelator(NamedTuple):
    """The wrapper and the statistics of a decorrelated optimizer, made together so that they match.

    Attributes:
        wrap: maps an optimizer to the one to train with.
        statistics: `(params, batch) -> stats`, for `make_train_step`; None if the wrapped optimizer
            needs no statistics.
    """

    wrap: Callable[[optax.GradientTransformation], optax.GradientTransformation]
    statistics: Callable[[Any, Any], Any] | None = None


def decorrelate(
    inner: optax.GradientTransformation,
    *,
    mode: str = "online",
    rate: ArrayLike = 0.2,
    balance: ArrayLike = 0.5,
    iterations: ArrayLike = 12,
    damping: ArrayLike = 1e-4,
    average: ArrayLike = 0.7,
    clip: ArrayLike | None = 0.5,
    normalise: bool = True,
    every: ArrayLike = 25,
    mask: Any | Callable[[Any], Any] | None = None,
    turn_params: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Runs `inner` on S' = S R^-1, whose inputs z = R x are decorrelated.

    `update(grads, state, params, *, stats=None, ...)` takes the statistics of the leaves' inputs as
    `stats`. This is a tree like the parameters. For a leaf [..., N, M] it holds E[x x^T] of shape
    [..., M, M], of any floating dtype (leading axes of size 1 are shared), or None without new
    statistics. An update moves R first, then transforms the gradient with the new R. Without
    `stats` it uses R unchanged. Other extra arguments are passed to `inner`.

    * A matrix whose statistics are non-finite or zero keeps C and R for that update. A matrix whose
      C cannot be whitened in float32, such as one of deficient rank without damping, keeps R.
      Neither increases `count`.
    * R and C are float32. Gradients and updates keep their dtypes.
    * With R = I the result is bit-exact that of `inner`.
    * The defaults let R follow within a few updates, since tuning one layer's memory changes the
      inputs of the next one.
    * In a chain, put weight decay after this: `inner` sees gradients of S' but parameters S. To
      keep it inside, set `turn_params`.
    * Under `optax.MultiSteps`, only the statistics of the last microbatch count.
    * `optax.inject_hyperparams` treats a callable `mask` as a schedule unless `static_args` names
      it.

    Args:
        inner: the optimizer of S'.
        mode: "online" (R follows C by the published rule), "exact" (R is `whitening` of C,
            recomputed after every `every` statistics) or "whiten" (R is `whitening` of the first
            statistics, then frozen).
        rate: step size of the online rule, at least 0.
        balance: kappa in [0, 1]: 0 only decorrelates, 1 only scales variances to 1.
        iterations: steps of the online rule per update.
        damping: added to the eigenvalues of C, whose mean is 1; see `whitening`. With 0, R grows
            without bound in mode "online" along directions without inputs.
        average: weight of the old C in the running average, in [0, 1]; 0 uses only the newest.
        clip: maximum Frobenius norm of the online rule's relative step; None for no limit.
        normalise: whiten C M / tr C instead of C, which keeps learning rates comparable.
        every: statistics between two computations of R in mode "exact".
        mask: the leaves to decorrelate: a tree of bools (or a prefix of one), or a function from
            parameters to it. None selects every leaf with two axes or more.
        turn_params: whether `inner` gets the parameters S' = S R^-1 as well, so that its weight
            decay shrinks S as it does without decorrelation. Costs a linear solve per matrix.

    Raises:
        ValueError: an unknown mode, a number out of its range, or a mask or statistics of the wrong
            structure or shape.
        TypeError: statistics that are not floating-point arrays.

    Source: arXiv 2405.02385 (its "standard" rule is `iterations=1, damping=0, average=0, clip=None,
        normalise=False`); arXiv 2504.05097. Average, damping, clip and scale are ours.
    """
    with prefix_errors("decorrelate"):
        check_optimizer(inner, "`inner`")
        rule = _Rule(
            mode=mode,
            rate=rate,
            balance=balance,
            iterations=iterations,
            damping=damping,
            average=average,
            clip=clip,
            normalise=normalise,
            every=every,
        )
        rule.check()
    inner = optax.with_extra_args_support(inner)

    def init(params):
        return _init_state(params, mask, inner.init(params))

    def update(updates, state, params=None, *, stats=None, **extra):
        if stats is not None:
            state = _learn_from(rule, updates, stats, state)
        turned = _map_with_whitener(_turn_gradient, updates, state.whitener)
        if turn_params and params is not None:
            params = _map_with_whitener(_turn_param, params, state.whitener)
        turned, inner_state = inner.update(turned, state.inner, params, **extra)
        moves = _map_with_whitener(_turn_back, turned, state.whitener)
        return moves, state._replace(inner=inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


class _Rule(NamedTuple):
    """The update rule of R for a leaf; the attributes are arguments of `decorrelate`."""

    mode: str
    rate: ArrayLike
    balance: ArrayLike
    iterations: ArrayLike
    damping: ArrayLike
    average: ArrayLike
    clip: ArrayLike | None
    normalise: bool
    every: ArrayLike

    def check(self) -> None:
        """Raises for the first setting out of its range; traced values and schedules pass."""
        check_choice(self.mode, MODES, "`mode`")
        ranges = {
            "rate": (0, math.inf),
            "balance": (0, 1),
            "iterations": (0, math.inf),
            "damping": (0, math.inf),
            "average": (0, 1),
            "every": (1, math.inf),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if isinstance(value, jax.Array):
                continue
            if hasattr(value, "dtype") and np.ndim(value):
                continue
            bounds = (
                f"at least {low}" if high == math.inf else f"between {low} and {high}"
            )
            check_number(value, low, high, f"`{name}`", bounds=bounds)
        # A loop would silently truncate a fractional count.
        for name in ("iterations", "every"):
            value = getattr(self, name)
            if isinstance(value, float | np.floating) and value != int(value):
                raise ValueError(f"`{name}` must be an integer; got {value}.")
        if self.clip is not None and not isinstance(self.clip, jax.Array):
            bounds = "above 0, or None"
            check_number(self.clip, 0, math.inf, "`clip`", above=True, bounds=bounds)

    def learn(self, statistics, count, covariance, whitener):
        """Updates a leaf's count, covariance and whitener from its statistics."""
        covariance, usable = _running_average(
            statistics, covariance, self.average, fresh=count == 0
        )
        target = damped_covariance(covariance, self.damping, self.normalise)
        moved = self._next_whitener(whitener, target, count, usable)
        # A matrix whose R is not finite is not counted: "whiten" tries again at the next update.
        usable = usable & finite(moved)
        return (
            count + usable.astype(count.dtype),
            covariance,
            jnp.where(per_matrix(usable), moved, whitener),
        )

    def _next_whitener(self, whitener, target, count, usable):
        if self.mode == "online":
            return online_update(
                whitener,
                target,
                self.rate,
                self.balance,
                self.iterations,
                self.clip,
            )
        if self.mode == "whiten":
            due = usable & (count == 0)
        else:
            due = usable & (count % self.every == 0)
        return recompute(whitener, target, due)


def _is_masked(node) -> bool:
    return isinstance(node, optax.MaskedNode)


def _mask_tree(params, mask):
    """Expands `mask` to a tree of bools with the parameters' structure, and checks it."""
    # A tree without leaves matches any mask: Optax masks out everything, or asks for the structure
    # of the state.
    if not jax.tree.leaves(params):
        return params
    if mask is None:
        return jax.tree.map(lambda leaf: leaf.ndim >= 2, params)
    flags = mask(params) if callable(mask) else mask

    def spread(flag, part):
        return jax.tree.map(lambda _: bool(flag), part)

    try:
        flags = jax.tree.map(spread, flags, params)
    except ValueError:
        raise ValueError(
            "decorrelate: `mask` must have the parameters' structure, "
            f"{jax.tree.structure(params)}; got {jax.tree.structure(flags)}."
        ) from None
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for (path, leaf), flag in zip(leaves, jax.tree.leaves(flags), strict=True):
        if flag and leaf.ndim < 2:
            raise ValueError(
                "decorrelate: `mask` must select leaves of two axes or more; got "
                f"{jax.tree_util.keystr(path)} of shape {leaf.shape}."
            )
    return flags


def _init_state(params, mask, inner) -> DecorrelationState:
    """Makes the state before the first statistics: R = I, C = 0."""
    flags = _mask_tree(params, mask)

    def for_decorrelated(make):
        def make_leaf(leaf, flag):
            return make(leaf.shape[:-2], leaf.shape[-1]) if flag else optax.MaskedNode()

        return jax.tree.map(make_leaf, params, flags)

    def identity(heads, m):
        return jnp.broadcast_to(jnp.eye(m, dtype=jnp.float32), (*heads, m, m))

    return DecorrelationState(
        count=for_decorrelated(lambda heads, _: jnp.zeros(heads, jnp.int32)),
        covariance=for_decorrelated(
            lambda heads, m: jnp.zeros((*heads, m, m), jnp.float32)
        ),
        whitener=for_decorrelated(identity),
        inner=inner,
    )


def _running_average(statistics, covariance, average, *, fresh):
    """Adds new statistics to the running average; returns it and which matrices could use them."""
    new = jnp.broadcast_to(jnp.asarray(statistics, jnp.float32), covariance.shape)
    trace = jnp.trace(new, axis1=-2, axis2=-1)
    # Finite entries are not enough: the trace of entries near 1e38 overflows.
    usable = finite(new) & (trace > 0) & (trace < jnp.inf)
    old_share = jnp.asarray(average, jnp.float32)
    mean = jnp.where(
        per_matrix(fresh), new, old_share * covariance + (1 - old_share) * new
    )
    return jnp.where(per_matrix(usable), mean, covariance), usable


def _map_with_whitener(function: Callable, tree, whitener):
    """Applies a function to every decorrelated leaf, at least float32, and its R.

    Each leaf keeps its dtype.
    """

    def change(leaf, matrix):
        if _is_masked(matrix):
            return leaf
        return function(widened(leaf), matrix).astype(leaf.dtype)

    return jax.tree.map(change, tree, whitener)


def _turn_gradient(gradient, whitener):
    """Computes the gradient G R^T of S' from that of S."""
    return jnp.einsum("...nm,...km->...nk", gradient, whitener, precision="highest")


def _turn_back(move, whitener):
    """Computes the update u' R of S from that of S'."""
    return jnp.einsum("...nk,...km->...nm", move, whitener, precision="highest")


def _turn_param(param, whitener):
    """Computes S' = S R^-1."""
    return jnp.linalg.solve(whitener.mT, param.mT).mT


def _learn_from(
    rule: _Rule, updates, stats, state: DecorrelationState
) -> DecorrelationState:
    """Applies the rule to every leaf with statistics."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(updates, is_leaf=_is_masked)
    try:
        stats = tree.flatten_up_to(stats)
    except ValueError:
        raise ValueError(
            "decorrelate: `stats` must have the gradients' structure, "
            f"{jax.tree.structure(updates)}; got {jax.tree.structure(stats)}."
        ) from None
    old = zip(
        tree.flatten_up_to(state.count),
        tree.flatten_up_to(state.covariance),
        tree.flatten_up_to(state.whitener),
        strict=True,
    )
    counts = []
    covariances = []
    whiteners = []
    for (path, leaf), statistics, carried in zip(leaves, stats, old, strict=True):
        # Under `optax.masked`, `stats` still holds the statistics of masked leaves.
        if not (_is_masked(leaf) or statistics is None or _is_masked(statistics)):
            _check_statistics(jax.tree_util.keystr(path), leaf, statistics, carried[0])
            carried = rule.learn(statistics, *carried)
        count, covariance, whitener = carried
        counts.append(count)
        covariances.append(covariance)
        whiteners.append(whitener)
    return state._replace(
        count=tree.unflatten(counts),
        covariance=tree.unflatten(covariances),
        whitener=tree.unflatten(whiteners),
    )


def _check_statistics(name: str, leaf, statistics, count) -> None:
    """Raises unless the statistics have the dtype and shape for this leaf."""
    kind = getattr(statistics, "dtype", type(statistics))
    if not jnp.issubdtype(kind, jnp.floating):
        raise TypeError(
            f"decorrelate: `stats`{name} must be a floating array; got {kind}."
        )
    if _is_masked(count):
        raise ValueError(
            f"decorrelate: `stats`{name} must be None, because `mask` excludes that leaf; got "
            f"shape {statistics.shape}."
        )
    shape = (*leaf.shape[:-2], leaf.shape[-1], leaf.shape[-1])
    fits = len(shape) == statistics.ndim and statistics.shape[-2:] == shape[-2:]
    if not fits or any(
        a not in (1, b) for a, b in zip(statistics.shape, shape, strict=True)
    ):
        raise ValueError(
            f"decorrelate: `stats`{name} must have shape {shape}; got {statistics.shape}."
        )
