"""Checks of the parameters, the arguments and the batches of train steps."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.tree_util import Partial

from rwkv7_jax.checks import (
    as_array,
    check_count,
    check_function,
    check_instance,
    check_not_donated,
    check_not_intercepted,
    check_placed,
    prefix_errors,
)
from rwkv7_jax.optim.decorrelation import DecorrelationState
from rwkv7_jax.optim.optimizer import check_optimizer
from rwkv7_jax.sharding import is_abstract, refuse_explicit_axes


def check_parameters(params: Any) -> None:
    """Raises unless the leaves of a tree can be trained."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if not leaves:
        raise ValueError(f"`params` must hold an array; got {params!r}.")
    check_not_donated(params, "`params`")
    for path, leaf in leaves:
        # Python floats become arrays; strings, functions and integers cannot be trained.
        kind = getattr(leaf, "dtype", type(leaf))
        is_trainable = kind in (float, complex) or (
            hasattr(leaf, "dtype") and jnp.issubdtype(kind, jnp.inexact)
        )
        if not is_trainable:
            name = jax.tree_util.keystr(path)
            kind = getattr(kind, "__name__", kind)
            raise TypeError(
                f"`params`{name} must be an array of floating point numbers; got {kind}."
            )


def as_partial(function: Any, argument: str) -> Partial:
    """Converts a function to a `Partial`, whose arrays become arguments of a compiled program."""
    check_function(function, argument)
    return function if isinstance(function, Partial) else Partial(function)


def check_step_arguments(
    loss: Any, tx: Any, statistics: Any, accumulate: Any, mesh: Any
) -> tuple[Partial, Partial | None]:
    """Checks the arguments that all train steps share.

    Returns:
        The loss and the statistics as `Partial`s.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: `accumulate` below 1, or a mesh with axes of the type `AxisType.Explicit`.
    """
    loss = as_partial(loss, "`loss`")
    check_optimizer(tx, "`tx`")
    if statistics is not None:
        statistics = as_partial(statistics, "`statistics`")
    check_count(accumulate, 1, "`accumulate`")
    if mesh is not None:
        check_instance(mesh, Mesh, "`mesh`")
        refuse_explicit_axes(mesh, "`mesh`")
    return loss, statistics


def check_optimizer_state(opt_state: Any, statistics: Any) -> None:
    """Checks that a decorrelating optimizer gets statistics.

    Raises:
        ValueError: it gets none, and would act like its inner optimizer.
    """
    if statistics is not None:
        return

    def is_decorrelated(node: Any) -> bool:
        return isinstance(node, DecorrelationState)

    if any(map(is_decorrelated, jax.tree.leaves(opt_state, is_leaf=is_decorrelated))):
        raise ValueError(
            "`statistics` must be given if `tx` decorrelates, such as state_statistics(model, "
            "params); got None."
        )


def _check_fields(batch: Any, *, needs_shares: bool) -> None:
    """Raises unless a batch has the fields that a step needs, all with the same rows."""
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"`batch` must be a Batch or a mapping; got {type(batch).__name__}."
        )
    names = ", ".join(map(str, batch))
    if "tokens" not in batch:
        raise ValueError(f"`batch` must hold 'tokens'; it has {names}.")
    if needs_shares and "mask" not in batch and "weights" not in batch:
        raise ValueError(f"`batch` must hold 'mask' or 'weights'; it has {names}.")
    rows = as_array(batch["tokens"], "`batch.tokens`").shape[:1]
    for name in ("mask", "weights"):
        if name not in batch:
            continue
        shape = tuple(as_array(batch[name], f"`batch.{name}`").shape)
        # Broadcasting would hide this: a mask of one row would multiply the loss of B rows by B.
        if shape[:1] != rows:
            raise ValueError(
                f"`batch.{name}` must have the same {rows} rows as its tokens; got shape {shape}."
            )


class CheckedProgram:
    """A compiled program with its frozen arguments, which checks batches before they are traced.

    Shapes are checked once for each new set of shapes. Ids are checked in every batch of NumPy
    arrays, and in the first batch of each shape on a device: reading later ones would wait for
    their transfer.

    `lower` and `trace` are those of `jax.jit` after the same checks, for ahead-of-time compilation
    and cost analysis. Their arguments may be shapes and dtypes. A program that is compiled this way
    takes the frozen arguments too: `compiled(*step.args, train, batch)`.

    Attributes:
        func: the function from `jax.jit`, which takes the frozen arguments and those of a call.
        args: the frozen arguments; the first is the loss.
    """

    def __init__(
        self,
        func: jax.stages.Wrapped,
        *args: Any,
        caller: str,
        trained: str,
        needs_shares: bool,
        mesh: Mesh | None = None,
    ):
        """Binds the frozen arguments.

        Args:
            func: from `jax.jit`.
            *args: the frozen arguments; the first is the loss.
            caller: the public function's name, for messages.
            trained: the name of a call's first argument, which holds the trainable parameters.
            needs_shares: whether a batch must have a mask or weights.
            mesh: the program's mesh; None is that of `use_mesh`.
        """
        self.func = func
        self.args = args
        self._caller = caller
        self._trained = trained
        self._needs_shares = needs_shares
        self._mesh = mesh
        # Shapes and dtypes of batches that were checked.
        self._seen: set[Any] = set()

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Checks parameters and batch, then runs the program."""
        self._check(arguments, named)
        return self.func(*self.args, *arguments, **named)

    def lower(self, *arguments: Any, **named: Any) -> jax.stages.Lowered:
        """Checks parameters and batch, then lowers the program for these arguments."""
        self._check(arguments, named)
        return self.func.lower(*self.args, *arguments, **named)

    def trace(self, *arguments: Any, **named: Any) -> jax.stages.Traced:
        """Checks parameters and batch, then traces the program for these arguments."""
        self._check(arguments, named)
        return self.func.trace(*self.args, *arguments, **named)

    def _check(self, arguments: tuple, named: Mapping[str, Any]) -> None:
        """Raises unless a call's parameters and batch are valid."""
        trained = arguments[0] if arguments else named.get(self._trained)
        with prefix_errors(self._caller):
            check_not_intercepted()
            check_not_donated(trained, f"`{self._trained}`")
        batch = arguments[1] if len(arguments) > 1 else named.get("batch")
        leaves = jax.tree.leaves(batch)
        described = tuple(
            (np.shape(leaf), getattr(leaf, "dtype", None)) for leaf in leaves
        )
        names = tuple(batch) if isinstance(batch, Mapping) else type(batch)
        key = (names, described)
        on_host = any(isinstance(leaf, np.ndarray) for leaf in leaves)
        if key in self._seen and not on_host:
            return
        check = getattr(self.args[0].func, "check_batch", None)
        with prefix_errors(self._caller):
            _check_fields(batch, needs_shares=self._needs_shares)
            given = (self.args, arguments, named)
            check_placed(given, "the arguments", self._mesh)
            if check is not None:
                check(batch)
        # The ids of an abstract batch have not been checked.
        if not is_abstract(batch):
            self._seen.add(key)
